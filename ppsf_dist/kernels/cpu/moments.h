// The factored moments, between the passes.
#pragma once
#include "walk.h"

namespace ppsf {
namespace {

// Calls f with each of some parameters that has factored moments, and where its part of every table begins and ends.
template <class F>
inline void each_factored(const Moments& m, int64_t first, int64_t last, F f) {
    for (int64_t slot = first; slot < last; slot++)
        if (m.begins[slot].value < m.begins[slot + 1].value) f(slot, m.begins[slot], m.begins[slot + 1]);
}

// The moments that divide in this step.
inline const float* dividing(const Moments& m, int64_t slot) { return m.adopt && m.adopt[slot] ? m.values : m.after; }

APART void updated(const float* old, float beta, float weight, const float* sums, float inverse_n, int64_t n, bool half,
                   float* after) {
    if (half)
        for (int64_t i = 0; i < n; i++) after[i] = ema(old[i], beta, weight, sums[i] * inverse_n, true);
    else
        for (int64_t i = 0; i < n; i++) after[i] = ema(old[i], beta, weight, sums[i] * inverse_n, false);
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

void update_moments(const Plan& plan, const Moments& m, int64_t first, int64_t last) {
    const float *beta2 = plan.coefficients + plan.rows[BETA2] * plan.slots,
                *weight = plan.coefficients + plan.rows[SQUARE_WEIGHT] * plan.slots;
    each_factored(m, first, last, [&](int64_t slot, const Begins& begin, const Begins& end) {
        const bool half = m.in_bf16 && m.in_bf16[begin.value];
        // R, then C: each is a mean over one axis.
        const int64_t columns = begin.value + end.row - begin.row;
        for (int64_t i = begin.value, last = columns; i < end.value; i = last, last = end.value)
            updated(m.values + i, beta2[slot], weight[slot], plan.sums + i, m.inverse_n[i], last - i, half, m.after + i);
    });
}

void fill_factors(const Plan& plan, const Moments& m, int64_t first, int64_t last) {
    each_factored(m, first, last, [&](int64_t slot, const Begins& begin, const Begins& end) {
        // R, then C.
        const float *from = dividing(m, slot), *x = from + begin.value;
        float* root = plan.factors + begin.value;
        const int64_t rows = end.row - begin.row;
        roots(x + rows, end.value - begin.value - rows, root + rows);
        if (m.own_mean[begin.row]) return roots_of_own_shares(x, rows, root);
        const int64_t* ordered = m.ordered + begin.ordered;
        for (int64_t cell = begin.cell; cell < end.cell; cell++) {
            const int64_t n = m.lengths[cell];
            double sum = 0;
            if (ordered[n - 1] - ordered[0] == n - 1)
                sum = ordered_sum(from + *ordered, n);
            else
                for (int64_t i = 0; i < n; i++) sum += double(from[ordered[i]]);
            m.means[cell] = float(sum / double(n)), ordered += n;
        }
        if (end.cell == begin.cell + 1) return roots_of_shares(x, m.means[begin.cell], rows, root);
        for (int64_t i = 0; i < rows; i++) roots_of_shares(x + i, m.means[m.cell_of[begin.row + i]], 1, root + i);
    });
}

void write_moments(const Plan& plan, const Moments& m) {
    each_factored(m, 0, plan.slots, [&](int64_t slot, const Begins& begin, const Begins& end) {
        const int64_t i = begin.value;
        if (plan.moments_gate[slot]) memcpy(m.values + i, m.after + i, sizeof(float) * (end.value - i));
    });
}

}  // namespace
}  // namespace ppsf
