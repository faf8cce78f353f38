// Pass 3: y, z, the elementwise moments and s after the step; and samples of z, packed.
#pragma once
#include "pass_2.h"

namespace ppsf {
namespace {

APART void store_floats(const float* from, int64_t n, float* to) {
    for (int64_t j = 0; j < n; j++) to[j] = from[j];
}

APART void store_floats(const float* from, int64_t n, bf16* to) {
    for (int64_t j = 0; j < n; j++) to[j] = bf16(rounded<false>(from[j], 0) >> 16);
}

// y and z in their dtype; z may not be there.
template <class T, bool ROUNDS>
void store_block(const Numbers& c, const Block& b, const float* new_y, const float* new_z, T* y, T* z) {
    if constexpr (ROUNDS) {
        alignas(64) uint32_t random[BLOCK];
        const uint32_t index = uint32_t(b.index), key = c.key;
        for (int64_t j = 0; j < b.n; j++) random[j] = mix((index + uint32_t(j)) ^ key);
        for (int64_t j = 0; j < b.n; j++) y[j] = T(rounded<true>(new_y[j], random[j] >> 16) >> 16);
        if (!new_z) return;
        for (int64_t j = 0; j < b.n; j++) z[j] = T(rounded<true>(new_z[j], random[j] & 0xffff) >> 16);
    } else {
        store_floats(new_y, b.n, y);
        if (new_z) store_floats(new_z, b.n, z);
    }
}

// The most common step, at once.
struct Common {
    float across, eps, q, advance, weight;
    bool from_y;
    uint32_t key;

    Common(const Numbers& c, const Block& b)
        : across(b.across), eps(c.of[D_EPS]), q(c.of[Q]), advance(c.advance), from_y(c.of[AVERAGE] < 0.5f), key(c.key) {
        weight = from_y ? c.of[AVERAGE] : c.of[AVERAGE] - 1;
    }

