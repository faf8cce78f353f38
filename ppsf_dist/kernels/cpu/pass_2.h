// Pass 2: norms of the direction; and the size of the mask of the schedule-free cautious update.
#pragma once
#include "common.h"

namespace ppsf {
namespace {

// The most common direction: a factored second moment, Schedule-Free.
constexpr int64_t COMMON = SCHEDULEFREE | SECOND_MOMENT | FACTORED;
constexpr int64_t UNCOMMON = ATAN2 | COUPLED_DECAY;

// Of four lines of a matrix at once, far from each other: then memory answers for each of them ahead.
template <class T>
__attribute__((noinline)) double common_norms(const T* g, int64_t n, int64_t apart, const float* across, int64_t stride,
                                              const float* along, float eps) {
    const T *g0 = g, *g1 = g0 + apart * n, *g2 = g1 + apart * n, *g3 = g2 + apart * n;
    const float a0 = across[0], a1 = across[apart * stride], a2 = across[2 * apart * stride], a3 = across[3 * apart * stride];
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        const int64_t end = n - begin < BLOCK ? n : begin + BLOCK;
        float sum0 = 0, sum1 = 0;
#pragma omp simd reduction(+ : sum0, sum1)
        for (int64_t j = begin; j < end; j++) {
            const float u0 = load(g0[j]) / (a0 * along[j] + eps), u1 = load(g1[j]) / (a1 * along[j] + eps);
            const float u2 = load(g2[j]) / (a2 * along[j] + eps), u3 = load(g3[j]) / (a3 * along[j] + eps);
            sum0 += u0 * u0 + u1 * u1, sum1 += u2 * u2 + u3 * u3;
        }
        total += double(sum0) + double(sum1);
    }
    return total;
}

// Of short lines, some of them for each rounding to fp64.
template <class T, int64_t N>
double common_norms_of(const T* g, int64_t lines, const float* across, int64_t stride, const float* along, float eps) {
    constexpr int64_t SOME = BLOCK / N;
    double total = 0;
    for (int64_t first = 0; first < lines; first += SOME) {
        const int64_t last = lines - first < SOME ? lines : first + SOME;
        alignas(64) float sums[N] = {};
        for (int64_t l = first; l < last; l++, g += N)
            for (int64_t j = 0; j < N; j++) {
                const float u = load(g[j]) / (across[l * stride] * along[j] + eps);
                sums[j] += u * u;
            }
        for (int64_t j = 0; j < N; j++) total += double(sums[j]);
    }
    return total;
}

// Of four lines of a convolution, as of a matrix; `period` holds some periods of the values of each.
template <class T>
__attribute__((noinline)) double periodic_norms(const T* g, int64_t n, int64_t apart, const float* period, int64_t width,
                                                const float* along, float eps) {
    const T *g0 = g, *g1 = g0 + apart * n, *g2 = g1 + apart * n, *g3 = g2 + apart * n;
    const float *p0 = period, *p1 = p0 + BLOCK, *p2 = p1 + BLOCK, *p3 = p2 + BLOCK;
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += width, g0 += width, g1 += width, g2 += width, g3 += width, along += width) {
        const int64_t count = n - begin < width ? n - begin : width;
        float sum0 = 0, sum1 = 0;
#pragma omp simd reduction(+ : sum0, sum1)
        for (int64_t j = 0; j < count; j++) {
            const float u0 = load(g0[j]) / (p0[j] * along[j] + eps), u1 = load(g1[j]) / (p1[j] * along[j] + eps);
            const float u2 = load(g2[j]) / (p2[j] * along[j] + eps), u3 = load(g3[j]) / (p3[j] * along[j] + eps);
            sum0 += u0 * u0 + u1 * u1, sum1 += u2 * u2 + u3 * u3;
        }
        total += double(sum0) + double(sum1);
    }
    return total;
}

