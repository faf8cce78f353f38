"""What torch asks of an optimizer: the checks of its own generic suite, with this class in place of torch's.

torch's wheel has the descriptions (``OptimizerInfo``), not the tests (``TestOptimRenewed``): these ask the same, under
the same names. What is left out:

* ``foreach``, ``fused``, ``capturable``, ``differentiable``, ``maximize`` and everything that compares them: there are
  no such arguments, each step is computed in one way.
* complex and sparse: refused (``test_complex_and_sparse_are_refused``).
* ``test_can_load_older_state_dict``: torch's class had other arguments once; here ``state_version`` decides
  (``test_checkpoints.py``).
* ``test_forloop_goes_right_direction_multigpu``, ``test_state_dict_with_cuda_params`` and the others of several
  devices: the suite runs without an accelerator.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import sys
import unittest
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ppsf_dist import ProdigyPlusScheduleFree
from tests.harness.models import D0
from tests.harness.pool import run
from tests.test_state import Net, same, train, whole

# torch's module derives a test case from one of this package, which nothing here uses.
if find_spec("expecttest") is None:
    sys.modules["expecttest"] = cast(ModuleType, SimpleNamespace(TestCase=unittest.TestCase))

from torch.testing._internal.common_dist_composable import CompositeParamModel  # noqa: E402
from torch.testing._internal.common_optimizers import (  # noqa: E402
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

CPU = torch.device("cpu")


def inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    """Each argument away from its default once, as torch's own functions of this kind do."""
    arguments: dict[str, dict[str, Any]] = {
        "default": {},
        "lr": {"lr": 0.5},
        "tensor lr": {"lr": torch.tensor(0.5)},
        "weight_decay": {"weight_decay": 0.1},
        "momentum": {"use_schedulefree": False},
        "speed": {"use_speed": True},
        "adopt": {"use_adopt": True},
        "focus": {"use_focus": True, "factored": False},
        "cautious": {"use_cautious": True},
        "orthograd": {"use_orthograd": True},
        "atan2": {"eps": None, "use_stableadamw": False},
        "unfactored, no quirks": {"factored": False, "reference_quirks": False},
    }
    return [OptimizerInput(None, {"d0": 1e-3, **given}, name) for name, given in arguments.items()]


def error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    """What torch asks of all optimizers, and arguments out of range."""

    def refused(says: str, **given: Any) -> ErrorOptimizerInput:
        return ErrorOptimizerInput(OptimizerInput(None, given), error_type=ValueError, error_regex=says)

    return [
        *get_error_inputs_for_all_optims(device, dtype),
        refused("lr=-1", lr=-1),
        refused(r"betas\[0\]=1.0", betas=(1.0, 0.0)),
        refused("weight_decay=-1", weight_decay=-1),
        refused("eps=-1", eps=-1),
    ]


INFO = OptimizerInfo(
    ProdigyPlusScheduleFree,
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=(lambda opt: StepLR(opt, gamma=0.99999, step_size=300), lambda opt: ReduceLROnPlateau(opt)),
    supported_impls=(),
    not_og_supported_flags=(),
    supports_complex=False,
)
INPUTS: list[OptimizerInput] = INFO.optim_inputs_func(CPU)
Optimizer = ProdigyPlusScheduleFree

every_input = pytest.mark.parametrize("given", INPUTS, ids=lambda given: given.desc)


def build(params: Any, given: OptimizerInput | None = None) -> Optimizer:
    optimizer: Optimizer = INFO.optim_cls(params, **copy.deepcopy(given.kwargs if given else {"d0": 1e-3}))
    return optimizer


def problem() -> tuple[nn.Parameter, nn.Parameter, Callable[[], Tensor]]:
    torch.manual_seed(0)
    weight, bias, x = nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(10)), torch.randn(5)
    return weight, bias, lambda: (weight.mv(x) + bias).square().sum()


