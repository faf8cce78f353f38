// What Python and C++ share: tables that are made once for a plan. ppsf_dist/kernels/codes.py and cpu/tables.py mirror it.
#pragma once
#include <stdint.h>

namespace ppsf {

constexpr int MOST_AXES = 7;

// Columns of the table of addresses, which has a row for each shard.
enum Address { WEIGHTS, GRADIENT, Z, EXP_AVG, EXP_AVG_SQ, P0, S, PACKED_Z, ADDRESSES };

// Rows of the table of coefficients, as Plan::rows finds them.
enum Coefficient {
    DELTA, AVERAGE, Q, BETA1, WEIGHT_DECAY, KEEP, D, D_EPS, MOMENTUM_WEIGHT, BETA2, SQUARE_WEIGHT, BETA3, S_WEIGHT, ROOT,
    COEFFICIENTS
};

// Rows of the table of scales (ppsf_dist.kernels.interface.Scales).
enum Scale { AMOUNT, PULL, MASK, ADVANCE };

// Sums of one task, in the order of ppsf_dist.methods.sums.Stat from LARGEST_SQUARE on.
enum Sum {
    LARGEST_SQUARE, DOT, S_L1, DELTA_L1, DELTA_SQUARE, EARLY_MASK, UU, WW, WU, LATE_MASK, GG, SUMS
};

enum Flag : int64_t {
    OWNED = 1 << 0,
    FACTORED = 1 << 1,
    SCHEDULEFREE = 1 << 2,
    MOMENTUM = 1 << 3,
    SECOND_MOMENT = 1 << 4,
    SGD_PHASE = 1 << 5,
    STATISTICS = 1 << 6,
    SPEED = 1 << 7,
    DECAYS = 1 << 8,
    DECAYS_BY_LR = 1 << 9,
    COUPLED_DECAY = 1 << 10,
    ATAN2 = 1 << 11,
    NEEDS_NORMS = 1 << 12,
    CAUTIOUS = 1 << 13,
    GRAMS = 1 << 14,
    STOCHASTIC = 1 << 15,
    WEIGHTS_IN_BF16 = 1 << 16,
    SAMPLES_IN_BF16 = 1 << 17,
    // R and C are each one value for a line or one for each of its elements, and no two lines share the former.
    MATRIX = 1 << 18,
    // The elements follow each other in the flattened parameter.
    FLAT = 1 << 19,
};

// A box of a parameter whose elements lie one after the other in local memory, as lines along its last axis.
struct Piece {
    int64_t slot, flags, slice_p, shard;
    // Pieces that may add to the same row or column are in different rounds.
    int64_t round;
    // Its first element and sample among those of the shard.
    int64_t first, first_sample;
    int64_t n, lines, axes;
    // Of the first element: its index in the flattened parameter, and where its row and column lie in the factors.
    int64_t index, row, col;
    // From an element of a line to the next: 0 or 1. A line may be a row of equal parts of `inner` elements: then that
    // holds within each, and from a part to the next are the jumps.
    int64_t row_step, col_step;
    int64_t inner, row_jump, col_jump;
    // The whole vectors of the parameter.
    int64_t first_row, row_count, first_col, col_count;
    // Of the axes before the last, and from a line to its neighbour along each of them.
    int64_t size[MOST_AXES], index_stride[MOST_AXES], row_stride[MOST_AXES], col_stride[MOST_AXES];
};

// Lines of a piece, from `begin` to `end` along them, and the place of its first sample. Its sums along the lines wait in
// Plan::partial from `partial` on, unless that is -1. No two tasks of a batch write to the same place.
struct Task {
    int64_t piece, first_line, last_line, begin, end, sample, batch, partial;
};

// Which tasks are taken. Several threads share it.
struct Job {
    int64_t next, last;
};

struct Plan {
    const Piece* pieces;
    const Task* tasks;
    const int64_t* addresses;
    const float* coefficients;
    int64_t slots;
    int64_t rows[COEFFICIENTS];
    float* factors;
    const float* scales;
    const int32_t* keys;
    const uint8_t* moments_gate;
    const uint8_t* weights_gate;
    float* sums;
    double* stats;
    int64_t stat_columns;
    double* masks;
    float* partial;
    double* results;
};

// Where the part of a parameter begins in the tables of factored moments.
struct Begins {
    int64_t value, row, cell, ordered;
};

// The flat buffer of factored moments (ppsf_dist/state/moments.py).
struct Moments {
    const Begins* begins;        // of each parameter, and where all end
    float* values;
    float* after;                // the moments after the step
    const float* inverse_n;
    const uint8_t* in_bf16;      // or null
    const uint8_t* adopt;        // of each parameter, or null
    // Of the values of R: which are divided by themselves, and by the mean of which cell the others are.
    const uint8_t* own_mean;
    const int64_t* cell_of;
    // The values of each cell, one after the other, and how many there are.
    const int64_t* ordered;
    const int64_t* lengths;
    float* means;
};

}  // namespace ppsf
