"""The hooks around ``state_dict()`` and ``load_state_dict()``, for optimizers that make their own state dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

StateDict = dict[str, Any]


def hooked_state_dict(optimizer: Optimizer, make: Callable[[], StateDict]) -> StateDict:
    """What ``make`` returns, with the hooks before and after it."""
    for before in optimizer._optimizer_state_dict_pre_hooks.values():
        before(optimizer)
    state_dict = make()
    for after in optimizer._optimizer_state_dict_post_hooks.values():
        changed = after(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    return state_dict


def hooked_load(optimizer: Optimizer, state_dict: StateDict, load: Callable[[StateDict], None]) -> None:
    """Give a state dict to ``load``, with the hooks before and after it."""
    state_dict = dict(state_dict)
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = before(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    load(state_dict)
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)
