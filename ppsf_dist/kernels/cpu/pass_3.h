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

// The default step of short lines of a matrix, each with its own `across`, where y moves towards z by less than half.
template <int64_t N>
void common_lines(const Common<Default>& step, const float* across, int64_t stride, const float* along,
                  int64_t lines, const float* g, float* y, float* z) {
    const float eps = step.eps, q = step.q, advance = step.advance, weight = step.weight;
    for (int64_t l = 0; l < lines; l++, g += N, y += N, z += N) {
        const float root = across[l * stride];
#pragma omp simd
        for (int64_t j = 0; j < N; j++) {
            const float v = g[j] / (root * along[j] + eps) * advance, old_y = y[j], old_z = z[j];
            y[j] = fused(-v, q, fused(weight, old_z - old_y, old_y));
            z[j] = old_z - v;
        }
    }
}

template <class T>
using Lines = void (*)(const Common<Default>&, const float*, int64_t, const float*, int64_t, const T*, T*, T*);

inline Lines<float> common_lines_of(const float*, int64_t n) {
    if (n == 8) return common_lines<8>;
    if (n == 16) return common_lines<16>;
    if (n == 32) return common_lines<32>;
    return n == 64 ? common_lines<64> : nullptr;
}

inline Lines<bf16> common_lines_of(const bf16*, int64_t) { return nullptr; }

template <class T, bool ROUNDS>
void pass_3(const Plan& plan, const Task& task, double*) {
    const Piece& piece = plan.pieces[task.piece];
    const int64_t flags = piece.flags;
    if (!plan.moments_gate[piece.slot]) return;
    const bool writes = plan.weights_gate[piece.slot];
    const Numbers c = numbers_of(plan, piece.slot);
    const Memory<T> memory = memory_of<T>(plan, piece);
    const Loops<T> loops = loops_of<T, ROUNDS>(flags);
    const bool averages = flags & SCHEDULEFREE, sums = (flags & STATISTICS) && !(flags & SPEED);
    alignas(64) float new_y[BLOCK], new_z[BLOCK], of_g[SAMPLES];
    int64_t first_sample = task.sample, samples = 0;
    auto update = [&] {
        if (flags & SAMPLES_IN_BF16) update_s(piece, c, of_g, samples, static_cast<bf16*>(memory.s) + first_sample);
        else update_s(piece, c, of_g, samples, static_cast<float*>(memory.s) + first_sample);
    };
    const bool matrix = (flags & (COMMON | UNCOMMON | DECAYS)) == COMMON && loops.step && writes && (flags & FLAT) &&
        is_matrix(piece) && c.of[AVERAGE] < 0.5f;
    const auto of_lines = matrix ? common_lines_of(memory.y, piece.n) : nullptr;
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
        if (loops.step && writes) {
            const T* g = memory.gradient(b.at);
            const Factors& of = blocks.factors;
            if (of_lines)
                of_lines({piece, c, b}, of.across + b.at / piece.n * of.stride, of.stride, of.along, b.n / piece.n, g, y, z);
            else loops.step(piece, c, b, g, y, averages ? z : memory.m + b.at, memory.v + b.at);
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

}  // namespace
}  // namespace ppsf
