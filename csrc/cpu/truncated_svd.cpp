// Truncated SVD of delta by block Krylov iteration, with a measured certificate.
//
// Block Lanczos on G = A.T A with full reorthogonalisation, A being delta or its transpose, whichever has fewer columns
// (N of them). After j passes the basis Q spans the block Krylov space, T = Q.T G Q is known from the orthogonalisation
// coefficients, and its leading eigenpairs (theta, s) give right singular vectors v = Q s.
//
// The certificate uses one more pass, which is needed anyway to form the left factor A v: rho_i = ||G v_i - theta_i
// v_i|| is measured, and with the gap to the first unwanted value
//
//     ||L - exact||^2 <~ sum_i (theta_i + theta_{r+1}) * min(1, rho_i / (theta_i - theta_{r+1}))^2 (Davis-Kahan)
//
// If float32 cannot reach the contract, because the gap is so small that rounding alone turns the vectors, the
// iteration goes on in float64 from where it stands. A gap that is zero to working precision leaves L undefined; then
// any choice whose energy is optimal is accepted.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../lors/ordered_key.h"
#include "eigh.h"
#include "gram.h"
#include "ops.h"

namespace lors {
namespace {

constexpr double kErrorBound = 8e-6;   // of L, relative; the contract is 1e-5 and the bound errs upwards
constexpr double kEnergyBound = 5e-7;  // of ||delta - L||^2, relative; the contract is 1e-6
constexpr double kEqual = 2e-6;        // relative difference below which two theta count as equal

// Deterministic uniform numbers in [-1, 1) (splitmix64).
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    double next() {
        uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return static_cast<double>(static_cast<int64_t>(z ^ (z >> 31))) * 0x1p-63;
    }

  private:
    uint64_t state_;
};

struct Ritz {
    Buffer<double> theta;  // [rank + 1], largest first; [rank] when the space has no more
    Buffer<double> s;      // [rank, size]
    double error = 0;      // bound on the relative error of L
    double energy = 0;     // bound on the energy lost, relative to what is left out
    double spread = 0;     // (theta_r - theta_{r+1}) / theta_r
};

// Turns residual norms into the two bounds. `theta` has more than `rank` entries unless the basis is the whole space.
void certify(Ritz& ritz, const double* rho, int64_t rank, double total_energy) {
    const double next = ritz.theta.size() > rank ? std::max(0.0, ritz.theta[rank]) : 0.0;
    double error = 0, kept = 0, lost = 0;
    for (int64_t i = 0; i < rank; ++i) {
        const double theta = std::max(0.0, ritz.theta[i]), gap = theta - next;
        const double turn = rho[i] >= gap ? 1.0 : rho[i] / gap;
        error += (theta + next) * turn * turn;
        lost += rho[i] * turn;
        kept += theta;
    }
    ritz.error = kept > 0 ? std::sqrt(error / kept) : 0;
    ritz.energy = lost > 0 ? lost / std::max(total_energy - kept, 1e-12 * total_energy) : 0;
    const double last = ritz.theta[rank - 1];
    ritz.spread = last > 0 ? (last - next) / last : 0;
}

bool accepted(const Ritz& ritz) {
    return ritz.error <= kErrorBound || (ritz.spread <= kEqual && ritz.energy <= kEnergyBound);
}

// A grown basis and the projection of G on it.
template <class T>
class Krylov {
  public:
    Krylov(const PackedRows& a, int64_t rank, int64_t width, int64_t limit, uint64_t seed, int threads)
        : a_(a),
          n_(a.cols()),
          np_(padded(a.cols())),
          rank_(rank),
          width_(width),
          limit_((std::min(limit, n_) + width - 1) / width * width),
          threads_(threads),
          random_(seed),
          basis_((limit_ + width) * np_),
          image_(width * np_),
          coefficients_((limit_ + width) * kWidth),
          t_(limit_ * limit_),
          below_(width * width) {}

    int passes() const { return passes_; }
    int64_t size() const { return size_; }
    bool full() const { return size_ >= limit_; }
    const T* row(int64_t i) const { return basis_.data() + i * np_; }

    // The first block: rows of `start` [count, np], then random directions, orthonormalised.
    template <class S>
    void begin(const S* start, int64_t count) {
        for (int64_t i = 0; i < width_; ++i) {
            for (int64_t j = 0; j < n_; ++j) {
                basis_[i * np_ + j] =
                    static_cast<T>(i < count ? static_cast<double>(start[i * np_ + j]) : random_.next());
            }
            std::fill(&basis_[i * np_ + n_], &basis_[i * np_ + np_], T{});
        }
        orthonormalise(0, 1.0);
    }

