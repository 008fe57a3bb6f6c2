// Radix select over the bits of |delta - L|: three digits of 11, 10 and 10 bits, one pass over the inputs each.
//
// A block counts its rows in shared memory and adds what it found to the pair's table with integer atomics, whose sum
// does not depend on their order. No candidate is ever stored, so no input can overflow a buffer.
#include "residual.cuh"

namespace lors {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 64;       // of a block
constexpr int kWide = 8192;     // columns of a block that has one row only
constexpr int kRowsAtOnce = 2;  // of a thread
constexpr int kReplicas = 2;    // neighbours often share a digit: two tables halve the conflicts

// What a block looks at: some whole rows, or a part of one that is long. Either way blocks follow one another in
// row-major order, which is the order that ties are cut in.
struct Chunk {
    int64_t row, end, col, stop;
};

constexpr __host__ __device__ int64_t chunk_rows(int64_t n) {
    return n > kWide ? 1 : kRows;
}
constexpr __host__ __device__ int64_t chunks_across(int64_t n) {
    return n > kWide ? (n + kWide - 1) / kWide : 1;
}

__device__ __forceinline__ Chunk chunk_at(int64_t chunk, int64_t m, int64_t n) {
    const int64_t rows = chunk_rows(n), across = chunks_across(n);
    const int64_t row = chunk / across * rows, col = chunk % across * kWide;
    return {row, m < row + rows ? m : row + rows, col, across == 1 || n < col + kWide ? n : col + kWide};
}

// Calls f(key) for each entry of the chunk.
template <Kind K, class F>
__device__ __forceinline__ void each_key(const GroupArgs& g, int64_t p, int64_t chunk, const F& f) {
    const PairView view = pair_view(g.table, p, g.pairs);
    const Chunk at = chunk_at(chunk, g.m, g.n);
    const int across = static_cast<int>((at.stop - at.col + kVector - 1) / kVector);
    const int pieces = static_cast<int>(at.end - at.row + kRowsAtOnce - 1) / kRowsAtOnce * across;
    const bool whole = K != Kind::kAny && (at.end - at.row) % kRowsAtOnce == 0;
    for (int piece = static_cast<int>(threadIdx.x); piece < pieces; piece += kThreads) {
        const int64_t row = at.row + piece / across * kRowsAtOnce, col = at.col + piece % across * kVector;
        uint32_t keys[kRowsAtOnce][kVector];
        keys8<K, kRowsAtOnce>(g, view, p, row, at.end, col, keys);
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
                if (whole || (row + r < at.end && col + e < at.stop)) f(keys[r][e]);
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
    const SharedCounters mine(table + threadIdx.x % kReplicas * kRadixBuckets);
    each_key<K>(g, p, chunk, [&](uint32_t key) {
        if (key >> (shift + bits) == wanted) mine.count((key >> shift) & mask);
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
    each_key<K>(g, p, chunk, [&](uint32_t other) { found += other == wanted; });
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
    const Chunk at = chunk_at(chunk, g.m, g.n);
    for (int64_t row = at.row; row < at.end; ++row) {
        for (int64_t start = at.col; start < at.stop; start += 32 * kVector) {
            const int64_t col = start + lane * kVector;
            unsigned hits = 0;
            if (col < at.stop) {
                uint32_t keys[1][kVector];
                keys8<K, 1>(g, view, p, row, at.end, col, keys);
                for (int e = 0; e < kVector; ++e) hits |= (col + e < at.stop && keys[0][e] == wanted ? 1u : 0u) << e;
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

int64_t tie_chunks(int64_t m, int64_t n) {
    return ceil_div(m, chunk_rows(n)) * chunks_across(n);
}

void threshold_pass(const Launch& launch, const Group& group, const float* left, const float* right_t, int64_t rank,
                    int pass, int64_t* counts, int32_t* prefix, int64_t* wanted, int64_t* equal, int64_t* non_finite) {
    const Selected selected = begin(launch, "residual_threshold", group);
    const GroupArgs g = arguments(group, left, right_t, rank);
    const int64_t chunks = tie_chunks(group.m, group.n);
    const int shift = kRadixShift[pass], bits = kRadixBits[pass];
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
    const Selected selected = begin(launch, "residual_threshold", group);
    const GroupArgs g = arguments(group, left, right_t, rank);
    const int64_t chunks = tie_chunks(group.m, group.n);
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
