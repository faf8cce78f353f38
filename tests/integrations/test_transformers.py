"""Hugging Face Trainer, the real one: it saves and evaluates the average, logs d, and resumes exactly."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from ppsf_dist import Prodigy, ProdigyPlusScheduleFree
from ppsf_dist.integrations.modes import step_sizes
from ppsf_dist.integrations.transformers import attach
from tests.bootstrap.launchers import ROOT

EXAMPLE = ROOT / "examples" / "hf_trainer.py"
D0 = 1e-3
"""So that weights move in a few steps."""


def rows(count: int = 32) -> list[dict[str, Tensor]]:
    made = [(torch.arange(8) * (1 + i % 3) + i) % 16 for i in range(count)]
    return [{"input_ids": row, "labels": row} for row in made]


def trainer(output: Path, *callbacks: Any, optimizer: Any = None, attached: bool = True, **arguments: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, use_cache=False
    )
    given: dict[str, Any] = {
        "output_dir": str(output), "max_steps": 6, "per_device_train_batch_size": 4, "use_cpu": True,
        "lr_scheduler_type": "constant", "max_grad_norm": 0, "report_to": "none", "disable_tqdm": True,
        "logging_steps": 1, "save_strategy": "no", "seed": 1,
    }  # fmt: skip
    made = Trainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(**given | arguments),
        train_dataset=rows(),
        eval_dataset=rows(8),
        optimizer_cls_and_kwargs=optimizer or (ProdigyPlusScheduleFree, {"d0": D0}),
        callbacks=list(callbacks),
    )
    if attached:
        attach(made)
    return made


def train(made: Any, **how: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        made.train(**how)
    return made


def saved_weights(folder: Path) -> dict[str, Tensor]:
    return dict(LlamaForCausalLM.from_pretrained(folder).named_parameters())


def average_of(checkpoint: Path, made: Any) -> dict[str, Tensor]:
    """x, computed from the optimizer's file alone: y and z are there."""
    content = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    names = {id(p): name for name, p in made.model.named_parameters()}
    found: dict[str, Tensor] = {}
    for ours, group in zip(made.optimizer.param_groups, content["param_groups"], strict=True):
        beta1 = group["betas"][0]
        for p, number in zip(ours["params"], group["params"], strict=True):
            y, z = content["state"][number]["y"].view_as(p), content["state"][number]["z"].view_as(p)
            found[names[id(p)]] = y + (1 - 1 / beta1) * (z - y)
    return found


