"""Arguments: what is refused and how it is said, what is warned of, and what torch's own tools rely on."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from fractions import Fraction
from typing import Any, cast

import numpy as np
import pytest
import torch
from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree as Reference
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.methods.prodigy_plus import ARGUMENTS, OURS
from ppsf_dist.refusals import refuse_gradient, refuse_reshaped
from tests.harness.pool import run

NAN, INF = math.nan, math.inf

OUT_OF_RANGE: list[tuple[str, Any, str, str]] = [
    *[("lr", value, f"lr={value!r}", "a finite number >") for value in (-1.0, NAN, INF, "a", None)],
    *[("betas", value, f"betas={value!r}", "a pair") for value in (None, 0.9, (0.9,), (0.9, 0.99, 0.999))],
    *[("betas", (value, 0.99), f"betas[0]={value!r}", "0 <= beta < 1") for value in (-0.1, 1.0, NAN, None, "a")],
    *[("betas", (0.9, value), f"betas[1]={value!r}", "0 <= beta < 1") for value in (-0.1, 1.0, NAN, None, "a")],
    *[("beta3", value, f"beta3={value!r}", "None or 0 <= beta3 < 1") for value in (-0.1, 1.0, NAN, "a")],
    *[("weight_decay", value, f"weight_decay={value!r}", "a finite number >= 0") for value in (-0.1, NAN, INF, None)],
    *[("d0", value, f"d0={value!r}", "a finite number > 0") for value in (0.0, -1e-6, NAN, INF, None)],
    *[("d_coef", value, f"d_coef={value!r}", "a finite number > 0") for value in (0.0, -1.0, NAN, INF, None)],
    *[("prodigy_steps", value, f"prodigy_steps={value!r}", "an integer >= 0") for value in (-1, 1.5, True, "a")],
    *[("beta4", value, f"beta4={value!r}", "None (for betas[1]) or 0 <= beta4 < 1") for value in (-0.1, 1, NAN, "a")],
    *[("growth_rate", value, f"growth_rate={value!r}", "a number >= 1, or inf") for value in (0.5, -INF, NAN, None)],
    *[("schedulefree_c", value, f"schedulefree_c={value!r}", "a finite number >= 0") for value in (-1, NAN, None)],
    *[("eps", value, f"eps={value!r}", "a number > 0, or None") for value in (0.0, -1e-8, NAN, "a")],
    *[
        (name, value, f"{name}={value!r}", "True or False")
        for name in [*(n for n, default in ARGUMENTS.items() if isinstance(default, bool)), "reference_quirks"]
        for value in (2, None, "yes")
    ],
]
IDS = [f"{message}" for _, _, message, _ in OUT_OF_RANGE]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (5,)))


def quiet(*args: Any, **kwargs: Any) -> ProdigyPlusScheduleFree:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ProdigyPlusScheduleFree(*args, **kwargs)


@pytest.mark.parametrize(("name", "value", "says", "allowed"), OUT_OF_RANGE, ids=IDS)
def test_the_constructor_refuses(name: str, value: Any, says: str, allowed: str) -> None:
    with pytest.raises(ValueError) as error:
        ProdigyPlusScheduleFree([parameter()], **{name: value})
    assert says in str(error.value) and allowed in str(error.value)
    with pytest.raises(ValueError) as error:
        ProdigyPlusScheduleFree([{"params": [parameter()], name: value}])
    assert says in str(error.value) and allowed in str(error.value)


@pytest.mark.parametrize(("name", "value", "says", "allowed"), OUT_OF_RANGE, ids=IDS)
def test_a_late_group_is_refused_before_anything_changes(name: str, value: Any, says: str, allowed: str) -> None:
    p = parameter()
    optimizer = quiet([p], d0=1e-2)
    p.grad = torch.ones(5)
    optimizer.step()
    before = optimizer.state_dict()
    with pytest.raises(ValueError) as error:
        optimizer.add_param_group({"params": [parameter()], name: value})
    assert says in str(error.value) and allowed in str(error.value)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()
    optimizer.step()
    assert optimizer.param_groups[0]["k"] == 3


def test_lr_is_zero_only_in_a_group() -> None:
    with pytest.raises(ValueError, match=r"lr=0 is out of range: allowed is a finite number > 0"):
        ProdigyPlusScheduleFree([parameter()], lr=0)
    assert quiet([{"params": [parameter()], "lr": 0}]).param_groups[0]["lr"] == 0
    assert float(quiet([{"params": [parameter()], "lr": torch.tensor(0.5)}]).param_groups[0]["lr"]) == 0.5


@pytest.mark.parametrize("name", ["split_groups", "split_groups_mean", "fused_back_pass", "reference_quirks"])
def test_groups_agree_on_what_belongs_to_the_optimizer(name: str) -> None:
    other = not {**ARGUMENTS, "reference_quirks": True}[name]
    groups: list[dict[str, Any]] = [{"params": [parameter()]}, {"params": [parameter()], name: other}]
    with pytest.raises(ValueError, match=f"{name} is .* in group 0 and .* in group 1"):
        ProdigyPlusScheduleFree(groups)


@pytest.mark.parametrize(
    ("name", "value"),
    [("d0", 1e-3), ("beta3", 0.5), ("d_coef", 2.0), ("d_limiter", False), ("prodigy_steps", 5), ("use_speed", True)]
    + [("beta4", 0.99), ("growth_rate", 1.02)],
)
def test_groups_agree_on_what_belongs_to_their_one_step_size(name: str, value: Any) -> None:
    def groups() -> list[dict[str, Any]]:
        return [{"params": [parameter()]}, {"params": [parameter()], name: value}]

    quiet(groups())
    with pytest.raises(ValueError, match=f"{name} is .* or split_groups=True"):
        ProdigyPlusScheduleFree(groups(), split_groups=False)


def test_arguments_are_the_references_in_its_order() -> None:
    ours = inspect.signature(ProdigyPlusScheduleFree).parameters
    theirs = inspect.signature(Reference).parameters
    positional = [p for p in ours.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in theirs.values()]
    keyword_only = {p.name: p.default for p in ours.values() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keyword_only == {"decouple_lr": None, "process_group": None, "seed": 0} | OURS
    assert len(positional) + len(keyword_only) == len(ours)
    assert {p.name: p.default for p in positional if p.name != "params"} == ARGUMENTS


@pytest.mark.parametrize("value", [True, False])
def test_decouple_lr_is_a_former_name(value: bool) -> None:
    with pytest.warns(DeprecationWarning, match=f"pass weight_decay_by_lr={not value}"):
        optimizer = ProdigyPlusScheduleFree([parameter()], decouple_lr=value)
    assert optimizer.param_groups[0]["weight_decay_by_lr"] is not value


@pytest.mark.parametrize(
    ("switches", "says", "settled"),
    [
        ({"use_cautious": True, "use_grams": True}, "use_grams=True has no effect", {"use_grams": False}),
        ({"use_focus": True}, "factored=True has no effect", {"factored": False}),
        ({"eps": None}, "use_stableadamw=True has no effect", {"use_stableadamw": False}),
        (
            {"eps": None, "use_focus": True, "factored": False, "use_stableadamw": False},
            "eps=None .* has no effect",
            {},
        ),
        ({"use_speed": True, "weight_decay": 0.1}, "can let d grow without bound", {}),
        ({"betas": (0.0, 0.99)}, r"betas\[0\]=0", {}),
        ({"use_bias_correction": True, "betas": (0.9, 0.6)}, r"betas\[1\]=0.6 <= 0.6 never moves", {}),
        ({"d_coef": 0.5}, "d can never grow", {}),
        ({"lr": 3e-4}, "lr=0.0003 .* leave it at 1.0", {}),
    ],
)
def test_what_has_no_effect_is_said(switches: dict[str, Any], says: str, settled: dict[str, bool]) -> None:
    with pytest.warns(UserWarning, match=says):
        optimizer = ProdigyPlusScheduleFree([parameter()], **switches)
    assert {name: optimizer.param_groups[0][name] for name in settled} == settled
    late = quiet([parameter()])
    with pytest.warns(UserWarning, match=says):
        late.add_param_group({"params": [parameter()], **switches})


@pytest.mark.parametrize(
    "switches", [{}, {"d_coef": 0.5, "reference_quirks": False}, {"d_coef": 0.5, "use_speed": True}]
)
def test_nothing_is_said_without_reason(switches: dict[str, Any]) -> None:
    quiet([parameter()], **switches)


def test_what_loggers_read_are_plain_numbers() -> None:
    p = parameter()
    optimizer = quiet([p])
    for _ in range(3):
        p.grad = torch.ones(5)
        optimizer.step()
        (group,) = optimizer.param_groups
        for key in ("d", "lr", "effective_lr", "d_numerator", "d_denom"):
            assert type(group[key]) is float, key
        assert type(group["k"]) is int and type(group["train_mode"]) is bool
    assert type(optimizer.get_d_estimate()) is float and [type(d) for d in optimizer.get_d()] == [float]
    assert type(optimizer.skipped_steps) is int


def test_parameters_come_plain_named_or_in_groups() -> None:
    assert quiet(iter([parameter()])).param_groups[0]["lr"] == 1.0
    named = quiet([("weight", parameter()), ("bias", parameter())])
    assert named.param_groups[0]["param_names"] == ["weight", "bias"]
    groups = quiet(
        [{"params": [parameter()], "lr": 0.5, "betas": [0.8, 0.9]}, {"params": parameter()}], weight_decay=0.1
    )
    assert [group["lr"] for group in groups.param_groups] == [0.5, 1.0]
    assert [group["betas"] for group in groups.param_groups] == [(0.8, 0.9), (0.9, 0.99)]
    assert [group["weight_decay"] for group in groups.param_groups] == [0.1, 0.1]
    for optimizer in (named, groups):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
        assert all(bool((p < 1).all()) for group in optimizer.param_groups for p in group["params"])


def test_a_closure_runs_with_gradients_and_its_value_comes_back() -> None:
    p = parameter()
    optimizer = quiet([p])
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss: Tensor = (p * p).sum()
        loss.backward()
        return float(loss.detach())

    with torch.no_grad():
        assert optimizer.step(closure) == 5.0
    assert calls == [True]
    assert bool((p < 1).all())
    assert optimizer.step() is None


def test_schedulers_of_torch_scale_the_step() -> None:
    moves = {}
    for scale in (1.0, 0.25):
        p = nn.Parameter(torch.zeros(5))
        optimizer = quiet([p], d0=1e-2, prodigy_steps=1)
        factors = (1.0, scale, scale)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors.__getitem__)
        for _ in range(2):
            before = optimizer.state[p]["z"].clone() if p in optimizer.state else torch.zeros(5)
            p.grad = torch.ones(5)
            optimizer.step()
            scheduler.step()
        moves[scale] = optimizer.state[p]["z"] - before
        assert optimizer.param_groups[0]["lr"] == scale
    torch.testing.assert_close(moves[0.25], 0.25 * moves[1.0])


def _partial() -> str:
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    p.grad = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
    optimizer = ProdigyPlusScheduleFree([p])
    with pytest.raises(ValueError) as error:
        optimizer.step()
    assert not optimizer.state
    return str(error.value)


@pytest.mark.dist
def test_partial_parameters_are_refused() -> None:
    for message in run(2, _partial):
        assert "a Partial parameter has no value of its own; redistribute it to Replicate() or Shard()" in message


@pytest.mark.parametrize(
    ("name", "value"), [("seed", "a"), ("seed", 1.5), ("seed", -1), ("decouple_lr", "x"), ("process_group", "world")]
)
def test_arguments_of_the_optimizer_alone(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r} is .*allowed is"):
        ProdigyPlusScheduleFree([torch.nn.Parameter(torch.ones(2))], **{name: value})


@pytest.mark.parametrize(
    ("dtype", "way_out"),
    [
        (torch.float16, "torch.autocast"),
        (torch.complex64, "torch.view_as_complex"),
        (torch.float8_e4m3fn, "convert them in the forward"),
    ],
)
def test_weights_that_cannot_be_stepped_are_refused(dtype: torch.dtype, way_out: str) -> None:
    weights = nn.Parameter(torch.ones(3, 2).to(dtype))
    weights.grad = torch.ones_like(weights)
    optimizer = ProdigyPlusScheduleFree([parameter(), weights])
    with pytest.raises(ValueError, match=rf"parameter 1 .*\(3, 2\) in group 0\) are {dtype}.*{way_out}"):
        optimizer.step()
    assert not optimizer.state and bool((weights.float() == 1).all() if not dtype.is_complex else True)


def test_gradients_and_weights_that_do_not_fit_are_named() -> None:
    """By a step, which changes nothing then."""
    for gradient, message in (
        (torch.ones(5, 3).to_sparse(), r"gradient of parameter 0 .*\(5, 3\).* is torch.sparse_coo.*sparse=F"),
        (torch.ones(5, 3), ""),
    ):
        weights = nn.Parameter(torch.ones(5, 3))
        optimizer = ProdigyPlusScheduleFree([weights])
        weights.grad = gradient
        if message:
            with pytest.raises(ValueError, match=message):
                optimizer.step()
            assert torch.equal(weights, torch.ones(5, 3)) and optimizer.get_d() == [1e-6]
        else:
            optimizer.step()
            weights.data = torch.ones(6, 3)
            weights.grad = torch.ones(6, 3)
            with pytest.raises(ValueError, match=r"parameter 0 .* have shape \(6, 3\) here, their state \(5, 3\)"):
                optimizer.step()
    with pytest.raises(ValueError, match="complex64: allowed is a real one"):
        refuse_gradient(torch.ones(5, dtype=torch.complex64), (5,), "w")
    with pytest.raises(ValueError, match=r"shape \(5,\) here, its weights \(6,\).*zero_grad"):
        refuse_gradient(torch.ones(5), (6,), "w")
    refuse_gradient(torch.ones(5, 3), (5, 3), "w")
    refuse_reshaped((5,), (5,), "w")


def test_numbers_of_numpy_and_others_are_the_numbers_that_they_are() -> None:
    switch: Any = np.True_
    optimizer = quiet(
        [parameter()],
        lr=np.float32(0.5),
        betas=(np.float64(0.5), Fraction(1, 2)),
        prodigy_steps=np.int64(3),
        weight_decay=torch.tensor(0.25),
        use_speed=np.False_,
        d_limiter=switch,
        seed=np.int32(3),
    )
    (group,) = optimizer.param_groups
    assert {type(group[name]) for name in ("lr", "weight_decay")} == {float} and group["betas"] == (0.5, 0.5)
    assert type(group["prodigy_steps"]) is int and group["d_limiter"] is True and group["use_speed"] is False


@pytest.mark.parametrize("name", ["lr", "d0", "weight_decay", "prodigy_steps", "seed", "schedulefree_c", "eps"])
def test_huge_integers_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=an integer of 1329 bits is out of range: allowed is"):
        ProdigyPlusScheduleFree([parameter()], **cast(Any, {name: 10**400}))


def test_numbers_beyond_fp32_are_named() -> None:
    with pytest.raises(ValueError, match=r"lr=1e\+39 is out of range.*at most 3.4e\+38 as numbers of a step are fp32"):
        ProdigyPlusScheduleFree([parameter()], lr=1e39)


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ({"d0": 1e-20}, r"d0=1e-20 .*betas\[1\]=0.99.*allowed is 1.1e-18 <= d0"),
        ({"d0": 1e25}, r"d0=1e\+25 .*<= d0 <= 1.8e\+19"),
        ({"d0": 1e-17, "eps": 1e-25}, r"eps=1e-25.*allowed is 1.2e-13 <= d0"),
        ({"d0": 1e-12, "betas": (0.9, 1 - 1e-15)}, "allowed is 3.4e-12 <= d0"),
    ],
)
def test_step_sizes_that_fp32_cannot_carry_are_refused(given: dict[str, Any], allowed: str) -> None:
    with pytest.raises(ValueError, match=allowed):
        ProdigyPlusScheduleFree([parameter()], **given)
    with pytest.raises(ValueError, match=f"{allowed}.*parameter group 1"):
        ProdigyPlusScheduleFree([{"params": [parameter()]}, {"params": [parameter()], **given}])


@pytest.mark.parametrize("d0", [1.1e-18, 1e-12, 1e-6, 1.0, 1e12])
def test_numbers_of_a_step_are_normal_in_fp32(d0: float) -> None:
    quiet([parameter()], d0=d0)
    tiny, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    assert all(tiny <= value <= largest for value in (d0 * d0 * (1 - 0.99), d0 * d0 / math.sqrt(d0), d0 * 1e-8))


@pytest.mark.parametrize(
    ("key", "meant"), [("use_sped", "use_speed"), ("weigth_decay", "weight_decay"), ("beta", "betas")]
)
def test_a_typo_in_a_group_is_named(key: str, meant: str) -> None:
    says = f"{key}=1 in a parameter group is no argument: did you mean {meant}.*parameter group 1"
    groups: list[dict[str, Any]] = [{"params": [parameter()]}, {"params": [parameter()], key: 1}]
    with pytest.raises(ValueError, match=says):
        ProdigyPlusScheduleFree(groups)
    optimizer = quiet([parameter()])
    with pytest.raises(ValueError, match=says):
        optimizer.add_param_group({"params": [parameter()], key: 1})
    assert len(optimizer.param_groups) == 1


def test_keys_of_a_persons_own_stay_in_a_group() -> None:
    own = {"name": "encoder", "initial_lr": 1.0, "lr_scale": 0.5, "weight_decay_mult": 2}
    assert own.items() <= quiet([{"params": [parameter()], **own}]).param_groups[0].items()
    with pytest.raises(ValueError, match="seed=3 .* belongs to the whole optimizer"):
        ProdigyPlusScheduleFree([{"params": [parameter()], "seed": 3}])


def test_a_late_group_whose_warning_is_an_error_is_not_added() -> None:
    optimizer = quiet([parameter()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="leave it at 1.0"):
            optimizer.add_param_group({"params": [parameter()], "lr": 1e-3})
    assert len(optimizer.param_groups) == 1


def test_with_a_process_group_a_copy_is_refused() -> None:
    optimizer = quiet([parameter()])
    optimizer._engine.process_group = cast(Any, object())
    with pytest.raises(TypeError, match=r"process_group= cannot be copied .* state_dict\(\)"):
        copy.deepcopy(optimizer)