def steps(optimizer: Optimizer, loss: Callable[[], Tensor], count: int = 3) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def trained(given: OptimizerInput | None = None, count: int = 3) -> tuple[Optimizer, Callable[[], Tensor]]:
    weight, bias, loss = problem()
    optimizer = build([weight, bias], given)
    steps(optimizer, loss, count)
    return optimizer, loss


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- construction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(error_inputs("cpu", torch.float32))))
def test_errors(index: int) -> None:
    error = INFO.optim_error_inputs_func("cpu", torch.float32)[index]
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = error.optimizer_error_input
    params = [nn.Parameter(torch.randn(1))] if given.params is None else given.params
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if issubclass(error.error_type, Warning):
            warnings.simplefilter("error", error.error_type)
        with pytest.raises(error.error_type, match=error.error_regex):
            INFO.optim_cls(params, **given.kwargs)


def test_param_group_validation() -> None:
    optimizer = build([nn.Parameter(torch.ones(2))])
    leaf = nn.Parameter(torch.ones(2))
    before = copy.deepcopy(optimizer.state_dict())
    for group, error in (
        ([leaf], TypeError),
        ({"params": {leaf}}, TypeError),
        ({"params": ["a"]}, TypeError),
        ({"params": [leaf * 2]}, ValueError),
        ({"params": [optimizer.param_groups[0]["params"][0]]}, ValueError),
        ({"params": [("named", leaf)]}, ValueError),
    ):
        with pytest.raises(error):
            optimizer.add_param_group(group)  # type: ignore[arg-type]
        assert same(before, optimizer.state_dict()) and len(optimizer._engine.given) == 1
    with pytest.raises(ValueError, match="empty parameter list"):
        INFO.optim_cls([])


def test_optim_infos_do_not_specify_global_cliquey_kwargs() -> None:
    assert not any({"foreach", "fused", "differentiable"} & given.kwargs.keys() for given in INPUTS)


@every_input
def test_optimizer_can_be_printed(given: OptimizerInput) -> None:
    text = repr(build([nn.Parameter(torch.randn(2, 3))], given))
    assert text.startswith("ProdigyPlusScheduleFree (") and "lr:" in text


# --- steps ---------------------------------------------------------------------------------------------------------


@every_input
@pytest.mark.parametrize(
    ("contiguous", "schedulers"), [(True, ()), (False, ()), (True, INFO.scheduler_inputs)], ids=["", "strided", "lr"]
)
def test_forloop_goes_right_direction(given: OptimizerInput, contiguous: bool, schedulers: Any) -> None:
    weight, bias, loss = problem()
    if not contiguous:
        weight.data = torch.randn(10, 5, 2)[..., 0]
        bias.data = torch.randn(10, 2)[..., 0]
    optimizer = build([weight, bias], given)
    attached: list[Any] = [scheduler(optimizer) for scheduler in schedulers]
    first = float(loss())
    for _ in range(20):
        steps(optimizer, loss, 1)
        for scheduler in attached:
            scheduler.step(*([loss()] if isinstance(scheduler, ReduceLROnPlateau) else []))
    assert float(loss()) < first


def test_param_group_with_lrscheduler_goes_right_direction() -> None:
    weight, bias, loss = problem()
    optimizer = build([{"params": [weight]}, {"params": [bias], "lr": 0.1}])
    scheduler = StepLR(optimizer, gamma=0.9, step_size=10)
    first = float(loss())
    for _ in range(20):
        steps(optimizer, loss, 1)
        scheduler.step()
    assert float(loss()) < first


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr(shape: tuple[int, ...]) -> None:
    results = []
    for lr in (0.5, torch.full(shape, 0.5)):
        weight, bias, loss = problem()
        optimizer = Optimizer([weight, bias], lr=lr, d0=1e-3)  # type: ignore[arg-type]
        scheduler: LRScheduler = StepLR(optimizer, gamma=0.9, step_size=2)
        for _ in range(4):
            steps(optimizer, loss, 1)
            scheduler.step()
        resumed = Optimizer([weight, bias], lr=copy.deepcopy(lr), d0=1e-3)  # type: ignore[arg-type]
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        steps(resumed, loss, 2)
        assert isinstance(resumed.param_groups[0]["lr"], Tensor) is isinstance(lr, Tensor)
        results.append((weight.detach().clone(), bias.detach().clone()))
    assert same(results[0], results[1])


