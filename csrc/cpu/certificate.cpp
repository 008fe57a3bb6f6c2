#include "certificate.h"

#include <algorithm>
#include <cmath>

namespace lors {

Spectrum::Spectrum(const Eigen& ritz, int64_t starts, const double* below, int64_t width, int64_t n,
                   double (*noise)(double, double), double blur, bool complete)
    : theta(ritz.values.data(), ritz.values.data() + ritz.values.size()),
      rho(theta.size()),
      residual(theta.size()),
      starts_(starts),
      width_(width),
      n_(n),
      noise_(noise),
      blur_(blur),
      complete_(complete),
      first_(theta.size() * static_cast<size_t>(starts)),
      ends_(theta.size() * static_cast<size_t>(width)),
      share_(theta.size()) {
    for (size_t j = 0; j < theta.size(); ++j) {
        const double* entries = ritz.vectors.data() + static_cast<int64_t>(j) * (starts + width);
        double* first = &first_[j * static_cast<size_t>(starts)];
        double* ends = &ends_[j * static_cast<size_t>(width)];
        double share = 0, sum = 0;
        for (int64_t i = 0; i < starts; ++i) share += (first[i] = entries[i]) * entries[i];
        for (int64_t p = 0; p < width; ++p) {
            for (int64_t q = p; q < width; ++q) ends[p] += below[p * width + q] * entries[starts + q];
            sum += ends[p] * ends[p];
        }
        share_[j] = std::sqrt(share * static_cast<double>(n));
        rho[j] = std::sqrt(sum);
        residual[j] = std::hypot(rho[j], this->noise(theta[j]));
    }
}

double Spectrum::unseen(double lambda, int64_t found) const {
    if (complete_) return 0;
    const size_t size = theta.size();
    const double floor = noise(lambda);
    // what such an eigenvector has at most of Ritz vector j: by its residual (times a part of the next block), by
    // rounding
    std::vector<double> push(size), shake(size), reach(size);
    for (size_t j = 0; j < size; ++j) {
        const double away = lambda - theta[j], distance = std::fabs(away);
        if (rho[j] > 0) push[j] = std::copysign(1 / std::max(distance, rho[j]), away);
        shake[j] = floor < distance ? floor / distance : 1;
        reach[j] = share_[j] * std::max(rho[j] * std::fabs(push[j]), shake[j]);
    }
    // the found ones that reach furthest, as many as leave a direction of the start free
    std::vector<size_t> nearest(static_cast<size_t>(std::min<int64_t>(found, static_cast<int64_t>(size))));
    for (size_t j = 0; j < nearest.size(); ++j) nearest[j] = j;
    const size_t most = std::min(nearest.size(), static_cast<size_t>(starts_ - 1));
    std::partial_sort(nearest.begin(), nearest.begin() + static_cast<std::ptrdiff_t>(most), nearest.end(),
                      [&](size_t i, size_t j) { return reach[i] > reach[j]; });
    std::vector<bool> aside(size);
    for (size_t c = 0; c < most; ++c) aside[nearest[c]] = true;
    // part of the start = m @ (part of the next block) + shaken
    const size_t starts = static_cast<size_t>(starts_), width = static_cast<size_t>(width_);
    std::vector<double> m(starts * width);
    double shaken = 0;
    const auto add = [&](size_t j) {
        for (size_t i = 0; i < starts; ++i) {
            const double factor = first_[j * starts + i] * push[j];
            for (size_t p = 0; p < width; ++p) m[i * width + p] += factor * ends_[j * width + p];
        }
        shaken += share_[j] * share_[j] * shake[j] * shake[j];
    };
    for (size_t j = 0; j < size; ++j) {
        if (!aside[j]) add(j);
    }
    double least = 1;
    for (size_t c = most;; --c) {  // with the c nearest explained by what was found, starts - c directions remain
        double sum = 0;
        for (double entry : m) sum += entry * entry;
        const double free = static_cast<double>(starts_ - static_cast<int64_t>(c)),
                     exact = static_cast<double>(n_) * sum;
        const double chance = std::pow(std::sqrt(exact + shaken), free);
        const double copy = c > 0 ? kUnseen / kCopy * std::pow(std::sqrt(exact), free) : 0;
        least = std::min(least, std::max(chance, copy));
        if (c == 0) return least;
        add(nearest[c - 1]);
    }
}

std::optional<Cut> Spectrum::cut(int64_t count) const {
    if (count >= size()) return std::nullopt;
    const double last = theta[static_cast<size_t>(count - 1)], next = std::max(0.0, theta[static_cast<size_t>(count)]);
    if (complete_) return above(next) < last ? std::optional(Cut{count, above(next)}) : std::nullopt;
    for (int64_t i = 0; i < count; ++i) {
        if (unseen(theta[static_cast<size_t>(i)], count) > kUnseen) return std::nullopt;
    }
    for (double step : {1.0 / 16, 1.0 / 4, 1.0 / 2}) {
        const double upper = next + step * (last - next);
        if (above(upper) < last && unseen(upper, count) <= kUnseen) return Cut{count, above(upper)};
    }
    return std::nullopt;
}

namespace {

// cut.upper, and what the captured part may lend to what lies beside it: the complement of the vectors has no larger
// Rayleigh quotient.
double complement_bound(const double* theta, const double* rho, const Cut& cut) {
    double upper = cut.upper;
    for (int64_t j = 0; j < cut.count; ++j) {
        if (theta[j] > cut.upper) upper += rho[j] * rho[j] / (theta[j] - cut.upper);
    }
    return upper;
}

}  // namespace

double error_bound(const double* theta, const double* rho, int64_t rank, const Cut& cut, double turn) {
    const double beside = complement_bound(theta, rho, cut);
    double error = 0, kept = 0, tail = 0;  // tail: rho^2 of this pair and the wanted ones after it
    for (int64_t i = std::min(rank, cut.count); i < rank; ++i) {
        error += 2 * cut.upper;
        kept += std::max(0.0, theta[i]);
    }
    for (int64_t i = std::min(rank, cut.count) - 1; i >= 0; --i) {
        const double value = std::max(0.0, theta[i]), wide = value - beside;
        double leak = 0, mixed = 0, spread = 1, sine2 = 1;
        bool apart = wide > 0;
        for (int64_t j = rank; j < cut.count && apart; ++j) {
            const double gap = value - theta[j];
            apart = gap > 0;
            leak += rho[j] * rho[j] / (gap * wide);
            spread += rho[j] * rho[j] / (gap * gap);
            mixed += turn * turn / (gap * gap);
        }
        if (apart && leak < 1) {
            const double sine = rho[i] / (wide * (1 - leak));
            sine2 = std::min(1.0, sine * sine * spread + mixed);
        }
        tail += rho[i] * rho[i];
        const double most = value + std::sqrt(tail);  // of the eigenvalue
        error += (most + std::min(most, cut.count > rank ? theta[rank] + rho[rank] : cut.upper)) * sine2;
        kept += value;
    }
    return kept > 0 ? std::sqrt(error / kept) : 0;
}

double energy_bound(const double* theta, const double* rho, const Cut& cut) {
    const double beside = complement_bound(theta, rho, cut);
    double lost = 0;
    for (int64_t j = 0; j < cut.count; ++j) {
        const double gap = theta[cut.count - 1] - beside;
        lost += gap > 0 ? std::min(rho[j], 2 * rho[j] * rho[j] / gap) : rho[j];
    }
    return lost;
}

}  // namespace lors
