// The steps that most people make, each as one loop: an element is read, stepped and written once.
#pragma once
#include "walk.h"

namespace ppsf {
namespace {

// What a direction is divided by.
enum class Second { NOTHING, FACTORED, ELEMENTWISE };

// Of which kind a step is: by its second moment, of an average or of a momentum, with a weight decay by lr.
template <Second SECOND, bool AVERAGES_, bool DECAYS_>
struct Kind {
    static constexpr bool DIVIDES = SECOND != Second::NOTHING, FACTORED = SECOND == Second::FACTORED,
                          ELEMENTWISE = SECOND == Second::ELEMENTWISE, AVERAGES = AVERAGES_, DECAYS = DECAYS_;
};

using Default = Kind<Second::FACTORED, true, false>;

template <class KIND>
struct Common {
    float across, eps, q, advance, weight, amount, delta, decay, beta1, momentum_weight, beta2, square_weight;
    bool from_y;
    uint32_t index, key;

    Common(const Piece& piece, const Numbers& c, const Block& b)
        : across(b.across), eps(c.of[D_EPS]), q(c.of[Q]), advance(c.advance), amount(c.amount), delta(c.of[DELTA]),
          decay(c.of[WEIGHT_DECAY]), beta1(c.of[BETA1]), momentum_weight(c.of[MOMENTUM_WEIGHT]), beta2(c.of[BETA2]),
          square_weight(c.of[SQUARE_WEIGHT]), from_y(c.of[AVERAGE] < 0.5f), index(uint32_t(b.index)), key(c.key) {
        weight = from_y ? c.of[AVERAGE] : c.of[AVERAGE] - 1;
        if (!KIND::AVERAGES) decay = piece.flags & DECAYS ? c.of[KEEP] : 1;
    }

    // The direction; `m` is the momentum, `v` the elementwise second moment, where there are such.
    template <bool HALF>
    float direction(float g, float along, float& m, float& v) const {
        if constexpr (!KIND::DIVIDES) return g;
        float root = across * along;
        if constexpr (KIND::ELEMENTWISE) {
            v = ema(v, beta2, square_weight, g * g, HALF);
            root = HALF ? as_bf16(__builtin_sqrtf(v)) : __builtin_sqrtf(v);
        }
        if constexpr (!KIND::AVERAGES) g = m = ema(m, beta1, momentum_weight, g, HALF);
        return g / (root + eps);
    }