@every_input
def test_step_is_noop_when_params_have_no_grad(given: OptimizerInput) -> None:
    params = [nn.Parameter(torch.randn(2, 3)) for _ in range(2)]
    before = [p.detach().clone() for p in params]
    optimizer = build(params, given)
    optimizer.step()
    assert same(before, [p.detach() for p in params])


@every_input
def test_step_is_noop_for_zero_grads(given: OptimizerInput) -> None:
    if given.kwargs.get("use_focus"):
        # FOCUS pulls weights towards their average whatever the gradient, as in the reference: nothing to ask here.
        return
    param = nn.Parameter(torch.randn(5, 1))
    before = param.detach().clone()
    optimizer = build([param], given)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(before, param)


@pytest.mark.parametrize("shape", [(0, 40), (40, 0), (0,), (3, 0, 40)])
@every_input
def test_empty_parameters(given: OptimizerInput, shape: tuple[int, ...]) -> None:
    """Alone they are nothing to do, beside others they change nothing; their state is saved and loaded."""
    results = []
    for empty in (False, True):
        weight, bias, loss = problem()
        nothing = [nn.Parameter(torch.empty(shape))] if empty else []
        optimizer = build([weight, bias, *nothing], given)
        for _ in range(3):
            for p in nothing:
                p.grad = torch.empty_like(p)
            loss().backward()
            optimizer.step()
        if empty:
            resumed = build([weight, bias, *nothing], given)
            resumed.load_state_dict(through_a_file(optimizer.state_dict()))
            assert same(optimizer.state_dict(), resumed.state_dict())
            optimizer.eval()
            optimizer.train()
        results.append((weight.detach().clone(), optimizer.get_d()))
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[0][0], results[1][0])


def test_empty_groups() -> None:
    weight, bias, loss = problem()
    optimizer = build([{"params": []}, {"params": [weight, bias]}, {"params": []}])
    steps(optimizer, loss)
    resumed = build([{"params": []}, {"params": [weight, bias]}, {"params": []}])
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same(optimizer.state_dict(), resumed.state_dict())
    steps(resumed, loss)


def test_complex_and_sparse_are_refused() -> None:
    complex_parameter = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    complex_parameter.grad = torch.ones_like(complex_parameter)
    with pytest.raises(ValueError, match="complex64"):
        build([complex_parameter]).step()


def test_set_default_dtype_works() -> None:
    """Numbers do not depend on torch's default dtype."""
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            param = nn.Parameter(torch.linspace(0, 1, 33 * 40, dtype=torch.float32).view(33, 40))
            optimizer = build([param])
            for _ in range(3):
                param.grad = param.detach().clone()
                optimizer.step()
            results.append((param.detach().clone(), optimizer.state_dict()["state"]))
        finally:
            torch.set_default_dtype(torch.float32)
    assert same(results[0], results[1])


# --- state dicts ---------------------------------------------------------------------------------------------------


@every_input
@pytest.mark.parametrize("named", [False, True])
def test_state_dict_deterministic(given: OptimizerInput, named: bool) -> None:
    """A loaded copy with equal, not identical, parameters goes on equally and saves the same."""

    def made() -> tuple[Optimizer, Callable[[], Tensor]]:
        weight, bias, loss = problem()
        return build([("weight", weight), ("bias", bias)] if named else [weight, bias], given), loss

    optimizer, loss = made()
    steps(optimizer, loss)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other, other_loss = made()
    with torch.no_grad():
        for p, q in zip(params_of(other), params_of(optimizer), strict=True):
            p.copy_(q)
    other.load_state_dict(saved)
    assert same(kept, saved), "loading changes what it is given"
    steps(optimizer, loss)
    steps(other, other_loss)
    assert same(params_of(optimizer), params_of(other))
    assert same(optimizer.state_dict(), other.state_dict())
    assert same(kept, saved), "steps change what was saved"
    # Repeated parameters have identical representations (pytorch issue 36831).
    other.param_groups.extend(other.param_groups)
    assert same(optimizer.state_dict()["param_groups"][-1], other.state_dict()["param_groups"][-1])


