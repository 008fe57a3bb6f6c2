// Radix select over the bits of |delta - L|: three digits of 11, 10 and 10 bits, one pass over the inputs each.
//
// A block counts its rows in shared memory and adds what it found to the pair's table with integer atomics, whose sum
// does not depend on their order. No candidate is ever stored, so no input can overflow a buffer.
#include "residual.cuh"

namespace lors {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 64;       // of a block; whole rows, so that blocks follow one another in row-major order
constexpr int kRowsAtOnce = 2;  // of a thread
constexpr int kReplicas = 2;    // neighbours often share a digit: two tables halve the conflicts

// Calls f(row, col, keys) for each piece of the block's rows [first, first + kRows); rows and columns inside the
// matrix.
template <Kind K, class F>
__device__ __forceinline__ void each_key(const GroupArgs& g, int64_t p, int64_t first, const F& f) {
    const PairView view = pair_view(g.table, p, g.pairs);
    const int64_t across = (g.n + kVector - 1) / kVector;
    const int64_t end = g.m < first + kRows ? g.m : first + kRows;
    const int64_t pieces = (end - first + kRowsAtOnce - 1) / kRowsAtOnce * across;
    for (int64_t piece = threadIdx.x; piece < pieces; piece += kThreads) {
        const int64_t row = first + piece / across * kRowsAtOnce, col = piece % across * kVector;
        uint32_t keys[kRowsAtOnce][kVector];
        keys8<K, kRowsAtOnce>(g, view, p, row, col, keys);
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
                if (K != Kind::kAny && (g.m % kRowsAtOnce) == 0) {
                    f(row + r, col + e, keys[r][e]);
                } else if (row + r < end && col + e < g.n) {
                    f(row + r, col + e, keys[r][e]);
                }
            }
        }
    }
}

template <Kind K>
__global__ void __launch_bounds__(kThreads, 2) histogram_kernel(GroupArgs g, int64_t chunks, int shift, int bits,
                                                                const int32_t* prefix, unsigned long long* counts) {
    LORS_SHARED(uint32_t, table, [kReplicas * kRadixBuckets]);
    const int64_t p = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
    const uint32_t wanted = static_cast<uint32_t>(prefix[p]), mask = (1u << bits) - 1;
    for (int i = threadIdx.x; i < kReplicas * kRadixBuckets; i += kThreads) table[i] = 0;
    __syncthreads();
    uint32_t* mine = table + threadIdx.x % kReplicas * kRadixBuckets;
    each_key<K>(g, p, chunk * kRows, [&](int64_t, int64_t, uint32_t key) {
        if (key >> (shift + bits) == wanted) atomicAdd(mine + ((key >> shift) & mask), 1u);
    });
    __syncthreads();
    for (int i = threadIdx.x; i < kRadixBuckets; i += kThreads) {
        unsigned long long found = 0;
        for (int replica = 0; replica < kReplicas; ++replica) found += table[replica * kRadixBuckets + i];
        if (found) atomicAdd(counts + p * kRadixBuckets + i, found);
    }
}

// One block per pair: the digit in which the wanted[p]-th largest key lies, counted from the top.
__global__ void __launch_bounds__(kThreads)
    descend_kernel(bool first, int shift, int bits, const int64_t* counts, int32_t* prefix, int64_t* wanted,
                   int64_t* equal, int64_t* non_finite) {
    constexpr int kEach = kRadixBuckets / kThreads;
    LORS_SHARED(int64_t, sums, [kThreads]);
    const int64_t p = blockIdx.x, *mine = counts + p * kRadixBuckets;
    const int top = kRadixBuckets - 1 - static_cast<int>(threadIdx.x) * kEach;  // this thread's largest digit
    int64_t sum = 0;
    for (int i = 0; i < kEach; ++i) sum += mine[top - i];
    sums[threadIdx.x] = sum;
    const int64_t k = wanted[p];
    __syncthreads();
    int64_t above = 0;
    for (unsigned t = 0; t < threadIdx.x; ++t) above += sums[t];
    if (above < k && above + sum >= k) {  // one thread
        int digit = top;
        while (above + mine[digit] < k) above += mine[digit--];
        prefix[p] = static_cast<int32_t>((static_cast<uint32_t>(prefix[p]) << bits) | static_cast<uint32_t>(digit));
        wanted[p] = k - above;
        equal[p] = mine[digit];
    }
    if (first && threadIdx.x == 0) {
        int64_t bad = 0;
        for (int digit = static_cast<int>(kNonFiniteKey >> shift); digit < kRadixBuckets; ++digit) bad += mine[digit];
        non_finite[p] = bad;
    }
}

