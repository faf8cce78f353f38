// The numbers of groups of Prodigy, as ppsf_dist/methods/prodigy.py has them: one d for all, which is known once a step has
// its sums, and serves this step.
#pragma once
#include "numbers.h"

namespace ppsf::prodigy {

// Rows of the tables of a group: ProdigyMethod.hyper, its numbers, its coefficients, and what a step knows.
namespace argument {
enum { lr, beta1, beta2, beta3, eps, weight_decay, use_bias_correction, safeguard_warmup, d0, d_coef, growth_rate };
}
namespace value {
enum { d, d_max, d_hat, d_numerator, d_denom, rows };
}
namespace coefficient {
using namespace ppsf::coefficient;
enum { d_eps = own, momentum_weight, beta2, square_weight, beta3, s_weight };
}
// Its d and what that comes from, in the order of `value`.
namespace known {
using namespace ppsf::known;
enum { now = own };
}

// What follows from the d that this step writes with.
inline void take_d(const Group& of, double d) {
    of.scales(coefficient::gain) = float(of.given(argument::beta1) > 0 ? 1 : d);
    of.scales(coefficient::d_eps) = float(d * of.given(argument::eps));
}

void begin(const Groups& all) {
    const Group first{all, 0};
    const double steps = first.was(int(all.k)) + 1;
    const double correction = __builtin_sqrt(1 - power(first.given(argument::beta2), steps)) /
        (1 - power(first.given(argument::beta1), steps));
    double lr = first.given(argument::lr), unsound = 0;
    for (int64_t i = 1; i < all.count; i++) lr = larger(lr, Group{all, i}.given(argument::lr));
    for (int64_t i = 0; i < all.count; i++) {
        const Group of{all, i};
        const double d = of.was(value::d), own_lr = of.given(argument::lr), beta1 = of.given(argument::beta1);
        const double beta2 = of.given(argument::beta2), decay = of.given(argument::weight_decay);
        // Groups stand still or have the same lr.
        unsound += !(begin_group(of, all.adaptive) && (own_lr == 0 || own_lr == lr));
        const double delta = d * lr * (of.given(argument::use_bias_correction) > 0 ? correction : 1);

        of.knows(known::k) = of.was(int(all.k)), of.knows(known::delta) = delta;
        of.knows(known::c) = 0, of.knows(known::q) = 1, of.knows(known::pauses) = own_lr == 0;
        for (int row = 0; row < value::rows; row++) of.knows(known::now + row) = of.was(row);

        of.scales(coefficient::delta) = float(delta), of.scales(coefficient::c) = 0, of.scales(coefficient::q) = 1;
        of.scales(coefficient::beta1) = float(beta1), of.scales(coefficient::weight_decay) = float(decay);
        of.scales(coefficient::keep) = float(1 - decay * delta);
        of.scales(coefficient::momentum_weight) = float((1 - beta1) * d);
        of.scales(coefficient::beta2) = float(beta2), of.scales(coefficient::square_weight) = float((1 - beta2) * d * d);
        of.scales(coefficient::beta3) = float(of.given(argument::beta3));
        of.scales(coefficient::s_weight) =
            float(d / of.given(argument::d0) * (of.given(argument::safeguard_warmup) > 0 ? d : delta));
        take_d(of, d);
    }
    end_beginning(all, unsound);
}

// d of this step, as ppsf_dist/algorithm/step_size.py (`adapted_for_all`), from the totals of its parts, rows by groups.
void learn(const Groups& all, const double* totals) {
    const int64_t n = all.count;
    double numerator = 0, denominator = 0;
    for (int64_t i = 0; i < n; i++) {
        const Group of{all, i};
        numerator += of.was(value::d) / of.given(argument::d0) * of.knows(known::delta) * totals[total::numerator * n + i];
        denominator += totals[total::denominator * n + i];
    }
    for (int64_t i = 0; i < n; i++) {
        const Group of{all, i};
        const double old = of.was(value::d), d0 = of.given(argument::d0), rate = of.given(argument::growth_rate);
        const double sum = Group{all, 0}.given(argument::beta3) * of.was(value::d_numerator) + numerator;
        const double found = of.given(argument::d_coef) * sum / denominator, most = larger(of.was(value::d_max), found);
        const double limit = rate > 0 ? (old == d0 ? larger(old, found) : old) * rate : __builtin_inf();
        const double d = smaller(most, limit);
        const double now[] = {d, most, found, sum, denominator};
        for (int row = 0; row < value::rows; row++) of.knows(known::now + row) = now[row];
        // Where no gradient has been seen yet there is no estimate, and no step.
        of.knows(known::moves) = denominator > 0;
        take_d(of, d);
    }
}

void end(const Groups& all, const double* totals, double* after) {
    if (!count_step(all, totals, after)) return;
    for (int64_t i = 0; i < value::rows * all.count; i++) after[i] = all.known[known::now * all.count + i];
}

}  // namespace ppsf::prodigy