    // One pass: projects G times the newest block, and leaves the next block, orthonormal, behind the basis.
    void expand() {
        const T* newest = basis_.data() + size_ * np_;
        gram<T>(a_, newest, width_ / kWidth, image_.data(), static_cast<T*>(nullptr), threads_);
        ++passes_;
        size_ += width_;
        for (int64_t i = 0; i < size_; ++i) {
            const int64_t from = i < size_ - width_ ? size_ - width_ : 0;
            std::fill(&t_[i * limit_ + from], &t_[i * limit_ + size_], 0.0);
        }
        for (int round = 0; round < 2; ++round) {
            for (int64_t g = 0; g < width_ / kWidth; ++g) {
                T* image = image_.data() + g * kWidth * np_;
                dots(basis_.data(), np_, size_, image, np_, coefficients_.data());
                for (int64_t i = 0; i < size_ * kWidth; ++i) coefficients_[i] = -coefficients_[i];
                accumulate(basis_.data(), np_, size_, coefficients_.data(), image, np_);
                for (int64_t i = 0; i < size_; ++i) {
                    for (int64_t c = 0; c < kWidth; ++c) {
                        const int64_t column = size_ - width_ + g * kWidth + c;
                        t_[i * limit_ + column] -= static_cast<double>(coefficients_[i * kWidth + c]);
                    }
                }
            }
        }
        for (int64_t i = 0; i < size_; ++i) {
            for (int64_t j = std::max<int64_t>(size_ - width_, i + 1); j < size_; ++j) {
                const double mean =
                    i < size_ - width_ ? t_[i * limit_ + j] : 0.5 * (t_[i * limit_ + j] + t_[j * limit_ + i]);
                t_[i * limit_ + j] = t_[j * limit_ + i] = mean;
            }
        }
        double scale = 0;
        for (int64_t i = 0; i < size_; ++i) scale = std::max(scale, t_[i * limit_ + i]);
        std::copy(image_.data(), image_.data() + width_ * np_, basis_.data() + size_ * np_);
        orthonormalise(size_, scale);
    }

    // Leading eigenpairs of the projection and the residuals they would have in exact arithmetic.
    Ritz solve(double total_energy) const {
        Buffer<double> copy(size_ * size_);
        for (int64_t i = 0; i < size_; ++i) {
            std::copy(t_.data() + i * limit_, t_.data() + i * limit_ + size_, copy.data() + i * size_);
        }
        Eigen eigen = eigh(copy.data(), size_, rank_, std::min({rank_ + 1, size_, n_}));
        Ritz ritz;
        ritz.theta = std::move(eigen.values);
        ritz.s = std::move(eigen.vectors);
        std::vector<double> rho(static_cast<size_t>(rank_));
        for (int64_t i = 0; i < rank_; ++i) {
            const double* last = ritz.s.data() + (i + 1) * size_ - width_;
            double sum = 0;
            for (int64_t p = 0; p < width_; ++p) {
                double entry = 0;
                for (int64_t q = 0; q < width_; ++q) entry += below_[p * width_ + q] * last[q];
                sum += entry * entry;
            }
            rho[static_cast<size_t>(i)] = std::sqrt(sum);
        }
        certify(ritz, rho.data(), rank_, total_energy);
        return ritz;
    }

    // v [groups * kWidth, np] = s @ Q, zero rows past rank
    void combine(const Ritz& ritz, T* v) {
        const int64_t groups = (rank_ + kWidth - 1) / kWidth;
        std::fill(v, v + groups * kWidth * np_, T{});
        for (int64_t g = 0; g < groups; ++g) {
            for (int64_t i = 0; i < size_; ++i) {
                for (int64_t c = 0; c < kWidth; ++c) {
                    const int64_t row = g * kWidth + c;
                    coefficients_[i * kWidth + c] = row < rank_ ? static_cast<T>(ritz.s[row * size_ + i]) : T{};
                }
            }
            accumulate(basis_.data(), np_, size_, coefficients_.data(), v + g * kWidth * np_, np_);
        }
    }

