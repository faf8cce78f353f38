"""Numbers and weights that are not finite, gradients at the edge of fp32, learning rates that are tensors."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
from torch import nn

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.engine.host import HostAccess, PendingCopy
from tests.harness.counting import count_host_syncs
from tests.harness.layouts import LAYOUTS, Layout, gather, local, set_grads, shard_parameters
from tests.harness.models import NamedShapes, gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.runs import SINGLE, make_optimizer
from tests.switches import EVERY
from tests.test_nonfinite import bits, same

SHAPES = named_shapes("small")
SHARDED = [name for name, layout in LAYOUTS.items() if layout.world_size > 1 and name != "replicated"]


class Late(HostAccess):
    """A device whose copies arrive when they like, on each rank at another time."""

    def __init__(self, seed: int) -> None:
        super().__init__(torch.device("cpu"))
        self.free = False
        self._random = random.Random(seed)

    def start_copy(self, values: torch.Tensor) -> PendingCopy:
        return LateCopy(values.clone(), self._random)


class LateCopy(PendingCopy):
    def __init__(self, values: torch.Tensor, chance: random.Random) -> None:
        super().__init__(values, wants_event=False)
        self._chance = chance

    def take(self, *, wait: bool = False) -> torch.Tensor | None:
        return super().take(wait=wait) if wait or self._chance.random() < 0.4 else None


def late_runs(layout: Layout, names: list[str], late: bool) -> dict[str, list[Any]]:
    seen = {}
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    for name in names:
        parameters = shard_parameters(initial_weights(SHAPES), layout)
        optimizer = make_optimizer(parameters, 2, **EVERY[name])
        if late:
            optimizer._engine.host = Late(rank)
        for gradients in gradient_sequence(SHAPES, 9):
            set_grads(parameters, gradients)
            optimizer.step()
        optimizer.get_d()
        # Whether p0 and s are freed yet is the one thing that depends on when a rank learns of k.
        states = [{k: v for k, v in optimizer.state[p].items() if k not in ("p0", "s")} for p in parameters.values()]
        weights = [local(p.detach()).clone() for p in parameters.values()]
        seen[name] = [weights, [list(state.values()) for state in states], optimizer.get_d()]
    return seen


@pytest.mark.dist
@pytest.mark.parametrize("third", range(3))
@pytest.mark.parametrize("layout", ["fsdp_2", "hsdp_2x2"])
def test_copies_that_arrive_late_change_nothing(layout: str, third: int) -> None:
    """Each rank hears of d and k at another time; none waits for another, and every bit is that of prompt copies."""
    names = list(EVERY)[third::3]
    prompt = run(LAYOUTS[layout].world_size, late_runs, LAYOUTS[layout], names, False)
    late = run(LAYOUTS[layout].world_size, late_runs, LAYOUTS[layout], names, True)
    for a, b in zip(prompt, late, strict=True):
        for name in names:
            assert same(a[name], b[name]), name


NOT_FINITE = [("lr", float("nan")), ("lr", float("inf")), ("weight_decay", float("inf")), ("d", float("nan"))]


def unsound_numbers(layout: Layout, name: str, value: float, as_tensor: bool) -> dict[str, Any]:
    parameters = shard_parameters(initial_weights(SHAPES), layout)
    optimizer = make_optimizer(parameters, 2, weight_decay=0.01)
    sequence = list(gradient_sequence(SHAPES, 5))
    for gradients in sequence[:3]:
        set_grads(parameters, gradients)
        optimizer.step()
    group = optimizer.param_groups[1]
    good = optimizer.get_d()[1] if name == "d" else group[name]
    optimizer.get_d()
    before = bits(parameters, optimizer)
    group[name] = torch.tensor(value) if as_tensor else value
    for gradients in sequence[3:]:
        set_grads(parameters, gradients)
        optimizer.step()
    skipped = optimizer.skipped_steps
    group[name] = good
    optimizer.get_d()
    unchanged = same(before, bits(parameters, optimizer))
    set_grads(parameters, sequence[3])
    optimizer.step()
    return {"unchanged": unchanged, "skipped": skipped, "goes on": not same(before, bits(parameters, optimizer))}


@pytest.mark.parametrize(("name", "value"), NOT_FINITE)
def test_a_number_that_is_not_finite_is_a_skipped_step(
    name: str, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    assert unsound_numbers(SINGLE, name, value, False) == {"unchanged": True, "skipped": 2, "goes on": True}
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1, said
    assert f"{name}={value} in parameter group 1: steps change nothing" in said[0]


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["fsdp_2", "fsdp_tp_2x2"])
def test_a_learning_rate_that_is_not_finite_under_sharding(layout: str) -> None:
    expected = {"unchanged": True, "skipped": 2, "goes on": True}
    for as_tensor in (False, True):
        told = run(LAYOUTS[layout].world_size, unsound_numbers, LAYOUTS[layout], "lr", float("nan"), as_tensor)
        assert told == [expected] * LAYOUTS[layout].world_size


def unsound_weights(layout: Layout, finite_gradients: bool) -> tuple[int, list[str], bool]:
    """Three steps with a NaN among the weights of the last rank: skipped steps, what was said, whether all stayed."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ppsf_dist").addHandler(handler)
    try:
        parameters = shard_parameters(initial_weights(SHAPES), layout)
        optimizer = make_optimizer(parameters, 2, use_orthograd=finite_gradients, use_schedulefree=not finite_gradients)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        sequence = list(gradient_sequence(SHAPES, 5))
        for step, gradients in enumerate(sequence):
            set_grads(parameters, gradients)
            if step == 2:
                optimizer.get_d()
                if rank == layout.world_size - 1:
                    local(parameters["tall"].detach()).view(-1)[1] = float("nan")
                before = bits(parameters, optimizer)
            if step >= 2 and not finite_gradients:
                for p in parameters.values():
                    if p.grad is not None:
                        local(p.grad).fill_(float("nan"))
            optimizer.step()
        optimizer.get_d()
        return optimizer.skipped_steps, said, same(before, bits(parameters, optimizer))
    finally:
        logging.getLogger("ppsf_dist").removeHandler(handler)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("layout", "finite_gradients"),
    [("single", False), ("single", True), ("fsdp_2", False), ("fsdp_2", True), ("hsdp_2x2", False)],
)
def test_a_nan_among_the_weights_is_named_once_and_is_no_bad_gradient(layout: str, finite_gradients: bool) -> None:
    told = run(LAYOUTS[layout].world_size, unsound_weights, LAYOUTS[layout], finite_gradients)
    assert {(skipped, stayed) for skipped, _, stayed in told} == {(0, True)}
    (message,) = told[-1][1]
    assert "the weights of parameter 4 (torch.float32 (64, 48) in group 1) are not finite" in message
    assert all(said == [] for _, said, _ in told[: LAYOUTS[layout].world_size // 2])


EDGE: dict[str, tuple[float, bool]] = {
    # Largest gradient, and whether the step is made: the squares of a row add up beyond fp32 or not.
    "sum of a matrix beyond fp32": (3.3e17, True),
    "sum of a row beyond fp32": (3.3e18, False),
    "square beyond fp32": (2e19, False),
}


def at_the_edge(layout: Layout) -> dict[str, tuple[int, dict[str, Any]]]:
    seen = {}
    for name, (size, _) in EDGE.items():
        for factored in (True, False):
            shapes: NamedShapes = [("w", (64, 64))]
            parameters = shard_parameters(initial_weights(shapes), layout)
            optimizer = make_optimizer(parameters, 1, factored=factored)
            set_grads(parameters, {"w": torch.full((64, 64), size)})
            optimizer.step()
            seen[f"{name}, factored={factored}"] = (optimizer.skipped_steps, gather(parameters))
    return seen


@pytest.mark.dist
@pytest.mark.parametrize("layout", SHARDED)
def test_the_edge_of_fp32_is_in_the_same_place_in_every_layout(layout: str) -> None:
    expected = at_the_edge(SINGLE)
    for name, (_, made) in EDGE.items():
        assert expected[f"{name}, factored=True"][0] == int(not made)
    for of_rank in run(LAYOUTS[layout].world_size, at_the_edge, LAYOUTS[layout]):
        for name, (skipped, weights) in of_rank.items():
            assert skipped == expected[name][0], name
            torch.testing.assert_close(weights["w"], expected[name][1]["w"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("free", [True, False])
def test_a_learning_rate_that_is_a_tensor_is_never_waited_for(free: bool) -> None:
    runs = []
    for as_tensor in (True, False):
        parameters = shard_parameters(initial_weights(SHAPES), SINGLE)
        optimizer = make_optimizer(parameters, 2)
        syncs_seen: dict[str, int] = {}
        for step, gradients in enumerate(gradient_sequence(SHAPES, 5)):
            lr = 1.0 / (step + 1)
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(lr, dtype=torch.float64) if as_tensor else lr
            set_grads(parameters, gradients)
            if step == 1 and not free:
                (plan,) = optimizer._engine.plans.values()
                plan.host.free = False
            with count_host_syncs() as syncs:
                optimizer.step()
            syncs_seen = {name: count for name, count in syncs.names.items() if count}
        assert syncs_seen == ({"tolist": 3} if free else {"numpy": 1})
        optimizer.get_d()
        runs.append(bits(parameters, optimizer))
    # The groups still hold their learning rates, one kind each.
    assert same([part for part in runs[0][:-1]], [part for part in runs[1][:-1]])


def convert(layout: Layout) -> list[float]:
    """A model that becomes bf16 in mid-run, and fp32 again: d after each step, and evaluations in between."""
    module = nn.Module()
    parameters = shard_parameters(initial_weights(SHAPES), layout)
    for name, p in parameters.items():
        module.register_parameter(name, p)
    optimizer = make_optimizer(parameters, 2)
    ds = []
    for step, gradients in enumerate(gradient_sequence(SHAPES, 9)):
        if step == 3:
            module.bfloat16()
        if step == 6:
            module.float()
        parameters = dict(module.named_parameters())
        dtype = torch.bfloat16 if 3 <= step < 6 else torch.float32
        set_grads(parameters, {name: None if g is None else g.to(dtype) for name, g in gradients.items()})
        optimizer.step()
        before = [local(p.detach()).clone() for p in parameters.values()]
        optimizer.eval(keep=True)
        optimizer.train()
        assert all(torch.equal(a, local(p)) for a, p in zip(before, parameters.values(), strict=True))
        optimizer.eval()
        assert all(p.dtype == dtype for p in parameters.values())
        optimizer.train()
        ds.append(optimizer.get_d()[0])
    return ds


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["single", "fsdp_2", "tp"])
def test_a_model_that_changes_its_dtype_in_mid_run(layout: str) -> None:
    expected = convert(SINGLE)
    assert expected == sorted(expected) and expected[-1] > expected[0]
    for ds in run(LAYOUTS[layout].world_size, convert, LAYOUTS[layout]):
        assert ds == pytest.approx(expected, rel=1e-5)


def test_mode_and_weights_change_together() -> None:
    """An exception at any operator of eval() or train() leaves both as they will be, and the next call works."""
    from tests.test_interruptions import RaiseAt

    for keep in (False, True):
        for error in (KeyboardInterrupt, RuntimeError):
            point = 0
            while True:
                parameters = shard_parameters(initial_weights(SHAPES), SINGLE)
                optimizer = make_optimizer(parameters, 2)
                for gradients in gradient_sequence(SHAPES, 2):
                    set_grads(parameters, gradients)
                    optimizer.step()
                optimizer.get_d()
                y = [p.detach().clone() for p in parameters.values()]
                try:
                    with RaiseAt(point, error):
                        optimizer.eval(keep=keep)
                    break
                except error:
                    modes = {group["train_mode"] for group in optimizer.param_groups}
                    assert len(modes) == 1
                    moved = any(not torch.equal(a, p) for a, p in zip(y, parameters.values(), strict=True))
                    assert moved == (modes == {False})
                    optimizer.eval(keep=keep)
                    x = [p.detach().clone() for p in parameters.values()]
                optimizer.train()
                reference = shard_parameters(initial_weights(SHAPES), SINGLE)
                other = make_optimizer(reference, 2)
                for gradients in gradient_sequence(SHAPES, 2):
                    set_grads(reference, gradients)
                    other.step()
                other.eval()
                assert all(torch.equal(a, p) for a, p in zip(x, reference.values(), strict=True))
                if keep:
                    assert all(torch.equal(a, p) for a, p in zip(y, parameters.values(), strict=True))
                assert not any("y" in optimizer.state[p] for p in parameters.values())
                point += 1
            assert point > len(parameters)


def test_an_optimizer_of_its_own_is_still_silent() -> None:
    """Nothing above is said of an ordinary run."""
    parameters = [nn.Parameter(torch.randn(40, 40))]
    optimizer = ProdigyPlusScheduleFree(parameters)
    parameters[0].grad = torch.randn(40, 40)
    optimizer.step()
    assert optimizer.skipped_steps == 0


def test_unsound_weights_are_named_late_on_an_accelerator(caplog: pytest.LogCaptureFixture) -> None:
    parameters = shard_parameters(initial_weights(SHAPES), SINGLE)
    optimizer = make_optimizer(parameters, 2)
    optimizer._engine.host = Late(0)
    for gradients in list(gradient_sequence(SHAPES, 3)) * 12:
        set_grads(parameters, gradients)
        parameters["tall"].data.view(-1)[1] = float("nan")
        parameters["tall"].grad = torch.full_like(parameters["tall"], float("nan"))
        with count_host_syncs() as syncs:
            optimizer.step()
        assert set(syncs.names) <= {"numpy", "tolist", "tensor"}
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "the weights of parameter 4 (torch.float32 (64, 48) in group 1) are not finite: steps change nothing"
    ]


def fails_on_an_accelerator(layout: Layout) -> tuple[list[str], bool]:
    """Rank 1 raises in a closure; rank 0, which reads nothing at once, hears of it in a later step."""
    rank = torch.distributed.get_rank()
    parameters = shard_parameters(initial_weights(SHAPES), layout)
    optimizer = make_optimizer(parameters, 2)
    optimizer._engine.host = Late(rank)
    for gradients in gradient_sequence(SHAPES, 2):
        set_grads(parameters, gradients)
        optimizer.step()
    optimizer.get_d()
    before = bits(parameters, optimizer)

    def closure() -> float:
        if rank == 1:
            raise ZeroDivisionError("a batch without tokens")
        return 0.0

    try:
        optimizer.step(closure)
    except ZeroDivisionError:
        pass
    optimizer.get_d()
    unchanged = same(before, bits(parameters, optimizer))
    messages = []
    for gradients in list(gradient_sequence(SHAPES, 3)) * 6:
        set_grads(parameters, gradients)
        try:
            optimizer.step()
        except RuntimeError as error:
            messages.append(str(error))
    return messages, unchanged


@pytest.mark.dist
def test_a_failure_on_one_rank_is_heard_of_late_on_an_accelerator() -> None:
    (others, unchanged), (own, also_unchanged) = run(2, fails_on_an_accelerator, LAYOUTS["fsdp_2"])
    assert unchanged and also_unchanged and own == []
    (message,) = others
    assert message.startswith("an earlier step changed nothing on any rank")
