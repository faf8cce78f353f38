// The passes over one task, for weights of one dtype. Those of bf16 are compiled in bf16.cpp, at the same time as those of
// float, which are in passes.cpp with all else.
#pragma once
#include "pass_1.h"
#include "pass_2.h"
#include "pass_3.h"

namespace ppsf {

enum Pass { SUMS_OF_SQUARES = 1, NORMS = 2, WRITE = 3, MASKS = 4 };

// Sums go to `result`.
template <class T>
void do_task(const Plan& plan, int pass, const Task& task, double* result) {
    if (pass == SUMS_OF_SQUARES) return pass_1<T>(plan, task, result);
    if (pass == NORMS) return pass_2<T>(plan, task, result);
    if (pass == MASKS) return count_masks<T>(plan, task, result);
    if constexpr (sizeof(T) == sizeof(bf16))
        if (plan.pieces[task.piece].flags & STOCHASTIC) return pass_3<T, true>(plan, task, result);
    pass_3<T, false>(plan, task, result);
}

// The samples of a task, or the first of them, as they lie in z.
template <class T>
bool pack(const Plan& plan, const Task& task, bool only_compares) {
    constexpr int64_t A_FEW = 8;
    const Memory<T> memory = memory_of<T>(plan, plan.pieces[task.piece]);
    const int64_t slice_p = plan.pieces[task.piece].slice_p;
    if (!memory.packed) return true;
    Block b;
    Blocks blocks(plan, task, false);
    while (blocks.next(b)) {
        const int64_t count = only_compares && b.count > A_FEW ? A_FEW : b.count;
        T* packed = memory.packed + b.sample;
        const T* z = memory.z + b.at + b.phase;
        if (only_compares) {
            for (int64_t m = 0; m < count; m++)
                if (stored_bits(packed[m]) != stored_bits(z[m * slice_p])) return false;
            if (count) return true;
        } else {
            for (int64_t m = 0; m < count; m++) packed[m] = z[m * slice_p];
        }
    }
    return true;
}

extern template void do_task<bf16>(const Plan&, int, const Task&, double*);
extern template bool pack<bf16>(const Plan&, const Task&, bool);

}  // namespace ppsf