  private:
    double dot(const T* x, const T* y) const {
        Vec<T> sum = {};
        for (int64_t j = 0; j < np_; j += kLanes<T>) sum += load(x + j) * load(y + j);
        double total = 0;
        for (int lane = 0; lane < kLanes<T>; ++lane) total += static_cast<double>(sum[lane]);
        return total;
    }
    void subtract(T* x, double factor, const T* y) const {
        const T f = static_cast<T>(factor);
        for (int64_t j = 0; j < np_; j += kLanes<T>) store(x + j, load(x + j) - f * load(y + j));
    }
    void scale(T* x, double factor) const {
        const T f = static_cast<T>(factor);
        for (int64_t j = 0; j < np_; j += kLanes<T>) store(x + j, load(x + j) * f);
    }

    // Makes rows first.. first + width orthonormal to each other and to all before; below_ receives the triangular
    // factor. A direction that vanishes (the space is exhausted, or delta has low rank) is replaced by a random one
    // whose coefficient is zero; once the basis spans everything the remaining rows are zero.
    void orthonormalise(int64_t first, double magnitude) {
        const double floor = magnitude * std::sqrt(static_cast<double>(n_)) * (sizeof(T) == 4 ? 6e-8 : 1e-16);
        below_.zero();
        for (int64_t c = 0; c < width_; ++c) {
            T* w = basis_.data() + (first + c) * np_;
            double before = std::sqrt(dot(w, w));
            if (live_ >= n_) {
                std::fill(w, w + np_, T{});
                continue;
            }
            for (int64_t i = 0; i < c; ++i) {
                const T* q = basis_.data() + (first + i) * np_;
                const double overlap = dot(w, q);
                below_[i * width_ + c] = overlap;
                subtract(w, overlap, q);
            }
            double norm = std::sqrt(dot(w, w));
            if (norm > floor && norm < 0.5 * before) {  // cancellation: what remains may lean on the whole basis again
                clean(w, first, c);
                norm = std::sqrt(dot(w, w));
            }
            bool vanished = norm <= floor;
            below_[c * width_ + c] = vanished ? 0 : norm;
            for (int attempt = 0; vanished; ++attempt) {
                for (int64_t j = 0; j < n_; ++j) w[j] = static_cast<T>(random_.next());
                before = std::sqrt(dot(w, w));
                clean(w, first, c);
                clean(w, first, c);
                norm = std::sqrt(dot(w, w));
                vanished = norm <= 1e-3 * before && attempt < 8;
            }
            scale(w, 1 / norm);
            ++live_;
        }
    }

    void clean(T* w, int64_t first, int64_t c) const {
        for (int64_t i = 0; i < first + c; ++i) subtract(w, dot(w, row(i)), row(i));
    }

