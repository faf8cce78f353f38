// The passes of ppsf_dist.kernels.interface over everything in a plan: plain C calls without torch, Python or threads of
// their own. Several threads may be in the same call; which of them does a task changes no bit.
#include "moments.h"
#include "numbers_of_prodigy.h"
#include "numbers_of_prodigy_plus.h"
#include "numbers_of_schedulefree.h"
#include "tasks.h"

namespace ppsf {
namespace {

void run_task(const Plan& plan, int pass, int64_t number) {
    const Task& task = plan.tasks[number];
    double* result = plan.results + number * SUMS;
    for (int sum = 0; sum < SUMS && pass != WRITE; sum++) result[sum] = 0;
    const bool half = plan.pieces[task.piece].flags & WEIGHTS_IN_BF16;
    half ? do_task<bf16>(plan, pass, task, result) : do_task<float>(plan, pass, task, result);
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
        if (task.partial >= 0 && is_summed_by_lines(piece)) {
            float* along = plan.sums + place_along(piece);
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
    sizes[4] = sizeof(Moments), sizes[5] = sizeof(Groups), sizes[6] = sizeof(Parameters);
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
        const bool by_lines = is_summed_by_lines(piece);
        int64_t lines = (ELEMENTS + piece.n - 1) / piece.n, step = piece.n;
        if (by_lines) {
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
        if (sums && !by_lines) wants = 2 * (piece.row_count + piece.col_count);
        else if (by_lines && parts > 1) wants = piece.n;
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
EXPORTED void ppsf_update_moments(const Plan* plan, const Moments* moments, int64_t first, int64_t last) {
    update_moments(*plan, *moments, first, last);
}

EXPORTED void ppsf_fill_factors(const Plan* plan, const Moments* moments, int64_t first, int64_t last) {
    fill_factors(*plan, *moments, first, last);
}

EXPORTED void ppsf_write_moments(const Plan* plan, const Moments* moments) { write_moments(*plan, *moments); }

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

// The numbers between the passes: those of groups by method, then those of parameters, in the order of a step.
EXPORTED void ppsf_begin_prodigy_plus(const Groups* groups) { prodigy_plus::begin(*groups); }

EXPORTED void ppsf_end_prodigy_plus(const Groups* groups, const double* totals, double* after) {
    prodigy_plus::end(*groups, totals, after);
}

EXPORTED void ppsf_begin_prodigy(const Groups* groups) { prodigy::begin(*groups); }

EXPORTED void ppsf_learn_prodigy(const Groups* groups, const double* totals) { prodigy::learn(*groups, totals); }

EXPORTED void ppsf_end_prodigy(const Groups* groups, const double* totals, double* after) {
    prodigy::end(*groups, totals, after);
}

EXPORTED void ppsf_begin_schedulefree(const Groups* groups) { schedulefree::begin(*groups); }

EXPORTED void ppsf_end_schedulefree(const Groups* groups, const double* totals, double* after) {
    schedulefree::end(*groups, totals, after);
}

EXPORTED void ppsf_fill_coefficients(const Groups* groups, const Parameters* of) { fill_coefficients(*groups, *of); }

EXPORTED void ppsf_fill_keys(const Parameters* of, uint32_t seed) { fill_keys(*of, seed); }

EXPORTED void ppsf_fill_scales(const Groups* groups, const Parameters* of) { fill_scales(*groups, *of); }

EXPORTED int ppsf_find_cause(const Groups* groups, const Parameters* of, uint8_t* active) {
    return find_cause(*groups, *of, active);
}

EXPORTED void ppsf_contribute(
    const Groups* groups, const Parameters* of, const uint8_t* active, const double* cause, double* totals, double* after) {
    contribute(*groups, *of, active, *cause, totals, after);
}

EXPORTED void ppsf_fill_gates(const Groups* groups, const Parameters* of, const uint8_t* active, const double* cause) {
    fill_gates(*groups, *of, active, *cause);
}

// Whether it rounds once where it may.
EXPORTED int ppsf_fuses() { return FUSES; }
