// Truncated SVD of delta by block Krylov iteration, with a certificate (certificate.h, docs/certificate.md).
//
// A is delta or its transpose, whichever has fewer columns, and the space is grown in float32 from two random vectors.
// When its own numbers promise the bound, the wanted pairs are measured: one more pass, which is needed anyway to form
// the left factor. Where the cut lies in a bulk of close values, rounding mixes the pairs at the cut; then some beyond
// it are measured too, and a Rayleigh-Ritz step in float64 sorts them out. Where values that matter differ by many
// orders of magnitude the search starts again in float64, and what that does not settle is left to a dense solver.
#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "ops.h"
#include "pack.h"
#include "ritz_pairs.h"

namespace lors {
namespace {

constexpr int64_t kWidth = 2;               // of the first block
constexpr int64_t kWidest = 32;             // beyond it a dense solver is asked
constexpr int64_t kSmall = 256;             // columns of which a space may span all
constexpr double kAim = 0.5 * kErrorBound;  // of forecasts
constexpr int64_t kNever = 1 << 20;         // passes
constexpr double kCaptured = 4e-6;          // of delta's norm: what L may leave out for L = delta to hold
template <class T>
constexpr double kProduct = sizeof(T) == 4 ? 4e-7 : 1e-15;  // rounding of A v, relative
constexpr double kFactors = 1.2e-7;                         // rounding of both factors to float32, relative

// Where a dense solver becomes the cheaper one. Measured at 768x768: a space of n / 3 dimensions costs what
// eigenvectors of A.T A in float32 do with their certificate, so whoever goes on until then and finds nothing has lost
// as much again at most.
int64_t largest_space(int64_t n, int64_t rank) {
    return even(std::min(n, std::max(n / 3, std::min(kSmall, 6 * rank + 128))));
}

// A space needs at least about 2.3 dimensions for each wanted pair, whatever the spectrum.
bool dense_is_cheaper(int64_t n, int64_t rank) {
    return n > kSmall && 23 * rank > 10 * largest_space(n, rank);
}

struct Factors {
    Pairs pairs;
    double residual;
    bool unique;
};

// One search in one precision.
template <class T>
class Search {
  public:
    enum class End { kCertified, kRounding, kUnsettled };

    Search(const PackedRows& a, int64_t rank, double energy, uint64_t seed, int threads)
        : a_(a),
          rank_(rank),
          energy_(energy),
          threads_(threads),
          krylov_(a, kWidth, largest_space(a.cols(), rank), seed, threads) {}

    End run() {
        wait_ = (rank_ + 4) / kWidth + 2;
        for (;;) {
            krylov_.expand();
            ++since_;
            if (--wait_ > 0 && !krylov_.full()) continue;
            if (look(krylov_.spectrum())) return End::kCertified;
            if (rounding_ || krylov_.complete()) return End::kRounding;
            if (krylov_.full()) return End::kUnsettled;
            since_ = 0;
        }
    }

    int passes() const { return krylov_.passes() + measured_; }
    Factors& factors() { return *factors_; }

  private:
    // The bound if nothing unseen stands in the way: as it may be measured, and without rounding.
    struct Forecast {
        double bound = 1, exact = 1;
    };

    // Tries what the spectrum promises; else sets how many passes to wait.
    bool look(const Spectrum& s) {
        wait_ = 1;
        if (s.size() < rank_) return false;
        if (captures_all(s)) return true;
        needed_ = needed(s);
        const bool last = krylov_.full(), level = levels_at_cut(s);
        if (level && certified_level(s)) return true;
        const Forecast alone = forecast(s, needed_);
        Forecast apart;
        int64_t count = rank_;  // with so many pairs
        for (int64_t c = rank_ + 1; c < reach(s) && apart.bound > kAim; ++c) {
            const Forecast f = forecast(s, c);
            if (f.bound < apart.bound) apart = f, count = c;
        }
        const double rate = previous_ > 0 ? std::log(previous_ / alone.exact) / static_cast<double>(since_) : 0.5;
        previous_ = alone.exact;
        const int64_t alone_wait = passes_to_go(alone, rate), apart_wait = passes_to_go(apart, rate);
        // the part of rounding in the forecast, which no pass lessens
        const double rounded = std::sqrt(std::max(0.0, alone.bound * alone.bound - alone.exact * alone.exact));
        const bool blurred = apart_wait < kNever && rounded > 0.7 * kErrorBound;
        // products with a vector in float32; those in float64 count double
        const bool patient = !mixed_ && !blurred && kWidth * alone_wait + rank_ <= kWidth * apart_wait + 3 * count;
        wait_ = std::max<int64_t>(1, patient ? alone_wait : apart_wait);
        rounding_ = wait_ == kNever;
        if (wait_ > 1 && !last && !level) return false;
        // if what is promised cannot be proved yet: a look costs more than a pass once the space is large
        wait_ = std::max<int64_t>(wait_, 1 + krylov_.passes() / 32);
        if ((patient || last) && certified_alone(s)) return true;
        if ((!patient || last) && certified_apart(s)) return true;
        const bool ready = level || std::min(alone.bound, apart.bound) <= kErrorBound;
        if (ready && !settled(s)) widen();
        return false;
    }

