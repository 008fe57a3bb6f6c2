// Measured peaks of this processor, see peaks.cpp. Each runs for about `seconds`.
#pragma once

#include <cstdint>

namespace lors {

double multiply_rate(int threads, double seconds);  // float32 operations per second, by multiply-adds in registers
double bfloat16_rate(int threads, double seconds);  // the same by dot products of bfloat16; 0 where there are none
double read_rate(int64_t bytes, int threads,
                 double seconds);  // bytes per second, from `bytes` in equal parts per thread

}  // namespace lors
