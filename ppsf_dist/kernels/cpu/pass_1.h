// Pass 1: sums of squares by row and column, and all sums that need nothing of this step.
#pragma once
#include "walk.h"

namespace ppsf {
namespace {

// Sums of neighbours, two by two.
APART void pair_sums(const float* __restrict from, int64_t n, float* __restrict to) {
    for (int64_t i = 0; i < n; i++) to[i] = from[2 * i] + from[2 * i + 1];
}

// Squares of some lines at each of four places, `apart` lines from each other: memory answers for each of them ahead. They
// lie one after the other in `squares`, and are added to `total` along the lines.
template <class T, int64_t N>
APART void squares_of(const T* g, int64_t apart, int64_t count, float* squares, float* total) {
    const T *g0 = g, *g1 = g0 + apart * N, *g2 = g1 + apart * N, *g3 = g2 + apart * N;
    float *s0 = squares, *s1 = s0 + count * N, *s2 = s1 + count * N, *s3 = s2 + count * N;
    for (int64_t l = 0; l < count * N; l += N)
#pragma omp simd
        for (int64_t j = 0; j < N; j++) {
            float x0 = load(g0[l + j]), x1 = load(g1[l + j]), x2 = load(g2[l + j]), x3 = load(g3[l + j]);
            x0 *= x0, x1 *= x1, x2 *= x2, x3 *= x3;
            s0[l + j] = x0, s1[l + j] = x1, s2[l + j] = x2, s3[l + j] = x3;
            total[j] += (x0 + x1) + (x2 + x3);
        }
}

// Of some lines of squares: the sum of each, and added to `along` the sums of their elements.
template <class T, int64_t N>
void line_sums_of(const T* g, int64_t lines, float* of_line, float* along) {
    constexpr int64_t some = BLOCK / N / 4;
    const int64_t apart = lines / 4;
    alignas(64) float total[N] = {}, squares[BLOCK], halves[BLOCK / 2];
    for (int64_t first = 0; first < apart; first += some) {
        const int64_t count = apart - first < some ? apart - first : some;
        squares_of<T, N>(g + first * N, apart, count, squares, total);
        // Half as many in each round, until there is one for each line.
        float *from = squares, *to = halves;
        for (int64_t n = N / 2; n; n /= 2) {
            pair_sums(from, 4 * count * n, to);
            float* const next = from;
            from = to, to = next;
        }
        for (int64_t place = 0; place < 4; place++)
            memcpy(of_line + place * apart + first, from + place * count, sizeof(float) * count);
    }
    for (int64_t l = 4 * apart; l < lines; l++) {
        float sum = 0;
        for (int64_t j = 0; j < N; j++) {
            const float x = load(g[l * N + j]), square = x * x;
            sum += square, total[j] += square;
        }
        of_line[l] = sum;
    }
    for (int64_t j = 0; j < N; j++) along[j] += total[j];
}

template <class T>
__attribute__((noinline)) void line_sums(const T* g, int64_t n, int64_t lines, float* of_line, float* along) {
    if (n == 8) return line_sums_of<T, 8>(g, lines, of_line, along);
    if (n == 16) return line_sums_of<T, 16>(g, lines, of_line, along);
    if (n == 32) return line_sums_of<T, 32>(g, lines, of_line, along);
    if (n == 64) return line_sums_of<T, 64>(g, lines, of_line, along);
    // Four lines at once, far from each other: then memory answers for each of them ahead.
    const int64_t apart = lines / 4;
    for (int64_t l = 0; l < apart; l++) {
        const T *g0 = g + l * n, *g1 = g0 + apart * n, *g2 = g1 + apart * n, *g3 = g2 + apart * n;
        float a0 = 0, a1 = 0, a2 = 0, a3 = 0;
#pragma omp simd reduction(+ : a0, a1, a2, a3)
        for (int64_t j = 0; j < n; j++) {
            float x0 = load(g0[j]), x1 = load(g1[j]), x2 = load(g2[j]), x3 = load(g3[j]);
            x0 *= x0, x1 *= x1, x2 *= x2, x3 *= x3;
            a0 += x0, a1 += x1, a2 += x2, a3 += x3;
            along[j] += (x0 + x1) + (x2 + x3);
        }
        of_line[l] = a0, of_line[l + apart] = a1, of_line[l + 2 * apart] = a2, of_line[l + 3 * apart] = a3;
    }
    for (int64_t l = 4 * apart; l < lines; l++) {
        float a = 0;
#pragma omp simd reduction(+ : a)
        for (int64_t j = 0; j < n; j++) {
            float x = load(g[l * n + j]);
            x *= x;
            a += x;
            along[j] += x;
        }
        of_line[l] = a;
    }
}

// A matrix: rows and columns of some of its lines.
template <class T>
void matrix_sums(const Plan& plan, const Piece& piece, const T* g, int64_t first, int64_t last, float* along, double* result) {
    constexpr int64_t AT_ONCE = 2048;
    const int64_t stride = piece.row_step ? piece.col_stride[0] : piece.row_stride[0];
    float of_line[AT_ONCE];
    for (int64_t l = first; l < last; l += AT_ONCE) {
        const int64_t lines = last - l < AT_ONCE ? last - l : AT_ONCE;
        line_sums(g + (l - first) * piece.n, piece.n, lines, of_line, along);
        float* sums = plan.sums + (piece.row_step ? piece.col : piece.row) + l * stride;
        if (stride == 1)
            for (int64_t i = 0; i < lines; i++) sums[i] += of_line[i];
        else
            for (int64_t i = 0; i < lines; i++) sums[i * stride] += of_line[i];
        result[GG] += ordered_sum(of_line, lines);
        keep_largest(result + LARGEST_SQUARE, largest(of_line, lines));
    }
}

// Of four lines of a convolution at once: sums of some of their periods side by side, and along them. Lines that are not
// there are zeros that begin anew with each of those.
template <class T>
APART void periodic_line_sums(const T* const* lines, const bool* here, int64_t n, int64_t width, float* sums, float* along) {
    float *s0 = sums, *s1 = s0 + width, *s2 = s1 + width, *s3 = s2 + width;
    for (int64_t begin = 0; begin < n; begin += width, along += width) {
        const int64_t count = n - begin < width ? n - begin : width;
        const T *g0 = lines[0] + begin, *g1 = lines[1] + here[1] * begin, *g2 = lines[2] + here[2] * begin,
                *g3 = lines[3] + here[3] * begin;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            float x0 = load(g0[i]), x1 = load(g1[i]), x2 = load(g2[i]), x3 = load(g3[i]);
            x0 *= x0, x1 *= x1, x2 *= x2, x3 *= x3;
            s0[i] += x0, s1[i] += x1, s2[i] += x2, s3[i] += x3;
            along[i] += (x0 + x1) + (x2 + x3);
        }
    }
}

// The sums of the periods of a line, of which `few` has 16 side by side.
APART void add_periods(const Plan& plan, const Periodic& of, int64_t line, float* few, double* result) {
    for (int64_t i = 1; i < 16; i++) {
        const float* more = few + i * of.inner;
        for (int64_t k = 0; k < of.inner; k++) few[k] += more[k];
    }
    float* to = plan.sums + of.first + line * of.stride;
    for (int64_t k = 0; k < of.inner; k++) to[k] += few[k];
    result[GG] += ordered_sum(few, of.inner);
    keep_largest(result + LARGEST_SQUARE, largest(few, of.inner));
}

// Some lines of a convolution, four at once and far from each other, as of a matrix.
template <class T>
void periodic_sums(const Plan& plan, const Piece& piece, const T* g, int64_t first, int64_t last, float* along, double* result) {
    const Periodic of(piece);
    const int64_t width = 16 * of.inner, count = last - first, apart = (count + 3) / 4;
    alignas(64) float sums[4 * BLOCK];
    for (int64_t l = 0; l < apart; l++) {
        const T* lines[4];
        bool here[4];
        for (int64_t part = 0; part < 4; part++) {
            here[part] = part * apart + l < count;
            lines[part] = here[part] ? g + (part * apart + l) * piece.n : reinterpret_cast<const T*>(ZEROS);
        }
        memset(sums, 0, sizeof(float) * 4 * width);
        periodic_line_sums(lines, here, piece.n, width, sums, along);
        for (int64_t part = 0; part < 4; part++)
            if (here[part]) add_periods(plan, of, first + part * apart + l, sums + part * width, result);
    }
}

// Of elements that belong to no row and no column.
template <class T>
APART void square_sums(const T* g, int64_t n, double* result) {
    float sum = 0;
    int32_t most = 0;
#pragma omp simd reduction(+ : sum) reduction(max : most)
    for (int64_t j = 0; j < n; j++) {
        const float x = load(g[j]), square = x * x;
        const int32_t bits = int32_t(bits_of(square) & 0x7fffffff);
        most = bits > most ? bits : most;
        sum += square;
    }
    result[GG] += double(sum);
    keep_largest(result + LARGEST_SQUARE, float_of(uint32_t(most)));
}

// Adds numbers that come along a line, from its element `begin` on, where they belong.
APART void add_along(double* to, const Run& run, int64_t begin, const float* x, int64_t n) {
    if (run.is_contiguous()) {
        to += begin;
        for (int64_t j = 0; j < n; j++) to[j] += double(x[j]);
    } else {
        run.each_part(begin, n, [&](int64_t at, int64_t count, int64_t place) {
            if (run.step)
                for (int64_t j = 0; j < count; j++) to[place + j] += double(x[at + j]);
            else
                to[place] += ordered_sum(x + at, count);
        });
    }
}

// Any other factored piece, line by line, in fp64: rows, then columns of the whole parameter.
APART void line_sums_anywhere(const Piece& piece, const float* g, int64_t begin, int64_t n, const Line& line, double* sums,
                              double* result) {
    alignas(64) float squares[BLOCK];
    for (int64_t j = 0; j < n; j++) squares[j] = g[j] * g[j];
    double *rows = sums + line.row - piece.first_row, *cols = sums + piece.row_count + line.col - piece.first_col;
    add_along(rows, run_of(piece, piece.row_step, piece.row_jump), begin, squares, n);
    add_along(cols, run_of(piece, piece.col_step, piece.col_jump), begin, squares, n);
    result[GG] += ordered_sum(squares, n);
    keep_largest(result + LARGEST_SQUARE, largest(squares, n));
}

// The sums over some samples: of a block, or of a longer stretch of a flat piece.
template <class T>
__attribute__((noinline)) void statistics(const Piece& piece, const Numbers& c, const Memory<T>& memory, const Block& b,
                                          double* result) {
    alignas(64) float of_g[SAMPLES], of_point[SAMPLES];
    const T* g = memory.g ? memory.g + b.at : nullptr;
    const T *y = memory.y + b.at, *from = piece.flags & SCHEDULEFREE ? memory.z + b.at : y;
    for (int64_t first = 0; first < b.count; first += SAMPLES) {
        const int64_t count = b.count - first < SAMPLES ? b.count - first : SAMPLES;
        const int64_t at = b.phase + first * piece.slice_p, sample = b.sample + first;
        if (g) gather(g + at, count, piece.slice_p, of_g);
        else memset(of_g, 0, sizeof(float) * count);
        if (piece.flags & COUPLED_DECAY) {
            gather(y + at, count, piece.slice_p, of_point);
            for (int64_t m = 0; m < count; m++) of_g[m] = of_point[m] * c.of[WEIGHT_DECAY] + of_g[m];
        }
        const float* point = of_point;
        if (memory.packed) point = floats(memory.packed + sample, count, of_point);
        else gather(from + at, count, piece.slice_p, of_point);
        auto sum = [&](auto* p0, auto* s) { sample_sums(piece, c, of_g, point, p0 + sample, s + sample, count, result); };
        if (piece.flags & SAMPLES_IN_BF16) sum(static_cast<const bf16*>(memory.p0), static_cast<const bf16*>(memory.s));
        else sum(static_cast<const float*>(memory.p0), static_cast<const float*>(memory.s));
    }
}

template <class T>
void pass_1(const Plan& plan, const Task& task, double* result) {
    const Piece& piece = plan.pieces[task.piece];
    const int64_t flags = piece.flags, n = task.end - task.begin;
    const Numbers c = numbers_of(plan, piece.slot);
    const Memory<T> memory = memory_of<T>(plan, piece);
    const bool early = (flags & CAUTIOUS) && !(flags & SCHEDULEFREE);
    const bool fast = is_summed_by_lines(piece);
    const Periodic periodic(piece);
    alignas(64) float m[BLOCK];
    Block b;
    Floats floats;
    float* along = nullptr;
    if (fast) {
        along = plan.sums + place_along(piece);
        if (task.partial >= 0) {
            along = plan.partial + task.partial;
            memset(along, 0, sizeof(float) * piece.n);
        }
    } else if ((flags & FACTORED) && (flags & OWNED)) {
        memset(plan.partial + task.partial, 0, sizeof(double) * (piece.row_count + piece.col_count));
    }
    // So many lines at a time that what follows their sums finds them in a second-level cache.
    constexpr int64_t IN_CACHE = 131072, FEWEST = 4;
    const int64_t some = n * FEWEST < IN_CACHE ? IN_CACHE / n : FEWEST;
    Task part = task;
    for (part.first_line = task.first_line; part.first_line < task.last_line; part.first_line = part.last_line) {
        part.last_line = task.last_line - part.first_line < some ? task.last_line : part.first_line + some;
        if (fast && memory.g) {
            const auto sums = periodic.is ? periodic_sums<T> : matrix_sums<T>;
            sums(plan, piece, memory.g + part.first_line * piece.n, part.first_line, part.last_line, along, result);
        }
        if (fast && !early && !(flags & STATISTICS)) continue;
        const bool flat = (flags & FLAT) && (flags & STATISTICS) && (flags & OWNED);
        Blocks blocks(plan, part, false);
        while ((!fast || !flat || early) && blocks.next(b)) {
            if (!fast && !(flags & (FACTORED | COUPLED_DECAY))) {
                square_sums(memory.gradient(b.at), b.n, result);
            } else if (!fast) {
                load_block(piece, c, memory, b, false, floats);
                const float* g = floats.g;
                if (flags & FACTORED && flags & OWNED) {
                    double* rows = reinterpret_cast<double*>(plan.partial + task.partial);
                    for (int64_t j = 0; j < b.n;) {
                        const int64_t at = b.at + j, line = at / piece.n, begin = at % piece.n;
                        const int64_t rest = piece.n - begin < b.n - j ? piece.n - begin : b.n - j;
                        line_sums_anywhere(piece, g + j, begin, rest, line_of(piece, line), rows, result);
                        j += rest;
                    }
                } else {
                    square_sums(g, b.n, result);
                }
            }
            if (!(flags & OWNED)) continue;
            if ((flags & STATISTICS) && !flat) statistics(piece, c, memory, b, result);
            if (early) {
                load_block(piece, c, memory, b, false, floats);
                momentum(piece, c, floats, b.n, m);
                result[EARLY_MASK] += double(aligned(floats.g, m, b.n));
            }
        }
        // Gradients are in the cache by now.
        if (flat) {
            const Block all = stretch(piece, part);
            statistics(piece, c, memory, all, result);
            part.sample += all.count;
        } else {
            part.sample = blocks.sample;
        }
    }
    if (!(flags & OWNED)) {
        // A replica adds nothing to the sums, unless its gradient is not finite.
        result[GG] = 0;
        if (result[LARGEST_SQUARE] - result[LARGEST_SQUARE] == 0) result[LARGEST_SQUARE] = 0;
    }
}

}  // namespace
}  // namespace ppsf
