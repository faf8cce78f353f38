"""Learning-rate-free, schedule-free training that does not depend on how the model is sharded."""

from ppsf_dist.batch_norm import recalibrate_batch_norm
from ppsf_dist.bootstrap import ProcessInfo, init_process_group
from ppsf_dist.captured import CapturedStep
from ppsf_dist.clipping import clip_grad_norm_
from ppsf_dist.consistency import check_replicas
from ppsf_dist.engine.reports import StepReport
from ppsf_dist.evaluation import averaged
from ppsf_dist.monitor import Monitor
from ppsf_dist.optimizers.adamw_schedulefree import AdamWScheduleFree, RAdamScheduleFree
from ppsf_dist.optimizers.closures import (
    AdamWScheduleFreeClosure,
    RAdamScheduleFreeClosure,
    SGDScheduleFreeClosure,
)
from ppsf_dist.optimizers.prodigy import Prodigy
from ppsf_dist.optimizers.prodigy_plus import RECOMMENDED, ProdigyPlusScheduleFree
from ppsf_dist.optimizers.sgd_schedulefree import SGDScheduleFree
from ppsf_dist.optimizers.wrapper import ScheduleFreeWrapper

__all__ = [
    "AdamWScheduleFree",
    "AdamWScheduleFreeClosure",
    "CapturedStep",
    "ProcessInfo",
    "Monitor",
    "Prodigy",
    "ProdigyPlusScheduleFree",
    "RECOMMENDED",
    "RAdamScheduleFree",
    "RAdamScheduleFreeClosure",
    "SGDScheduleFree",
    "SGDScheduleFreeClosure",
    "ScheduleFreeWrapper",
    "StepReport",
    "averaged",
    "check_replicas",
    "clip_grad_norm_",
    "init_process_group",
    "recalibrate_batch_norm",
]
