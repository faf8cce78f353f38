// The factored moments, between the passes.
#pragma once
#include "block.h"

namespace ppsf {
namespace {

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

}  // namespace
}  // namespace ppsf
