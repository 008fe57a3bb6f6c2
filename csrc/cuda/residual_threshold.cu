// The exact k-th largest of |delta - L|, and where ties are cut.
//
// Two passes, for inputs that allow it: a bracket around the wanted key, from the ranks of a sample; then one sweep
// that counts what lies above and collects what lies inside, from which the key is chosen. Nothing is taken on trust:
// where the counts do not put the wanted one inside the bracket, where more lies inside than there is room for, or
// where anything is not finite, the pair is left unsettled, and a radix select over the bits decides it: three digits
// of 11, 10 and 10 bits, one pass over the inputs each. No candidate is stored there, so no input can overflow a
// buffer.
//
// Integer atomics only, whose sum does not depend on their order; what is collected is counted, whatever its order.
#include <cmath>

#include "../common/counter_random.h"
#include "strip.cuh"

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
__global__ void __launch_bounds__(kThreads, 2)
    histogram_kernel(GroupArgs g, int64_t chunks, int shift, int bits, const int32_t* prefix, const int32_t* settled,
                     unsigned long long* counts) {
    LORS_SHARED(uint32_t, table, [kReplicas * kRadixBuckets]);
    const int64_t p = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
    if (settled[p]) return;
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
    descend_kernel(bool first, int shift, int bits, const int32_t* settled, const int64_t* counts, int32_t* prefix,
                   int64_t* wanted, int64_t* equal, int64_t* non_finite) {
    constexpr int kEach = kRadixBuckets / kThreads;
    LORS_SHARED(int64_t, sums, [kThreads]);
    const int64_t p = blockIdx.x, *mine = counts + p * kRadixBuckets;
    if (settled[p]) return;
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

// --- two passes

constexpr int kSampleThreads = 512, kSampleWarps = kSampleThreads / 32;
constexpr int kSampleEach = 4;   // vectors of eight of a thread
constexpr int kPiece = 4;        // vectors of the sample that are neighbours: 32 columns
constexpr int kSweepRows = 128;  // of a block of the sweep
constexpr int kLocal = 4096;     // candidates that a block keeps for itself

// The sum of all threads' words, each of two numbers whose sums stay below 2^16.
__device__ __forceinline__ unsigned block_sum(unsigned value, unsigned* parts) {
    const unsigned warp = __reduce_add_sync(~0u, value);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = warp;
    __syncthreads();
    unsigned total = 0;
#pragma unroll
    for (int i = 0; i < kSampleWarps; ++i) total += parts[i];
    return total;
}

// One block per pair: the bracket. The sample is pieces of 32 neighbours, one drawn from every pieces-th part of the
// matrix. Its keys stay in registers; both ends are found bit by bit, by counting.
template <Kind K>
__global__ void __launch_bounds__(kSampleThreads, 1) bracket_kernel(GroupArgs g, ThresholdSearch search) {
    LORS_SHARED(unsigned, parts, [2 * kSampleWarps]);
    const int64_t p = blockIdx.x, across = g.n / (kPiece * kVector), all = across * g.m;
    const PairView view = pair_view(g.table, p, g.pairs);
    uint32_t keys[kSampleEach][kVector];
#pragma unroll
    for (int i = 0; i < kSampleEach; ++i) {
        const int64_t vector = threadIdx.x + i * kSampleThreads, piece = vector / kPiece;
        const int64_t from = piece * all / search.pieces, upto = (piece + 1) * all / search.pieces;
        const int64_t at = from + static_cast<int64_t>(random_bits(0, static_cast<uint64_t>(piece))) * (upto - from) /
                                      (int64_t{1} << 32);
        const bool there = piece < search.pieces;
        uint32_t found[1][kVector];
        const int64_t row = there ? at / across : 0,
                      col = there ? (at % across * kPiece + vector % kPiece) * kVector : 0;
        keys8<K, 1>(g, view, p, row, g.m, col, found);
#pragma unroll
        for (int e = 0; e < kVector; ++e) keys[i][e] = there ? found[0][e] : 0;  // 0: below everything
    }
    // the ranks, among the sampled, between which the wanted key nearly always lies
    const double size = static_cast<double>(search.pieces * kPiece * kVector),
                 share = static_cast<double>(search.k) / static_cast<double>(g.m * g.n);
    const double rank = share * size, margin = 6 * sqrt(size * share * (1 - share)) + 4;
    const int64_t top = static_cast<int64_t>(rank - margin), bottom = static_cast<int64_t>(rank + margin) + 1;
    const unsigned ranks[2] = {static_cast<unsigned>(bottom < size ? bottom : size),
                               static_cast<unsigned>(top > 0 ? top : 0)};
    uint32_t ends[2] = {};
    int turn = 0;
#pragma unroll 1
    for (int bit = 30; bit >= 0; --bit, turn ^= 1) {
        const uint32_t low = ends[0] | 1u << bit, high = ends[1] | 1u << bit;
        unsigned mine = 0;
#pragma unroll
        for (int i = 0; i < kSampleEach; ++i) {
#pragma unroll
            for (int e = 0; e < kVector; ++e)
                mine += (keys[i][e] >= low ? 1u : 0u) + (keys[i][e] >= high ? 0x10000u : 0u);
        }
        const unsigned sum = block_sum(mine, parts + turn * kSampleWarps);
        if ((sum & 0xffff) >= ranks[0]) ends[0] = low;
        if (sum >> 16 >= ranks[1]) ends[1] = high;
    }
    if (threadIdx.x == 0) {  // beyond the sample's ends everything counts as inside
        search.bracket[p] = bottom <= size ? key_to_magnitude(ends[0]) : 0.0f;
        search.bracket[g.pairs + p] = top > 0 ? key_to_magnitude(ends[1]) : kLargest;
    }
}

// A block per 128 rows and 256 columns: counts, and collects the keys inside the bracket, first for itself. Keys that
// no longer fit there go to the pair's candidates one by one.
template <Kind K>
__global__ void __launch_bounds__(kTileThreads, 2) sweep_kernel(GroupArgs g, int64_t tiles, ThresholdSearch search) {
    LORS_SHARED(__align__(16) float, stages, [kTileWarps * kStageSize]);
    LORS_SHARED(uint32_t, local, [kLocal]);
    LORS_SHARED(unsigned, counts, [4]);  // above, taken slots of `local`, filled ones, whether anything is not finite
    LORS_SHARED(unsigned long long, place);
    const int64_t p = blockIdx.x / tiles, tile = blockIdx.x % tiles, across = (g.n + kTileCols - 1) / kTileCols;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t first = tile / across * kSweepRows, end = g.m < first + kSweepRows ? g.m : first + kSweepRows;
    const int64_t col = tile % across * kTileCols + lane * kVector;
    const bool there = col < g.n;
    const PairView view = pair_view(g.table, p, g.pairs);
    const float least = search.bracket[p], most = search.bracket[g.pairs + p];
    const bool collects = least != most;  // else there is nothing to choose from
    unsigned long long* inside_all = search.found + g.pairs + p;
    uint32_t* candidates = search.candidates + p * search.capacity;
    if (threadIdx.x < 4) counts[threadIdx.x] = threadIdx.x == 2 ? kLocal : 0;
    __syncthreads();
    int above = 0, within = 0;
    float poison = 0;  // NaN once anything is not finite
#pragma unroll 1
    for (int64_t row = first + warp * kStripRows; row < end; row += kTileWarps * kStripRows) {
        float r[kStripRows][kVector];
        strip_low<K>(g.left + p * g.m * g.rank, g.right_t + p * g.rank * g.n, static_cast<int>(g.rank), g.n, row, g.m,
                     col, there ? kVector : 0, stages + warp * kStageSize, r);
        const int rows = there ? static_cast<int>(end - row < kStripRows ? end - row : kStripRows) : 0;
        unsigned over = 0, inside = 0;
        StripDelta<K> delta(g, view, row, col, kVector);
#pragma unroll
        for (int i = 0; i < kStripRows; ++i) {
            float d[kVector];
            delta.next(i < rows, d);
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
                r[i][e] = __fsub_rn(d[e], r[i][e]);
                const float size = fabsf(r[i][e]);
                const bool beyond = !(size <= most);
                if (beyond) over |= 1u << (i * kVector + e);
                if (!beyond && size >= least) inside |= 1u << (i * kVector + e);
                poison = __fmaf_rn(size, 0.0f, poison);
            }
        }
        over &= strip_rows(rows), inside &= strip_rows(rows);
        above += __popc(over);
        if (!collects) {
            within += __popc(inside);
        } else if (inside) {
            unsigned slot = atomicAdd(&counts[1], static_cast<unsigned>(__popc(inside)));
            if (LORS_RARELY(slot > kLocal - kStripRows * kVector)) {
                atomicMin(&counts[2], slot);  // slots are given out in order: none behind this one is filled
#pragma unroll
                for (int i = 0; i < kStripRows * kVector; ++i) {
                    if (!(inside >> i & 1)) continue;
                    const unsigned long long at = atomicAdd(inside_all, 1ull);
                    if (at < static_cast<unsigned long long>(search.capacity)) {
                        candidates[at] = magnitude_key(r[i / kVector][i % kVector]);
                    }
                }
            } else {
#pragma unroll
                for (int i = 0; i < kStripRows * kVector; ++i) {
                    if (inside >> i & 1) local[slot++] = __float_as_uint(r[i / kVector][i % kVector]);
                }
            }
        }
    }
    const unsigned sum = __reduce_add_sync(~0u, static_cast<unsigned>(above));
    const unsigned alike = __reduce_add_sync(~0u, static_cast<unsigned>(within));
    const bool bad = __any_sync(~0u, poison != 0.0f);
    if (lane == 0) {
        atomicAdd(&counts[0], sum);
        if (!collects) atomicAdd(&counts[1], alike);
        if (bad) counts[3] = 1;
    }
    __syncthreads();
    const unsigned kept = collects && counts[1] > counts[2] ? counts[2] : counts[1];
    if (threadIdx.x == 0) {
        if (counts[0]) atomicAdd(search.found + p, static_cast<unsigned long long>(counts[0]));
        if (counts[3]) atomicAdd(search.found + 2 * g.pairs + p, 1ull);
        place = kept ? atomicAdd(inside_all, static_cast<unsigned long long>(kept)) : 0;
    }
    if (!collects) return;
    __syncthreads();
    for (unsigned i = threadIdx.x; i < kept; i += kTileThreads) {
        const int64_t at = static_cast<int64_t>(place + i);
        if (at < search.capacity) candidates[at] = local[i] & kMagnitudeMask;
    }
}

// One block per pair: the wanted key among the candidates, by digits of its distance from the bracket's lower end. A
// pair of which the counts do not prove that it is there stays unsettled.
__global__ void __launch_bounds__(kSampleThreads) choose_kernel(int64_t pairs, ThresholdSearch search) {
    constexpr int kEach = kRadixBuckets / kSampleThreads, kDigit = 11;
    LORS_SHARED(uint32_t, table, [kRadixBuckets]);
    LORS_SHARED(unsigned, sums, [kSampleThreads]);
    LORS_SHARED(unsigned, chosen, [3]);  // digit, how many lie above it, how many have it
    const int64_t p = blockIdx.x;
    const int64_t above = static_cast<int64_t>(search.found[p]), inside = static_cast<int64_t>(search.found[pairs + p]);
    const uint32_t least = magnitude_key(search.bracket[p]), most = magnitude_key(search.bracket[pairs + p]);
    if (search.found[2 * pairs + p] || above >= search.k || search.k > above + inside) return;
    if (least != most && inside > search.capacity) return;
    const uint32_t* candidates = search.candidates + p * search.capacity;
    int64_t rank = search.k - above, equal = inside;
    uint32_t prefix = 0;
    int bits = 0;
    while ((most - least) >> bits) ++bits;
    while (bits > 0) {
        const int digit = bits < kDigit ? bits : kDigit, shift = bits - digit;
        for (int i = static_cast<int>(threadIdx.x); i < kRadixBuckets; i += kSampleThreads) table[i] = 0;
        __syncthreads();
        const SharedCounters counters(table);
        for (int64_t i = threadIdx.x; i < inside; i += kSampleThreads) {
            const uint32_t distance = candidates[i] - least;
            if (distance >> bits == prefix) counters.count((distance >> shift) & ((1u << digit) - 1));
        }
        __syncthreads();
        const int top = kRadixBuckets - 1 - static_cast<int>(threadIdx.x) * kEach;  // this thread's largest digit
        unsigned mine = 0;
#pragma unroll
        for (int i = 0; i < kEach; ++i) mine += table[top - i];
        sums[threadIdx.x] = mine;
        __syncthreads();
        unsigned before = 0;
        for (unsigned t = 0; t < threadIdx.x; ++t) before += sums[t];
        if (before < rank && before + mine >= rank) {  // one thread
            int here = top;
            while (before + table[here] < rank) before += table[here--];
            chosen[0] = static_cast<unsigned>(here), chosen[1] = before, chosen[2] = table[here];
        }
        __syncthreads();
        prefix = prefix << digit | chosen[0];
        rank -= chosen[1], equal = chosen[2];
        bits = shift;
    }
    if (threadIdx.x == 0) {
        search.key[p] = static_cast<int32_t>(least + prefix);
        search.wanted[p] = rank, search.equal[p] = equal, search.non_finite[p] = 0;
        search.settled[p] = 1;
    }
}

// --- where ties are cut

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

int64_t threshold_sample() {
    return kSampleThreads * kSampleEach / kPiece;
}

namespace {

template <Kind K>
void search(const Launch& launch, const Group& group, const GroupArgs& g, const ThresholdSearch& search) {
    const char* what = "residual_threshold";
    const unsigned each = blocks(group.pairs(), what, group);
    const int64_t tiles = ceil_div(group.m, kSweepRows) * ceil_div(group.n, kTileCols);
    start(launch, "residual_threshold (bracket)", group, each, kSampleThreads, 0, bracket_kernel<K>, g, search);
    start(launch, "residual_threshold (sweep)", group, blocks(group.pairs() * tiles, what, group), kTileThreads, 0,
          sweep_kernel<K>, g, tiles, search);
    start(launch, "residual_threshold (choose)", group, each, kSampleThreads, 0, choose_kernel, group.pairs(), search);
}

template <Kind K>
void radix_passes(const Launch& launch, const Group& group, const GroupArgs& g, const ThresholdSearch& search,
                  int passes, int64_t* counts) {
    const char* what = "residual_threshold";
    const int64_t chunks = tie_chunks(group.m, group.n);
    const unsigned grid = blocks(group.pairs() * chunks, what, group), each = blocks(group.pairs(), what, group);
    for (int pass = 0; pass < passes; ++pass, counts += group.pairs() * kRadixBuckets) {
        const int shift = kRadixShift[pass], bits = kRadixBits[pass];
        start(launch, "residual_threshold (histogram)", group, grid, kThreads, 0, histogram_kernel<K>, g, chunks, shift,
              bits, search.key, search.settled, reinterpret_cast<unsigned long long*>(counts));
        start(launch, "residual_threshold (descend)", group, each, kThreads, 0, descend_kernel, pass == 0, shift, bits,
              search.settled, counts, search.key, search.wanted, search.equal, search.non_finite);
    }
}

}  // namespace

void residual_threshold(const Launch& launch, const Group& group, const float* left, const float* right_t, int64_t rank,
                        const ThresholdSearch& state, int passes, int64_t* counts, int64_t* ties, int64_t* cut) {
    const Selected selected = begin(launch, "residual_threshold", group);
    const GroupArgs g = arguments(group, left, right_t, rank);
    with_kind(kind_of(group), [&](auto tag) {
        constexpr Kind kind = decltype(tag)::kind;
        if constexpr (kind != Kind::kAny) {
            if (state.pieces) search<kind>(launch, group, g, state);
        }
        radix_passes<kind>(launch, group, g, state, passes, counts);
        if (!cut) return;
        const int64_t chunks = tie_chunks(group.m, group.n);
        start(launch, "residual_threshold (ties)", group, blocks(group.pairs() * chunks, "residual_threshold", group),
              kThreads, 0, tie_kernel<kind>, g, chunks, state.key, state.wanted, state.equal,
              reinterpret_cast<unsigned long long*>(ties));
        start(launch, "residual_threshold (cut)", group, blocks(group.pairs(), "residual_threshold", group), 32, 0,
              cut_kernel<kind>, g, chunks, state.key, state.wanted, state.equal, ties, cut);
    });
}

}  // namespace lors