    void move(float g, float along, float& y, float& z) const {
        const float v = g / (across * along + eps) * advance;
        y = fused(-v, q, fused(weight, z - y, from_y ? y : z));
        z = z - v;
    }
};

template <bool ROUNDS>
__attribute__((noinline)) void common_step(const Numbers& c, const Block& b, const float* g, float* y, float* z) {
    const Common step(c, b);
    const float* along = b.along;
#pragma omp simd
    for (int64_t j = 0; j < b.n; j++) {
        float new_y = y[j], new_z = z[j];
        step.move(g[j], along[j], new_y, new_z);
        y[j] = new_y, z[j] = new_z;
    }
}

// The same of short lines of a matrix, each with its own `across`; from y on or from z on, as ``Common`` says.
template <int64_t N, bool FROM_Y>
void common_lines(const Common& step, const float* across, int64_t stride, const float* along, int64_t lines, const float* g,
                  float* y, float* z) {
    const float eps = step.eps, q = step.q, advance = step.advance, weight = step.weight;
    for (int64_t l = 0; l < lines; l++, g += N, y += N, z += N) {
        const float root = across[l * stride];
#pragma omp simd
        for (int64_t j = 0; j < N; j++) {
            const float v = g[j] / (root * along[j] + eps) * advance, old_y = y[j], old_z = z[j];
            y[j] = fused(-v, q, fused(weight, old_z - old_y, FROM_Y ? old_y : old_z));
            z[j] = old_z - v;
        }
    }
}

template <class T>
using Lines = void (*)(const Common&, const float*, int64_t, const float*, int64_t, const T*, T*, T*);

template <bool FROM_Y>
Lines<float> common_lines_of(int64_t n) {
    if (n == 8) return common_lines<8, FROM_Y>;
    if (n == 16) return common_lines<16, FROM_Y>;
    if (n == 32) return common_lines<32, FROM_Y>;
    return n == 64 ? common_lines<64, FROM_Y> : nullptr;
}

inline Lines<float> common_lines_of(const float*, int64_t n, bool from_y) {
    return from_y ? common_lines_of<true>(n) : common_lines_of<false>(n);
}

inline Lines<bf16> common_lines_of(const bf16*, int64_t, bool) { return nullptr; }

// Two neighbours at a time: the halves of 32 bits are floats after a shift and a mask.
typedef uint32_t __attribute__((may_alias, aligned(2))) Pair;

template <bool ROUNDS>
__attribute__((noinline)) void common_step(const Numbers& c, const Block& b, const bf16* g, bf16* y, bf16* z) {
    const Common step(c, b);
    const float* along = b.along;
    const uint32_t index = uint32_t(b.index), key = c.key;
    const Pair* gs = reinterpret_cast<const Pair*>(g);
    Pair *ys = reinterpret_cast<Pair*>(y), *zs = reinterpret_cast<Pair*>(z);
    constexpr uint32_t HIGH = 0xffff0000u;
#pragma omp simd
    for (int64_t j = 0; j < b.n / 2; j++) {
        float y0 = float_of(ys[j] << 16), y1 = float_of(ys[j] & HIGH), z0 = float_of(zs[j] << 16), z1 = float_of(zs[j] & HIGH);
        step.move(float_of(gs[j] << 16), along[2 * j], y0, z0);
        step.move(float_of(gs[j] & HIGH), along[2 * j + 1], y1, z1);
        const uint32_t at = index + 2 * uint32_t(j);
        const uint32_t random0 = ROUNDS ? mix(at ^ key) : 0, random1 = ROUNDS ? mix((at + 1) ^ key) : 0;
        ys[j] = (rounded<ROUNDS>(y0, random0 >> 16) >> 16) | (rounded<ROUNDS>(y1, random1 >> 16) & HIGH);
        zs[j] = (rounded<ROUNDS>(z0, random0 & 0xffff) >> 16) | (rounded<ROUNDS>(z1, random1 & 0xffff) & HIGH);
    }
    if (b.n % 2) {
        const int64_t j = b.n - 1;
        float new_y = load(y[j]), new_z = load(z[j]);
        step.move(load(g[j]), along[j], new_y, new_z);
        const uint32_t random = ROUNDS ? mix((index + uint32_t(j)) ^ key) : 0;
        y[j] = bf16(rounded<ROUNDS>(new_y, random >> 16) >> 16);
        z[j] = bf16(rounded<ROUNDS>(new_z, random & 0xffff) >> 16);
    }
}

template <class T, bool ROUNDS>
void pass_3(const Plan& plan, const Task& task, double*) {
    const Piece& piece = plan.pieces[task.piece];
    const int64_t flags = piece.flags;
    if (!plan.moments_gate[piece.slot]) return;
    const bool writes = plan.weights_gate[piece.slot];
    const Numbers c = numbers_of(plan, piece.slot);
    const Memory<T> memory = memory_of<T>(plan, piece);
    const bool common = (flags & (COMMON | UNCOMMON | CAUTIOUS | GRAMS | DECAYS)) == COMMON;
    const bool averages = flags & SCHEDULEFREE, sums = (flags & STATISTICS) && !(flags & SPEED);
    alignas(64) float new_y[BLOCK], new_z[BLOCK], of_g[SAMPLES];
    int64_t first_sample = task.sample, samples = 0;
    auto update = [&] {
        if (flags & S_IN_BF16) update_s(piece, c, of_g, samples, static_cast<bf16*>(memory.s) + first_sample);
        else update_s(piece, c, of_g, samples, static_cast<float*>(memory.s) + first_sample);
    };
    const bool matrix = common && writes && (flags & MATRIX) && (flags & FLAT) && piece.axes == 1;
    const auto of_lines = matrix ? common_lines_of(memory.y, piece.n, c.of[AVERAGE] < 0.5f) : nullptr;
    const bool rows = !piece.row_step;
    const int64_t stride = rows ? piece.row_stride[0] : piece.col_stride[0];
    const float *across = plan.factors + (rows ? piece.row : piece.col), *along = plan.factors + (rows ? piece.col : piece.row);
    Floats floats;
    Direction d;
    Block b;
    Blocks blocks(plan, task, (flags & FACTORED) && !of_lines);
    while (blocks.next(b)) {
        if (samples + b.count > SAMPLES) {
            update();
            first_sample += samples, samples = 0;
        }
        T *y = memory.y + b.at, *z = averages ? memory.z + b.at : nullptr;
        if (common && writes) {
            const T* g = memory.gradient(b.at);
            if (of_lines) of_lines(Common(c, b), across + b.at / piece.n * stride, stride, along, b.n / piece.n, g, y, z);
            else common_step<ROUNDS>(c, b, g, y, z);
            if (sums) gather(g + b.phase, b.count, piece.slice_p, of_g + samples);
        } else {
            load_block(piece, c, memory, b, true, floats);
            direction(piece, c, floats, b, d);
            if ((flags & SECOND_MOMENT) && !(flags & FACTORED)) store_floats(d.v, b.n, memory.v + b.at);
            if (!writes) continue;
            if (!averages && (flags & MOMENTUM)) store_floats(d.m, b.n, memory.m + b.at);
            move(piece, c, floats.y, floats.z, b.n, d.u, new_y, new_z);
            store_block<T, ROUNDS>(c, b, new_y, averages ? new_z : nullptr, y, z);
            if (sums) gather(floats.g + b.phase, b.count, piece.slice_p, of_g + samples);
        }
        if (sums) samples += b.count;
        if (memory.packed) gather_as_stored(z + b.phase, b.count, piece.slice_p, memory.packed + b.sample);
    }
    if (samples) update();
}

// The samples of a task, or the first of them, as they lie in z.
template <class T>
bool pack(const Plan& plan, const Task& task, bool only_compares) {
    constexpr int64_t A_FEW = 8;
    const Memory<T> memory = memory_of<T>(plan, plan.pieces[task.piece]);
    const int64_t slice_p = plan.pieces[task.piece].slice_p;
    if (!memory.packed) return true;
    Block b;
    Blocks blocks(plan, task, false);
    while (blocks.next(b)) {
        const int64_t count = only_compares && b.count > A_FEW ? A_FEW : b.count;
        T* packed = memory.packed + b.sample;
        const T* z = memory.z + b.at + b.phase;
        if (only_compares) {
            for (int64_t m = 0; m < count; m++)
                if (memcmp(packed + m, z + m * slice_p, sizeof(T))) return false;
            if (count) return true;
        } else {
            for (int64_t m = 0; m < count; m++) packed[m] = z[m * slice_p];
        }
    }
    return true;
}

}  // namespace
}  // namespace ppsf