    // A value may have more copies than the block is wide; or its pair has not converged, which a few passes show.
    void widen() {
        if (unsettled_ == 0) unsettled_ = krylov_.passes();
        if (krylov_.passes() <= unsettled_ + krylov_.passes() / 12) return;
        if (krylov_.width() >= kWidest || !krylov_.widen()) return;
        unsettled_ = 0;
        wait_ = std::max<int64_t>(2, krylov_.passes() / 2);
    }

    // How many of the wanted pairs matter: what the others hold is not worth telling apart.
    int64_t needed(const Spectrum& s) const {
        const double kept = sum_of(s.theta, rank_);
        int64_t count = 0;
        while (count < rank_ && 2 * static_cast<double>(rank_ - count) * s.theta[static_cast<size_t>(count)] >
                                    0.1 * kErrorBound * kErrorBound * kept) {
            ++count;
        }
        return count;
    }

    Forecast forecast(const Spectrum& s, int64_t count) const {
        if (count >= s.size()) return krylov_.complete() ? Forecast{0, 0} : Forecast{};
        const Cut cut{count, std::max(0.0, s.theta[static_cast<size_t>(count)] + s.rho[static_cast<size_t>(count)])};
        return {std::min(1.0, bound(s.theta, s.residual, cut)), std::min(1.0, bound(s.theta, s.rho, cut))};
    }

    // Passes until the forecast should hold.
    int64_t passes_to_go(const Forecast& f, double rate) const {
        if (f.bound <= kAim) return 0;
        if (f.exact <= 0.5 * f.bound) return f.bound <= 0.9 * kErrorBound ? 0 : kNever;  // rounding has the last word
        const double wanted = 0.85 * std::log(f.exact / (0.5 * kAim)) / std::max(0.15, rate);
        return std::clamp<int64_t>(static_cast<int64_t>(std::ceil(wanted)), 1,
                                   std::max<int64_t>(4, krylov_.passes() / 3));
    }

    bool accept(Pairs&& pairs, double residual, bool unique) {
        factors_.emplace(Factors{std::move(pairs), residual, unique});
        return true;
    }

    // By the wanted pairs alone, as the space has them.
    bool certified_alone(const Spectrum& s) {
        const std::optional<Cut> cut = s.cut(needed_);
        const double expected = cut ? bound(s.theta, s.residual, *cut) : 1;
        if (expected > kErrorBound) return false;
        Pairs pairs = measured(a_, krylov_, rank_, threads_);
        ++measured_;
        const double error = bound(pairs.theta, pairs.rho, *cut) + pairs.skew + kProduct<T>;
        if (error <= kErrorBound) return accept(std::move(pairs), error, true);
        mixed_ = bound(s.theta, s.rho, *cut) <= 0.5 * error;  // more passes would not help
        return false;
    }

    // By as few pairs as do, held apart in float64. Where rounding keeps them from the bound, more pairs may do later.
    bool certified_apart(const Spectrum& s) {
        bool failed = false, later = false;
        for (int64_t count = rank_ + 1; count < reach(s); ++count) {
            if (excess_ * forecast(s, count).bound > kErrorBound) continue;
            const std::optional<Cut> cut = s.cut(count);
            const double expected = cut ? bound(s.theta, s.residual, *cut) : 1;
            later = later || excess_ * expected > kErrorBound;
            if (excess_ * expected > kErrorBound) continue;
            Pairs pairs = held_apart(a_, krylov_, count, threads_);
            measured_ += 2;
            const double error = bound(pairs.theta, pairs.rho, *cut, pairs.turn);
            if (error <= kErrorBound) return accept(std::move(pairs), error, true);
            excess_ = std::max(excess_, error / expected);
            failed = failed || bound(s.theta, s.rho, *cut) <= 0.5 * error;
        }
        if (failed) rounding_ = !later;
        return false;
    }

