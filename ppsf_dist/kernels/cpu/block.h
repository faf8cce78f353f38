// The formulas on a block: consecutive elements of one parameter, few enough for the first-level cache. In the order of
// operations of ppsf_dist/kernels/eager/tile.py and passes.py, so that the bits agree.
#pragma once
#include "element.h"
#include "plan.h"

namespace ppsf {

constexpr int64_t BLOCK = 1024;

// Once in the library, whoever calls it: it compiles in a second.
#define APART __attribute__((noinline)) static

alignas(64) const float ZEROS[BLOCK] = {};

// The numbers of the parameter that a piece belongs to.
struct Numbers {
    float of[COEFFICIENTS];
    float amount, mask, advance;
    uint32_t key;
};

struct Block {
    int64_t at;       // first element, within the piece
    int64_t n;
    int64_t index;    // of the first element in the flattened parameter
    int64_t sample;   // where its first sample stands among the piece's
    int64_t phase, count;  // its first sampled element, and how many there are
    float across;     // across * along[j] is the root of the factored second moment
    const float* along;
};

// Where a piece lies.
template <class T>
struct Memory {
    T *y, *z, *m, *v;
    const T* g;
    const void* p0;
    void* s;
    T* packed;

    const T* gradient(int64_t at) const { return g ? g + at : reinterpret_cast<const T*>(ZEROS); }
};

// The elements of a block, as floats: where they lie, or copies.
struct Floats {
    const float *g, *y, *z, *m, *v;
    alignas(64) float copies[5][BLOCK];
};

template <class T>
inline const float* floats(const T* from, int64_t n, float* beside) {
    if constexpr (sizeof(T) == sizeof(float)) {
        return from;
    } else {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) beside[j] = load(from[j]);
        return beside;
    }
}

// What a step reads of a block; only the gradient, and the weights where they are added to it, without `all`.
template <class T>
void load_block(const Piece& piece, const Numbers& c, const Memory<T>& memory, const Block& b, bool all, Floats& f) {
    auto of = [&](const T* from, int which) { return from ? floats(from + b.at, b.n, f.copies[which]) : nullptr; };
    f.g = floats(memory.gradient(b.at), b.n, f.copies[0]);
    f.y = all || (piece.flags & COUPLED_DECAY) ? of(memory.y, 1) : nullptr;
    if (piece.flags & COUPLED_DECAY) {
        const float decay = c.of[WEIGHT_DECAY], *y = f.y, *g = f.g;
#pragma omp simd
        for (int64_t j = 0; j < b.n; j++) f.copies[0][j] = y[j] * decay + g[j];
        f.g = f.copies[0];
    }
    f.z = all ? of(memory.z, 2) : nullptr, f.m = of(memory.m, 3), f.v = of(memory.v, 4);
}

// beta * old + weight * x, rounded as it is stored: once, or twice in 16 bits.
inline float ema(float old, float beta, float weight, float x, bool half) {
    return half ? as_bf16(as_bf16(old * beta) + x * weight) : fused(x, weight, old * beta);
}

// The same for a block. Here and below no switch is asked inside a loop: then the compiler makes vectors of it.
APART void ema(const float* old, float beta, float weight, const float* x, int64_t n, bool half, float* after) {
    if (half)
#pragma omp simd
        for (int64_t j = 0; j < n; j++) after[j] = ema(old[j], beta, weight, x[j], true);
    else
#pragma omp simd
        for (int64_t j = 0; j < n; j++) after[j] = ema(old[j], beta, weight, x[j], false);
}

// What a step makes of a block beside the weights: the direction in units of gain, and the moments after it.
struct Direction {
    alignas(64) float u[BLOCK], m[BLOCK], v[BLOCK];
};

inline void momentum(const Piece& piece, const Numbers& c, const Floats& f, int64_t n, float* after) {
    ema(f.m, c.of[BETA1], c.of[MOMENTUM_WEIGHT], f.g, n, piece.flags & WEIGHTS_IN_BF16, after);
}

inline float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; }

APART void direction(const Piece& piece, const Numbers& c, const Floats& f, const Block& b, Direction& d) {
    const int64_t flags = piece.flags, n = b.n;
    const float* g = f.g;
    if (!(flags & SECOND_MOMENT)) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) d.u[j] = g[j];
        return;
    }
    if (flags & FACTORED) {
        const float across = b.across, *along = b.along;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) d.u[j] = across * along[j];
    } else {
        const bool half = flags & WEIGHTS_IN_BF16;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) d.u[j] = g[j] * g[j];
        ema(f.v, c.of[BETA2], c.of[SQUARE_WEIGHT], d.u, n, half, d.v);
