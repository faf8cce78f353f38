// The passes of ppsf_dist.kernels.interface over everything in a plan: plain C calls without torch, Python or threads of
// their own. Several threads may be in the same call; which of them does a task changes no bit.
#include "block.h"

namespace ppsf {
namespace {

// Lines shorter than this are computed several at once.
constexpr int64_t SHORT = 192;

// Where a line lies.
struct Line {
    int64_t index, row, col;
};

Line line_of(const Piece& piece, int64_t number) {
    Line line = {piece.index, piece.row, piece.col};
    for (int64_t axis = piece.axes - 1; axis >= 0; axis--) {
        const int64_t at = axis ? number % piece.size[axis] : number;
        if (axis) number /= piece.size[axis];
        line.index += at * piece.index_stride[axis];
        line.row += at * piece.row_stride[axis];
        line.col += at * piece.col_stride[axis];
    }
    return line;
}

int64_t phase_of(int64_t index, int64_t slice_p) {
    const int64_t over = index % slice_p;
    return over ? slice_p - over : 0;
}

int64_t samples_in(int64_t index, int64_t n, int64_t slice_p) {
    const int64_t phase = phase_of(index, slice_p);
    return phase < n ? (n - phase + slice_p - 1) / slice_p : 0;
}

// The root of the second moment along a line, as across * along[j].
APART float factors_of(const float* factors, const Piece& piece, const Line& line, int64_t begin, int64_t n, float* beside, const float** along) {
    const float *row = factors + line.row + begin * piece.row_step, *col = factors + line.col + begin * piece.col_step;
    if (!piece.row_step) return *along = col, *row;
    if (!piece.col_step) return *along = row, *col;
    for (int64_t j = 0; j < n; j++) beside[j] = row[j] * col[j];
    return *along = beside, 1.0f;
}

// The blocks of a task, in order.
struct Blocks {
    const Plan& plan;
    const Task& task;
    const Piece& piece;
    const bool divides;  // whether the root of the second moment is wanted
    int64_t line, begin, sample, index;
    uint32_t phase;
    alignas(64) float root[BLOCK];

    Blocks(const Plan& plan, const Task& task, bool divides)
        : plan(plan), task(task), piece(plan.pieces[task.piece]), divides(divides), line(task.first_line), begin(task.begin), sample(task.sample), index(-1) {}

