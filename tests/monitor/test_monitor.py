"""Monitor: its rows are the numbers of the optimizer, they reach every sink, and cost no wait and no message."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch import nn

from ppsf_dist import AdamWScheduleFree, Monitor, Prodigy, ProdigyPlusScheduleFree
from ppsf_dist.monitor.picture import settled_at, verdict
from tests.harness.counting import count_collectives, count_host_syncs
from tests.harness.layouts import LAYOUTS, set_grads, shard_parameters
from tests.harness.models import D0, gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.runs import SINGLE, make_groups, take_step

SHAPES = named_shapes("small")
STEPS = 12


def trained(every: int = 4, steps: int = STEPS, groups: int = 2, **arguments: Any) -> tuple[Any, Monitor, list[Any]]:
    """An optimizer after some steps with given gradients, its monitor, and what its groups were at each row."""
    parameters = shard_parameters(initial_weights(SHAPES), SINGLE)
    optimizer = ProdigyPlusScheduleFree(make_groups(parameters, groups), d0=D0)
    monitor = Monitor(optimizer, every=every, **arguments)
    seen = []
    for step, gradients in enumerate(gradient_sequence(SHAPES, steps), start=1):
        take_step(optimizer, parameters, gradients)
        monitor.log(loss=1.0 / step)
        if step % every == 0:
            seen.append([dict(group) for group in optimizer.param_groups])
    return optimizer, monitor, seen


def test_rows_are_the_numbers_of_the_optimizer() -> None:
    optimizer, monitor, seen = trained()
    assert [row["step"] for row in monitor.rows] == [4, 8, 12]
    for row, groups in zip(monitor.rows, seen, strict=True):
        assert 0 < row["step_share"] <= 1 and row["skipped"] == 0
        for told, group in zip(row["groups"], groups, strict=True):
            assert told["d"] == group["d"] and told["d_lr"] == group["d"] * group["lr"]
            assert told["d_effective_lr"] == group["d"] * group["effective_lr"]
            assert told["estimate"] == group["d_numerator"] / group["d_denom"]
            elements = sum(p.numel() for p in group["params"])
            assert told["update_rms"] == pytest.approx(told["update_norm"] / (told["d_lr"] * math.sqrt(elements)))
    first, second, _ = monitor.rows
    assert second["groups"][1]["growth"] == second["groups"][1]["d"] / first["groups"][1]["d"]
    # The row of a step is made in that step, with what was given before.
    assert [row["loss"] for row in monitor.rows] == [1 / 3, 1 / 7, 1 / 11]
    with pytest.warns(UserWarning, match="eval"):
        monitor.close()
    optimizer.step()
    assert len(monitor.rows) == 3


def test_classes_without_a_d_have_rows_too() -> None:
    for make, finds_d in ((AdamWScheduleFree, False), (Prodigy, True)):
        model = nn.Linear(3, 40)
        optimizer = make(model.parameters())
        if not finds_d:
            optimizer.train()
        with Monitor(optimizer, every=1) as monitor:
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            with pytest.warns(UserWarning, match="eval") if not finds_d else contextlib.nullcontext():
                monitor.close()
        (group,) = monitor.rows[0]["groups"]
        assert (
            ("d" in group) == finds_d and group["gradient_norm"] > 0 and group["lr"] == optimizer.param_groups[0]["lr"]
        )


class Writer:
    """What a TensorBoard writer, a run of W&B and MLflow have, as far as a monitor uses it."""

    def __init__(self, method: str) -> None:
        self.calls: list[Any] = []
        setattr(self, method, lambda *args, **kwargs: self.calls.append((args, kwargs)))


def test_every_kind_of_sink_gets_each_row(tmp_path: Path) -> None:
    board, run_, flow = Writer("add_scalar"), Writer("log"), Writer("log_metrics")
    rows: list[Any] = []
    file = tmp_path / "deep" / "run.jsonl"
    _, monitor, _ = trained(to=[file, board, run_, flow, rows.append], groups=1)
    assert rows == monitor.rows
    about, *lines = (json.loads(line) for line in file.read_text().splitlines())
    assert about["about"]["optimizer"] == "ProdigyPlusScheduleFree" and about["about"]["d0"] == D0
    assert lines == json.loads(json.dumps(monitor.rows))
    d = monitor.rows[0]["groups"][0]["d"]
    assert (("ppsf/d", d, 4), {}) in board.calls
    ((numbers,), step), ((other,), other_step) = run_.calls[0], flow.calls[0]
    assert numbers["ppsf/d"] == other["ppsf/d"] == d and step == other_step == {"step": 4}
    assert numbers["ppsf/loss"] == 1 / 3


def test_two_groups_have_two_names_in_a_tracker() -> None:
    flow = Writer("log_metrics")
    _, monitor, _ = trained(to=flow)
    ((numbers,), _) = flow.calls[-1]
    assert [numbers[f"ppsf/{index}/d"] for index in (0, 1)] == [group["d"] for group in monitor.rows[-1]["groups"]]


def test_a_tensorboard_file_holds_d(tmp_path: Path) -> None:
    """The real writer."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        _, monitor, _ = trained(to=writer, groups=1)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("ppsf/d")]
    assert found == [(row["step"], pytest.approx(row["groups"][0]["d"], rel=1e-6)) for row in monitor.rows]


