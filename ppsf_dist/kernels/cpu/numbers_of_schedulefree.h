// The numbers of groups of SGDScheduleFree, AdamWScheduleFree and RAdamScheduleFree, as ppsf_dist/methods/schedulefree.py and
// adamw_schedulefree.py have them.
#pragma once
#include "numbers.h"

namespace ppsf::schedulefree {

// Rows of the tables of a group: ScheduleFree.hyper and what AdamW and RAdam add, its numbers, the coefficients of all
// three, and what a step knows.
namespace argument {
enum { lr, beta1, weight_decay, r, weight_lr_power, warmup_steps, beta2, eps, silent_sgd_phase };
}
namespace value {
enum { k, weight_sum, lr_max, scheduled_lr };
}
namespace coefficient {
using namespace ppsf::coefficient;
enum { d_eps = own, beta2, square_weight, root };
}
namespace known {
using namespace ppsf::known;
enum { weight_sum = own, lr_max };
}

// base^exponent of whole numbers: of others Python takes torch's.
inline double raised(double base, double exponent) {
    return exponent < 0 ? 1 / power(base, -exponent) : power(base, exponent);
}

void begin(const Groups& all) {
    double unsound = 0;
    for (int64_t i = 0; i < all.count; i++) {
        const Group of{all, i};
        const double steps = of.was(value::k) + 1, beta1 = of.given(argument::beta1);
        const double decay = of.given(argument::weight_decay);
        unsound += !begin_group(of, all.adaptive);

        double schedule = smaller(steps / larger(of.given(argument::warmup_steps), 1), 1);
        bool as_sgd = false;
        if (all.options & option::radam) {
            radam(steps, of.given(argument::beta2), &schedule);
            as_sgd = schedule == 0 && of.given(argument::silent_sgd_phase) == 0;
            schedule = as_sgd ? 1 : schedule;
        }
        const double delta = of.given(argument::lr) * schedule, lr_max = larger(delta, of.was(value::lr_max));
        const double weight = raised(steps, of.given(argument::r)) * raised(lr_max, of.given(argument::weight_lr_power));
        double weight_sum = of.was(value::weight_sum);
        const double c = averaged(weight, &weight_sum), q = 1 - beta1 * (1 - c);

        of.knows(known::k) = of.was(value::k), of.knows(known::delta) = delta;
        of.knows(known::c) = c, of.knows(known::q) = q;
        of.knows(known::weight_sum) = weight_sum, of.knows(known::lr_max) = lr_max;

        of.scales(coefficient::delta) = float(delta), of.scales(coefficient::c) = float(c);
        of.scales(coefficient::q) = float(q), of.scales(coefficient::beta1) = float(beta1);
        of.scales(coefficient::weight_decay) = float(decay), of.scales(coefficient::keep) = float(1 - decay * delta);
        of.scales(coefficient::gain) = 1;
        if (all.options & option::adam) {
            // g / (sqrt(V / correction) + eps) in terms of the root that is there.
            const double beta2 = of.given(argument::beta2), root = __builtin_sqrt(1 - power(beta2, steps));
            of.scales(coefficient::gain) = float(as_sgd ? 1 : root);
            of.scales(coefficient::d_eps) = float(as_sgd ? 1 : of.given(argument::eps) * root);
            of.scales(coefficient::beta2) = float(beta2), of.scales(coefficient::square_weight) = float(1 - beta2);
        }
        if (all.options & option::radam) of.scales(coefficient::root) = as_sgd ? 0 : 1;
    }
    end_beginning(all, unsound);
}

void end(const Groups& all, const double* totals, double* after) {
    const int64_t n = all.count;
    if (!count_step(all, totals, after)) return;
    for (int64_t i = 0; i < n; i++) {
        const Group of{all, i};
        after[value::weight_sum * n + i] = of.knows(known::weight_sum);
        after[value::lr_max * n + i] = of.knows(known::lr_max);
        after[value::scheduled_lr * n + i] = of.knows(known::delta);
    }
}

}  // namespace ppsf::schedulefree