def test_can_load_from_to_named_state_dict() -> None:
    for source in (False, True):
        for target in (False, True):
            weight, bias, loss = problem()
            plain, named = [weight, bias], [("weight", weight), ("bias", bias)]
            optimizer = build(named if source else plain)
            steps(optimizer, loss)
            other = build(named if target else plain)
            other.load_state_dict(optimizer.state_dict())
            expected = ["weight", "bias"] if source or target else None
            assert other.param_groups[0].get("param_names") == expected


@every_input
def test_save_load_equality_with_weights_only(given: OptimizerInput) -> None:
    optimizer, _ = trained(given)
    saved = optimizer.state_dict()
    assert same(saved, through_a_file(saved))


def test_load_nontensor_step() -> None:
    optimizer, loss = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["step"] = torch.tensor(entry["step"])
    optimizer.load_state_dict(saved)
    assert all(type(state["step"]) is float for state in optimizer.state.values())
    steps(optimizer, loss)


@every_input
def test_non_empty_state(given: OptimizerInput) -> None:
    optimizer, _ = trained(given)
    assert len(optimizer.state) == 2 and all(len(state) for state in optimizer.state.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_deepcopy_copies_all_public_attributes(copied: Any) -> None:
    """With hooks and a scheduler too, which replaces step(): a copy has neither, as torch's have not."""
    weight, bias, loss = problem()
    optimizer = build([weight, bias])
    optimizer.register_step_pre_hook(lambda *_: None)
    scheduler = StepLR(optimizer, step_size=3)
    steps(optimizer, loss)
    scheduler.step()
    other = copied(optimizer)
    public = {name for name in vars(optimizer) if not name.startswith("_")} - {"step"}
    assert public == {name for name in vars(other) if not name.startswith("_")}
    assert same(optimizer.state_dict(), other.state_dict())
    for p in params_of(other):
        p.grad = torch.ones_like(p)
    other.step()


def test_keys_of_others_survive() -> None:
    """A scheduler's initial_lr, a person's name, entries of the state of a parameter and of none."""
    optimizer, _ = trained()
    StepLR(optimizer, step_size=1)
    optimizer.param_groups[0]["name"] = "encoder"
    weight = params_of(optimizer)[0]
    optimizer.state[weight]["mine"] = torch.ones(3, dtype=torch.float64)
    optimizer.state[weight]["nested"] = {"a": [1, 2]}
    optimizer.state["everyone"] = {"count": 3}
    saved = through_a_file(optimizer.state_dict())

    resumed = build(params_of(optimizer))
    resumed.load_state_dict(saved)
    assert same(saved, resumed.state_dict())
    assert resumed.param_groups[0]["name"] == "encoder" and resumed.state["everyone"] == {"count": 3}
    assert resumed.state[weight]["mine"].dtype == torch.float64
    StepLR(resumed, step_size=1, last_epoch=2)
    weight.grad = torch.ones_like(weight)
    resumed.step()
    resumed.load_state_dict(saved)
    assert same(saved, resumed.state_dict())


def test_entries_of_others_before_the_first_step() -> None:
    weight, bias, loss = problem()
    optimizer = build([weight, bias])
    optimizer.state[weight]["mine"] = 1
    saved = optimizer.state_dict()
    assert saved["state"] == {0: {"mine": 1}}
    resumed = build([weight, bias])
    resumed.load_state_dict(saved)
    steps(resumed, loss)
    assert resumed.state[weight]["mine"] == 1 and "z" in resumed.state[weight]


# --- hooks ---------------------------------------------------------------------------------------------------------


def test_step_hooks() -> None:
    """Before and after the step, of this optimizer and of all."""
    optimizer, loss = trained()
    order: list[str] = []

    def say(name: str) -> Callable[..., None]:
        return lambda *_: order.append(f"{name}{optimizer.param_groups[0]['k']}")

    handles = [
        register_optimizer_step_pre_hook(say("all, before ")),
        register_optimizer_step_post_hook(say("all, after ")),
        optimizer.register_step_pre_hook(say("before ")),
        optimizer.register_step_post_hook(say("after ")),
    ]
    k = optimizer.param_groups[0]["k"]
    steps(optimizer, loss, 1)
    for handle in handles:
        handle.remove()
    steps(optimizer, loss, 1)
    assert order == [f"all, before {k}", f"before {k}", f"after {k + 1}", f"all, after {k + 1}"]


def test_step_pre_hook_may_change_the_arguments() -> None:
    optimizer, _ = trained()
    called = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: called.append(1)), {}))
    optimizer.step()
    assert called == [1]


