// What lies between the passes: the numbers of groups (as ppsf_dist/methods/prodigy_plus.py has them) and of parameters (as
// ppsf_dist/engine/part_numbers.py), in fp64. For torch their formulas are a hundred operators on short vectors.
#pragma once
#include "element.h"
#include "plan.h"

namespace ppsf {

// Rows of the tables of a group, in the order of ProdigyPlus.hyper, of its numbers with those of a step, and of its
// coefficients. The last of each counts them.
namespace argument {
enum { lr, beta1, beta2, beta3, beta4, growth_rate, weight_decay, d0, d_coef, eps, prodigy_steps, schedulefree_c, gain_is_d,
    momentum_of_d, focus_fixed, d_limiter, use_speed, use_bias_correction, use_schedulefree, weight_decay_by_lr, rows };
}
namespace value {
enum { d, d_prev, d_numerator, d_denom, prev_d_numerator, max_d_numerator, weight_sum, effective_lr, shared_d, k,
    skipped_steps, gradient_norm, update_norm, cause, failures, rows };
}
namespace coefficient {
enum { delta, c, q, beta1, weight_decay, keep, gain, d, d_eps, momentum_weight, beta2, square_weight, focus_correction, clamp,
    beta3, s_weight, rows };
}
// What a step knows of a group from its beginning on.
namespace known {
enum { k, d, delta, c, q, beta2, weight, weight_sum, adapts, unsound, rows };
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

struct Groups {
    int64_t count;
    // One d for all groups, with the arguments of the first; whether steps take the harmonic mean of all, and whether it is
    // computed; reference_quirks.
    int64_t pooled, takes_mean, averages_d, quirks;
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

constexpr double LIMIT = 1.189207115002721;  // 2^(1/4)

// base^count by squaring.
inline double power(double base, double count) {
    double result = 1;
    for (uint64_t n = uint64_t(count); n; n >>= 1, base *= base)
        if (n & 1) result *= base;
    return result;
}

inline double fourth_root(double x) { return __builtin_sqrt(__builtin_sqrt(x)); }

struct Group {
    const Groups& all;
    int64_t g;
    double given(int row) const { return all.arguments[row * all.count + g]; }
    double was(int row) const { return all.values[row * all.count + g]; }
    double& knows(int row) const { return all.known[row * all.count + g]; }
    float& scales(int row) const { return all.coefficients[row * all.count + g]; }
};

// RAdam's beta2 and rectification, as ppsf_dist/algorithm/second_moment.py.
inline double radam(double k, double beta2, double* rectification) {
    const double grown = power(beta2, k), longest = 2 / (1 - beta2) - 1;
    const double rho = longest - 2 * k * grown / (1 - grown);
    const double variance = (rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho);
    *rectification = __builtin_sqrt(larger(rho > 4 ? variance : 0, 0));
    return 1 - (1 - beta2) / (1 - grown);
}

void begin_step(const Groups& all) {
    double unsound = 0;
    for (int64_t i = 0; i < all.count; i++) {
        const Group of{all, i};
        const double d = of.was(value::d), k = of.was(value::k), lr = of.given(argument::lr);
        const double beta1 = of.given(argument::beta1), decay = of.given(argument::weight_decay);
        bool sound = __builtin_isfinite(d);
        for (int row = 0; row < argument::rows; row++) sound &= __builtin_isfinite(of.given(row));
        unsound += !sound;

        double delta = (all.takes_mean && of.was(value::shared_d) > 0 ? of.was(value::shared_d) : d) * lr;
        double beta2 = of.given(argument::beta2);
        if (of.given(argument::use_bias_correction) > 0) {
            double rectification;
            beta2 = radam(k, beta2, &rectification);
            delta *= rectification;
        }
        const double share = delta * delta, weight_sum = of.was(value::weight_sum) + share;
        double c = weight_sum > 0 ? share / larger(weight_sum, 2.2250738585072014e-308) : 0;
        const double constant = of.given(argument::schedulefree_c);
        if (constant > 0) c = smaller(c * (1 - beta1) * constant, 1);
        const double q = 1 - beta1 * (1 - c), weight = d * d / __builtin_sqrt(of.given(argument::d0));
        const double steps = of.given(argument::prodigy_steps);

        of.knows(known::k) = k, of.knows(known::d) = d, of.knows(known::delta) = delta;
        of.knows(known::c) = c, of.knows(known::q) = q, of.knows(known::beta2) = beta2;
        of.knows(known::weight) = weight, of.knows(known::weight_sum) = weight_sum;
        of.knows(known::adapts) = steps == 0 || k < steps;

        const double square = of.given(argument::focus_fixed) > 0 ? 1 : d * d;
        of.scales(coefficient::delta) = float(delta), of.scales(coefficient::c) = float(c);
        of.scales(coefficient::q) = float(q), of.scales(coefficient::beta1) = float(beta1);
        of.scales(coefficient::weight_decay) = float(decay);
        of.scales(coefficient::keep) = float(1 - decay * (of.given(argument::weight_decay_by_lr) > 0 ? delta : 1));
        of.scales(coefficient::gain) = float(of.given(argument::gain_is_d) > 0 ? d : 1);
        of.scales(coefficient::d) = float(d), of.scales(coefficient::d_eps) = float(d * of.given(argument::eps));
        of.scales(coefficient::momentum_weight) =
            float((1 - beta1) * (of.given(argument::momentum_of_d) > 0 ? d : 1));
        of.scales(coefficient::beta2) = float(beta2);
        of.scales(coefficient::square_weight) = float((1 - beta2) * square);
        of.scales(coefficient::focus_correction) = 1, of.scales(coefficient::clamp) = float(fourth_root(k));
        of.scales(coefficient::beta3) = float(of.given(argument::beta3));
        of.scales(coefficient::s_weight) = float(weight);
    }
    for (int64_t i = 0; i < all.count; i++) all.known[known::unsound * all.count + i] = unsound;
}

// d after a step, as ppsf_dist/algorithm/step_size.py: `total` is the new numerator, `largest` the largest so far.
inline double adapted(const Group& of, double total, double largest, double denominator) {
    const double d = of.knows(known::d), d0 = of.given(argument::d0), d_coef = of.given(argument::d_coef);
    const double rate = of.given(argument::growth_rate), beta4 = of.given(argument::beta4);
    const double most = rate > 0 && d != d0 ? rate * d : __builtin_inf();
    if (of.given(argument::use_speed) > 0) {
        const double before = of.was(value::d_numerator);
        if (!(total >= largest && total > 0 && before > 0)) return d;
        const double grown = d * smaller(__builtin_sqrt(larger(total / before, 0)), LIMIT) *
            __builtin_sqrt(fourth_root(d_coef));
        return larger(d, smaller(grown, most));
    }
    double estimate = total / denominator;
    if (!of.all.quirks) estimate = d_coef * estimate;
    if (of.given(argument::d_limiter) > 0) estimate = smaller(LIMIT * d, estimate);
    if (of.all.quirks) estimate = d_coef * estimate;
    estimate = smaller(estimate, most);
    if (!(denominator > 0)) return d;
    return beta4 > 0 ? beta4 * d + (1 - beta4) * larger(estimate, d0) : larger(d, estimate);
}

// The numbers after a step from the totals of its parts, rows by groups. Nothing but what is counted of a void one.
void end_step(const Groups& all, const double* totals, double* after) {
    const int64_t n = all.count;
    double numerators = 0, denominators = 0, inverses = 0;
    bool ok = true;
    for (int64_t i = 0; i < n; i++) {
        numerators += totals[total::numerator * n + i] * all.known[known::weight * n + i];
        denominators += totals[total::denominator * n + i];
        ok &= totals[total::cause * n + i] == why::nothing;
    }
    for (int64_t i = 0; i < value::rows * n; i++) after[i] = all.values[i];
    for (int64_t i = 0; i < n; i++) {
        // With one d for all it is that of the first group.
        const Group of{all, i}, first{all, all.pooled ? 0 : i};
        double* next = after + i;
        if (ok && first.knows(known::adapts) != 0) {
            const double numerator = all.pooled ? numerators : totals[total::numerator * n + i] * of.knows(known::weight);
            const double denominator = all.pooled ? denominators : totals[total::denominator * n + i];
            const bool counts = first.knows(known::d) > first.given(argument::d0) || numerator > 0;
            const double sum = first.given(argument::beta3) * first.was(value::d_numerator) + (counts ? numerator : 0);
            const double largest = larger(sum, first.was(value::max_d_numerator));
            next[value::d * n] = adapted(first, sum, largest, denominator);
            next[value::d_prev * n] = of.knows(known::d);
            next[value::d_numerator * n] = sum, next[value::d_denom * n] = denominator;
            next[value::prev_d_numerator * n] = first.was(value::d_numerator);
            next[value::max_d_numerator * n] = largest;
        }
        if (ok) {
            const bool averages = of.given(argument::use_schedulefree) > 0;
            if (totals[total::moved * n + i] > 0 || !averages) {
                // Of an average that has been switched off nothing is left.
                next[value::weight_sum * n] = averages ? of.knows(known::weight_sum) : 0;
                next[value::effective_lr * n] = of.given(argument::lr) * (averages ? of.knows(known::q) : 1);
            }
            next[value::k * n] += 1;
        }
        const double cause = totals[total::cause * n + i];
        next[value::skipped_steps * n] += cause == why::gradient || cause == why::number;
        next[value::failures * n] += cause == why::failure;
        if (!ok) next[value::cause * n] = cause;
        next[value::gradient_norm * n] = __builtin_sqrt(totals[total::gradient_square * n + i]);
        next[value::update_norm * n] = __builtin_sqrt(totals[total::update_square * n + i]);
        inverses += 1 / next[value::d * n];
    }
    for (int64_t i = 0; i < n && ok && all.averages_d; i++) after[value::shared_d * n + i] = double(n) / inverses;
}

void fill_coefficients(const Groups& all, const Parameters& of) {
    for (int row = 0; row < coefficient::rows; row++)
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

// Which parameters have a gradient on some rank, and why nothing may be written, if so. In fp64 the sums of finite numbers
// are finite, and sums of others are not.
int find_cause(const Parameters& of, uint8_t* active) {
    double state = 0, gradients = 0;
    for (int64_t i = 0; i < of.count; i++) {
        const double* sums = of.stats + i * of.columns;
        active[i] = sums[stat::present] > 0;
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
        if (!active[i]) continue;
        if (group.knows(known::adapts) != 0) {
            double numerator = stored(sums[stat::dot], of.traits[i] & ROUNDS_SAMPLES);
            double denominator = stored(sums[stat::s_l1], of.traits[i] & ROUNDS_S);
            if (group.given(argument::use_speed) > 0)
                speed(of, i, group.knows(known::k), after + i, &numerator, &denominator);
            sum[total::numerator * n] += numerator, sum[total::denominator * n] += denominator;
        }
        const double advance = amount(of, i) * group.knows(known::delta);
        sum[total::moved * n] += 1, sum[total::gradient_square * n] += sums[stat::gg];
        sum[total::update_square * n] += of.traits[i] & MEASURED ? sums[stat::uu] * (advance * advance) : __builtin_nan("");
    }
}

void fill_gates(const Parameters& of, const uint8_t* active, int cause) {
    for (int64_t i = 0; i < of.count; i++) of.moments_gate[i] = of.weights_gate[i] = active[i] && cause == why::nothing;
}

}  // namespace ppsf