    const PackedRows& a_;
    int64_t n_, np_, rank_, width_, limit_;
    int threads_;
    Random random_;
    Buffer<T> basis_;         // [limit + width, np]
    Buffer<T> image_;         // [width, np]
    Buffer<T> coefficients_;  // [limit + width, kWidth]
    Buffer<double> t_;        // [limit, limit], size_ x size_ of it in use
    Buffer<double> below_;    // [width, width]: next block = image @ inverse(below)
    int64_t size_ = 0;        // rows of the basis that have been multiplied
    int64_t live_ = 0;        // rows that are not zero
    int passes_ = 0;
};

struct Factors {
    Buffer<double> sigma;    // [rank]
    Buffer<double> product;  // [rows, groups, kWidth] = A @ v
    Buffer<double> vectors;  // [groups * kWidth, np]
    double error;
    bool accepted;
};

// v from the basis, A @ v, and the measured certificate.
template <class T>
Factors finish(const PackedRows& a, Krylov<T>& krylov, Ritz& ritz, int64_t rank, double total_energy, int threads) {
    const int64_t np = padded(a.cols()), groups = (rank + kWidth - 1) / kWidth, width = groups * kWidth;
    Buffer<T> v(width * np), z(width * np), product(a.rows() * width);
    krylov.combine(ritz, v.data());
    gram<T>(a, v.data(), groups, z.data(), product.data(), threads);
    Factors f;
    f.sigma.allocate(rank);
    std::vector<double> rho(static_cast<size_t>(rank));
    std::vector<double> norm2(static_cast<size_t>(width));
    for (int64_t i = 0; i < a.rows(); ++i) {
        for (int64_t c = 0; c < width; ++c) {
            const double y = static_cast<double>(product[i * width + c]);
            norm2[static_cast<size_t>(c)] += y * y;
        }
    }
    for (int64_t c = 0; c < rank; ++c) {
        const double theta = norm2[static_cast<size_t>(c)];
        double sum = 0;
        for (int64_t j = 0; j < a.cols(); ++j) {
            const double entry = static_cast<double>(z[c * np + j]) - theta * static_cast<double>(v[c * np + j]);
            sum += entry * entry;
        }
        rho[static_cast<size_t>(c)] = std::sqrt(sum);
        f.sigma[c] = std::sqrt(theta);
    }
    certify(ritz, rho.data(), rank, total_energy);
    f.error = ritz.error;
    f.accepted = accepted(ritz);
    f.vectors.allocate(v.size());
    for (int64_t i = 0; i < v.size(); ++i) f.vectors[i] = static_cast<double>(v[i]);
    f.product.allocate(product.size());
    for (int64_t i = 0; i < product.size(); ++i) f.product[i] = static_cast<double>(product[i]);
    return f;
}

// Passes until the bound should be met, from how fast it has been falling. A look at the bound costs a small
// eigen-decomposition, which grows with the basis: the longer it takes, the rarer they are.
int64_t passes_to_go(double error, double previous, int64_t since, int64_t passes) {
    const double rate =
        previous > 0 && error < previous ? std::log(previous / error) / static_cast<double>(since) : 0.7;
    const double wanted = std::log(std::max(1.0, error / (0.5 * kErrorBound))) / std::max(rate, 0.3);
    return std::clamp<int64_t>(static_cast<int64_t>(std::ceil(wanted * 0.85)), 1, std::max<int64_t>(4, passes / 2));
}

// Grows the basis until the certificate holds, or until it cannot: the limit is reached, or the measured error stays
// far above the one exact arithmetic would have (rounding has the last word).
template <class T>
Factors iterate(const PackedRows& a, Krylov<T>& krylov, int64_t rank, double total_energy, int64_t width, int threads,
                int& passes) {
    int64_t wait = std::max<int64_t>(2, (rank + 2 * width - 1) / width + 2), since = 0;
    double previous = 0;
    for (;;) {
        krylov.expand();
        ++since;
        if (--wait > 0 && !krylov.full()) continue;
        Ritz ritz = krylov.solve(total_energy);
        const bool promising = accepted(ritz);
        if (promising || krylov.full()) {
            const double expected = ritz.error;
            Factors f = finish(a, krylov, ritz, rank, total_energy, threads);
            ++passes;
            if (f.accepted || krylov.full() || f.error > 4 * std::max(expected, kErrorBound / 4)) {
                passes += krylov.passes();
                return f;
            }
        }
        wait = passes_to_go(ritz.error, previous, since, krylov.passes());
        previous = ritz.error;
        since = 0;
    }
}

// delta, transposed when wide, in memory and in the range where squares neither overflow nor vanish. Packing once, as a
// matrix product packs its operands, lets the passes read 4 bytes per entry from cache instead of base and tuned again;
// a delta that already lies in memory so is used where it is.
struct Packed {
    Buffer<float> copy;
    const float* rows;  // [m, padded(n)] = delta * scale
    double scale;       // a power of two, so that scaling is exact
    double energy;      // sum of squares of `rows`
    int64_t non_finite;
};

// The largest magnitude key and the sum of squares of some entries.
struct Survey {
    uint32_t largest = 0;
    double energy = 0;
};

Survey survey(const float* rows, int64_t count, int64_t np) {
    Survey found;
    VecU32 largest = {};
    for (int64_t i = 0; i < count; ++i) {
        Vec<float> squares = {};
        for (int64_t j = 0; j < np; j += kLanes<float>) {
            const Vec<float> v = load(rows + i * np + j);
            const VecU32 key = reinterpret_cast<VecU32>(v) & kMagnitudeMask;
            largest = key > largest ? key : largest;
            squares += v * v;
        }
        for (int lane = 0; lane < kLanes<float>; ++lane) found.energy += static_cast<double>(squares[lane]);
    }
    for (int lane = 0; lane < kLanes<float>; ++lane) found.largest = std::max<uint32_t>(found.largest, largest[lane]);
    return found;
}

Packed pack(const Delta& delta, bool wide, int threads) {
    const int64_t m = wide ? delta.cols() : delta.rows(), n = wide ? delta.rows() : delta.cols(), np = padded(n);
    const int64_t chunks = (m + kChunkRows - 1) / kChunkRows;
    const bool stored = !wide && delta.stored() && delta.contiguous();
    Packed packed{Buffer<float>(stored ? 0 : m * np), nullptr, 1, 0, 0};
    packed.rows = stored ? delta.stored_row(0) : packed.copy.data();
    // body(first row, rows) -> Survey; the sums are added in order
    const auto each_chunk = [&](const auto& body) {
        std::vector<Survey> parts(static_cast<size_t>(chunks));
        parallel_for(chunks, threads, [&](int64_t chunk, int) {
            const int64_t first = chunk * kChunkRows;
            parts[static_cast<size_t>(chunk)] = body(first, std::min(m - first, kChunkRows));
        });
        Survey all;
        for (const Survey& part : parts) {
            all.largest = std::max(all.largest, part.largest);
            all.energy += part.energy;
        }
        return all;
    };
    Survey all = each_chunk([&](int64_t first, int64_t count) {
        float* rows = packed.copy.data() + first * np;
        if (wide) {
            DeltaColumns{delta}.fetch(first, count, rows);
        } else if (!stored) {
            DeltaRows{delta}.fetch(first, count, rows);
        }
        return survey(packed.rows + first * np, count, np);
    });
    if (all.largest >= kNonFiniteKey) {
        for (int64_t j = 0; j < m * np; ++j) packed.non_finite += magnitude_key(packed.rows[j]) >= kNonFiniteKey;
        return packed;
    }
    const int exponent = all.largest ? std::ilogb(key_to_magnitude(all.largest)) : 0;
    if (exponent < -40 || exponent > 20) {
        packed.scale = std::ldexp(1.0, -exponent);
        if (stored) packed.copy.allocate(m * np);
        all = each_chunk([&](int64_t first, int64_t count) {
            for (int64_t j = first * np; j < (first + count) * np; ++j) {
                packed.copy[j] = static_cast<float>(packed.rows[j] * packed.scale);
            }
            return survey(packed.copy.data() + first * np, count, np);
        });
        packed.rows = packed.copy.data();
    }
    packed.energy = all.energy;
    return packed;
}

int64_t default_limit(int64_t n, int64_t rank) {
    return std::min(n, std::max<int64_t>(n / 2, 6 * rank + 128));
}

}  // namespace