template <class T>
void pass_2(const Plan& plan, const Task& task, double* result) {
    const Piece& piece = plan.pieces[task.piece];
    if (!(piece.flags & OWNED) || !(piece.flags & NEEDS_NORMS)) return;
    const Numbers c = numbers_of(plan, piece.slot);
    const Memory<T> memory = memory_of<T>(plan, piece);
    const bool common = (piece.flags & (COMMON | UNCOMMON)) == COMMON;
    Block b;
    Floats floats;
    Direction d;
    Task rest = task;
    if (common && is_matrix(piece) && memory.g) {
        const Factors of(plan, piece);
        const int64_t lines = task.last_line - task.first_line, apart = lines / 4, stride = of.stride;
        const float *across = of.across + task.first_line * stride, *along = of.along, eps = c.of[D_EPS];
        const T* g = memory.g + task.first_line * piece.n;
        auto of_short = [&](auto norms) { result[UU] += norms(g, lines, across, stride, along, eps), rest.first_line += lines; };
        if (piece.n == 8) of_short(common_norms_of<T, 8>);
        else if (piece.n == 16) of_short(common_norms_of<T, 16>);
        else if (piece.n == 32) of_short(common_norms_of<T, 32>);
        else if (piece.n == 64) of_short(common_norms_of<T, 64>);
        else if (piece.n >= SHORT) {
            for (int64_t l = 0; l < apart; l++)
                result[UU] += common_norms(g + l * piece.n, piece.n, apart, across + l * stride, stride, along, eps);
            rest.first_line += 4 * apart;
        }
    }
    const Periodic periodic(piece);
    if (common && periodic.is && memory.g && piece.n >= SHORT && task.begin == 0 && task.end == piece.n) {
        const int64_t apart = (task.last_line - task.first_line) / 4, width = periodic.width(BLOCK);
        const Run run = {1, 0, periodic.inner};
        alignas(64) float period[4 * BLOCK];
        for (int64_t l = 0; l < apart; l++) {
            const int64_t line = task.first_line + l;
            for (int64_t part = 0; part < 4; part++) {
                const float* values = plan.factors + periodic.first + (line + part * apart) * periodic.stride;
                spread(values, run, 0, piece.n < width ? piece.n : width, period + part * BLOCK);
            }
            result[UU] += periodic_norms(memory.g + line * piece.n, piece.n, apart, period, width,
                                         plan.factors + periodic.along, c.of[D_EPS]);
        }
        rest.first_line += 4 * apart;
    }
    const Loops<T> loops = loops_of<T, false>(piece.flags);
    Blocks blocks(plan, rest, piece.flags & FACTORED);
    while (blocks.next(b)) {
        if (loops.norm) {
            result[UU] += loops.norm(piece, c, b, memory.gradient(b.at), memory.m + b.at, memory.v + b.at);
        } else {
            load_block(piece, c, memory, b, false, floats);
            direction(piece, c, floats, b, d);
            result[UU] += square_sum(d.u, b.n);
        }
    }
}

template <class T>
void count_masks(const Plan& plan, const Task& task, double* result) {
    const Piece& piece = plan.pieces[task.piece];
    if (!(piece.flags & OWNED) || !(piece.flags & CAUTIOUS) || !(piece.flags & SCHEDULEFREE)) return;
    const Numbers c = numbers_of(plan, piece.slot);
    const Memory<T> memory = memory_of<T>(plan, piece);
    alignas(64) float step[BLOCK];
    Block b;
    Floats floats;
    Direction d;
    Blocks blocks(plan, task, piece.flags & FACTORED);
    while (blocks.next(b)) {
        load_block(piece, c, memory, b, true, floats);
        direction(piece, c, floats, b, d);
        finish(piece, c, floats.y, b.n, d.u);
        masked_step(c, d.u, floats.y, floats.z, b.n, step);
        result[LATE_MASK] += double(aligned(d.u, step, b.n));
    }
}

}  // namespace
}  // namespace ppsf