def test_state_dict_pre_hook() -> None:
    optimizer, loss = trained()
    seen = []

    def hook(opt: Any) -> None:
        seen.append(opt.param_groups[0]["d"])
        opt.state["test"] = 1
        opt.state[params_of(opt)[0]]["mine"] = 2
        opt.param_groups[0]["note"] = "x"

    handle = optimizer.register_state_dict_pre_hook(hook)
    saved = optimizer.state_dict()
    assert seen == optimizer.get_d()
    assert saved["state"]["test"] == 1 and saved["state"][0]["mine"] == 2 and saved["param_groups"][0]["note"] == "x"
    handle.remove()
    optimizer.state_dict()
    assert len(seen) == 1
    # What a hook writes into the numbers is saved, and used.
    optimizer.register_state_dict_pre_hook(lambda opt: opt.param_groups[0].update(d=0.25))
    assert optimizer.state_dict()["param_groups"][0]["d"] == 0.25
    optimizer.register_state_dict_pre_hook(lambda opt: opt.eval(), prepend=True)
    assert not optimizer.state_dict()["param_groups"][0]["train_mode"]
    optimizer.train()
    steps(optimizer, loss, 1)
    assert optimizer.param_groups[0]["d_prev"] == 0.25


def test_state_dict_post_hook() -> None:
    optimizer, _ = trained()
    seen = []

    def change(opt: Any, state_dict: dict[str, Any]) -> None:
        seen.append(set(state_dict["state"][0]))
        state_dict["extra"] = 1

    handle = optimizer.register_state_dict_post_hook(change)
    assert optimizer.state_dict()["extra"] == 1 and {"z", "p0", "s"} <= seen[0]
    other = optimizer.register_state_dict_post_hook(lambda opt, state_dict: {"replaced": state_dict["extra"]})
    assert optimizer.state_dict() == {"replaced": 1}
    other.remove()
    optimizer.register_state_dict_post_hook(lambda opt, state_dict: {"first": dict(state_dict)}, prepend=True)
    handle.remove()
    assert set(optimizer.state_dict()) == {"first"}


def test_load_state_dict_pre_hook() -> None:
    """It sees the whole state dict, and what it returns, or does to it, is loaded; the caller's stays as it is."""
    source, _ = trained()
    saved = source.state_dict()
    replacing, changing = build(params_of(source)), build(params_of(source))
    seen = []

    def replace(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(set(state_dict["state"][0]))
        groups = [{**group, "lr": 0.125} for group in state_dict["param_groups"]]
        return {"state": state_dict["state"], "param_groups": groups}

    def change(opt: Any, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"] = [{**group, "lr": 0.25} for group in state_dict["param_groups"]]

    for optimizer, hook, lr in ((replacing, replace, 0.125), (changing, change, 0.25)):
        handle = optimizer.register_load_state_dict_pre_hook(hook)
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == lr and saved["param_groups"][0]["lr"] == 1.0
        assert len(optimizer.state) == 2 and same(saved["state"], optimizer.state_dict()["state"])
        handle.remove()
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 1.0
    assert {"z", "p0", "s"} <= seen[0]


def test_load_state_dict_post_hook() -> None:
    source, _ = trained()
    optimizer = build(params_of(source))
    seen: list[Any] = []
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(copy.deepcopy(opt.state_dict())))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("first"), prepend=True)
    optimizer.register_load_state_dict_pre_hook(lambda opt, state_dict: seen.append("before"))
    optimizer.load_state_dict(source.state_dict())
    assert seen[:2] == ["before", "first"] and same(seen[2], source.state_dict())