def test_a_run_that_goes_on_appends_and_one_that_begins_starts_anew(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    optimizer, _, _ = trained(to=file, groups=1)
    again = Monitor(optimizer, every=1, to=file)
    optimizer.step()
    with pytest.warns(UserWarning, match="eval"):
        again.close()
    steps = [json.loads(line).get("step") for line in file.read_text().splitlines()]
    assert steps == [None, 4, 8, 12, None, 13]
    trained(to=file, groups=1)
    assert len(file.read_text().splitlines()) == 4


def test_bad_arguments_are_named() -> None:
    model = nn.Linear(2, 2)
    optimizer = ProdigyPlusScheduleFree(model.parameters())
    with pytest.raises(TypeError, match="optimizer is a SGD: a monitor follows"):
        Monitor(torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="every=0 is out of range"):
        Monitor(optimizer, every=0)
    with pytest.raises(TypeError, match="to=3 takes no rows: allowed are"):
        Monitor(optimizer, to=3)
    with pytest.raises(ValueError, match="nothing to draw"):
        Monitor(optimizer).plot("nowhere.png")


def test_a_monitor_costs_no_wait() -> None:
    """Rows of every step, beside none."""
    waits = []
    for every in (1, 1000):
        parameters = shard_parameters(initial_weights(SHAPES), SINGLE)
        optimizer = ProdigyPlusScheduleFree(make_groups(parameters, 1), d0=D0)
        monitor = Monitor(optimizer, every=every)
        first, *others = gradient_sequence(SHAPES, 4)
        take_step(optimizer, parameters, first)
        with count_host_syncs() as counted:
            for gradients in others:
                take_step(optimizer, parameters, gradients)
        waits.append(counted.total)
        assert len(monitor.rows) == (4 if every == 1 else 0)
    assert waits[0] == waits[1]


def watched(layout_name: str, folder: str) -> tuple[list[dict[str, Any]], int]:
    """On every rank: some steps with a monitor; its rows, and the collectives of the last step."""
    parameters = shard_parameters(initial_weights(SHAPES), LAYOUTS[layout_name])
    optimizer = ProdigyPlusScheduleFree(make_groups(parameters, 2), d0=D0)
    monitor = Monitor(optimizer, every=2, to=f"{folder}/run.jsonl")
    for gradients in gradient_sequence(SHAPES, 6):
        set_grads(parameters, gradients)
        with count_collectives() as counted:
            optimizer.step()
    return monitor.rows, counted.total


@pytest.mark.dist
def test_on_two_ranks_only_the_first_writes_and_no_message_is_added(tmp_path: Path) -> None:
    (first, collectives), (second, _) = run(2, watched, "fsdp_2", str(tmp_path))
    assert [row["step"] for row in first] == [2, 4, 6] and not second
    assert collectives == 2
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 4


def rows(values: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "step": 10 * (i + 1),
            "groups": [{"d": d, "estimate": d / 2, "update_rms": 1.0, "gradient_norm": 2.0}],
            "loss": 1.0,
        }
        for i, d in enumerate(values)
    ]


def test_the_picture_says_at_a_glance_whether_d_has_settled(tmp_path: Path) -> None:
    settled = rows([1e-6, 1e-4, *[2e-3] * 20])
    growing = rows([1e-6 * 1.2**i for i in range(30)])
    assert settled_at(settled) == 30 and verdict(settled) == "d settled at step 30: 2.00e-03, unchanged up to step 220"
    assert settled_at(growing) is None and verdict(growing).startswith("d has not settled: 1.98e-04 after 300 steps")
    assert settled_at(rows([1e-6] * 5)) == 10
    monitor = trained(groups=2)[1]
    monitor.plot(tmp_path / "pictures" / "d.png")
    picture = imread(tmp_path / "pictures" / "d.png")[:, :, :3]
    assert 0.01 < (picture < 0.9).any(axis=2).mean() < 0.4
