// Block Lanczos on G = A.T A with full reorthogonalisation: a grown basis Q and the projection T = Q.T G Q.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/counter_random.h"
#include "certificate.h"
#include "gram.h"

namespace lors {

template <class T>
class Krylov {
  public:
    // A space of at most `limit` dimensions from `width` random vectors; both are even.
    Krylov(const PackedRows& a, int64_t width, int64_t limit, uint64_t seed, int threads)
        : a_(a),
          n_(a.cols()),
          np_(padded(a.cols())),
          width_(width),
          limit_(limit),
          threads_(threads),
          random_(seed),
          basis_((limit + width) * np_),
          t_(limit * limit),
          below_(0) {
        for (int64_t i = 0; i < width; ++i) draw(i);
    }

    int passes() const { return passes_; }
    int64_t size() const { return size_; }
    int64_t width() const { return width_; }
    bool complete() const { return spanned_ >= n_; }
    bool full() const { return complete() || size_ + width_ > limit_; }

    // One pass: projects G times the newest block, and leaves the next block, orthonormal, behind the basis.
    void expand() {
        const int64_t old = size_, before = newest_, width = width_;
        Buffer<T> image(width * np_), overlaps((old + width) * width);
        gram<T>(a_, row(old), width, image.data(), static_cast<T*>(nullptr), passes_ % 2 == 1, threads_);
        std::vector<double> lengths;  // before what lies in the space is taken out
        for (int64_t c = 0; c < width; ++c) lengths.push_back(norm(&image[c * np_]));
        ++passes_;
        size_ += width;
        newest_ = width;
        spanned_ = live_;
        for (int64_t i = 0; i < size_; ++i)
            std::fill(&t_[i * limit_ + (i < old ? old : 0)], &t_[i * limit_ + size_], 0.0);
        // G maps a block into what it came from, itself and the next one: all but rounding goes with these two.
        for (int64_t first : {std::max<int64_t>(0, old - before), int64_t{0}}) {
            project_out(image.data(), first, overlaps.data());
        }
        symmetrise(old);
        double scale = 0;
        for (int64_t i = 0; i < size_; ++i) scale = std::max(scale, t_[i * limit_ + i]);
        std::copy(image.data(), image.data() + width * np_, basis_.data() + size_ * np_);
        below_.allocate(width * width);
        below_.zero();
        for (int64_t c = 0; c < width; ++c) {
            const double diagonal = t_[(old + c) * limit_ + old + c];
            orthonormalise(c, lengths[static_cast<size_t>(c)], noise_near<T>(diagonal, scale));
        }
    }

    // Adds as many random vectors to the next block as it has: a value may have more copies than the block found.
    bool widen() {
        if (size_ + 2 * width_ > limit_ || live_ + width_ > n_) return false;
        Buffer<T> basis((limit_ + 2 * width_) * np_);
        std::copy(row(0), row(size_ + width_), basis.data());
        basis_ = std::move(basis);
        for (int64_t c = 0; c < width_; ++c) draw(size_ + width_ + c);
        width_ *= 2;
        return true;
    }

    Spectrum spectrum() const {
        std::vector<int64_t> entries;
        for (int64_t start : starts_) {
            if (start < size_) entries.push_back(start);
        }
        const int64_t starts = static_cast<int64_t>(entries.size());
        for (int64_t i = size_ - newest_; i < size_; ++i) entries.push_back(i);
        Buffer<double> t = projection();
        return Spectrum(eigh(t.data(), size_, entries), starts, below_.data(), newest_, n_, noise_near<T>, kBlur<T>,
                        complete());
    }

    // The first `count` Ritz vectors as rows of v [count, np]. Summed in float64: sums of a hundred float32 terms would
    // lose a digit of the residuals.
    void ritz_vectors(int64_t count, double* v) const {
        constexpr int64_t kStrip = 4 * kPad;  // columns of the basis that stay in L2 in float64
        Buffer<double> t = projection();
        const Eigen ritz = eigh_leading(t.data(), size_, count);
        Buffer<double> factors(even(count) * size_), panel(size_ * kStrip), sums(4 * kStrip);
        each_group(even(count), [&](auto group, int64_t first) {
            constexpr int W = decltype(group)::value;
            columns_of<W>(ritz.vectors.data(), count, size_, first, &factors[first * size_]);
        });
        for (int64_t j = 0; j < np_; j += kStrip) {
            const int64_t strip = std::min(kStrip, np_ - j);
            for (int64_t i = 0; i < size_; ++i) {
                for (int64_t k = 0; k < strip; ++k) panel[i * strip + k] = static_cast<double>(row(i)[j + k]);
            }
            each_group(even(count), [&](auto group, int64_t first) {
                constexpr int W = decltype(group)::value;
                sums.zero();
                accumulate<W>(panel.data(), strip, size_, &factors[first * size_], sums.data(), strip);
                for (int64_t c = 0; c < std::min<int64_t>(W, count - first); ++c) {
                    std::copy(&sums[c * strip], &sums[(c + 1) * strip], v + (first + c) * np_ + j);
                }
            });
        }
    }