SvdResult truncated_svd(const Matrix& base, const Matrix& tuned, int64_t rank, uint64_t seed, float* left, float* right,
                        float* sigma, int threads) {
    const Delta delta(base, tuned);
    const bool wide = delta.rows() < delta.cols();
    const int64_t m = wide ? delta.cols() : delta.rows(), n = wide ? delta.rows() : delta.cols(), np = padded(n);

    Packed packed = pack(delta, wide, threads);
    SvdResult result{SvdMethod::kKrylov, 0, 0, packed.energy / packed.scale / packed.scale, packed.non_finite};
    if (result.non_finite) return result;

    const PackedRows a{packed.rows, m, n};
    const int64_t groups = (rank + kWidth - 1) / kWidth;
    const int64_t limit = default_limit(n, rank);
    Krylov<float> single(a, rank, kWidth, limit, seed, threads);
    single.begin(static_cast<const float*>(nullptr), 0);
    Factors f = iterate(a, single, rank, packed.energy, kWidth, threads, result.passes);
    if (!f.accepted) {
        result.method = SvdMethod::kKrylovDouble;
        const int64_t width = (rank / kWidth + 1) * kWidth;
        Krylov<double> twice(a, rank, width, limit, seed, threads);
        twice.begin(f.vectors.data(), rank);
        f = iterate(a, twice, rank, packed.energy, width, threads, result.passes);
        if (!f.accepted) result.method = SvdMethod::kNotConverged;
    }
    result.residual = f.error;
    for (int64_t c = 0; c < rank; ++c) {
        f.sigma[c] /= packed.scale;
        sigma[c] = static_cast<float>(f.sigma[c]);
    }
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t c = 0; c < rank; ++c) {
            const double y = f.product[i * groups * kWidth + c] / packed.scale;
            if (wide) {
                right[i * rank + c] = static_cast<float>(f.sigma[c] > 0 ? y / f.sigma[c] : 0.0);
            } else {
                left[i * rank + c] = static_cast<float>(y);
            }
        }
    }
    for (int64_t j = 0; j < n; ++j) {
        for (int64_t c = 0; c < rank; ++c) {
            const double v = f.vectors[c * np + j];
            (wide ? left : right)[j * rank + c] = static_cast<float>(wide ? v * f.sigma[c] : v);
        }
    }
    return result;
}

}  // namespace lors