def test_a_hook_that_raises_changes_nothing() -> None:
    source, loss = trained()
    saved = copy.deepcopy(source.state_dict())
    steps(source, loss, 1)
    before = copy.deepcopy(source.state_dict())

    def fail(*_: Any) -> None:
        raise KeyError("hook")

    for register in (source.register_load_state_dict_pre_hook, source.register_state_dict_pre_hook):
        handle = register(fail)
        with pytest.raises(KeyError):
            source.load_state_dict(saved) if "load" in register.__name__ else source.state_dict()
        handle.remove()
        assert same(before, source.state_dict())


# --- compilers, devices --------------------------------------------------------------------------------------------


@pytest.fixture
def _compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("what", ["step", "all"])
def test_compiled_programs_step_as_others(what: str, backend: str) -> None:
    """``inductor`` gives the same (tried by hand: it takes half a minute)."""
    results = []
    for compiled in (functools.partial(torch.compile, backend=backend), lambda function: function):
        weight, bias, loss = problem()
        optimizer = build([weight, bias])
        step = compiled(optimizer.step) if what == "step" else optimizer.step

        def train(optimizer: Optimizer = optimizer, step: Any = step, loss: Any = loss) -> None:
            optimizer.zero_grad()
            loss().backward()
            step()

        one = compiled(train) if what == "all" else train
        for _ in range(3):
            one()
        results.append((weight.detach().clone(), bias.detach().clone(), optimizer.get_d()))
    assert same(results[0], results[1])


def test_parameters_on_meta() -> None:
    """A model that has no memory yet: building, saving, loading; and a step, which nothing can be read of."""
    params = [nn.Parameter(torch.empty(33, 40, device="meta")), nn.Parameter(torch.empty(3, device="meta"))]
    optimizer = build(params)
    fresh = optimizer.state_dict()
    assert fresh["state"] == {}
    for _ in range(2):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
    saved = optimizer.state_dict()
    assert all(v.is_meta for entry in saved["state"].values() for v in entry.values() if isinstance(v, Tensor))
    assert optimizer.get_d() == [1e-3] and optimizer.skipped_steps == 0
    build(params).load_state_dict(saved)
    copy.deepcopy(optimizer)
    optimizer.eval()
    optimizer.train()


# --- two ranks -----------------------------------------------------------------------------------------------------


def _sharded(frozen: bool) -> tuple[Net, Optimizer]:
    model = Net()
    model.conv.weight.requires_grad_(not frozen)
    model.scale.requires_grad_(not frozen)
    fully_shard(model.embed)
    fully_shard(model)
    return model, Optimizer([{"params": list(model.parameters()), "name": "all"}], d0=D0)


def _round_trips(frozen: bool) -> None:
    """Through torch's functions with each combination of options that they support: bit for bit."""
    model, optimizer = _sharded(frozen)
    train(model, optimizer, 0, 4)
    weights = get_model_state_dict(model)
    weights = {name: value.clone() for name, value in weights.items()}
    expected_state = _whole_state(optimizer)
    saved: dict[str, Any] = {}
    for names in OPTIONS:
        settings = StateDictOptions(**dict.fromkeys(names, True))
        saved[str(names)] = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=settings))
    train(model, optimizer, 4, 6)
    expected = whole(model)
    for names in OPTIONS:
        settings = StateDictOptions(**dict.fromkeys(names, True))
        other, fresh = _sharded(frozen)
        set_model_state_dict(other, weights)
        mine = {} if "broadcast_from_rank0" in names and dist.get_rank() else saved[str(names)]
        set_optimizer_state_dict(other, fresh, mine, options=settings)
        assert same(expected_state, _whole_state(fresh)), names
        assert fresh.param_groups[0]["name"] == "all"
        train(other, fresh, 4, 6)
        assert same(expected, whole(other)), names


