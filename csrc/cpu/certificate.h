// What a block Krylov space proves about a truncated SVD. docs/certificate.md has the argument.
//
// G = A.T A, of which only the space is known: a basis Q with G Q = Q T + Q' B, Q' being the next block. The eigenpairs
// (theta, s) of T are the Ritz pairs, B s their residuals. An eigenvector u of G with eigenvalue lambda has
//
//     s_j . Q.T u = (B s_j) . (Q'.T u) / (lambda - theta_j)
//
// of Ritz vector j, and from these its part in the start block follows. The start was drawn at random, so that part is
// not small, or else u was missed by bad luck, whose probability `unseen` bounds.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "eigh.h"

namespace lors {

constexpr double kErrorBound = 9.5e-6;  // of L, relative; the contract is 1e-5, rounding of the factors included
constexpr double kEnergyBound = 5e-7;   // of ||delta - L||^2, relative; the contract is 1e-6
constexpr double kEqual = 1.9e-6;       // relative difference below which two theta count as equal: 1e-6 of sigma
constexpr double kUnseen = 1e-3;        // probability with which an eigenvector may have been missed
constexpr double kCopy = 1e-4;          // the same for one more copy of a value that was found; rounding allows no less
constexpr int64_t kExtra = 12;          // Ritz pairs beyond the wanted ones that are looked at

// Rounding of products with G and of the orthogonalisation, its part along one direction, several times what was
// measured: of what lies near an eigenvalue lambda, relative to sqrt(lambda theta_1); and of anything, relative to
// theta_1.
template <class T>
constexpr double kRounding = sizeof(T) == 4 ? 1e-7 : 2e-16;
template <class T>
constexpr double kGround = sizeof(T) == 4 ? 1e-9 : 1e-17;
// The same of the Ritz values themselves, which may mix what was rounded at the height of theta_1. Twice it, which
// `above` adds, is more than was seen on clusters far below it.
template <class T>
constexpr double kBlur = sizeof(T) == 4 ? 5e-8 : 1e-16;
template <class T>
double noise_near(double lambda, double first) {
    return kRounding<T> * std::sqrt(std::max(0.0, lambda) * first) + kGround<T> * first;
}

// No eigenvalue of G but `count` of them lies above `upper`, which lies below as many Ritz values.
struct Cut {
    int64_t count;
    double upper;
};

class Spectrum {
  public:
    // ritz.vectors: of each pair its entries in the `starts` random vectors, then those in the newest block.
    //   below  [width, width], B: next block = image @ inverse(below)
    // complete: the basis spans the whole space of n dimensions.
    Spectrum(const Eigen& ritz, int64_t starts, const double* below, int64_t width, int64_t n,
             double (*noise)(double, double), double blur, bool complete);

    int64_t size() const { return static_cast<int64_t>(theta.size()); }

    // The probability that the start had too little of an eigenvector of value `lambda`, besides those of the first
    // `found` Ritz values, for the space to show it.
    double unseen(double lambda, int64_t found) const;

    // Whether the first `count` Ritz values are all that there is above some value; the lowest that could be shown.
    std::optional<Cut> cut(int64_t count) const;

    // Where a Ritz value of this size may lie without rounding, at most.
    double above(double value) const { return value + 2 * blur(value); }

    // What rounding does to a residual near `lambda`.
    double noise(double lambda) const { return noise_(lambda, std::max(0.0, theta[0])); }

    std::vector<double> theta, rho;  // Ritz values, largest first, and the norms of their residuals in T
    std::vector<double> residual;    // what may be measured of the latter: rounding comes on top

  private:
    int64_t starts_, width_, n_;
    // What it does to a Ritz value.
    double blur(double lambda) const { return noise(lambda) + blur_ * std::max(0.0, theta[0]); }

    double (*noise_)(double lambda, double first);
    double blur_;
    bool complete_;
    std::vector<double> first_;  // [size, starts]: entries in the start vectors
    std::vector<double> ends_;   // [size, width]: residual in terms of the next block
    std::vector<double> share_;  // [size]: how much of the start, 1 being the average
};

// A bound on ||A V V.T - L|| / ||L||, V the first `rank` of `cut.count` vectors whose Rayleigh quotients `theta` and
// residual norms `rho` were measured, all of them rotated until V.T G V is diagonal up to `turn`.
double error_bound(const double* theta, const double* rho, int64_t rank, const Cut& cut, double turn);

// A bound on how much less energy than the optimum the first `cut.count` of these vectors capture.
double energy_bound(const double* theta, const double* rho, const Cut& cut);

}  // namespace lors