template <Kind K>
__global__ void __launch_bounds__(kThreads, 2)
    tie_kernel(GroupArgs g, int64_t chunks, const int32_t* key, const int64_t* ties, const int64_t* equal,
               unsigned long long* counts) {
    const int64_t p = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
    if (equal[p] == ties[p]) return;  // all are kept: no cut to look for
    const uint32_t wanted = static_cast<uint32_t>(key[p]);
    LORS_SHARED(unsigned long long, total);
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    unsigned long long found = 0;
    each_key<K>(g, p, chunk * kRows, [&](int64_t, int64_t, uint32_t other) { found += other == wanted; });
    if (found) atomicAdd(&total, found);
    __syncthreads();
    if (threadIdx.x == 0) counts[blockIdx.x] = total;
}

// One warp per pair walks the one chunk that holds the last kept tie.
template <Kind K>
__global__ void __launch_bounds__(32) cut_kernel(GroupArgs g, int64_t chunks, const int32_t* key, const int64_t* ties,
                                                 const int64_t* equal, const int64_t* counts, int64_t* cut) {
    const int64_t p = blockIdx.x;
    const int lane = static_cast<int>(threadIdx.x);
    if (equal[p] == ties[p]) {
        if (lane == 0) cut[p] = g.m * g.n;
        return;
    }
    int64_t remaining = ties[p], chunk = 0;
    while (chunk < chunks && counts[p * chunks + chunk] < remaining) remaining -= counts[p * chunks + chunk++];
    const uint32_t wanted = static_cast<uint32_t>(key[p]);
    const PairView view = pair_view(g.table, p, g.pairs);
    const int64_t end = g.m < (chunk + 1) * kRows ? g.m : (chunk + 1) * kRows;
    for (int64_t row = chunk * kRows; row < end; ++row) {
        for (int64_t start = 0; start < g.n; start += 32 * kVector) {
            const int64_t col = start + lane * kVector;
            unsigned hits = 0;
            if (col < g.n) {
                uint32_t keys[1][kVector];
                keys8<K, 1>(g, view, p, row, col, keys);
                for (int e = 0; e < kVector; ++e) hits |= (col + e < g.n && keys[0][e] == wanted ? 1u : 0u) << e;
            }
            int upto = __popc(hits);  // hits of this lane and the lanes before
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(~0u, upto, step);
                if (lane >= step) upto += other;
            }
            const int all = __shfl_sync(~0u, upto, 31);
            if (all >= remaining) {
                int64_t before = upto - __popc(hits);
                if (before < remaining && upto >= remaining) {
                    for (int e = 0; e < kVector; ++e) {
                        if ((hits >> e & 1) && ++before == remaining) cut[p] = row * g.n + col + e + 1;
                    }
                }
                return;
            }
            remaining -= all;
        }
    }
}

}  // namespace

int64_t tie_chunks(int64_t m) {
    return ceil_div(m, kRows);
}

void threshold_pass(const Launch& launch, const Group& group, const float* left, const float* right_t, int64_t rank,
                    int pass, int64_t* counts, int32_t* prefix, int64_t* wanted, int64_t* equal, int64_t* non_finite) {
    begin(launch, "residual_threshold", group);
    const GroupArgs g = arguments(group, left, right_t, rank);
    const int64_t chunks = tie_chunks(group.m);
    const int shift = kRadixShift[pass], bits = kRadixBits[pass];
    if (group.n >= (int64_t{1} << 32) / kRows) {
        throw CudaError(describe("residual_threshold", group) + ": a block's counters hold fewer than 2^32 entries");
    }
    const unsigned grid = blocks(group.pairs() * chunks, "residual_threshold", group);
    with_kind(kind_of(group), [&](auto tag) {
        start(launch, "residual_threshold (histogram)", group, grid, kThreads, 0, histogram_kernel<decltype(tag)::kind>,
              g, chunks, shift, bits, prefix, reinterpret_cast<unsigned long long*>(counts));
    });
    start(launch, "residual_threshold (descend)", group, blocks(group.pairs(), "residual_threshold", group), kThreads,
          0, descend_kernel, pass == 0, shift, bits, counts, prefix, wanted, equal, non_finite);
}

void threshold_cut(const Launch& launch, const Group& group, const float* left, const float* right_t, int64_t rank,
                   const int32_t* key, const int64_t* ties, const int64_t* equal, int64_t* counts, int64_t* cut) {
    begin(launch, "residual_threshold", group);
    const GroupArgs g = arguments(group, left, right_t, rank);
    const int64_t chunks = tie_chunks(group.m);
    const unsigned grid = blocks(group.pairs() * chunks, "residual_threshold", group);
    with_kind(kind_of(group), [&](auto tag) {
        constexpr Kind kind = decltype(tag)::kind;
        start(launch, "residual_threshold (ties)", group, grid, kThreads, 0, tie_kernel<kind>, g, chunks, key, ties,
              equal, reinterpret_cast<unsigned long long*>(counts));
        start(launch, "residual_threshold (cut)", group, blocks(group.pairs(), "residual_threshold", group), 32, 0,
              cut_kernel<kind>, g, chunks, key, ties, equal, counts, cut);
    });
}

}  // namespace lors