OPTIONS: list[tuple[str, ...]] = [
    (),
    ("full_state_dict",),
    ("cpu_offload",),
    ("flatten_optimizer_state_dict",),
    ("cpu_offload", "flatten_optimizer_state_dict"),
    ("full_state_dict", "broadcast_from_rank0"),
    ("full_state_dict", "cpu_offload", "broadcast_from_rank0"),
]
"""torch (2.13) cannot load what it has flattened and made full, of no optimizer: KeyError 'param_groups.0.params.0'."""


def _whole_state(optimizer: Optimizer) -> dict[Any, dict[str, Any]]:
    state: dict[Any, dict[str, Any]] = optimizer.state_dict()["state"]
    return {key: {n: getattr(v, "full_tensor", lambda v=v: v)() for n, v in e.items()} for key, e in state.items()}


def _frozen_as_on_one_device() -> None:
    """With most parameters frozen the terms of Prodigy's numerator cancel; its sum must not depend on their order."""
    torch.manual_seed(3)
    alone = CompositeParamModel(CPU)
    sharded = copy.deepcopy(alone)
    for model in (alone, sharded):
        model.u1.requires_grad_(False)
        model.u2.requires_grad_(False)
    fully_shard(sharded)
    optimizers = Optimizer(alone.parameters()), Optimizer(sharded.parameters())
    for _ in range(10):
        x = torch.rand(8, 100)
        for model, optimizer in zip((alone, sharded), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
    one, two = (optimizer.param_groups[0] for optimizer in optimizers)
    for name in ("d", "d_numerator", "d_denom", "weight_sum"):
        assert two[name] == pytest.approx(one[name], rel=5e-7), name


def _one_rank_alone_fails() -> None:
    """What is refused on one rank only changes nothing there; both go on together."""
    model, optimizer = _sharded(False)
    train(model, optimizer, 0, 2)
    before = copy.deepcopy(optimizer.state_dict())
    if dist.get_rank():
        damaged = {**before, "param_groups": [{**before["param_groups"][0], "lr": -1}]}
        with pytest.raises(ValueError, match="lr=-1"):
            optimizer.load_state_dict(damaged)
        with pytest.raises(ValueError, match="lr=-1"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": -1})
    groups = optimizer.state_dict()["param_groups"]
    assert same(before["param_groups"], groups)
    train(model, optimizer, 2, 4)
    other, other_optimizer = _sharded(False)
    train(other, other_optimizer, 0, 4)
    assert same(whole(model), whole(other))


def _built_on_meta() -> None:
    """torch's recipe for large models: build on meta, shard, get memory, then the optimizer."""
    with torch.device("meta"):
        model = nn.Linear(40, 33)
    fully_shard(model)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.ones_(p)
    optimizer = build(model.parameters())
    model(torch.ones(2, 40)).sum().backward()
    optimizer.step()
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.param_groups[0]["k"] == 2


def _zero_redundancy() -> None:
    """It is refused, and what the message says in its place works."""
    model = nn.Linear(40, 33)
    for made in (Optimizer, functools.partial(Optimizer, d0=1e-3)):
        with pytest.raises(
            ValueError, match=r"fully_shard\(model\) and ProdigyPlusScheduleFree\(model.parameters\(\)\)"
        ):
            ZeroRedundancyOptimizer(model.parameters(), optimizer_class=made)  # type: ignore[arg-type]
    fully_shard(model)
    optimizer = Optimizer(model.parameters())
    model(torch.full((2, 40), 1.0 + dist.get_rank())).sum().backward()
    optimizer.step()
    d: list[Any] = [None, None]
    dist.all_gather_object(d, (optimizer.get_d(), optimizer.param_groups[0]["d_denom"]))
    assert d[0] == d[1]


def _two_ranks() -> None:
    for frozen in (False, True):
        _round_trips(frozen)
    _frozen_as_on_one_device()
    _one_rank_alone_fails()
    _built_on_meta()
    _zero_redundancy()


@pytest.mark.dist
def test_two_ranks() -> None:
    """torch's suites for FSDP2 and distributed state dicts, in spirit."""
    run(2, _two_ranks)
