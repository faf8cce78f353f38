// The way over everything: pieces, lines, blocks, and where their numbers and memory are.
#pragma once
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
        int64_t at = number;
        if (axis && number < INT32_MAX && piece.size[axis] < INT32_MAX) {
            // Divisions of 32 bits are several times as fast.
            const uint32_t small = uint32_t(number), size = uint32_t(piece.size[axis]);
            at = small % size, number = small / size;
        } else if (axis) {
            at = number % piece.size[axis], number /= piece.size[axis];
        }
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

// How R or C runs along a line: from an element to the next (0 or 1), and from a part of `inner` elements to the next.
struct Run {
    int64_t step, jump, inner;

    bool is_constant() const { return !step && !jump; }
    bool is_contiguous() const { return step && jump == inner; }
    bool is_periodic() const { return step && !jump; }

    // Calls f with each part of some elements: where it begins, how long it is, and its first place.
    template <class F>
    void each_part(int64_t begin, int64_t n, F f) const {
        for (int64_t j = 0; j < n;) {
            const int64_t part = (begin + j) / inner, inside = (begin + j) - part * inner;
            const int64_t count = inner - inside < n - j ? inner - inside : n - j;
            f(j, count, part * jump + inside * step);
            j += count;
        }
    }
};

inline Run run_of(const Piece& piece, int64_t step, int64_t jump) {
    return {step, piece.inner == piece.n ? step * piece.inner : jump, piece.inner};
}

// What comes along a line from its element `begin` on.
APART const float* spread(const float* from, const Run& run, int64_t begin, int64_t n, float* beside) {
    if (run.is_contiguous()) return from + begin;
    if (run.is_periodic()) {
        // One period, and then twice as much each time.
        const int64_t inner = run.inner, phase = begin % inner, once = inner < n ? inner : n;
        for (int64_t j = 0; j < once; j++) beside[j] = from[phase + j < inner ? phase + j : phase + j - inner];
        for (int64_t done = once; done < n; done *= 2)
            memcpy(beside + done, beside, sizeof(float) * (done < n - done ? done : n - done));
        return beside;
    }
    run.each_part(begin, n, [&](int64_t at, int64_t count, int64_t place) {
        for (int64_t j = 0; j < count; j++) beside[at + j] = from[place + j * run.step];
    });
    return beside;
}

// The root of the second moment along a line, as across * along[j].
APART float factors_of(const float* factors, const Piece& piece, const Line& line, int64_t begin, int64_t n, float* beside,
                       const float** along) {
    const float *row = factors + line.row, *col = factors + line.col;
    const Run of_row = run_of(piece, piece.row_step, piece.row_jump), of_col = run_of(piece, piece.col_step, piece.col_jump);
    if (of_row.is_constant()) return *along = spread(col, of_col, begin, n, beside), *row;
    if (of_col.is_constant()) return *along = spread(row, of_row, begin, n, beside), *col;
    alignas(64) float other[BLOCK];
    const float *rows = spread(row, of_row, begin, n, beside), *cols = spread(col, of_col, begin, n, other);
    for (int64_t j = 0; j < n; j++) beside[j] = rows[j] * cols[j];
    return *along = beside, 1.0f;
}

// The factors of a matrix: across[line * stride] * along[j] is the root of the second moment.
struct Factors {
    const float *across, *along;
    int64_t stride;

    Factors(const Plan& plan, const Piece& piece) {
        const float *row = plan.factors + piece.row, *col = plan.factors + piece.col;
        const bool rows = !piece.row_step;
        across = rows ? row : col, along = rows ? col : row, stride = rows ? piece.row_stride[0] : piece.col_stride[0];
    }
};

inline bool is_matrix(const Piece& piece) { return (piece.flags & MATRIX) && piece.axes == 1; }

// The kernels of a convolution as lines: of R and C one has a value for each element of every line, and the other the same
// few again and again along a line, which no two lines share.
struct Periodic {
    bool rows, is;            // whether it is R that repeats; whether one does
    int64_t inner, stride;    // how many values it has for a line, and from those of a line to those of the next
    int64_t first, along;     // where in Plan::sums and Plan::factors both begin