    // L leaves so little of delta that it is delta.
    bool captures_all(const Spectrum& s) {
        if (energy_ - sum_of(s.theta, rank_) > 2e-6 * energy_ || krylov_.passes() < try_all_) return false;
        try_all_ = 2 * krylov_.passes();
        Pairs pairs = held_apart(a_, krylov_, rank_, threads_);
        measured_ += 2;
        const double energy = energy64(a_);
        const double left = std::sqrt(std::max(0.0, 1 - sum_of(pairs.theta, rank_) / energy) + cancellation());
        return left <= kCaptured && accept(std::move(pairs), 2 * left, true);
    }

    bool levels_at_cut(const Spectrum& s) const {
        if (s.size() <= rank_ || needed_ < rank_) return false;
        const size_t r = static_cast<size_t>(rank_);
        const double last = s.theta[r - 1];
        return last - s.theta[r] <= kEqual * last + 4 * s.noise(last) &&
               std::max(s.rho[r - 1], s.rho[r]) <= 1e-5 * last;
    }

    // Values are equal across the cut: one choice among them is as good as another, if nothing above them is missing.
    bool certified_level(const Spectrum& s) {
        if (krylov_.passes() < try_level_ && !krylov_.full()) return false;
        try_level_ = krylov_.passes() + krylov_.passes() / 4 + 1;
        Pairs pairs = held_apart(a_, krylov_, reach(s), threads_);
        measured_ += 2;
        const double last = pairs.theta[static_cast<size_t>(rank_ - 1)], rank = static_cast<double>(rank_);
        if (last - pairs.theta[static_cast<size_t>(rank_)] > kEqual * last) return false;
        const double energy = energy64(a_), rest = energy - sum_of(pairs.theta, rank_);
        if (rest < 100 * cancellation() * energy) return false;
        const double slack = std::min(0.5 * kEnergyBound * rest / rank,
                                      kEqual * last - (last - pairs.theta[static_cast<size_t>(rank_)]));
        // rounding may have mixed those that are not held apart with those that are
        if (reach(s) < s.size() && s.above(s.theta[static_cast<size_t>(reach(s))]) > last + slack) return false;
        const auto above = [&](double value) {
            return std::count_if(pairs.theta.begin(), pairs.theta.end(), [&](double theta) { return theta > value; });
        };
        const Cut cut{above(last + slack), last + slack};
        const int64_t found = above(last * (1 - kEqual));
        for (size_t i = 0; i < static_cast<size_t>(rank_); ++i) {
            if (s.unseen(std::max(s.theta[i], cut.upper), found) > kUnseen) return false;
        }
        const double lost = energy_bound(pairs.theta.data(), pairs.rho.data(), cut) + slack * rank;
        if (lost > kEnergyBound * rest) return false;
        const double factors =
            kFactors * kFactors * sum_of(pairs.theta, rank_);  // their rounding is orthogonal to what is lost
        return accept(std::move(pairs), 1.02 * (lost + factors) / rest, false);
    }

    // Whether every value that matters has shown all its copies.
    bool settled(const Spectrum& s) const {
        for (int64_t i = 0; i < needed_; ++i) {
            if (s.unseen(s.theta[static_cast<size_t>(i)], reach(s)) > kUnseen) return false;
        }
        return true;
    }

    // What float64 sums over A may be off, relative to its energy.
    double cancellation() const { return 1.2e-16 * static_cast<double>(a_.rows() + a_.cols()); }
    int64_t reach(const Spectrum& s) const { return std::min(s.size(), rank_ + kExtra); }
    double bound(const std::vector<double>& theta, const std::vector<double>& rho, const Cut& cut,
                 double turn = 0) const {
        return error_bound(theta.data(), rho.data(), rank_, cut, turn);
    }
    static double sum_of(const std::vector<double>& theta, int64_t count) {
        double sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += theta[static_cast<size_t>(i)];
        return sum;
    }