STRATEGIES: dict[str, dict[str, Any]] = {
    "saves alone": {"save_strategy": "steps", "save_steps": 2},
    "saves and evaluates": {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
    "saves between evaluations": {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3},
    "by epochs": {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1, "eval_strategy": "epoch"},
    "the best": {
        "save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "greater_is_better": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_saved_model_is_the_average(strategy: str, tmp_path: Path) -> None:
    made = train(trainer(tmp_path, **STRATEGIES[strategy]))
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        expected, found = average_of(checkpoint, made), saved_weights(checkpoint)
        for name, weights in expected.items():
            torch.testing.assert_close(found[name], weights, rtol=1e-5, atol=1e-6)


def test_what_is_evaluated_and_left_behind_is_the_average(tmp_path: Path) -> None:
    """The loss of an evaluation is that of the model that was saved with it; so is the model after training."""
    made = train(trainer(tmp_path, **STRATEGIES["saves and evaluates"]))
    logged = {log["step"]: log["eval_loss"] for log in made.state.log_history if "eval_loss" in log}
    assert set(logged) == {2, 4, 6}
    made.save_model(str(tmp_path / "last"))
    last = saved_weights(tmp_path / "last")
    for name, weights in saved_weights(tmp_path / "checkpoint-6").items():
        assert torch.equal(weights, last[name])
    for step, loss in logged.items():
        made.model.load_state_dict(LlamaForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}").state_dict())
        assert made.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)


def test_saving_and_evaluating_in_every_step_changes_nothing(tmp_path: Path) -> None:
    often: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    watched, plain = train(trainer(tmp_path / "a", **often)), train(trainer(tmp_path / "b"))
    assert watched.optimizer.optimizer.get_d() == plain.optimizer.optimizer.get_d()
    for p, q in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_run_that_is_resumed_is_the_run_that_never_stopped(evaluates: bool, tmp_path: Path) -> None:
    arguments: dict[str, Any] = STRATEGIES["saves and evaluates" if evaluates else "saves alone"]
    whole = train(trainer(tmp_path / "whole", **arguments))
    train(trainer(tmp_path / "parts", **arguments | {"max_steps": 4}))
    resumed = train(trainer(tmp_path / "parts", **arguments), resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert resumed.optimizer.optimizer.get_d() == whole.optimizer.optimizer.get_d()
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_d_stands_in_the_logs_beside_lr(tmp_path: Path) -> None:
    """In the history, and in TensorBoard's file; one number where both groups of Trainer have the same."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    optimizer = (ProdigyPlusScheduleFree, {"d0": D0, "split_groups": False})
    made = train(trainer(tmp_path, optimizer=optimizer, report_to="tensorboard"))
    logs = [log for log in made.state.log_history if "loss" in log]
    assert len(logs) == 6 and all(log["d"] == log["d_lr"] > log["d_effective_lr"] * 0.1 for log in logs)
    assert logs[-1]["d"] == made.optimizer.optimizer.get_d_estimate()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.value for event in events.Scalars("train/d")] == pytest.approx([log["d"] for log in logs], rel=1e-6)


def test_two_step_sizes_have_two_names() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2))]} for _ in range(2)]
    optimizer = ProdigyPlusScheduleFree(groups)
    optimizer.param_groups[1]["d"] = 0.5
    sizes = step_sizes(optimizer)
    assert (sizes["d_0"], sizes["d_1"], sizes["d_lr_1"]) == (1e-6, 0.5, 0.5) and "d" not in sizes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_scheduler_type": "linear"}, 'lr_scheduler_type="linear" of TrainingArguments multiplies'),
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 of TrainingArguments"),
    ],
)
def test_a_schedule_and_clipping_must_be_meant(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **arguments)
    attach(trainer(tmp_path, attached=False, **arguments), schedule=True, clip=True)


def test_another_optimizer_is_refused_before_the_first_step(tmp_path: Path) -> None:
    made = trainer(tmp_path, optimizer=(torch.optim.AdamW, {}))
    before = [p.detach().clone() for p in made.model.parameters()]
    with pytest.raises(TypeError, match="the optimizer that trains is a AdamW, none of ppsf_dist: give it one by"):
        train(made)
    assert all(torch.equal(p, q) for p, q in zip(made.model.parameters(), before, strict=True))


class SavesLate(TrainerCallback):
    """Asks for a save after everybody has looked."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step == 2


def test_a_save_that_comes_too_late_is_an_error_and_in_the_right_order_none(tmp_path: Path) -> None:
    late = trainer(tmp_path)
    late.add_callback(SavesLate())
    with pytest.raises(RuntimeError, match="checkpoint-2 holds the training weights y"):
        train(late)
    made = train(trainer(tmp_path, SavesLate()))
    expected = average_of(tmp_path / "checkpoint-2", made)
    for name, weights in saved_weights(tmp_path / "checkpoint-2").items():
        torch.testing.assert_close(weights, expected[name], rtol=1e-5, atol=1e-6)


def test_a_class_without_an_average_saves_what_it_trains(tmp_path: Path) -> None:
    made = trainer(tmp_path, optimizer=(Prodigy, {"d0": D0}), attached=False, lr_scheduler_type="cosine")
    attach(made, schedule=True)
    train(made)
    assert made.state.log_history[0]["d"] > 0


@pytest.mark.launch
def test_the_example_runs_on_one_rank_and_resumes_on_two(tmp_path: Path) -> None:
    """On two ranks, which see twice the data, the model that both evaluate is the same one."""
    words = [str(EXAMPLE), "--output", str(tmp_path)]
    alone = subprocess.run([sys.executable, *words, "--steps", "50"], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # A file for each rank: in a common pipe the lines of two ranks mix.
    logs = tmp_path / "logs"
    two += ["--log-dir", str(logs), "--redirects", "1"]
    both = subprocess.run([*two, *words, "--steps", "100", "--resume"], capture_output=True, text=True)
    assert both.returncode == 0, both.stderr
    losses = [re.findall(r"loss of the averaged weights: \S+", file.read_text()) for file in logs.rglob("stdout.log")]
    assert len(losses) == 2 and losses[0] == losses[1] and len(losses[0]) == 1