    Periodic(const Piece& piece) {
        constexpr int64_t LONGEST = 64;
        const Run of_row = run_of(piece, piece.row_step, piece.row_jump), of_col = run_of(piece, piece.col_step, piece.col_jump);
        rows = of_row.is_periodic();
        const bool repeats = rows ? of_col.is_contiguous() : of_col.is_periodic() && of_row.is_contiguous();
        inner = piece.inner, stride = rows ? piece.row_stride[0] : piece.col_stride[0];
        const bool apart = !piece.axes || (stride >= inner && !(rows ? piece.col_stride[0] : piece.row_stride[0]));
        is = repeats && inner <= LONGEST && piece.axes <= 1 && apart && !(piece.flags & MATRIX);
        first = rows ? piece.row : piece.col, along = rows ? piece.col : piece.row;
    }

    // As many elements as are whole periods and whole vectors, up to a block.
    int64_t width(int64_t most) const { return most / (16 * inner) * (16 * inner); }
};

// Where the sums along the lines of a matrix or a convolution are in Plan::sums.
APART int64_t place_along(const Piece& piece) {
    const Periodic of(piece);
    return of.is ? of.along : piece.row_step ? piece.row : piece.col;
}

// Whether the sums of squares of some lines need no more memory than those along one of them.
APART bool is_summed_by_lines(const Piece& piece) {
    constexpr int64_t all = FACTORED | OWNED;
    return (piece.flags & (all | COUPLED_DECAY)) == all && ((piece.flags & MATRIX) || Periodic(piece).is);
}

// The blocks of a task, in order.
struct Blocks {
    const Plan& plan;
    const Task& task;
    const Piece& piece;
    const bool divides;  // whether the root of the second moment is wanted
    const Factors factors;
    const Periodic periodic;
    int64_t line, begin, sample, index;
    uint32_t phase;
    int64_t line_of_period = -1;
    alignas(64) float root[BLOCK], period[BLOCK];

    __attribute__((noinline)) Blocks(const Plan& plan, const Task& task, bool divides)
        : plan(plan), task(task), piece(plan.pieces[task.piece]), divides(divides), factors(plan, piece), periodic(piece),
          line(task.first_line), begin(task.begin), sample(task.sample), index(-1) {}

    bool next(Block& b);
};

// The root of the second moment for each element of some lines of a matrix.
template <int64_t N>
void outer_product(const float* across, int64_t stride, const float* along, int64_t n, int64_t lines, float* root) {
    n = N ? N : n;
    for (int64_t l = 0; l < lines; l++, root += n)
        for (int64_t j = 0; j < n; j++) root[j] = across[l * stride] * along[j];
}

APART void products(const float* a, const float* b, int64_t n, float* to) {
    for (int64_t j = 0; j < n; j++) to[j] = a[j] * b[j];
}

APART void expand_roots(const Plan& plan, const Piece& piece, int64_t first, int64_t count, float* root) {
    const int64_t n = piece.n;
    if (is_matrix(piece)) {
        const Factors of(plan, piece);
        const int64_t stride = of.stride;
        const float *across = of.across + first * stride, *along = of.along;
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
        const int64_t most = periodic.is ? BLOCK - BLOCK % periodic.inner : BLOCK;
        b.n = task.end - begin < most ? task.end - begin : most;
        if (periodic.is) {
            b.index = piece.index + line * piece.index_stride[0] + begin;
            if (divides) {
                // The same for all blocks of a line, each of which begins where a period does, as the task does.
                if (line != line_of_period) {
                    const Run run = {1, 0, periodic.inner};
                    spread(plan.factors + periodic.first + line * periodic.stride, run, task.begin, b.n, period);
                    line_of_period = line;
                }
                products(period, plan.factors + periodic.along + begin, b.n, root);
                b.across = 1.0f, b.along = root;
            }
        } else if (is_matrix(piece)) {
            b.index = piece.index + line * piece.index_stride[0] + begin;
            if (divides) b.across = factors.across[line * factors.stride], b.along = factors.along + begin;
        } else {
            const Line of = line_of(piece, line);
            b.index = of.index + begin;
            if (divides) b.across = factors_of(plan.factors, piece, of, begin, b.n, root, &b.along);
        }
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

// In an order that no set of instructions changes: every rank computes the same means.
APART double ordered_sum(const float* x, int64_t n) {
    constexpr int64_t APART_BY = 8;
    double sums[APART_BY] = {}, total = 0;
    int64_t i = 0;
    for (; i + APART_BY <= n; i += APART_BY)
        for (int64_t k = 0; k < APART_BY; k++) sums[k] += double(x[i + k]);
    for (int64_t k = 0; k < APART_BY; k++) total += sums[k];
    for (; i < n; i++) total += double(x[i]);
    return total;
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

}  // namespace
}  // namespace ppsf
