// What lies between the passes: the numbers of parameters, as ppsf_dist/engine/part_numbers.py has them, and what the
// numbers of groups have in common whatever the method, in fp64. For torch their formulas are a hundred operators on
// short vectors. What groups do of their own is in numbers_of_*.h, a file for each module of ppsf_dist/methods.
#pragma once
#include "element.h"
#include "plan.h"

namespace ppsf {

// The first coefficients of every method (ppsf_dist.methods.base.AVERAGING); those of its own follow.
namespace coefficient {
enum { delta, c, q, beta1, weight_decay, keep, gain, own };
}
// What a step knows of a group (ppsf_dist.kernels.codes.KNOWN); what it needs to know of its own follows.
namespace known {
enum { k, delta, c, q, adapts, speeds, pauses, moves, unsound, own };
}
// The last numbers of a group, after the adaptive ones (ppsf_dist.engine.group_numbers.OF_THE_STEP).
namespace last {
enum { gradient_norm, update_norm, cause, failures, rows };
}
// ppsf_dist.methods.base.Total and Cause.
namespace total {
enum { numerator, denominator, moved, gradient_square, update_square, cause, rows };
}
namespace why {
enum { nothing, weights, gradient, number, failure };
}
// ppsf_dist.methods.sums.Stat.
namespace stat {
enum { present, largest_square, dot, s_l1, delta_l1, delta_square, early_mask, uu, ww, wu, late_mask, gg };
}
// ppsf_dist.state.inventory.PARAMETER_NUMBERS.
namespace memory {
enum { step, dot, l1, l2, rows };
}

// ppsf_dist.kernels.numbers.Options: what there is to do.
namespace option {
enum { pooled = 1 << 0, takes_mean = 1 << 1, averages_d = 1 << 2, quirks = 1 << 3, adam = 1 << 6, radam = 1 << 7 };
}

struct Groups {
    // Of groups, and of the rows of the tables: arguments, adaptive numbers (of those that of steps and that of skipped
    // ones), coefficients.
    int64_t count, arguments_count, adaptive, k, skipped_steps, coefficients_count;
    int64_t options;
    // Rows by groups: the numbers before the step, the arguments, what a step knows, and the coefficients.
    const double* values;
    const double* arguments;
    double* known;
    float* coefficients;
};

enum Trait : int64_t {
    STABLEADAMW = 1 << 0,
    MEASURED = 1 << 1,
    EARLY = 1 << 2,
    LATE = 1 << 3,
    ROUNDS_SAMPLES = 1 << 4,
    ROUNDS_S = 1 << 5,
};

struct Parameters {
    int64_t count, columns, sums_count;
    const int64_t* traits;
    const int64_t* group_of;
    const int64_t* param_id;
    const double* numel;
    // Rows by parameters, but for the sums: those are parameters by columns, and flat.
    const double* numbers;
    float* coefficients;
    float* scales;
    int32_t* keys;
    uint8_t* moments_gate;
    uint8_t* weights_gate;
    const double* stats;
    const float* sums;
    const double* outcome;
};

// As torch.maximum and torch.minimum: of a NaN and a number it is NaN.
inline double larger(double a, double b) { return a > b || a != a ? a : b; }
inline double smaller(double a, double b) { return a < b || a != a ? a : b; }

// base^count by squaring.
inline double power(double base, double count) {
    double result = 1;
    for (uint64_t n = uint64_t(count); n; n >>= 1, base *= base)
        if (n & 1) result *= base;
    return result;
}

inline double fourth_root(double x) { return __builtin_sqrt(__builtin_sqrt(x)); }

// RAdam's beta2 and rectification, as ppsf_dist/algorithm/second_moment.py.
inline double radam(double k, double beta2, double* rectification) {
    const double grown = power(beta2, k), longest = 2 / (1 - beta2) - 1;
    const double rho = longest - 2 * k * grown / (1 - grown);
    const double variance = (rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho);
    *rectification = __builtin_sqrt(larger(rho > 4 ? variance : 0, 0));
    return 1 - (1 - beta2) / (1 - grown);
}

// The share of a step of some weight in the average (ppsf_dist/algorithm/averaging.py), and the new sum of weights.
inline double averaged(double weight, double* weight_sum) {
    *weight_sum += weight;
    return *weight_sum > 0 ? weight / larger(*weight_sum, 2.2250738585072014e-308) : 0;
}

// One of the groups, in all tables.
struct Group {
    const Groups& all;
    int64_t g;
    double given(int row) const { return all.arguments[row * all.count + g]; }
    double was(int row) const { return all.values[row * all.count + g]; }
    double& knows(int row) const { return all.known[row * all.count + g]; }
    float& scales(int row) const { return all.coefficients[row * all.count + g]; }
};

// What is known of a group that nothing is special about; true if its arguments, and the first so many adaptive numbers,
// are finite.
inline bool begin_group(const Group& of, int64_t adaptive) {
    of.knows(known::adapts) = of.knows(known::moves) = 1, of.knows(known::speeds) = of.knows(known::pauses) = 0;
    bool sound = true;
    for (int64_t row = 0; row < of.all.arguments_count; row++) sound &= __builtin_isfinite(of.given(int(row)));
    for (int64_t row = 0; row < adaptive; row++) sound &= __builtin_isfinite(of.was(int(row)));
    return sound;
}

inline void end_beginning(const Groups& all, double unsound) {
    for (int64_t i = 0; i < all.count; i++) all.known[known::unsound * all.count + i] = unsound;
}

// What is counted of every step, void or not, in the numbers after it, which are those before it otherwise; true if it is
// not void.
inline bool count_step(const Groups& all, const double* totals, double* after) {
    const int64_t n = all.count;
    bool ok = true, moves = false;
    for (int64_t i = 0; i < n; i++) {
        ok &= totals[total::cause * n + i] == why::nothing;
        moves |= all.known[known::moves * n + i] != 0;
    }
    ok &= moves;
    for (int64_t i = 0; i < (all.adaptive + last::rows) * n; i++) after[i] = all.values[i];
    for (int64_t i = 0; i < n; i++) {
        const double cause = totals[total::cause * n + i];
        double* of_step = after + all.adaptive * n + i;
        after[all.k * n + i] += ok;
        after[all.skipped_steps * n + i] += cause == why::gradient || cause == why::number;
        of_step[last::failures * n] += cause == why::failure;
        if (!ok) of_step[last::cause * n] = cause;
        of_step[last::gradient_norm * n] = __builtin_sqrt(totals[total::gradient_square * n + i]);
        of_step[last::update_norm * n] = __builtin_sqrt(totals[total::update_square * n + i]);
    }
    return ok;
}

void fill_coefficients(const Groups& all, const Parameters& of) {
    for (int64_t row = 0; row < all.coefficients_count; row++)
        for (int64_t i = 0; i < of.count; i++)
            of.coefficients[row * of.count + i] = all.coefficients[row * all.count + of.group_of[i]];
}

// Of stochastic rounding, as ppsf_dist/algorithm/rounding.py.
void fill_keys(const Parameters& of, uint32_t seed) {
    for (int64_t i = 0; i < of.count; i++) {
        const uint32_t key = mix(uint32_t(int64_t(of.numbers[memory::step * of.count + i])) + seed);
        of.keys[i] = int32_t(mix(key ^ uint32_t(uint64_t(of.param_id[i]) * 0x632BE5ABu)));
    }
}

inline double of_mask(double count, double numel) { return 1 / larger(count / numel, 1e-3); }

// What multiplies the direction of a parameter: the gain with an early mask, and StableAdamW's factor.
inline double amount(const Parameters& of, int64_t i) {
    const double* sums = of.stats + i * of.columns;
    double gain = of.coefficients[coefficient::gain * of.count + i], rms = 1;
    if (of.traits[i] & EARLY) gain *= of_mask(sums[stat::early_mask], of.numel[i]);
    if (of.traits[i] & STABLEADAMW)
        rms = 1 / __builtin_sqrt(larger(__builtin_sqrt(sums[stat::uu] * gain * gain / of.numel[i]), 1));
    return rms * gain;
}

void fill_scales(const Groups& all, const Parameters& of) {
    for (int64_t i = 0; i < of.count; i++) {
        const double factor = amount(of, i);
        const double mask = of.traits[i] & LATE ? of_mask(of.stats[i * of.columns + stat::late_mask], of.numel[i]) : 1;
        of.scales[AMOUNT * of.count + i] = float(factor), of.scales[PULL * of.count + i] = 0;
        of.scales[MASK * of.count + i] = float(mask);
        of.scales[ADVANCE * of.count + i] = float(factor * all.known[known::delta * all.count + of.group_of[i]]);
    }
}

// Which parameters have a gradient on some rank, and a group that does not pause, and why nothing may be written, if so.
// In fp64 the sums of finite numbers are finite, and sums of others are not.
int find_cause(const Groups& all, const Parameters& of, uint8_t* active) {
    double state = 0, gradients = 0;
    for (int64_t i = 0; i < of.count; i++) {
        const double* sums = of.stats + i * of.columns;
        active[i] = sums[stat::present] > 0 && all.known[known::pauses * all.count + of.group_of[i]] == 0;
        for (int column = stat::dot; column < stat::late_mask; column++) state += sums[column];
        gradients += sums[stat::largest_square];
    }
    const float* of_moments = of.sums;
#pragma omp simd reduction(+ : gradients)
    for (int64_t i = 0; i < of.sums_count; i++) gradients += double(of_moments[i]);
    if (of.outcome[0] > 0 || of.outcome[1] > 0) return why::failure;
    if (of.outcome[2] > 0) return why::number;
    if (!__builtin_isfinite(gradients)) return why::gradient;
    return __builtin_isfinite(state) ? why::nothing : why::weights;
}

inline double stored(double x, bool in_bf16) { return in_bf16 ? as_bf16(float(x)) : x; }

// SPEED's share of a parameter in the sums of its group; its memory after the step goes to `after`, a column of rows.
inline void speed(const Parameters& of, int64_t i, double k, double* after, double* numerator, double* denominator) {
    const double* sums = of.stats + i * of.columns;
    const bool rounds = of.traits[i] & ROUNDS_SAMPLES;
    const double dot = stored(sums[stat::dot], rounds), l1 = stored(sums[stat::delta_l1], rounds);
    const double l2 = stored(__builtin_sqrt(sums[stat::delta_square]), rounds);
    double* old[memory::rows];
    for (int row = 0; row < memory::rows; row++) old[row] = after + row * of.count;
    const double decay = 1 - 1 / (__builtin_sqrt(k) * fourth_root(k));
    const double average = *old[memory::l1] == 0 ? dot : decay * *old[memory::dot] + (1 - decay) * dot;
    *old[memory::dot] = float(average);
    *old[memory::l1] = larger(l1, larger(*old[memory::l1], 1e-8));
    *old[memory::l2] = larger(l2, larger(*old[memory::l2], 1e-8));
    *numerator = 1 / ((1 + *old[memory::l2]) * (1 + *old[memory::l2])) * *old[memory::dot] / *old[memory::l1];
    *denominator = *old[memory::l2];
}

// What parameters add to their groups, and their own numbers after the step. Of a part that is not written only the cause
// and the gradient's norm count.
void contribute(const Groups& all, const Parameters& of, const uint8_t* active, double cause, double* totals, double* after) {
    const int64_t n = all.count;
    for (int64_t i = 0; i < total::rows * n; i++) totals[i] = i < total::cause * n ? 0 : cause;
    for (int64_t i = 0; i < memory::rows * of.count; i++) after[i] = of.numbers[i];
    for (int64_t i = 0; i < of.count; i++) {
        const Group group{all, of.group_of[i]};
        const double* sums = of.stats + i * of.columns;
        double* sum = totals + group.g;
        after[i] += 1;
        // Of one that stands still, too.
        sum[total::gradient_square * n] += sums[stat::gg];
        if (!active[i]) continue;
        if (group.knows(known::adapts) != 0) {
            double numerator = stored(sums[stat::dot], of.traits[i] & ROUNDS_SAMPLES);
            double denominator = stored(sums[stat::s_l1], of.traits[i] & ROUNDS_S);
            if (group.knows(known::speeds) != 0)
                speed(of, i, group.knows(known::k), after + i, &numerator, &denominator);
            sum[total::numerator * n] += numerator, sum[total::denominator * n] += denominator;
        }
        const double advance = amount(of, i) * group.knows(known::delta);
        sum[total::moved * n] += 1;
        sum[total::update_square * n] += of.traits[i] & MEASURED ? sums[stat::uu] * (advance * advance) : __builtin_nan("");
    }
}

void fill_gates(const Groups& all, const Parameters& of, const uint8_t* active, double cause) {
    for (int64_t i = 0; i < of.count; i++) {
        const bool moves = all.known[known::moves * all.count + of.group_of[i]] != 0;
        of.moments_gate[i] = of.weights_gate[i] = active[i] && moves && cause == why::nothing;
    }
}

}  // namespace ppsf