    // `z` is the momentum where nothing is averaged.
    template <bool HALF>
    void move(float g, float along, float& y, float& z, float& v) const {
        float u = direction<HALF>(g, along, z, v);
        if constexpr (KIND::AVERAGES) {
            u = KIND::DECAYS ? fused(y, decay, u * amount) * delta : u * advance;
            y = fused(-u, q, fused(weight, z - y, from_y ? y : z));
            z = z - u;
        } else {
            y = y * decay - u * amount * delta;
        }
    }
};

template <class KIND, bool ROUNDS>
APART void common_step(const Piece& piece, const Numbers& c, const Block& b, const float* g, float* y, float* z, float* v) {
    const Common<KIND> step(piece, c, b);
    const float* along = b.along;
#pragma omp simd
    for (int64_t j = 0; j < b.n; j++) {
        float new_y = y[j], new_z = z[j], new_v = KIND::ELEMENTWISE ? v[j] : 0;
        step.template move<false>(g[j], KIND::FACTORED ? along[j] : 0, new_y, new_z, new_v);
        y[j] = new_y, z[j] = new_z;
        if constexpr (KIND::ELEMENTWISE) v[j] = new_v;
    }
}

// Two neighbours at a time: the halves of 32 bits are floats after a shift and a mask.
typedef uint32_t __attribute__((may_alias, aligned(2))) Pair;
constexpr uint32_t HIGH = 0xffff0000u;

inline uint32_t paired(uint32_t low, uint32_t high) { return (low >> 16) | (high & HIGH); }

template <class KIND, bool ROUNDS>
APART void common_step(const Piece& piece, const Numbers& c, const Block& b, const bf16* g, bf16* y, bf16* z, bf16* v) {
    const Common<KIND> step(piece, c, b);
    // A momentum is rounded as it is averaged.
    constexpr bool ROUNDS_Z = ROUNDS && KIND::AVERAGES;
    const float* along = b.along;
    const Pair* gs = reinterpret_cast<const Pair*>(g);
    Pair *ys = reinterpret_cast<Pair*>(y), *zs = reinterpret_cast<Pair*>(z), *vs = reinterpret_cast<Pair*>(v);
#pragma omp simd
    for (int64_t j = 0; j < b.n / 2; j++) {
        float y0 = float_of(ys[j] << 16), y1 = float_of(ys[j] & HIGH), z0 = float_of(zs[j] << 16), z1 = float_of(zs[j] & HIGH);
        float v0 = 0, v1 = 0;
        if constexpr (KIND::ELEMENTWISE) v0 = float_of(vs[j] << 16), v1 = float_of(vs[j] & HIGH);
        step.template move<true>(float_of(gs[j] << 16), KIND::FACTORED ? along[2 * j] : 0, y0, z0, v0);
        step.template move<true>(float_of(gs[j] & HIGH), KIND::FACTORED ? along[2 * j + 1] : 0, y1, z1, v1);
        const uint32_t at = step.index + 2 * uint32_t(j);
        const uint32_t random0 = ROUNDS ? mix(at ^ step.key) : 0, random1 = ROUNDS ? mix((at + 1) ^ step.key) : 0;
        ys[j] = paired(rounded<ROUNDS>(y0, random0 >> 16), rounded<ROUNDS>(y1, random1 >> 16));
        zs[j] = paired(rounded<ROUNDS_Z>(z0, random0 & 0xffff), rounded<ROUNDS_Z>(z1, random1 & 0xffff));
        if constexpr (KIND::ELEMENTWISE) vs[j] = paired(bits_of(v0), bits_of(v1));
    }
    if (b.n % 2) {
        const int64_t j = b.n - 1;
        float new_y = load(y[j]), new_z = load(z[j]), new_v = KIND::ELEMENTWISE ? load(v[j]) : 0;
        step.template move<true>(load(g[j]), KIND::FACTORED ? along[j] : 0, new_y, new_z, new_v);
        const uint32_t random = ROUNDS ? mix((step.index + uint32_t(j)) ^ step.key) : 0;
        y[j] = bf16(rounded<ROUNDS>(new_y, random >> 16) >> 16);
        z[j] = bf16(rounded<ROUNDS_Z>(new_z, random & 0xffff) >> 16);
        if constexpr (KIND::ELEMENTWISE) store(v + j, new_v);
    }
}

template <class KIND, class T>
APART double common_norm(const Piece& piece, const Numbers& c, const Block& b, const T* g, const T* m, const T* v) {
    constexpr bool HALF = sizeof(T) == sizeof(bf16);
    const Common<KIND> step(piece, c, b);
    const float* along = b.along;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < b.n; j++) {
        float new_m = KIND::AVERAGES ? 0 : load(m[j]), new_v = KIND::ELEMENTWISE ? load(v[j]) : 0;
        const float u = step.template direction<HALF>(load(g[j]), KIND::FACTORED ? along[j] : 0, new_m, new_v);
        sum += u * u;
    }
    return sum;
}

// What a kind of step is computed by.
template <class T>
struct Loops {
    void (*step)(const Piece&, const Numbers&, const Block&, const T* g, T* y, T* z, T* v) = nullptr;
    double (*norm)(const Piece&, const Numbers&, const Block&, const T* g, const T* m, const T* v) = nullptr;
};

template <Second SECOND, class T, bool ROUNDS>
Loops<T> loops_for(int64_t flags) {
    using Momentum = Kind<SECOND, false, false>;
    using Average = Kind<SECOND, true, false>;
    // The norm is that of the direction, before any decay.
    if (!(flags & SCHEDULEFREE)) return {common_step<Momentum, ROUNDS>, common_norm<Momentum, T>};
    if (flags & DECAYS) return {common_step<Kind<SECOND, true, true>, ROUNDS>, common_norm<Average, T>};
    return {common_step<Average, ROUNDS>, common_norm<Average, T>};
}

// Nothing for steps that have no loop of their own.
template <class T, bool ROUNDS>
Loops<T> loops_of(int64_t flags) {
    const bool averages = flags & SCHEDULEFREE, divides = flags & SECOND_MOMENT;
    if (flags & (ATAN2 | COUPLED_DECAY | CAUTIOUS | GRAMS | SGD_PHASE)) return {};
    if (!averages && !(divides && (flags & MOMENTUM))) return {};
    if (averages && (flags & DECAYS) && !(flags & DECAYS_BY_LR)) return {};
    if (!divides) {
        using Average = Kind<Second::NOTHING, true, false>;
        using Decaying = Kind<Second::NOTHING, true, true>;
        if constexpr (ROUNDS) return {};
        else if (flags & DECAYS) return {common_step<Decaying, false>, nullptr};
        else return {common_step<Average, false>, nullptr};
    }
    return flags & FACTORED ? loops_for<Second::FACTORED, T, ROUNDS>(flags) : loops_for<Second::ELEMENTWISE, T, ROUNDS>(flags);
}

}  // namespace
}  // namespace ppsf