  private:
    T* row(int64_t i) { return basis_.data() + i * np_; }
    const T* row(int64_t i) const { return basis_.data() + i * np_; }

    Buffer<double> projection() const {
        Buffer<double> copy(size_ * size_);
        for (int64_t i = 0; i < size_; ++i) {
            std::copy(&t_[i * limit_], &t_[i * limit_ + size_], &copy[i * size_]);
        }
        return copy;
    }

    // image -= its projection on the basis from row `from` on, which is added to the last columns of T.
    void project_out(T* image, int64_t from, T* overlaps) {
        const int64_t rows = size_ - from;
        each_group(width_, [&](auto group, int64_t first) {
            constexpr int W = decltype(group)::value;
            dots<W>(row(from), np_, rows, image + first * np_, np_, np_, overlaps);
            for (int64_t i = 0; i < rows; ++i) {
                for (int64_t c = 0; c < W; ++c) {
                    t_[(from + i) * limit_ + size_ - width_ + first + c] += static_cast<double>(overlaps[i * W + c]);
                    overlaps[i * W + c] = -overlaps[i * W + c];
                }
            }
            accumulate<W>(row(from), np_, rows, overlaps, image + first * np_, np_);
        });
    }

    void symmetrise(int64_t old) {
        for (int64_t i = 0; i < size_; ++i) {
            for (int64_t j = std::max(old, i + 1); j < size_; ++j) {
                double& upper = t_[i * limit_ + j];
                if (i >= old) upper = 0.5 * (upper + t_[j * limit_ + i]);
                t_[j * limit_ + i] = upper;
            }
        }
    }

    double dot(const T* x, const T* y) const {
        Vec<T> sum = {};
        for (int64_t j = 0; j < np_; j += kLanes<T>) sum += load(x + j) * load(y + j);
        double total = 0;
        for (int lane = 0; lane < kLanes<T>; ++lane) total += static_cast<double>(sum[lane]);
        return total;
    }
    double norm(const T* x) const { return std::sqrt(dot(x, x)); }
    void subtract(T* x, double factor, const T* y) const {
        const T f = static_cast<T>(factor);
        for (int64_t j = 0; j < np_; j += kLanes<T>) store(x + j, load(x + j) - f * load(y + j));
    }
    void scale(T* x, double factor) const {
        const T f = static_cast<T>(factor);
        for (int64_t j = 0; j < np_; j += kLanes<T>) store(x + j, load(x + j) * f);
    }

    // Makes row `c` of the next block orthonormal to those before; below_ receives the triangular factor. What is no
    // longer than rounding (the space is exhausted, or delta has low rank) is replaced by a random direction.
    void orthonormalise(int64_t c, double length, double floor) {
        T* w = row(size_ + c);
        for (int64_t i = 0; i < c; ++i) {
            const double overlap = dot(w, row(size_ + i));
            below_[i * width_ + c] = overlap;
            subtract(w, overlap, row(size_ + i));
        }
        double left = norm(w);
        if (left > floor && left < 1e-2 * length) {  // cancellation: what remains may lean on the whole basis again
            clean(size_ + c);
            left = norm(w);
        }
        if (left <= floor || live_ >= n_) return draw(size_ + c);
        below_[c * width_ + c] = left;
        scale(w, 1 / left);
        ++live_;
    }

    // Row i becomes a random direction orthogonal to all before; zero once they span everything.
    void draw(int64_t i) {
        T* w = row(i);
        std::fill(w, w + np_, T{});
        if (live_ >= n_) return;
        double before, left;
        int attempt = 0;
        do {
            for (int64_t j = 0; j < n_; ++j) w[j] = static_cast<T>(random_.next());
            before = norm(w);
            clean(i);
            clean(i);
            left = norm(w);
        } while (left <= 1e-3 * before && ++attempt < 8);
        scale(w, 1 / left);
        starts_.push_back(i);
        ++live_;
    }

    void clean(int64_t i) {
        for (int64_t j = 0; j < i; ++j) subtract(row(i), dot(row(i), row(j)), row(j));
    }

    const PackedRows& a_;
    int64_t n_, np_, width_, limit_;
    int threads_;
    Random random_;
    Buffer<T> basis_;              // [limit + width, np]
    Buffer<double> t_;             // [limit, limit], size_ x size_ of it in use
    Buffer<double> below_;         // [width, width]: next block = image @ inverse(below)
    std::vector<int64_t> starts_;  // rows of the basis that were drawn at random
    int64_t size_ = 0;             // rows of the basis that have been multiplied
    int64_t live_ = 0;             // rows that are not zero
    int64_t spanned_ = 0;          // those of them that have been multiplied
    int64_t newest_ = 0;           // rows of the newest block that has been multiplied
    int passes_ = 0;
};

}  // namespace lors
