// The numbers of groups of ProdigyPlusScheduleFree, as ppsf_dist/methods/prodigy_plus.py has them.
#pragma once
#include "numbers.h"

namespace ppsf::prodigy_plus {

// Rows of the tables of a group: ProdigyPlus.hyper, its numbers, its coefficients, and what a step knows.
namespace argument {
enum { lr, beta1, beta2, beta3, beta4, growth_rate, weight_decay, d0, d_coef, eps, prodigy_steps, schedulefree_c, gain_is_d,
    momentum_of_d, focus_fixed, d_limiter, use_speed, use_bias_correction, use_schedulefree, weight_decay_by_lr };
}
namespace value {
enum { d, d_prev, d_numerator, d_denom, prev_d_numerator, max_d_numerator, weight_sum, effective_lr, shared_d };
}
namespace coefficient {
using namespace ppsf::coefficient;
enum { d = own, d_eps, momentum_weight, beta2, square_weight, focus_correction, clamp, beta3, s_weight };
}
namespace known {
using namespace ppsf::known;
enum { d = own, beta2, weight, weight_sum };
}
constexpr double LIMIT = 1.189207115002721;  // 2^(1/4)

void begin(const Groups& all) {
    double unsound = 0;
    for (int64_t i = 0; i < all.count; i++) {
        const Group of{all, i};
        const double d = of.was(value::d), k = of.was(int(all.k)), lr = of.given(argument::lr);
        const double beta1 = of.given(argument::beta1), decay = of.given(argument::weight_decay);
        unsound += !begin_group(of, value::d + 1);

        const double shared = of.was(value::shared_d);
        double delta = (all.options & option::takes_mean && shared > 0 ? shared : d) * lr, beta2 = of.given(argument::beta2);
        if (of.given(argument::use_bias_correction) > 0) {
            double rectification;
            beta2 = radam(k, beta2, &rectification);
            delta *= rectification;
        }
        double weight_sum = of.was(value::weight_sum), c = averaged(delta * delta, &weight_sum);
        const double constant = of.given(argument::schedulefree_c);
        if (constant > 0) c = smaller(c * (1 - beta1) * constant, 1);
        const double q = 1 - beta1 * (1 - c), weight = d * d / __builtin_sqrt(of.given(argument::d0));
        const double steps = of.given(argument::prodigy_steps);

        of.knows(known::k) = k, of.knows(known::d) = d, of.knows(known::delta) = delta;
        of.knows(known::c) = c, of.knows(known::q) = q, of.knows(known::beta2) = beta2;
        of.knows(known::weight) = weight, of.knows(known::weight_sum) = weight_sum;
        of.knows(known::adapts) = steps == 0 || k < steps;
        of.knows(known::speeds) = of.given(argument::use_speed) > 0;

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
    end_beginning(all, unsound);
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
    if (!(of.all.options & option::quirks)) estimate = d_coef * estimate;
    if (of.given(argument::d_limiter) > 0) estimate = smaller(LIMIT * d, estimate);
    if (of.all.options & option::quirks) estimate = d_coef * estimate;
    estimate = smaller(estimate, most);
    if (!(denominator > 0)) return d;
    return beta4 > 0 ? beta4 * d + (1 - beta4) * larger(estimate, d0) : larger(d, estimate);
}

// The numbers after a step from the totals of its parts, rows by groups. Nothing but what is counted of a void one.
void end(const Groups& all, const double* totals, double* after) {
    const int64_t n = all.count;
    const bool ok = count_step(all, totals, after), pooled = all.options & option::pooled;
    if (!ok) return;
    double numerators = 0, denominators = 0, inverses = 0;
    for (int64_t i = 0; i < n; i++) {
        numerators += totals[total::numerator * n + i] * all.known[known::weight * n + i];
        denominators += totals[total::denominator * n + i];
    }
    for (int64_t i = 0; i < n; i++) {
        // With one d for all it is that of the first group.
        const Group of{all, i}, first{all, pooled ? 0 : i};
        double* next = after + i;
        if (first.knows(known::adapts) != 0) {
            const double numerator = pooled ? numerators : totals[total::numerator * n + i] * of.knows(known::weight);
            const double denominator = pooled ? denominators : totals[total::denominator * n + i];
            const bool counts = first.knows(known::d) > first.given(argument::d0) || numerator > 0;
            const double sum = first.given(argument::beta3) * first.was(value::d_numerator) + (counts ? numerator : 0);
            const double largest = larger(sum, first.was(value::max_d_numerator));
            next[value::d * n] = adapted(first, sum, largest, denominator);
            next[value::d_prev * n] = of.knows(known::d);
            next[value::d_numerator * n] = sum, next[value::d_denom * n] = denominator;
            next[value::prev_d_numerator * n] = first.was(value::d_numerator);
            next[value::max_d_numerator * n] = largest;
        }
        const bool averages = of.given(argument::use_schedulefree) > 0;
        if (totals[total::moved * n + i] > 0 || !averages) {
            // Of an average that has been switched off nothing is left.
            next[value::weight_sum * n] = averages ? of.knows(known::weight_sum) : 0;
            next[value::effective_lr * n] = of.given(argument::lr) * (averages ? of.knows(known::q) : 1);
        }
        inverses += 1 / next[value::d * n];
    }
    for (int64_t i = 0; i < n && all.options & option::averages_d; i++) after[value::shared_d * n + i] = double(n) / inverses;
}

}  // namespace ppsf::prodigy_plus
