// The passes over weights in bf16.
#include "tasks.h"

template void ppsf::do_task<ppsf::bf16>(const Plan&, int, const Task&, double*);
template bool ppsf::pack<ppsf::bf16>(const Plan&, const Task&, bool);
