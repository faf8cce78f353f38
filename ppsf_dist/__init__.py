"""Learning-rate-free, schedule-free training that does not depend on how the model is sharded.

Names are imported when they are first used: ``import ppsf_dist`` alone costs next to nothing on top of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ppsf_dist.release import RELEASE

if TYPE_CHECKING:
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

__version__ = RELEASE

__all__ = [
    "AdamWScheduleFree",
    "AdamWScheduleFreeClosure",
    "CapturedStep",
    "Monitor",
    "ProcessInfo",
    "Prodigy",
    "ProdigyPlusScheduleFree",
    "RAdamScheduleFree",
    "RAdamScheduleFreeClosure",
    "RECOMMENDED",
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

_HOMES = {
    "batch_norm": ("recalibrate_batch_norm",),
    "bootstrap": ("ProcessInfo", "init_process_group"),
    "captured": ("CapturedStep",),
    "clipping": ("clip_grad_norm_",),
    "consistency": ("check_replicas",),
    "engine.reports": ("StepReport",),
    "evaluation": ("averaged",),
    "monitor": ("Monitor",),
    "optimizers.adamw_schedulefree": ("AdamWScheduleFree", "RAdamScheduleFree"),
    "optimizers.closures": ("AdamWScheduleFreeClosure", "RAdamScheduleFreeClosure", "SGDScheduleFreeClosure"),
    "optimizers.prodigy": ("Prodigy",),
    "optimizers.prodigy_plus": ("RECOMMENDED", "ProdigyPlusScheduleFree"),
    "optimizers.sgd_schedulefree": ("SGDScheduleFree",),
    "optimizers.wrapper": ("ScheduleFreeWrapper",),
}
_MODULES = ("deepspeed", "fsdp", "integrations", "kernels")
"""Those that a person uses by their own names."""


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is not None:
        value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *_MODULES, "__version__"]