#pragma omp simd
        for (int64_t j = 0; j < n; j++) d.u[j] = __builtin_sqrtf(d.v[j]);
        if (half)
#pragma omp simd
            for (int64_t j = 0; j < n; j++) d.u[j] = as_bf16(d.u[j]);
        if (flags & SGD_PHASE)
#pragma omp simd
            for (int64_t j = 0; j < n; j++) d.u[j] *= c.of[ROOT];
    }
    const float* numerator = g;
    alignas(64) float other[BLOCK];
    if (!(flags & SCHEDULEFREE) && (flags & MOMENTUM)) {
        momentum(piece, c, f, n, d.m);
        numerator = d.m;
        if (flags & (CAUTIOUS | GRAMS)) {
            numerator = other;
            if (flags & CAUTIOUS)
#pragma omp simd
                for (int64_t j = 0; j < n; j++) other[j] = d.m[j] * (g[j] * d.m[j] > 0 ? 1.0f : 0.0f);
            else
#pragma omp simd
                for (int64_t j = 0; j < n; j++) other[j] = sign(g[j]) * __builtin_fabsf(d.m[j]);
        }
    } else if (flags & ATAN2) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) other[j] = g[j] * c.of[D];
        numerator = other;
    }
    const float eps = c.of[D_EPS];
    if (flags & ATAN2)
#pragma omp simd
        for (int64_t j = 0; j < n; j++) d.u[j] = scaled_atan2(numerator[j], d.u[j]);
    else
#pragma omp simd
        for (int64_t j = 0; j < n; j++) d.u[j] = numerator[j] / (d.u[j] + eps);
}

// The direction with StableAdamW, the early mask and the weight decay of Schedule-Free.
APART void finish(const Piece& piece, const Numbers& c, const float* y, int64_t n, float* u) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) u[j] *= c.amount;
    constexpr int64_t adds = SCHEDULEFREE | DECAYS | DECAYS_BY_LR;
    if ((piece.flags & adds) == adds)
#pragma omp simd
        for (int64_t j = 0; j < n; j++) u[j] = fused(y[j], c.of[WEIGHT_DECAY], u[j]);
}

// The step of y, to be subtracted, under the Schedule-Free forms of cautious and Grams.
APART void masked_step(const Numbers& c, const float* u, const float* y, const float* z, int64_t n, float* step) {
    const float share = c.of[Q] * c.of[DELTA];
#pragma omp simd
    for (int64_t j = 0; j < n; j++) step[j] = fused(u[j], share, (y[j] - z[j]) * c.of[AVERAGE]);
}

// torch.lerp.
inline float lerp(float from, float to, float weight) {
    return weight < 0.5f ? fused(weight, to - from, from) : fused(weight - 1, to - from, to);
}

// y and z after a step along u.
APART void move(const Piece& piece, const Numbers& c, const float* y, const float* z, int64_t n, float* u, float* new_y,
                float* new_z) {
    const int64_t flags = piece.flags;
    const float delta = c.of[DELTA], q = c.of[Q];
    const bool decays_apart = (flags & DECAYS) && !(flags & DECAYS_BY_LR);
    if (!(flags & SCHEDULEFREE)) {
        finish(piece, c, y, n, u);
        const float keep = c.of[KEEP];
        if (flags & DECAYS)
#pragma omp simd
            for (int64_t j = 0; j < n; j++) new_y[j] = y[j] * keep - u[j] * delta;
        else
#pragma omp simd
            for (int64_t j = 0; j < n; j++) new_y[j] = y[j] - u[j] * delta;
        return;
    }
    if (flags & (CAUTIOUS | GRAMS)) {
        alignas(64) float step[BLOCK];
        finish(piece, c, y, n, u);
        masked_step(c, u, y, z, n, step);
        if (flags & CAUTIOUS)
#pragma omp simd
            for (int64_t j = 0; j < n; j++) new_y[j] = y[j] - step[j] * (u[j] * step[j] > 0 ? 1.0f : 0.0f) * c.mask;
        else
#pragma omp simd
            for (int64_t j = 0; j < n; j++)
                new_y[j] = y[j] - __builtin_fabsf(step[j]) * sign(u[j]);
#pragma omp simd
        for (int64_t j = 0; j < n; j++) u[j] *= delta;
    } else {
        if (flags & DECAYS) {
            finish(piece, c, y, n, u);
#pragma omp simd
            for (int64_t j = 0; j < n; j++) u[j] *= delta;
        } else {
#pragma omp simd
            for (int64_t j = 0; j < n; j++) u[j] *= c.advance;
        }
#pragma omp simd
        for (int64_t j = 0; j < n; j++) new_y[j] = fused(-u[j], q, lerp(y[j], z[j], c.of[AVERAGE]));
    }
#pragma omp simd
    for (int64_t j = 0; j < n; j++) new_z[j] = z[j] - u[j];
    if (decays_apart) {
        const float decay = c.of[WEIGHT_DECAY], share = decay * q;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
            new_z[j] = fused(-y[j], decay, new_z[j]);
            new_y[j] = fused(-y[j], share, new_y[j]);
        }
    }
}

