"""DeepSpeed ZeRO.

Importing this package lets a DeepSpeed config name the optimizer::

    {"optimizer": {"type": "ProdigyPlusScheduleFree", "params": {...}}}
"""

from ppsf_dist.extras import missing

try:
    import deepspeed as _deepspeed  # noqa: F401
except ModuleNotFoundError as error:
    raise missing(error, "deepspeed") from error

from ppsf_dist.deepspeed.config import check_config
from ppsf_dist.deepspeed.portable import load_checkpoint, save_checkpoint
from ppsf_dist.deepspeed.registration import register

__all__ = ["check_config", "load_checkpoint", "save_checkpoint"]

register()