    bool next(Block& b);
};

// The root of the second moment for each element of some lines of a matrix.
template <int64_t N>
void outer_product(const float* across, int64_t stride, const float* along, int64_t n, int64_t lines, float* root) {
    n = N ? N : n;
    for (int64_t l = 0; l < lines; l++, root += n)
        for (int64_t j = 0; j < n; j++) root[j] = across[l * stride] * along[j];
}

APART void expand_roots(const Plan& plan, const Piece& piece, int64_t first, int64_t count, float* root) {
    const int64_t n = piece.n;
    if ((piece.flags & MATRIX) && piece.axes == 1) {
        const bool rows = !piece.row_step;
        const int64_t stride = rows ? piece.row_stride[0] : piece.col_stride[0];
        const float *across = plan.factors + (rows ? piece.row : piece.col) + first * stride,
                    *along = plan.factors + (rows ? piece.col : piece.row);
        if (n == 8) return outer_product<8>(across, stride, along, n, count, root);
        if (n == 16) return outer_product<16>(across, stride, along, n, count, root);
        if (n == 32) return outer_product<32>(across, stride, along, n, count, root);
        return outer_product<0>(across, stride, along, n, count, root);
    }
    for (int64_t l = 0; l < count; l++, root += n) {
        const float* along;
        const float across = factors_of(plan.factors, piece, line_of(piece, first + l), 0, n, root, &along);
        for (int64_t j = 0; j < n; j++) root[j] = across * along[j];
    }
}

__attribute__((noinline)) bool Blocks::next(Block& b) {
    if (line >= task.last_line) return false;
    b.at = line * piece.n + begin;
    if (piece.n < SHORT && (piece.flags & FLAT)) {
        const int64_t most = BLOCK / piece.n, count = task.last_line - line < most ? task.last_line - line : most;
        if (divides) expand_roots(plan, piece, line, count, root);
        b.n = count * piece.n, b.index = piece.index + b.at, b.across = 1.0f, b.along = root;
        line += count;
    } else {
        const Line of = line_of(piece, line);
        b.n = task.end - begin < BLOCK ? task.end - begin : BLOCK;
        b.index = of.index + begin;
        if (divides) b.across = factors_of(plan.factors, piece, of, begin, b.n, root, &b.along);
        begin += b.n;
        if (begin >= task.end) begin = task.begin, line++;
    }
    // A division of 64 bits only where a line begins.
    if (b.index != index) phase = phase_of(b.index, piece.slice_p);
    const uint32_t p = uint32_t(piece.slice_p), n = uint32_t(b.n);
    b.sample = sample, b.phase = phase, b.count = phase < n ? (n - phase + p - 1) / p : 0;
    sample += b.count, phase += uint32_t(b.count) * p - n, index = b.index + b.n;
    return true;
}

// How many elements of a flat piece a task has.
int64_t length(const Piece& piece, const Task& task) {
    return (task.last_line - task.first_line - 1) * piece.n + task.end - task.begin;
}

// All of them at once.
Block stretch(const Piece& piece, const Task& task) {
    const int64_t at = task.first_line * piece.n + task.begin, n = length(piece, task), index = piece.index + at;
    return {at, n, index, task.sample, phase_of(index, piece.slice_p), samples_in(index, n, piece.slice_p), 0, nullptr};
}

Numbers numbers_of(const Plan& plan, int64_t slot) {
    Numbers c = {};
    for (int name = 0; name < COEFFICIENTS; name++)
        if (plan.rows[name] >= 0) c.of[name] = plan.coefficients[plan.rows[name] * plan.slots + slot];
    c.amount = plan.scales[AMOUNT * plan.slots + slot];
    c.mask = plan.scales[MASK * plan.slots + slot];
    c.advance = plan.scales[ADVANCE * plan.slots + slot];
    c.key = uint32_t(plan.keys[slot]);
    return c;
}

// Samples stay where the shard's begin: blocks count them from there.
template <class T>
Memory<T> memory_of(const Plan& plan, const Piece& piece) {
    const int64_t* at = plan.addresses + piece.shard * ADDRESSES;
    auto tensor = [&](Address name) { return at[name] ? reinterpret_cast<T*>(at[name]) + piece.first : nullptr; };
    return {tensor(WEIGHTS), tensor(Z), tensor(EXP_AVG), tensor(EXP_AVG_SQ), tensor(GRADIENT),
            reinterpret_cast<const void*>(at[P0]), reinterpret_cast<void*>(at[S]), reinterpret_cast<T*>(at[PACKED_Z])};
}

// Largest of some numbers that are not negative; not finite if one of them is not.
APART float largest(const float* x, int64_t n) {
    int32_t most = 0;
    for (int64_t j = 0; j < n; j++) {
        const int32_t bits = int32_t(bits_of(x[j]) & 0x7fffffff);
        most = bits > most ? bits : most;
    }
    return float_of(uint32_t(most));
}

APART float largest_square(const float* g, int64_t n) {
    alignas(64) float squares[BLOCK];
    for (int64_t j = 0; j < n; j++) squares[j] = g[j] * g[j];
    return largest(squares, n);
}

APART double square_sum(const float* u, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += u[j] * u[j];
    return sum;
}

// How many elements have the same sign.
APART int64_t aligned(const float* a, const float* b, int64_t n) {
    int64_t count = 0;
    for (int64_t j = 0; j < n; j++) count += a[j] * b[j] > 0;
    return count;
}

void keep_largest(double* at, double x) {
    if (!(x <= *at)) *at = *at != *at ? *at : x;
}

// ---- Pass 1 ----

// Of some lines of squares: the sum of each, and added to `along` the sums of their elements.
template <class T, int64_t N>
void line_sums_of(const T* g, int64_t lines, float* of_line, float* along) {
    alignas(64) float total[N] = {};
    for (int64_t l = 0; l < lines; l++, g += N) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < N; j++) {
            const float x = load(g[j]), square = x * x;
            total[j] += square;
            sum += square;
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
    int64_t l = 0;
    for (; l + 4 <= lines; l += 4) {
        const T *g0 = g + l * n, *g1 = g0 + n, *g2 = g1 + n, *g3 = g2 + n;
        float a0 = 0, a1 = 0, a2 = 0, a3 = 0;
#pragma omp simd reduction(+ : a0, a1, a2, a3)
        for (int64_t j = 0; j < n; j++) {
            float x0 = load(g0[j]), x1 = load(g1[j]), x2 = load(g2[j]), x3 = load(g3[j]);
            x0 *= x0, x1 *= x1, x2 *= x2, x3 *= x3;
            a0 += x0, a1 += x1, a2 += x2, a3 += x3;
            along[j] += (x0 + x1) + (x2 + x3);
        }
        of_line[l] = a0, of_line[l + 1] = a1, of_line[l + 2] = a2, of_line[l + 3] = a3;
    }
    for (; l < lines; l++) {
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
    constexpr int64_t AT_ONCE = 64;
    const int64_t stride = piece.row_step ? piece.col_stride[0] : piece.row_stride[0];
    float of_line[AT_ONCE];
    for (int64_t l = first; l < last; l += AT_ONCE) {
        const int64_t lines = last - l < AT_ONCE ? last - l : AT_ONCE;
        line_sums(g + (l - first) * piece.n, piece.n, lines, of_line, along);
        float* sums = plan.sums + (piece.row_step ? piece.col : piece.row) + l * stride;
        double total = 0;
        for (int64_t i = 0; i < lines; i++) sums[i * stride] += of_line[i], total += double(of_line[i]);
        result[GG] += total;
        keep_largest(result + LARGEST_SQUARE, largest(of_line, lines));
    }
}

// Any other factored piece, line by line, in fp64: rows, then columns of the whole parameter.
APART void line_sums_anywhere(const Piece& piece, const float* g, int64_t begin, int64_t n, const Line& line, double* rows, double* result) {
    double *row = rows + line.row - piece.first_row + begin * piece.row_step,
           *col = rows + piece.row_count + line.col - piece.first_col + begin * piece.col_step;
    for (int64_t j = 0; j < n; j++) {
        const double square = g[j] * g[j];
        row[j * piece.row_step] += square;
        col[j * piece.col_step] += square;
        result[GG] += square;
    }
    keep_largest(result + LARGEST_SQUARE, largest_square(g, n));
}

// The sums over some samples: of a block, or of a longer stretch of a flat piece.
template <class T>
__attribute__((noinline)) void statistics(const Piece& piece, const Numbers& c, const Memory<T>& memory, const Block& b, double* result) {
    Samples of;
    const T* g = memory.g ? memory.g + b.at : nullptr;
    const T *y = memory.y + b.at, *point = piece.flags & SCHEDULEFREE ? memory.z + b.at : y;
    for (int64_t first = 0; first < b.count; first += SAMPLES) {
        const int64_t count = b.count - first < SAMPLES ? b.count - first : SAMPLES;
        const int64_t at = b.phase + first * piece.slice_p, sample = b.sample + first;
        if (g) gather(g + at, count, piece.slice_p, of.g);
        else memset(of.g, 0, sizeof(float) * count);
        if (memory.packed) load_samples(memory.packed, piece.flags & WEIGHTS_IN_BF16, sample, count, of.point);
        else gather(point + at, count, piece.slice_p, of.point);
        if (piece.flags & COUPLED_DECAY) {
            gather(y + at, count, piece.slice_p, of.p0);
            for (int64_t m = 0; m < count; m++) of.g[m] = of.p0[m] * c.of[WEIGHT_DECAY] + of.g[m];
        }
        load_samples(memory.p0, piece.flags & P0_IN_BF16, sample, count, of.p0);
        if (!(piece.flags & SPEED)) load_samples(memory.s, piece.flags & S_IN_BF16, sample, count, of.s);
        sample_sums(piece, c, of, count, result);
    }
}

template <class T>
void pass_1(const Plan& plan, const Task& task, double* result) {
    const Piece& piece = plan.pieces[task.piece];
    const int64_t flags = piece.flags, n = task.end - task.begin;
    const Numbers c = numbers_of(plan, piece.slot);
    const Memory<T> memory = memory_of<T>(plan, piece);
    const bool early = (flags & CAUTIOUS) && !(flags & SCHEDULEFREE);
    const bool fast = (flags & FACTORED) && (flags & MATRIX) && !(flags & COUPLED_DECAY) && (flags & OWNED);
    alignas(64) float m[BLOCK];
    Block b;
    Floats floats;
    float* along = nullptr;
    if (fast) {
        along = plan.sums + (piece.row_step ? piece.row : piece.col);
        if (task.partial >= 0) {
            along = plan.partial + task.partial;
            memset(along, 0, sizeof(float) * piece.n);
        }
    } else if ((flags & FACTORED) && (flags & OWNED)) {
        memset(plan.partial + task.partial, 0, sizeof(double) * (piece.row_count + piece.col_count));
    }
    // Few lines at a time, so that what follows their sums finds them in the cache.
    const int64_t some = n < 4096 ? 16384 / n : 4;
    Task part = task;
    for (part.first_line = task.first_line; part.first_line < task.last_line; part.first_line = part.last_line) {
        part.last_line = task.last_line - part.first_line < some ? task.last_line : part.first_line + some;
        if (fast && memory.g)
            matrix_sums(plan, piece, memory.g + part.first_line * piece.n, part.first_line, part.last_line, along, result);
        if (fast && !early && !(flags & STATISTICS)) continue;
        const bool flat = (flags & FLAT) && (flags & STATISTICS) && (flags & OWNED);
        if (flat) statistics(piece, c, memory, stretch(piece, part), result);
        if (fast && flat && !early) {
            part.sample += samples_in(piece.index + part.first_line * piece.n + part.begin, length(piece, part), piece.slice_p);
            continue;
        }
        Blocks blocks(plan, part, false);
        while (blocks.next(b)) {
            if (!fast) {
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
                    keep_largest(result + LARGEST_SQUARE, largest_square(g, b.n));
                    result[GG] += square_sum(g, b.n);
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
        part.sample = blocks.sample;
    }
    if (!(flags & OWNED)) {
        // A replica adds nothing to the sums, unless its gradient is not finite.
        result[GG] = 0;
        if (result[LARGEST_SQUARE] - result[LARGEST_SQUARE] == 0) result[LARGEST_SQUARE] = 0;
    }
}

// ---- Pass 2, and the masks ----

// The most common direction: a factored second moment, Schedule-Free.
constexpr int64_t COMMON = SCHEDULEFREE | SECOND_MOMENT | FACTORED;
constexpr int64_t UNCOMMON = ATAN2 | COUPLED_DECAY;

template <class T>
float common_norm(const T* g, const Block& b, float eps) {
    float sum = 0;
    const float across = b.across, *along = b.along;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < b.n; j++) {
        const float u = load(g[j]) / (across * along[j] + eps);
        sum += u * u;
    }
    return sum;
}

// Of four lines of a matrix at once: memory is faster in several places.
template <class T>
__attribute__((noinline)) double common_norms(const T* g, int64_t n, const float* across, int64_t stride, const float* along, float eps) {
    const T *g0 = g, *g1 = g0 + n, *g2 = g1 + n, *g3 = g2 + n;
    const float a0 = across[0], a1 = across[stride], a2 = across[2 * stride], a3 = across[3 * stride];
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
    if (common && (piece.flags & MATRIX) && piece.n >= SHORT && memory.g) {
        const bool rows = !piece.row_step;
        const int64_t stride = rows ? piece.row_stride[0] : piece.col_stride[0];
        const float *across = plan.factors + (rows ? piece.row : piece.col), *along = plan.factors + (rows ? piece.col : piece.row);
        for (int64_t& l = rest.first_line; l + 4 <= task.last_line; l += 4)
            result[UU] += common_norms(memory.g + l * piece.n, piece.n, across + l * stride, stride, along, c.of[D_EPS]);
    }
    Blocks blocks(plan, rest, piece.flags & FACTORED);
    while (blocks.next(b)) {
        if (common) {
            result[UU] += common_norm(memory.gradient(b.at), b, c.of[D_EPS]);
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

// ---- Pass 3 ----

template <class T>
void store_floats(const float* from, int64_t n, T* to) {
    for (int64_t j = 0; j < n; j++) store(to + j, from[j]);
}

template <class T, bool ROUNDS>
void store_block(const Numbers& c, const Block& b, const float* new_y, const float* new_z, T* y, T* z) {
    for (int64_t j = 0; j < b.n; j++) {
        if constexpr (ROUNDS) {
            const uint32_t random = mix(uint32_t(b.index + j) ^ c.key);
            y[j] = stochastic(new_y[j], random >> 16);
            if (new_z) z[j] = stochastic(new_z[j], random & 0xffff);
        } else {
            store(y + j, new_y[j]);
            if (new_z) store(z + j, new_z[j]);
        }
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

// Two neighbours at a time: the halves of 32 bits are floats after a shift and a mask.
typedef uint32_t __attribute__((may_alias, aligned(2))) Pair;

template <bool ROUNDS>
uint32_t rounded(float x, uint32_t sixteen_bits) {
    const uint32_t bits = bits_of(x);
    if (ROUNDS) return bits + (int32_t(bits & 0x7fffffff) < 0x7f7f0000 ? sixteen_bits : 0);
    return uint32_t(nearest(x)) << 16;
}

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
    Floats floats;
    Direction d;
    Block b;
    Blocks blocks(plan, task, flags & FACTORED);
    while (blocks.next(b)) {
        if (samples + b.count > SAMPLES) {
            update_s(piece, c, of_g, samples, first_sample, memory.s);
            first_sample += samples, samples = 0;
        }
        T *y = memory.y + b.at, *z = averages ? memory.z + b.at : nullptr;
        if (common && writes) {
            const T* g = memory.gradient(b.at);
            common_step<ROUNDS>(c, b, g, y, z);
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
    if (samples) update_s(piece, c, of_g, samples, first_sample, memory.s);
}

// ---- Factored moments ----

void update_moments(const Plan& plan, const Moments& m, const Range& range) {
    const float *beta2 = plan.coefficients + plan.rows[BETA2] * plan.slots,
                *weight = plan.coefficients + plan.rows[SQUARE_WEIGHT] * plan.slots;
    for (int64_t i = range.value[0]; i < range.value[1]; i++) {
        const int64_t slot = m.slot_of[i];
        const float square = plan.sums[i] * m.inverse_n[i];
        m.after[i] = ema(m.values[i], beta2[slot], weight[slot], square, m.in_bf16 && m.in_bf16[i]);
    }
}

void fill_factors(const Plan& plan, const Moments& m, const Range& range) {
    constexpr float GUARD = 1e-30f;
    auto moment = [&](int64_t i) { return m.adopt && m.adopt[m.slot_of[i]] ? m.values[i] : m.after[i]; };
    for (int64_t i = range.value[0]; i < range.value[1]; i++) plan.factors[i] = __builtin_sqrtf(moment(i));
    const int64_t* ordered = m.ordered + range.ordered;
    for (int64_t cell = range.cell[0]; cell < range.cell[1]; cell++) {
        double sum = 0;
        for (int64_t i = 0; i < m.lengths[cell]; i++) sum += double(moment(*ordered++));
        m.means[cell] = float(sum / double(m.lengths[cell]));
    }
    for (int64_t k = range.row[0]; k < range.row[1]; k++) {
        const float row = moment(m.row[k]);
        plan.factors[m.row[k]] = __builtin_sqrtf(row / ((m.own_mean[k] ? row : m.means[m.cell_of[k]]) + GUARD));
    }
}

// ---- Packed samples of z ----

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

// ---- Everything ----

enum Pass { SUMS_OF_SQUARES = 1, NORMS = 2, WRITE = 3, MASKS = 4 };

void run_task(const Plan& plan, int pass, int64_t number) {
    const Task& task = plan.tasks[number];
    const int64_t flags = plan.pieces[task.piece].flags;
    double* result = plan.results + number * SUMS;
    for (int sum = 0; sum < SUMS && pass != WRITE; sum++) result[sum] = 0;
    const bool half = flags & WEIGHTS_IN_BF16, rounds = flags & STOCHASTIC;
    if (pass == SUMS_OF_SQUARES) return half ? pass_1<bf16>(plan, task, result) : pass_1<float>(plan, task, result);
    if (pass == NORMS) return half ? pass_2<bf16>(plan, task, result) : pass_2<float>(plan, task, result);
    if (pass == MASKS) return half ? count_masks<bf16>(plan, task, result) : count_masks<float>(plan, task, result);
    if (!half) return pass_3<float, false>(plan, task, result);
    return rounds ? pass_3<bf16, true>(plan, task, result) : pass_3<bf16, false>(plan, task, result);
}

// Sums along the lines of the pieces of a batch, in the order of its tasks.
void add_partial(const Plan& plan, int64_t first, int64_t last) {
    constexpr int64_t SOME = 256;
    double total[SOME];
    for (int64_t t = first; t < last;) {
        const Task& task = plan.tasks[t];
        const Piece& piece = plan.pieces[task.piece];
        int64_t end = t + 1;
        while (end < last && plan.tasks[end].piece == task.piece) end++;
        if (task.partial >= 0 && (piece.flags & MATRIX)) {
            float* along = plan.sums + (piece.row_step ? piece.row : piece.col);
            for (int64_t begin = 0; begin < piece.n; begin += SOME) {
                const int64_t n = piece.n - begin < SOME ? piece.n - begin : SOME;
                for (int64_t j = 0; j < n; j++) total[j] = along[begin + j];
                for (int64_t i = t; i < end; i++) {
                    const float* part = plan.partial + plan.tasks[i].partial + begin;
                    for (int64_t j = 0; j < n; j++) total[j] += part[j];
                }
                for (int64_t j = 0; j < n; j++) along[begin + j] = float(total[j]);
            }
        } else if (task.partial >= 0) {
            const double* part = reinterpret_cast<const double*>(plan.partial + task.partial);
            for (int64_t j = 0; j < piece.row_count; j++) plan.sums[piece.first_row + j] += float(part[j]);
            for (int64_t j = 0; j < piece.col_count; j++) plan.sums[piece.first_col + j] += float(part[piece.row_count + j]);
        }
        t = end;
    }
}

}  // namespace
}  // namespace ppsf

using namespace ppsf;

#define EXPORTED extern "C" __attribute__((visibility("default")))

// The sizes of what Python mirrors.
EXPORTED void ppsf_sizes(int64_t* sizes) {
    sizes[0] = sizeof(Piece), sizes[1] = sizeof(Task), sizes[2] = sizeof(Job), sizes[3] = sizeof(Plan);
    sizes[4] = sizeof(Moments), sizes[5] = sizeof(Range);
}

// Cuts pieces, which come sorted by round, into tasks; returns how many. Writes them if there is room, and into `needed`
// the length of Plan::partial. What is cut where depends on the pieces alone, never on how many threads there are.
EXPORTED int64_t ppsf_cut(const Piece* pieces, int64_t count, Task* tasks, int64_t room, int64_t* needed) {
    constexpr int64_t ELEMENTS = 1 << 17, OF_PIECE = 1 << 19, OF_BATCH = 1 << 20;
    int64_t total = 0, batch = 0, partial = 0;
    *needed = 0;
    for (int64_t p = 0; p < count; p++) {
        const Piece& piece = pieces[p];
        const bool sums = (piece.flags & FACTORED) && (piece.flags & OWNED);
        const bool matrix = sums && (piece.flags & MATRIX) && !(piece.flags & COUPLED_DECAY);
        int64_t lines = (ELEMENTS + piece.n - 1) / piece.n, step = piece.n;
        if (matrix) {
            // Room for the sums along its lines, for each task.
            const int64_t most = OF_PIECE / piece.n > 0 ? OF_PIECE / piece.n : 1;
            const int64_t least = (piece.lines + most - 1) / most;
            lines = lines < least ? least : lines;
        } else if (sums) {
            lines = piece.lines;
        } else if (piece.lines == 1) {
            step = ELEMENTS;
        }
        int64_t parts = (piece.lines + lines - 1) / lines, wants = 0;
        if (sums && !matrix) wants = 2 * (piece.row_count + piece.col_count);
        else if (matrix && parts > 1) wants = piece.n;
        if (p && (piece.round != pieces[p - 1].round || partial + wants * parts > OF_BATCH)) batch++, partial = 0;
        int64_t sample = piece.first_sample;
        for (int64_t first = 0; first < piece.lines; first += lines) {
            const int64_t last = piece.lines - first < lines ? piece.lines : first + lines;
            for (int64_t begin = 0; begin < piece.n; begin += step) {
                const int64_t end = piece.n - begin < step ? piece.n : begin + step;
                if (total < room) tasks[total] = Task{p, first, last, begin, end, sample, batch, wants ? partial : -1};
                total++;
                partial += wants + (wants & 1);
                if (piece.flags & FLAT)
                    sample += samples_in(piece.index + first * piece.n + begin, (last - first - 1) * piece.n + end - begin, piece.slice_p);
                else
                    for (int64_t l = first; l < last; l++)
                        sample += samples_in(line_of(piece, l).index + begin, end - begin, piece.slice_p);
            }
        }
        *needed = partial > *needed ? partial : *needed;
    }
    return total;
}

// Does tasks until none is left that nobody has taken.
EXPORTED void ppsf_run(const Plan* plan, int pass, Job* job) {
    for (;;) {
        const int64_t number = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (number >= job->last) return;
        run_task(*plan, pass, number);
        __atomic_fetch_add(&job->done, 1, __ATOMIC_RELEASE);
    }
}

// After the tasks of a batch of pass 1.
EXPORTED void ppsf_add_partial(const Plan* plan, int64_t first, int64_t last) { add_partial(*plan, first, last); }

// After some tasks of a pass: their sums, in order, into the table of statistics, or that of masks.
EXPORTED void ppsf_add_results(const Plan* plan, int64_t first, int64_t last, int64_t first_column, int masks) {
    for (int64_t t = first; t < last; t++) {
        double* row = (masks ? plan->masks : plan->stats) + plan->pieces[plan->tasks[t].piece].slot * plan->stat_columns;
        for (int sum = 0; sum < SUMS; sum++) row[first_column + sum] += plan->results[t * SUMS + sum];
    }
}

// The factored moments of some parameters after a step, beside the old ones; their factors; and the new ones of all in
// place of the old where a parameter's gate is open.
EXPORTED void ppsf_update_moments(const Plan* plan, const Moments* moments, const Range* range) {
    update_moments(*plan, *moments, *range);
}

EXPORTED void ppsf_fill_factors(const Plan* plan, const Moments* moments, const Range* range) {
    fill_factors(*plan, *moments, *range);
}

EXPORTED void ppsf_write_moments(const Plan* plan, const Moments* m) {
    for (int64_t i = 0; i < m->count; i++)
        if (plan->moments_gate[m->slot_of[i]]) m->values[i] = m->after[i];
}

// Whether the packed samples, as far as a few of each task tell, are those of z.
EXPORTED int ppsf_is_packed(const Plan* plan, int64_t tasks) {
    for (int64_t t = 0; t < tasks; t++) {
        const bool half = plan->pieces[plan->tasks[t].piece].flags & WEIGHTS_IN_BF16;
        if (!(half ? pack<bf16>(*plan, plan->tasks[t], true) : pack<float>(*plan, plan->tasks[t], true))) return 0;
    }
    return 1;
}

EXPORTED void ppsf_pack(const Plan* plan, int64_t tasks) {
    for (int64_t t = 0; t < tasks; t++) {
        const bool half = plan->pieces[plan->tasks[t].piece].flags & WEIGHTS_IN_BF16;
        half ? pack<bf16>(*plan, plan->tasks[t], false) : pack<float>(*plan, plan->tasks[t], false);
    }
}