constexpr int64_t SAMPLES = 1024;

template <int64_t STEP, class A>
inline void gather_each(const A* from, int64_t count, A* to) {
    for (int64_t m = 0; m < count; m++) to[m] = from[m * STEP];
}

// Every so-manyth element.
template <class A>
APART void gather_as_stored(const A* from, int64_t count, int64_t slice_p, A* to) {
    if (slice_p == 11) return gather_each<11>(from, count, to);
    for (int64_t m = 0; m < count; m++) to[m] = from[m * slice_p];
}

// The same as floats.
template <class A>
APART void gather(const A* from, int64_t count, int64_t slice_p, float* to) {
    if constexpr (sizeof(A) == sizeof(float)) return gather_as_stored(from, count, slice_p, to);
    alignas(64) A beside[SAMPLES];
    gather_as_stored(from, count, slice_p, beside);
    for (int64_t m = 0; m < count; m++) to[m] = load(beside[m]);
}

// Prodigy's s after this step: from one sample of it and of the gradient, as a float and as it is stored.
struct GradientSum {
    float beta3, weight;

    // Where both have 16 bits, torch rounds the weight to their dtype.
    GradientSum(const Piece& piece, const Numbers& c) : beta3(c.of[BETA3]), weight(c.of[S_WEIGHT]) {
        constexpr int64_t both = WEIGHTS_IN_BF16 | SAMPLES_IN_BF16;
        if ((piece.flags & both) == both) weight = as_bf16(weight);
    }

    float after(float s, float g) const { return s * beta3 + g * weight; }
    float after(bf16 s, float g) const { return as_bf16(as_bf16(load(s) * beta3) + g * weight); }
};

inline void keep(float* at, float x) { *at = x; }
inline void keep(bf16* at, float x) { *at = bf16(bits_of(x) >> 16); }

// Sums over samples: of the gradient, of the point where it was taken, and of p0 and s as they are stored. The difference
// of points is rounded to bf16 where both are stored so.
template <bool ROUNDS, class S>
void sample_sums_of(const Piece& piece, const Numbers& c, const float* g, const float* point, const S* p0, const S* s,
                    int64_t count, double* sums) {
    const auto difference = [&](int64_t m) {
        const float apart = load(p0[m]) - point[m];
        return ROUNDS ? as_bf16(apart) : apart;
    };
    double dot = 0;
    if (piece.flags & SPEED) {
        double l1 = 0, square = 0;
#pragma omp simd reduction(+ : dot, l1, square)
        for (int64_t m = 0; m < count; m++) {
            const float apart = difference(m);
            dot += double(g[m] * apart);
            l1 += double(__builtin_fabsf(apart));
            square += double(apart * apart);
        }
        sums[DELTA_L1] += l1;
        sums[DELTA_SQUARE] += square;
    } else {
        const GradientSum sum(piece, c);
        float length = 0;  // nothing cancels here
#pragma omp simd reduction(+ : dot, length)
        for (int64_t m = 0; m < count; m++) {
            dot += double(g[m] * difference(m));
            length += __builtin_fabsf(sum.after(s[m], g[m]));
        }
        sums[S_L1] += double(length);
    }
    sums[DOT] += dot;
}

template <class S>
APART void sample_sums(const Piece& piece, const Numbers& c, const float* g, const float* point, const S* p0, const S* s,
                       int64_t count, double* sums) {
    constexpr bool HALF = sizeof(S) == sizeof(bf16);
    if (HALF && (piece.flags & WEIGHTS_IN_BF16)) sample_sums_of<HALF>(piece, c, g, point, p0, s, count, sums);
    else sample_sums_of<false>(piece, c, g, point, p0, s, count, sums);
}

template <class S>
APART void update_s(const Piece& piece, const Numbers& c, const float* g, int64_t count, S* s) {
    const GradientSum sum(piece, c);
#pragma omp simd
    for (int64_t m = 0; m < count; m++) keep(s + m, sum.after(s[m], g[m]));
}

}  // namespace ppsf
