"""``recalibrate_batch_norm``: the statistics of BatchNorm at the average, on one device, under DDP and FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ppsf_dist import AdamWScheduleFree, averaged, recalibrate_batch_norm
from tests.harness.pool import run

BATCHES = 6


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4), nn.BatchNorm1d(4, momentum=0.3)
    )


def momenta(model: nn.Module) -> list[float | None]:
    return [layer.momentum for layer in model.modules() if isinstance(layer, nn.BatchNorm1d)]


def batches(first: int = 0, step: int = 1, count: int = BATCHES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 5, generator=generator) for _ in range(count)][first::step]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def expected(model: nn.Sequential, given: list[Tensor]) -> dict[str, Tensor]:
    """Means over batches of the mean and of the unbiased variance of what comes into each layer, without dropout.

    For layers whose weights are 1 and 0, as they start.
    """
    with torch.no_grad():
        first = [model[0](x) for x in given]
        hidden = [torch.relu(_normal(x)) for x in first]
        second = [model[4](x) for x in hidden]
    made = {}
    for name, inputs in (("1", first), ("5", second)):
        made[f"{name}.running_mean"] = torch.stack([x.mean(0) for x in inputs]).mean(0)
        made[f"{name}.running_var"] = torch.stack([x.var(0) for x in inputs]).mean(0)
        made[f"{name}.num_batches_tracked"] = torch.tensor(len(given))
    return made


def _normal(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


def check(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


def test_statistics_are_means_over_the_batches_without_dropout() -> None:
    model = make_model()
    model[2].eval()
    modes = [module.training for module in model.modules()]
    model(torch.randn(16, 5))
    assert recalibrate_batch_norm(model, batches()) == 2
    check(statistics(model), expected(model, batches()))
    assert [module.training for module in model.modules()] == modes
    assert momenta(model) == [0.1, 0.3]
    assert all(p.grad is None for p in model.parameters())


def test_batches_come_as_tensors_pairs_mappings_or_for_a_function() -> None:
    model = make_model()
    recalibrate_batch_norm(model, batches())
    plain = statistics(model)
    pairs = ((x, torch.zeros(16)) for x in batches())
    for given in (pairs, [{"input": x} for x in batches()]):
        model = make_model()
        recalibrate_batch_norm(model, given)
        check(statistics(model), plain)
    other = make_model()
    recalibrate_batch_norm(other, enumerate(batches()), forward=lambda batch: other(batch[1]))
    check(statistics(other), plain)


def test_the_evaluation_of_the_average_is_that_of_the_average() -> None:
    """The caveat of the Schedule-Free page: with statistics of y the evaluation at x is another one."""
    model = make_model()
    optimizer = AdamWScheduleFree(model.parameters(), lr=0.1)
    target = torch.randn(16, 4)
    for parameter in (*model[1].parameters(), *model[5].parameters()):
        parameter.requires_grad_(False)
    for x in batches(count=40):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    x = torch.cat(batches())
    with averaged(optimizer, model):
        model.eval()
        before = model(x)
        recalibrate_batch_norm(model, batches(count=40))
        after = model(x)
        check(statistics(model), expected(model, batches(count=40)))
    assert not torch.allclose(before, after, rtol=1e-2)


def test_a_model_without_batch_norm_asks_for_no_batch() -> None:
    def never() -> Iterator[Tensor]:
        raise AssertionError("asked")
        yield

    assert recalibrate_batch_norm(nn.Linear(2, 2), never()) == 0
    assert recalibrate_batch_norm(nn.BatchNorm1d(2, track_running_stats=False), never()) == 0


@pytest.mark.parametrize("given", ["none", "bad", "raises"])
def test_what_fails_leaves_the_statistics_and_modes(given: str) -> None:
    model = make_model()
    model(torch.randn(16, 5))
    before = statistics(model)

    def raising() -> Iterator[Tensor]:
        yield from batches()
        raise OSError("disk")

    which: dict[str, tuple[Any, type[Exception], str]] = {
        "none": ([], ValueError, "batches is empty on every rank"),
        "bad": ([*batches(), torch.randn(1, 5)], ValueError, "more than 1 value per channel"),
        "raises": (raising(), OSError, "disk"),
    }
    iterable, kind, message = which[given]
    with pytest.raises(kind, match=message):
        recalibrate_batch_norm(model, iterable)
    for name, value in before.items():
        assert torch.equal(statistics(model)[name], value)
    assert model.training and momenta(model) == [0.1, 0.3] and model[1].training


def on_ranks(kind: str, world_size: int, fault: str = "") -> tuple[dict[str, Tensor], str]:
    rank = dist.get_rank()
    model: nn.Module = make_model()
    if kind == "fsdp":
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    before = statistics(model)
    mine = batches(rank, world_size)
    if fault == "uneven" and rank == 0:
        mine = mine[:1]
    if fault == "raises" and rank == 1:
        mine = [*mine[:1], torch.randn(1, 5)]
    try:
        recalibrate_batch_norm(model, mine)
    except ValueError as error:
        assert all(torch.equal(statistics(model)[name], value) for name, value in before.items())
        return {}, str(error)
    return {name.removeprefix("module."): value for name, value in statistics(model).items()}, ""


@pytest.mark.dist
@pytest.mark.parametrize(("kind", "world_size"), [("ddp", 2), ("ddp", 3), ("fsdp", 2)])
def test_ranks_share_the_statistics_of_one_process(kind: str, world_size: int) -> None:
    single = make_model()
    recalibrate_batch_norm(single, batches())
    for ours, _ in run(world_size, on_ranks, kind, world_size):
        check(ours, statistics(single))


@pytest.mark.dist
def test_ranks_under_ddp_may_have_different_numbers_of_batches() -> None:
    single = make_model()
    recalibrate_batch_norm(single, [batches()[0], *batches(1, 2)])
    for ours, _ in run(2, on_ranks, "ddp", 2, "uneven"):
        check(ours, statistics(single))


@pytest.mark.dist
def test_where_ranks_wait_for_each_other_different_numbers_are_an_error_on_all() -> None:
    for _, error in run(2, on_ranks, "fsdp", 2, "uneven"):
        assert "ranks [0] have 1 batches, others more" in error and "drop_last=True" in error


@pytest.mark.dist
def test_a_failure_on_one_rank_is_all_ranks() -> None:
    for _, error in run(2, on_ranks, "ddp", 2, "raises"):
        assert "rank 1 of 2" in error and "more than 1 value per channel" in error
