// The factored moments, between the passes.
#pragma once
#include "block.h"

namespace ppsf {
namespace {

// Calls f with each run of values that belong to one parameter, from and to, and the parameter: they come in its order.
template <class F>
inline void each_run(const Moments& m, const int64_t* at, int64_t begin, int64_t end, F f) {
    auto slot = [&](int64_t i) { return m.slot_of[at ? at[i] : i]; };
    while (begin < end) {
        const int64_t here = slot(begin);
        int64_t low = begin, high = begin + 1;
        for (int64_t step = 1; high < end && slot(high) == here; step *= 2) low = high, high = end - high < step ? end : high + step;
        while (high - low > 1) {
            const int64_t middle = low + (high - low) / 2;
            (slot(middle) == here ? low : high) = middle;
        }
        f(begin, high, here);
        begin = high;
    }
}

// The moments that divide in this step.
inline const float* dividing(const Moments& m, int64_t slot) { return m.adopt && m.adopt[slot] ? m.values : m.after; }

APART void updated(const float* old, float beta, float weight, const float* sums, const float* inverse_n, int64_t n, bool half,
                   float* after) {
    if (half)
        for (int64_t i = 0; i < n; i++) after[i] = ema(old[i], beta, weight, sums[i] * inverse_n[i], true);
    else
        for (int64_t i = 0; i < n; i++) after[i] = ema(old[i], beta, weight, sums[i] * inverse_n[i], false);
}

APART void roots(const float* x, int64_t n, float* root) {
    for (int64_t i = 0; i < n; i++) root[i] = __builtin_sqrtf(x[i]);
}

constexpr float GUARD = 1e-30f;

APART void roots_of_shares(const float* x, float mean, int64_t n, float* root) {
    for (int64_t i = 0; i < n; i++) root[i] = __builtin_sqrtf(x[i] / (mean + GUARD));
}

APART void roots_of_own_shares(const float* x, int64_t n, float* root) {
    for (int64_t i = 0; i < n; i++) root[i] = __builtin_sqrtf(x[i] / (x[i] + GUARD));
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

void update_moments(const Plan& plan, const Moments& m, const Range& range) {
    const float *beta2 = plan.coefficients + plan.rows[BETA2] * plan.slots,
                *weight = plan.coefficients + plan.rows[SQUARE_WEIGHT] * plan.slots;
    each_run(m, nullptr, range.value[0], range.value[1], [&](int64_t i, int64_t end, int64_t slot) {
        const bool half = m.in_bf16 && m.in_bf16[i];
        updated(m.values + i, beta2[slot], weight[slot], plan.sums + i, m.inverse_n + i, end - i, half, m.after + i);
    });
}

void fill_factors(const Plan& plan, const Moments& m, const Range& range) {
    each_run(m, nullptr, range.value[0], range.value[1], [&](int64_t i, int64_t end, int64_t slot) {
        roots(dividing(m, slot) + i, end - i, plan.factors + i);
    });
    const int64_t* ordered = m.ordered + range.ordered;
    for (int64_t cell = range.cell[0]; cell < range.cell[1]; cell++) {
        const int64_t n = m.lengths[cell];
        const float* of = dividing(m, m.slot_of[*ordered]);
        double sum = 0;
        if (ordered[n - 1] - ordered[0] == n - 1)
            sum = ordered_sum(of + *ordered, n);
        else
            for (int64_t i = 0; i < n; i++) sum += double(of[ordered[i]]);
        m.means[cell] = float(sum / double(n)), ordered += n;
    }
    // The values of R follow each other.
    each_run(m, m.row, range.row[0], range.row[1], [&](int64_t k, int64_t end, int64_t slot) {
        const float* x = dividing(m, slot) + m.row[k];
        float* root = plan.factors + m.row[k];
        if (m.own_mean[k]) return roots_of_own_shares(x, end - k, root);
        // All of one cell, since its first and its last are.
        if (m.cell_of[k] == m.cell_of[end - 1]) return roots_of_shares(x, m.means[m.cell_of[k]], end - k, root);
        for (int64_t i = k; i < end; i++) roots_of_shares(x + i - k, m.means[m.cell_of[i]], 1, root + i - k);
    });
}

void write_moments(const Plan& plan, const Moments& m) {
    each_run(m, nullptr, 0, m.count, [&](int64_t i, int64_t end, int64_t slot) {
        if (plan.moments_gate[slot]) memcpy(m.values + i, m.after + i, sizeof(float) * (end - i));
    });
}

}  // namespace
}  // namespace ppsf