    const PackedRows& a_;
    int64_t rank_;
    double energy_;
    int threads_;
    Krylov<T> krylov_;
    std::optional<Factors> factors_;
    int64_t needed_ = 0;                   // wanted pairs that matter
    int64_t wait_ = 0;                     // passes until the next look
    int64_t since_ = 0;                    // passes since the last
    double previous_ = 0;                  // forecast at the last
    int64_t try_all_ = 0, try_level_ = 0;  // passes before which what failed is not tried again
    int unsettled_ = 0;                    // passes since which a value may have more copies
    double excess_ = 1.25;                 // what may be measured of pairs held apart, relative to what is expected
    bool mixed_ = false;                   // rounding keeps the wanted pairs alone from the bound
    bool rounding_ = false;                // and those held apart
    int measured_ = 0;
};

// The factors in float32 as the caller wants them; adds what rounding them may cost to the residual. Returns how many
// entries float32 cannot hold.
int64_t write(Factors& factors, const PackedRows& a, int64_t rank, double scale, bool wide, float* left, float* right,
              float* sigma) {
    const int64_t m = a.rows(), n = a.cols(), np = padded(n);
    const Pairs& pairs = factors.pairs;
    std::vector<double> values(static_cast<size_t>(rank));
    double kept = 0;
    for (int64_t c = 0; c < rank; ++c) {
        const double value = std::sqrt(std::max(0.0, pairs.theta[static_cast<size_t>(c)])) / scale;
        values[static_cast<size_t>(c)] = value;
        sigma[c] = static_cast<float>(value);
        kept += value * value;
    }
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t c = 0; c < rank; ++c) {
            const double y = pairs.product[i * pairs.width + c] / scale, value = values[static_cast<size_t>(c)];
            if (wide) {
                right[i * rank + c] = static_cast<float>(value > 0 ? y / value : 0.0);
            } else {
                left[i * rank + c] = static_cast<float>(y);
            }
        }
    }
    for (int64_t j = 0; j < n; ++j) {
        for (int64_t c = 0; c < rank; ++c) {
            const double v = pairs.vectors[c * np + j];
            (wide ? left : right)[j * rank + c] = static_cast<float>(wide ? v * values[static_cast<size_t>(c)] : v);
        }
    }
    const int64_t entries = (wide ? n : m) * rank;
    const double spacing = 0x1p-150 * std::sqrt(static_cast<double>(entries));  // of denormal ones
    if (factors.unique && kept > 0) factors.residual += kFactors + spacing / std::sqrt(kept);
    return std::count_if(left, left + entries, [](float value) { return !std::isfinite(value); });
}

}  // namespace

SvdResult truncated_svd(const Matrix& base, const Matrix& tuned, int64_t rank, uint64_t seed, float* left, float* right,
                        float* sigma, int threads) {
    const Delta delta(base, tuned);
    const bool wide = delta.rows() < delta.cols();
    const int64_t m = wide ? delta.cols() : delta.rows(), n = wide ? delta.rows() : delta.cols();

    Packed packed = pack(delta, wide, threads);
    SvdResult result{SvdMethod::kKrylov, 0, 0, true, packed.energy / packed.scale / packed.scale, packed.non_finite, 0};
    if (result.non_finite) return result;
    if (packed.energy == 0) {
        std::fill(left, left + delta.rows() * rank, 0.0f);
        std::fill(right, right + delta.cols() * rank, 0.0f);
        std::fill(sigma, sigma + rank, 0.0f);
        return result;
    }

    const PackedRows a{packed.rows, m, n};
    if (dense_is_cheaper(n, rank)) {
        result.method = SvdMethod::kNotConverged;
        return result;
    }
    const auto search = [&](auto precision) {
        using Attempt = Search<decltype(precision)>;
        Attempt attempt(a, rank, packed.energy, seed, threads);
        const auto end = attempt.run();
        result.passes += attempt.passes();
        if (end == Attempt::End::kCertified) {
            result.overflows = write(attempt.factors(), a, rank, packed.scale, wide, left, right, sigma);
            result.residual = attempt.factors().residual;
            result.unique = attempt.factors().unique;
        }
        return end;
    };
    const auto single = search(float{});
    if (single == Search<float>::End::kCertified) return result;
    result.method = SvdMethod::kNotConverged;
    if (single == Search<float>::End::kRounding && search(double{}) == Search<double>::End::kCertified) {
        result.method = SvdMethod::kKrylovDouble;
    }
    return result;
}

}  // namespace lors
