// One vector vocabulary for every instruction set.
//
// Each extension module is this source compiled once more with other -m flags (see setup.py), so "which instruction
// set" is answered by the compiler's own macros and no symbol is shared between the builds. GCC and Clang vector types
// give arithmetic; only what they cannot express (half conversion, horizontal sums) is written per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#if !defined(__clang__)  // GCC 12 warns about its own header
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../common/views.h"

namespace lors {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr const char* kIsa = "avx512";
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr const char* kIsa = "avx2";
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr const char* kIsa = "neon";
#else
constexpr int kVectorBytes = 16;
constexpr const char* kIsa = "portable";
#endif

// Before a loop whose arrays do not overlap, which no compiler can know.
#if defined(__clang__)
#define LORS_NO_OVERLAP _Pragma("clang loop vectorize(assume_safety)")
#else
#define LORS_NO_OVERLAP _Pragma("GCC ivdep")
#endif

template <class T>
struct Simd;
template <>
struct Simd<float> {
    typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Simd<double> {
    typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename Simd<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));

// Buffers are padded so that inner loops have no tails: every row starts on a multiple of 64 bytes and is filled with
// zeros up to the next one.
constexpr int64_t kPad = 16;
constexpr int64_t padded(int64_t n) {
    return (n + kPad - 1) / kPad * kPad;
}

template <class T>
inline Vec<T> load(const T* p) {
    Vec<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class T>
inline void store(T* p, Vec<T> v) {
    std::memcpy(p, &v, sizeof v);
}
// Compilers fold a load into every use of its value, and a load costs as much as a multiply-add; this one is used
// often.
template <class V>
inline void keep_in_register([[maybe_unused]] V& value) {
#if defined(__AVX512F__)
    asm("" : "+v"(value));
#elif defined(__AVX__)
    asm("" : "+x"(value));
#endif
}

template <class T>
inline Vec<T> splat(T value) {
    return value - Vec<T>{};
}

// Whether multiply_add rounds once.
#if defined(__AVX512F__) || defined(__AVX2__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

// a * b + c with one rounding where the instruction set has it, and never a choice of the compiler's: two callers that
// must see the same bits use this instead of operators, which may or may not be contracted.
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vec<float>>(_mm512_fmadd_ps(a, b, c));
#elif defined(__AVX2__)
    return reinterpret_cast<Vec<float>>(_mm256_fmadd_ps(a, b, c));
#elif defined(__aarch64__)
    const auto neon = [](Vec<float> v) { return reinterpret_cast<float32x4_t>(v); };
    return reinterpret_cast<Vec<float>>(vfmaq_f32(neon(c), neon(a), neon(b)));
#else
    return a * b + c;  // baseline x86-64 has nothing to contract it to
#endif
}

// --- half precision -------------------------------------------------------------------------------------------------

inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t exponent = (h >> 10) & 0x1fu;
    const uint32_t mantissa = h & 0x3ffu;
    uint32_t bits;
    float value;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | (mantissa << 13);
    } else if (exponent) {
        bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    } else {  // subnormal: mantissa * 2^-24 is exact in float32
        value = static_cast<float>(mantissa) * 0x1p-24f;
        std::memcpy(&bits, &value, 4);
        bits |= sign;
    }
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t float_to_half(float value) {  // round to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00u;
    if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds past 65504
    if (bits < 0x38800000u) {                        // below 2^-14: let the float unit round to multiples of 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        uint32_t shifted;
        std::memcpy(&shifted, &magnitude, 4);
        return sign | static_cast<uint16_t>(shifted - 0x3f000000u);
    }
    const uint32_t rounded = bits + 0xfffu + ((bits >> 13) & 1u);
    return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

inline float bfloat_to_float(uint16_t b) {
    const uint32_t bits = static_cast<uint32_t>(b) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t float_to_bfloat(float value) {  // round to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <DType D>
inline float load_one(const void* row, int64_t j) {
    if constexpr (D == DType::kFloat32) {
        float value;
        std::memcpy(&value, static_cast<const char*>(row) + j * 4, 4);
        return value;
    } else {
        uint16_t bits;
        std::memcpy(&bits, static_cast<const char*>(row) + j * 2, 2);
        return D == DType::kFloat16 ? half_to_float(bits) : bfloat_to_float(bits);
    }
}

template <DType D>
inline Vec<float> load_vector(const void* row, int64_t j) {
    if constexpr (D == DType::kFloat32) {
        return load(reinterpret_cast<const float*>(row) + j);
    } else {
        const uint16_t* p = static_cast<const uint16_t*>(row) + j;
#if defined(__AVX512F__)
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        if constexpr (D == DType::kFloat16) return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(bits));
        return reinterpret_cast<Vec<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#elif defined(__AVX2__)
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        if constexpr (D == DType::kFloat16) return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(bits));
        return reinterpret_cast<Vec<float>>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#elif defined(__aarch64__)
        const uint16x4_t bits = vld1_u16(p);
        if constexpr (D == DType::kFloat16)
            return reinterpret_cast<Vec<float>>(vcvt_f32_f16(vreinterpret_f16_u16(bits)));
        return reinterpret_cast<Vec<float>>(vshlq_n_u32(vmovl_u16(bits), 16));
#else
        Vec<float> v;
        for (int lane = 0; lane < kLanes<float>; ++lane) v[lane] = load_one<D>(p, lane);
        return v;
#endif
    }
}

// --- horizontal sums ------------------------------------------------------------------------------------------------

// sums[c] = sum of the lanes of v[c], c = 0..3.
inline void sum_lanes(const Vec<float>* v, float* sums) {
#if defined(__AVX512F__) || defined(__AVX2__)
    __m256 half[4];
    for (int c = 0; c < 4; ++c) {
#if defined(__AVX512F__)
        const __m512 whole = reinterpret_cast<__m512>(v[c]);
        half[c] = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
#else
        half[c] = reinterpret_cast<__m256>(v[c]);
#endif
    }
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
#else
    for (int c = 0; c < 4; ++c) sums[c] = (v[c][0] + v[c][1]) + (v[c][2] + v[c][3]);
#endif
}

inline void sum_lanes(const Vec<double>* v, double* sums) {
    for (int c = 0; c < 4; ++c) {
        double total = 0;
        for (int lane = 0; lane < kLanes<double>; ++lane) total += v[c][lane];
        sums[c] = total;
    }
}

// --- transposition --------------------------------------------------------------------------------------------------

// out[c, r] = in[r, c] for a 16 x 16 tile; steps are in elements.
inline void transpose_tile(const float* in, int64_t in_step, float* out, int64_t out_step) {
#if defined(__AVX512F__)
    __m512 a[16], b[16];
    for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_ps(in + r * in_step);
    for (int r = 0; r < 16; r += 2) {
        b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
    }
    for (int r = 0; r < 16; r += 4) {
        for (int h = 0; h < 2; ++h) {
            const __m512d low = _mm512_castps_pd(b[r + h]), high = _mm512_castps_pd(b[r + h + 2]);
            a[r + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            a[r + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    for (int c = 0; c < 4; ++c) {  // a[4 g + c] now holds columns c, c + 4, c + 8, c + 12 of rows 4 g .. 4 g + 3
        const __m512 even = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88),
                     odd = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
        const __m512 even2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
        const __m512 odd2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
        _mm512_storeu_ps(out + (c + 0) * out_step, _mm512_shuffle_f32x4(even, even2, 0x88));
        _mm512_storeu_ps(out + (c + 4) * out_step, _mm512_shuffle_f32x4(odd, odd2, 0x88));
        _mm512_storeu_ps(out + (c + 8) * out_step, _mm512_shuffle_f32x4(even, even2, 0xdd));
        _mm512_storeu_ps(out + (c + 12) * out_step, _mm512_shuffle_f32x4(odd, odd2, 0xdd));
    }
#else
    for (int c = 0; c < 16; ++c) {
        for (int r = 0; r < 16; ++r) out[c * out_step + r] = in[r * in_step + c];
    }
#endif
}

// --- selection ------------------------------------------------------------------------------------------------------

// Appends keys[j] for which low <= keys[j] <= high to out[count...] and returns the new count; at most kLanes<float>
// elements past the last one written are clobbered.
inline int64_t append_between(const VecU32 keys, uint32_t low, uint32_t high, uint32_t* out, int64_t count) {
#if defined(__AVX512F__)
    const __m512i k = reinterpret_cast<__m512i>(keys);
    const __m512i offset = _mm512_sub_epi32(k, _mm512_set1_epi32(static_cast<int>(low)));
    const __mmask16 hit = _mm512_cmple_epu32_mask(offset, _mm512_set1_epi32(static_cast<int>(high - low)));
    _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(hit, k));
    return count + __builtin_popcount(hit);
#else
    for (int lane = 0; lane < kLanes<float>; ++lane) {
        out[count] = keys[lane];
        count += keys[lane] - low <= high - low;
    }
    return count;
#endif
}

}  // namespace lors
