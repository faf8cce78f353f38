"""Loops of one's own: what people put around a step, each beside the plain run, and the example."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from ppsf_dist import ProdigyPlusScheduleFree, averaged
from tests.bootstrap.launchers import ROOT

EXAMPLE = ROOT / "examples" / "plain_loop.py"
STEPS = 6


class Net(nn.Module):
    """Two layers and a head that is the embedding."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(48, 40)
        self.inner = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 40))
        self.head = nn.Linear(40, 48, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.saves_memory = False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        inner: Tensor = checkpoint(self.inner, x, use_reentrant=False) if self.saves_memory else self.inner(x)
        logits: Tensor = self.head(x + inner)
        return logits


def loss_of(model: Any, step: int, share: slice = slice(None)) -> Tensor:
    tokens = torch.randint(0, 48, (16,), generator=torch.Generator().manual_seed(step))[share]
    return nn.functional.cross_entropy(model(tokens), (tokens * 5 + 7) % 48)


def run(
    model: nn.Module,
    backward: Callable[[nn.Module, int], None] = lambda model, step: loss_of(model, step).backward(),
    after: Callable[[Any], None] = lambda optimizer: None,
) -> tuple[list[float], list[Tensor]]:
    optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=1e-3)
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        after(optimizer)
    return optimizer.get_d(), [p.detach().clone() for p in model.parameters()]


def same(one: tuple[list[float], list[Tensor]], other: tuple[list[float], list[Tensor]], rtol: float) -> None:
    assert one[0] == pytest.approx(other[0], rel=rtol)
    for p, q in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol)


def test_gradient_checkpointing_and_accumulation_change_nothing() -> None:
    plain, saving = run(Net()), Net()
    saving.saves_memory = True
    same(run(saving), plain, 1e-6)

    def in_two(model: nn.Module, step: int) -> None:
        for half in (slice(0, 8), slice(8, 16)):
            (loss_of(model, step, half) / 2).backward()

    same(run(Net(), in_two), plain, 1e-4)


def test_a_compiled_model_and_a_compiled_training_step_change_nothing() -> None:
    plain = run(Net())
    model = Net()
    compiled: Any = torch.compile(model, backend="aot_eager")
    same(run(model, lambda _, step: loss_of(compiled, step).backward()), plain, 1e-5)
    model = Net()
    optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=1e-3)

    @torch.compile(backend="aot_eager")
    def train(tokens: Tensor) -> None:
        nn.functional.cross_entropy(model(tokens), (tokens * 5 + 7) % 48).backward()
        optimizer.step()
        optimizer.zero_grad()

    for step in range(STEPS):
        train(torch.randint(0, 48, (16,), generator=torch.Generator().manual_seed(step)))
    same((optimizer.get_d(), [p.detach() for p in model.parameters()]), plain, 1e-5)


def test_under_autocast_weights_state_and_d_stay_in_fp32() -> None:
    def backward(model: nn.Module, step: int) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_of(model, step).backward()

    seen: list[Any] = []
    d, weights = run(Net(), backward, seen.append)
    assert d[0] > 1e-3 and {w.dtype for w in weights} == {torch.float32}
    assert all(entries["z"].dtype == torch.float32 for entries in seen[-1].state.values())
    same((d, weights), run(Net()), 0.05)


def test_tied_weights_are_stepped_once() -> None:
    tied = Net()
    seen: list[Any] = []
    run(tied, after=seen.append)
    assert tied.head.weight is tied.embed.weight and len(seen[-1].state) == 5
    apart = Net(tied=False)
    assert sum(p.numel() for p in apart.parameters()) > sum(p.numel() for p in tied.parameters())


def test_an_average_of_ones_own_follows_the_training_weights_and_disturbs_nothing() -> None:
    """AveragedModel, as EMA or SWA; Schedule-Free's average is there without it."""
    model = Net()
    plain = run(Net())
    own = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    same(run(model, after=lambda _: own.update_parameters(model)), plain, 0)
    assert not torch.equal(next(own.module.parameters()), next(model.parameters()))


def test_a_schedule_that_comes_with_an_average_is_heard_of() -> None:
    """SWALR sets lr to its own 0.05."""
    model = Net()
    optimizer = ProdigyPlusScheduleFree(model.parameters())
    schedule = SWALR(optimizer, swa_lr=0.05, anneal_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            loss_of(model, step).backward()
            optimizer.step()
            schedule.step()
    assert [one for one in caught if "lr falls from 1 to 0.05" in str(one.message)]


def test_adapters_of_peft_are_trained_and_nothing_else() -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=48, hidden_size=40, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    # All parameters, as people give them; those that are frozen have no gradient and cost nothing.
    optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=1e-3)
    tokens = (torch.arange(64).view(8, 8) * 5 + 7) % 48
    losses = []
    for _ in range(30):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = {name for name, p in model.named_parameters() if p in optimizer.state}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad} and len(trained) == 6
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    with averaged(optimizer, model), torch.no_grad():
        at_average = model(input_ids=tokens, labels=tokens).loss.item()
        kept = copy.deepcopy(peft.get_peft_model_state_dict(model))
    assert at_average < losses[0]
    peft.set_peft_model_state_dict(model, kept)
    with torch.no_grad():
        assert model(input_ids=tokens, labels=tokens).loss.item() == at_average


@pytest.mark.launch
def test_the_example_runs_on_two_ranks_and_resumes_on_one(tmp_path: Path) -> None:
    """The whole stack: FSDP2, torch.compile, autocast, checkpointing, accumulation, tied weights."""
    for ranks, more in (("2", ()), ("1", ("--resume",))):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        words = [str(EXAMPLE), "--output", str(tmp_path), "--steps", "60", "--backend", "aot_eager", *more]
        done = subprocess.run([*launcher, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    found = re.search(r"loss of the averaged weights: (\S+)", done.stdout)
    assert found and float(found[1]) < 1.0
