// Truncated SVDs of matrices from standard input, results to standard output: for processors without Python here.
//   in   int64 rows, cols, rank, seed; float32 [rows, cols]
//   out  int64 method, passes, unique, overflows; float64 residual; float32 left [rows, rank], right [cols, rank]
#include <cstdio>
#include <vector>

#include "cpu/ops.h"

namespace {

template <class T>
bool read(std::vector<T>& values) {
    return std::fread(values.data(), sizeof(T), values.size(), stdin) == values.size();
}

template <class T>
void write(const std::vector<T>& values) {
    std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

}  // namespace

int main() {
    for (std::vector<int64_t> head(4); read(head);) {
        const int64_t m = head[0], n = head[1], rank = head[2];
        std::vector<float> a(m * n), left(m * rank), right(n * rank), sigma(rank);
        if (!read(a)) return 1;
        const lors::Matrix tuned{a.data(), lors::DType::kFloat32, m, n, n},
            zeros{nullptr, lors::DType::kFloat32, m, n, n};
        const lors::SvdResult svd = lors::truncated_svd(zeros, tuned, rank, static_cast<uint64_t>(head[3]), left.data(),
                                                        right.data(), sigma.data(), 1);
        write<int64_t>({static_cast<int64_t>(svd.method), svd.passes, svd.unique, svd.overflows});
        write<double>({svd.residual});
        write(left);
        write(right);
    }
    return 0;
}
