"""Models under fully_shard and other wrappers of torch: what a user's script does."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ppsf_dist import ProdigyPlusScheduleFree, averaged
from tests.harness.layouts import gather, local
from tests.harness.models import D0
from tests.harness.pool import run

pytestmark = pytest.mark.dist


class Tied(nn.Module):
    """A small language model: tied embeddings, blocks of uneven width, a gain of one element, an unused head."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(51, 37, dtype=dtype)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(37, dtype=dtype), nn.Linear(37, 37, dtype=dtype)) for _ in range(2)
        )
        nn.init.normal_(self.embed.weight, std=0.1)
        self.gain = nn.Parameter(torch.ones(1, dtype=dtype))
        self.head = nn.Linear(37, 51, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(5, 3, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        out: Tensor = self.head(x * self.gain)
        return out


def wrap(model: Tied, how: str) -> nn.Module:
    policies: dict[str, dict[str, Any]] = {
        "keep": {"reshard_after_forward": False},
        "reshard": {"reshard_after_forward": True},
        "mixed": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }
    options = policies.get(how, {})
    if how == "single":
        return model
    if how == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if how == "hsdp":
        options = {"mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))}
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def batch(step: int) -> Tensor:
    return torch.randint(0, 51, (8, 12), generator=torch.Generator().manual_seed(step))


def mine(tokens: Tensor) -> Tensor:
    """This rank's share of the global batch."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return tokens.chunk(world)[rank]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1]).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def script(how: str, steps: int, dtype: torch.dtype = torch.float32, **switches: Any) -> dict[str, Any]:
    """Trains, evaluates with the average half-way, trains on."""
    module = Tied(dtype)
    model = wrap(module, how)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), **{"d0": D0, **switches})
    losses, evaluated = [], []
    for step in range(steps):
        if step == steps // 2:
            model.eval()
            with averaged(optimizer, model), torch.no_grad():
                evaluated.append(float(loss_of(model, mine(batch(1000)))))
            model.train()
        optimizer.zero_grad()
        loss = loss_of(model, mine(batch(step)))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    names = dict(module.named_parameters())
    return {
        "losses": losses, "evaluated": evaluated, "d": optimizer.get_d(), "weights": gather(names),
        "dtypes": {str(p.dtype) for p in names.values()},
    }  # fmt: skip


def mean(runs: list[dict[str, Any]], key: str) -> list[float]:
    return [sum(values) / len(runs) for values in zip(*(r[key] for r in runs), strict=True)]


@functools.cache
def one_device(switches: tuple[tuple[str, bool], ...]) -> dict[str, Any]:
    (result,) = run(1, script, "single", 12, **dict(switches))
    return result


@pytest.mark.parametrize(("how", "ranks"), [
    ("default", 2), ("keep", 2), ("reshard", 2), ("offload", 2), ("default", 4), ("hsdp", 4), ("ddp", 2),
])  # fmt: skip
@pytest.mark.parametrize(
    "switches", [{}, {"use_speed": True}, {"use_schedulefree": False}], ids=["default", "speed", "momentum"]
)
def test_a_script_trains_the_same_on_one_device_and_sharded(how: str, ranks: int, switches: dict[str, Any]) -> None:
    expected = one_device(tuple(switches.items()))
    runs = run(ranks, script, how, 12, **switches)
    assert all(r["d"] == runs[0]["d"] for r in runs)
    assert runs[0]["d"] == pytest.approx(expected["d"], rel=1e-5)
    assert mean(runs, "losses") == pytest.approx(expected["losses"], abs=1e-5)
    assert mean(runs, "evaluated") == pytest.approx(expected["evaluated"], abs=1e-5)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(runs[0]["weights"][name], weight, rtol=1e-4, atol=1e-5)
    assert expected["d"][0] > D0


@pytest.mark.parametrize(("how", "dtype"), [("mixed", torch.float32), ("default", torch.bfloat16)])
def test_sixteen_bit_training(how: str, dtype: torch.dtype) -> None:
    """Forward and backward passes in bf16 round differently on each layout; the optimizer must not add to that."""
    (expected,) = run(1, script, "single", 12, dtype)
    runs = run(2, script, how, 12, dtype)
    assert runs[0]["d"] == runs[1]["d"]
    assert runs[0]["dtypes"] == {str(dtype)}
    assert mean(runs, "losses") == pytest.approx(expected["losses"], abs=0.03)


def stale_forward(how: str, give_model: bool) -> float:
    """How far the forward pass after an evaluation is from the one before it."""
    model = wrap(Tied(), how)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=1e-2)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()
    with torch.no_grad():
        before = model(batch(0))
        with averaged(optimizer, model if give_model else None):
            inside = model(batch(0))
        after = model(batch(0))
    assert not torch.equal(before, inside)
    return float((before - after).abs().max())


@pytest.mark.parametrize("how", ["default", "keep", "reshard", "hsdp"])
def test_averaged_reaches_weights_that_fsdp_keeps_gathered(how: str) -> None:
    """With the model and without."""
    for give_model in (True, False):
        assert run(4, stale_forward, how, give_model) == [0.0] * 4


def bf16_replicas(steps: int) -> dict[str, Tensor]:
    """Ranks draw from random generators of their own in between, as data loaders and dropout do."""
    module = Tied(torch.bfloat16)
    model = wrap(module, "hsdp")
    optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=1e-3)
    for step in range(steps):
        torch.rand(dist.get_rank() + 1)
        optimizer.zero_grad()
        loss_of(model, mine(batch(step))).backward()
        optimizer.step()
    gather(dict(module.named_parameters()), {n: optimizer.state[p]["z"] for n, p in module.named_parameters()
                                             if "unused" not in n} | {
        n: local(p) for n, p in module.named_parameters() if "unused" in n})  # fmt: skip
    return gather(dict(module.named_parameters()))


def test_replicas_stay_identical_for_fifty_steps_of_stochastic_rounding() -> None:
    """``gather`` fails if two ranks that hold the same element differ in any bit."""
    run(4, bf16_replicas, 50)


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stages = nn.ModuleList([nn.Linear(36, 40), nn.Linear(40, 36), nn.Linear(36, 7)])


def pipeline(dp: int, pp: int, use_group: bool) -> dict[str, Any]:
    """Each stage has an optimizer of its own over its own parameters; gradients are given."""
    full = Stages()
    mesh = init_device_mesh("cpu", (pp, dp), mesh_dim_names=("pp", "dp"))
    stage = mesh["pp"].get_local_rank()
    held = [m for i, m in enumerate(full.stages) if i % pp == stage]
    if dp > 1:
        for module in held:
            fully_shard(module, mesh=mesh["dp"])
    params = [p for m in held for p in m.parameters()]
    optimizer = ProdigyPlusScheduleFree(params, d0=D0, process_group=dist.group.WORLD if use_group else None)
    return {"d": feed(full, held, optimizer), "stage": stage}


def feed(full: Stages, held: list[nn.Module], optimizer: ProdigyPlusScheduleFree) -> list[float]:
    from torch.distributed.tensor import DTensor

    from tests.harness.layouts import set_grads

    d = []
    shapes = [tuple(p.shape) for p in full.parameters()]
    names = [n for n, _ in full.named_parameters()]
    held_names = {n for i, m in enumerate(full.stages) if m in held for n in names if n.startswith(f"stages.{i}.")}
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        grads = {n: torch.randn(s, generator=generator) * 0.01 + 0.02 for n, s in zip(names, shapes, strict=True)}
        parameters = {n: p for n, p in full.named_parameters() if n in held_names}
        set_grads(parameters, grads)
        assert all(
            p.grad is not None and isinstance(p.grad, DTensor) == isinstance(p, DTensor) for p in parameters.values()
        )
        optimizer.step()
        d.append(optimizer.get_d()[0])
    return d


def whole_model() -> list[float]:
    full = Stages()
    return feed(full, list(full.stages), ProdigyPlusScheduleFree(full.parameters(), d0=D0))


@pytest.mark.parametrize(("dp", "pp"), [(1, 2), (2, 2), (1, 3)])
def test_pipeline_stages_share_the_step_size_of_the_whole_model(dp: int, pp: int) -> None:
    (expected,) = run(1, whole_model)
    for of_rank in run(dp * pp, pipeline, dp, pp, True):
        assert of_rank["d"] == pytest.approx(expected, rel=1e-6)
    assert expected[-1] > 2 * expected[0]


def too_small_a_group() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    module = nn.Linear(8, 8)
    fully_shard(module, mesh=mesh["dp"])
    optimizer = ProdigyPlusScheduleFree(module.parameters(), process_group=mesh["pp"].get_group())
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="process_group has ranks"):
        optimizer.step()


def test_a_group_that_leaves_out_ranks_is_refused() -> None:
    run(4, too_small_a_group)


def experts(with_tokens: bool) -> list[float]:
    """Two experts on a mesh of their own, each sharded over two ranks, beside a dense layer on all four."""
    torch.manual_seed(7)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("expert", "shard"))
    dense, both = nn.Linear(40, 33), [nn.Linear(33, 40), nn.Linear(33, 40)]
    which = mesh["expert"].get_local_rank()
    expert = both[which]
    fully_shard(dense, mesh=init_device_mesh("cpu", (4,)))
    fully_shard(expert, mesh=mesh["shard"])
    optimizer = ProdigyPlusScheduleFree([*dense.parameters(), *expert.parameters()], d0=D0)
    return feed_experts(dense, {which: expert}, optimizer, with_tokens)


def feed_experts(
    dense: nn.Module, held: dict[int, nn.Module], optimizer: ProdigyPlusScheduleFree, with_tokens: bool
) -> list[float]:
    from tests.harness.layouts import set_grads

    d = []
    for step in range(10):
        everything = {"dense": dense, **{str(i): m for i, m in held.items()}}
        for index, key in enumerate(("dense", "0", "1")):
            if key not in everything:
                continue
            module = everything[key]
            names = [n for n, _ in module.named_parameters()]
            generator = torch.Generator().manual_seed(100 * step + index)
            idle = key == "1" and not with_tokens and step % 2 == 1
            grads: dict[str, Tensor | None] = {
                n: None if idle else torch.randn(tuple(p.shape), generator=generator) * 0.01 + 0.02
                for n, p in zip(names, module.parameters(), strict=True)
            }
            set_grads(dict(module.named_parameters()), grads)
        optimizer.step()
        d.append(optimizer.get_d()[0])
    return d


def experts_in_one_process(with_tokens: bool) -> list[float]:
    torch.manual_seed(7)
    dense, both = nn.Linear(40, 33), [nn.Linear(33, 40), nn.Linear(33, 40)]
    params = [*dense.parameters(), *both[0].parameters(), *both[1].parameters()]
    return feed_experts(dense, dict(enumerate(both)), ProdigyPlusScheduleFree(params, d0=D0), with_tokens)


@pytest.mark.parametrize("with_tokens", [True, False])
def test_experts_on_a_mesh_of_their_own(with_tokens: bool) -> None:
    (expected,) = run(1, experts_in_one_process, with_tokens)
    for d in run(4, experts, with_tokens):
        assert d == pytest.approx(expected, rel=1e-6)
