"""The methods of the closure forms of Schedule-Free, whose weights are the average between steps."""

from __future__ import annotations

from ppsf_dist.methods.adamw_schedulefree import AdamW, RAdam
from ppsf_dist.methods.sgd_schedulefree import SGD


class SGDClosure(SGD):
    """What SGDScheduleFreeClosure is."""

    name = "SGDScheduleFreeClosure"


class AdamWClosure(AdamW):
    """What AdamWScheduleFreeClosure is."""

    name = "AdamWScheduleFreeClosure"


class RAdamClosure(RAdam):
    """What RAdamScheduleFreeClosure is."""

    name = "RAdamScheduleFreeClosure"


SGD_CLOSURE, ADAMW_CLOSURE, RADAM_CLOSURE = SGDClosure(), AdamWClosure(), RAdamClosure()
