"""What is seldom meant is said once, on every layout, and what cannot work where it is asked for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ppsf_dist import AdamWScheduleFree, Prodigy, ProdigyPlusScheduleFree
from ppsf_dist.optimizers.base import DistributedOptimizer
from tests.harness.layouts import LAYOUTS, set_grads, shard_parameters
from tests.harness.models import gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.runs import take_step

SHAPES = named_shapes("small")
ORDINARY = "looks like the learning rate of another optimizer"
Lr = Callable[[int], float | Tensor]


def said(
    at: Lr, steps: int = 6, optimizer: type[DistributedOptimizer] = ProdigyPlusScheduleFree, **arguments: Any
) -> list[str]:
    """What a run says whose groups are given ``at(step)`` before each step."""
    parameters = {name: nn.Parameter(value) for name, value in initial_weights(SHAPES).items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = optimizer(parameters.values(), **arguments)
        for step, gradients in enumerate(gradient_sequence(SHAPES, steps)):
            for group in made.param_groups:
                group["lr"] = at(step)
            take_step(made, parameters, gradients)
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("optimizer", [ProdigyPlusScheduleFree, Prodigy])
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
def test_a_learning_rate_of_another_optimizer_is_doubted_where_it_is_set(
    optimizer: type[DistributedOptimizer], kind: Any
) -> None:
    messages = said(lambda _: kind(1e-4), optimizer=optimizer)
    assert len(messages) == 1 and "lr=0.0001" in messages[0] and ORDINARY in messages[0]
    messages = said(lambda _: kind(1e-4), optimizer=optimizer, lr=kind(1e-4))
    assert len(messages) == 1 and ORDINARY in messages[0], "the constructor has said so already"
    assert said(lambda _: kind(1e-4), optimizer=AdamWScheduleFree) == []


@pytest.mark.parametrize(
    ("lr", "word"),
    [
        (lambda step: 1 - step / 10, "falls from 1 to 0.9"),
        (lambda step: (step + 1) / 6, "rises from 0.1667 to 0.3333"),
    ],
    ids=["linear decay", "warm-up"],
)
def test_a_schedule_on_an_average_is_named_once_with_the_way_out(lr: Lr, word: str) -> None:
    messages = said(lr)
    assert len(messages) == 1 and word in messages[0] and 'lr_scheduler_type="constant"' in messages[0]


def test_schedules_that_have_their_place_are_not_doubted() -> None:
    assert said(lambda step: 1 - step / 10, use_schedulefree=False) == []
    assert said(lambda step: 1 - step / 10, optimizer=Prodigy) == []
    assert said(lambda step: (step + 1) / 6, optimizer=AdamWScheduleFree) == [], "a warm-up of one's own"
    assert len(said(lambda step: 1 - step / 10, optimizer=AdamWScheduleFree)) == 1
    assert said(lambda _: 0.5) == [], "a factor that stays is meant"


def test_a_tensor_is_not_read_to_follow_it() -> None:
    assert said(lambda step: torch.tensor(1 - step / 10)) == []


def test_a_run_that_goes_on_with_another_learning_rate_is_no_schedule() -> None:
    parameters = {name: nn.Parameter(value) for name, value in initial_weights(SHAPES).items()}
    optimizer = ProdigyPlusScheduleFree(parameters.values())
    first, second = gradient_sequence(SHAPES, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_step(optimizer, parameters, first)
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["lr"] = 0.5
        optimizer.load_state_dict(saved)
        take_step(optimizer, parameters, second)
    assert optimizer.param_groups[0]["lr"] == 0.5


def on_a_layout(name: str) -> list[str]:
    parameters = shard_parameters(initial_weights(SHAPES), LAYOUTS[name])
    optimizer = ProdigyPlusScheduleFree(parameters.values())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for lr, gradients in zip((1.0, 0.5, 0.25), gradient_sequence(SHAPES, 3), strict=True):
            optimizer.param_groups[0]["lr"] = lr
            set_grads(parameters, gradients)
            optimizer.step()
    return [str(one.message) for one in caught]


@pytest.mark.dist
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_of_every_layout_hears_of_a_schedule(name: str) -> None:
    for messages in run(LAYOUTS[name].world_size, on_a_layout, name):
        assert len(messages) == 1 and "lr falls from 1 to 0.5" in messages[0]


def test_a_step_on_nothing_but_frozen_parameters_says_so() -> None:
    model = nn.Linear(3, 3).requires_grad_(False)
    optimizer = ProdigyPlusScheduleFree(model.parameters())
    with pytest.warns(UserWarning, match="none of the optimizer's parameters requires a gradient"):
        optimizer.step()
    model.bias.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def _fully_sharded_by_fsdp1(original: bool) -> tuple[str, int]:
    model = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=original)
    with pytest.raises(NotImplementedError) as error:
        ProdigyPlusScheduleFree(model.parameters())
    optimizer = ProdigyPlusScheduleFree([nn.Parameter(torch.ones(5))])
    with pytest.raises(NotImplementedError):
        optimizer.add_param_group({"params": list(model.parameters())})
    return str(error.value), len(optimizer.param_groups)


@pytest.mark.dist
@pytest.mark.parametrize("original", [False, True], ids=["flat parameters", "use_orig_params"])
def test_fsdp1_is_refused_where_the_optimizer_is_made(original: bool) -> None:
    for message, groups in run(2, _fully_sharded_by_fsdp1, original):
        assert "use FSDP2, torch.distributed.fsdp.fully_shard" in message and groups == 1


def test_a_parameter_that_fsdp1_takes_later_is_refused_at_the_step() -> None:
    p = nn.Parameter(torch.ones(5))
    optimizer = ProdigyPlusScheduleFree([p])
    p._fsdp_flattened = True  # type: ignore[attr-defined]
    p.grad = torch.ones(5)
    with pytest.raises(NotImplementedError, match="use FSDP2, torch.distributed.fsdp.fully_shard"):
        optimizer.step()
    assert not optimizer.state and torch.equal(p.detach(), torch.ones(5))


class Kept(Tensor):
    """Weights that a subclass keeps as another tensor, as torchao's do."""

    within: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Kept:
        made: Kept = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)
        return made

    def __init__(self, inner: Tensor) -> None:
        self.within = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["within"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> Kept:
        return Kept(parts["within"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return Kept(args[0].within)
        plain = [one.within if isinstance(one, Kept) else one for one in args]
        return function(*plain, **(kwargs or {}))


def test_weights_that_are_kept_quantized_are_refused_and_full_ones_in_a_subclass_are_trained() -> None:
    quantized = nn.Parameter(Kept(torch.ones(4, 4, dtype=torch.int8)))
    quantized.grad = torch.ones(4, 4)
    optimizer = ProdigyPlusScheduleFree([quantized])
    with pytest.raises(ValueError, match=r"are a Kept, which keeps them as within \(torch.int8\)"):
        optimizer.step()
    assert not optimizer.state
    whole, plain = nn.Parameter(Kept(torch.ones(4, 4))), nn.Parameter(torch.ones(4, 4))
    for parameter in (whole, plain):
        optimizer = ProdigyPlusScheduleFree([parameter], d0=1e-3)
        for step in range(5):
            parameter.grad = torch.full((4, 4), 1.0 + step)
            optimizer.step()
    kept = whole.detach()
    assert isinstance(kept, Kept) and not torch.equal(kept.within, torch.ones(4, 4))
    torch.testing.assert_close(kept.within, plain.detach(), rtol=1e-6, atol=0)
