// One element: how it is stored, and how a stored element is rounded. Same bits as ppsf_dist/algorithm/rounding.py.
#pragma once
#include <stdint.h>
#include <string.h>

namespace ppsf {

using bf16 = uint16_t;

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint32_t stored_bits(float x) { return bits_of(x); }
inline uint32_t stored_bits(bf16 x) { return x; }

inline float load(float x) { return x; }
inline float load(bf16 x) { return float_of(uint32_t(x) << 16); }

// The bits of x to the nearest number of bf16, ties to even, as torch rounds. In 32 bits, which vectors do fastest.
inline uint32_t nearest(float x) {
    const uint32_t bits = bits_of(x);
    return x != x ? 0x7fc00000u : (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
}

inline float as_bf16(float x) { return float_of(nearest(x)); }

inline uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x21F0AAADu;
    x = (x ^ (x >> 15)) * 0xD35A2D97u;
    return x ^ (x >> 15);
}

// The bits of x rounded, of which bf16 keeps the upper half: to the nearest, or up with the probability that makes the
// expectation x. From the largest number of bf16 on nothing is added: infinities and NaN stay what they are, and a finite
// x stays finite.
template <bool STOCHASTIC>
inline uint32_t rounded(float x, uint32_t sixteen_bits) {
    const uint32_t bits = bits_of(x);
    if (!STOCHASTIC) return nearest(x);
    return bits + (int32_t(bits & 0x7fffffff) < 0x7f7f0000 ? sixteen_bits : 0);
}

inline void store(float* at, float x) { *at = x; }
inline void store(bf16* at, float x) { *at = bf16(nearest(x) >> 16); }

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool FUSES = true;
#else
constexpr bool FUSES = false;
#endif

// a * b + c, rounded once where torch's kernels for this instruction set do so.
inline float fused(float a, float b, float c) { return FUSES ? __builtin_fmaf(a, b, c) : a * b + c; }

// The series of atan(t) / t in t^2, from its term number K on.
template <int K>
inline double arc_series(double square) {
    constexpr double term = (K % 2 ? -1.0 : 1.0) / (2 * K + 1);
    if constexpr (K == 12) return term;
    else return term + square * arc_series<K + 1>(square);
}

// 4/pi atan2(a, b) for b >= 0, in fp64, so that one rounding remains.
inline float scaled_atan2(float a, float b) {
    const double tan_of_eighth = 0.41421356237309503, quarter_pi = 0.78539816339744831;
    const double size = __builtin_fabs(double(a)), other = b;
    const bool steep = size > other;
    const double low = steep ? other : size, high = steep ? size : other;
    const double ratio = low / (high > 0 ? high : 1.0);
    const bool folds = ratio > tan_of_eighth;
    const double t = folds ? (ratio - 1) / (ratio + 1) : ratio;
    const double angle = t * arc_series<0>(t * t) + (folds ? quarter_pi : 0.0);
    return __builtin_copysignf(float(steep ? 2 * quarter_pi - angle : angle), a) * 1.2732395f;
}

}  // namespace ppsf
