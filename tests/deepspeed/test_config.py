"""What the config decides: the name of the optimizer, refusals, and clipping that nobody has asked for."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ppsf_dist import ProdigyPlusScheduleFree, averaged
from ppsf_dist.deepspeed import check_config
from tests.deepspeed.engines import (
    GivenGradients,
    config,
    deepspeed_on_cpu,
    feed,
    gradients_for,
    make_engine,
    make_groups,
)
from tests.deepspeed.references import SHAPES
from tests.harness.models import initial_weights
from tests.harness.pool import run

pytestmark = pytest.mark.deepspeed
OPTIMIZER = {"type": "ProdigyPlusScheduleFree", "params": {"betas": [0.9, 0.99]}}
CONFIGS = sorted((Path(__file__).parents[2] / "launch").glob("ds_config_zero*.json"))


def test_neither_package_brings_the_other_in() -> None:
    """Who has imported DeepSpeed for something else steps a plain optimizer without a trace of it."""
    code = """
import sys, torch
from ppsf_dist import ProdigyPlusScheduleFree, averaged
assert not [name for name in sys.modules if name.split(".")[0] == "deepspeed"]
import deepspeed
parameter = torch.nn.Parameter(torch.ones(3))
optimizer = ProdigyPlusScheduleFree([parameter])
parameter.grad = torch.ones(3)
optimizer.step()
with averaged(optimizer):
    pass
optimizer.load_state_dict(optimizer.state_dict())
assert not [name for name in sys.modules if name.startswith("ppsf_dist.deepspeed")]
assert not hasattr(torch.optim, "ProdigyPlusScheduleFree")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_name_stands_for_the_optimizer() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = getattr(torch.optim, OPTIMIZER["type"])([parameter], betas=[0.95, 0.99], d_coef=2.0)  # type: ignore[call-overload]
    assert type(optimizer) is ProdigyPlusScheduleFree
    assert optimizer.param_groups[0]["betas"] == (0.95, 0.99) and optimizer.param_groups[0]["d_coef"] == 2.0


@pytest.mark.parametrize("name", ["ProdigyPlusScheduleFree", "Prodigy"])
def test_the_learning_rate_of_another_optimizer_is_refused(name: str) -> None:
    """Trainer writes its own 5e-5 where a config says "auto", and nothing would train."""
    parameter = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="lr=5e-05 looks like .* Leave lr out of the config"):
        getattr(torch.optim, name)([parameter], lr=5e-5)
    with pytest.raises(ValueError, match="lr='auto' is out of range"):
        getattr(torch.optim, name)([parameter], lr="auto")
    assert getattr(torch.optim, name)([parameter], lr=0.5).param_groups[0]["lr"] == 0.5
    other = "AdamWScheduleFree"
    assert getattr(torch.optim, other)([parameter], lr=5e-5).param_groups[0]["lr"] == 5e-5


def names_what_cannot_run(name: str) -> str:
    engine_config = config(2) | {"optimizer": {"type": name, "params": {}}}
    with pytest.raises(ValueError) as error:
        make_engine(SHAPES, engine_config, named=True)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("AdamWScheduleFreeClosure", "calls step() without a closure: name AdamWScheduleFree"),
        ("RAdamScheduleFreeClosure", "calls step() without a closure: name RAdamScheduleFree"),
        ("SGDScheduleFreeClosure", "calls step() without a closure: name SGDScheduleFree"),
        ("ScheduleFreeWrapper", "name AdamWScheduleFree, SGDScheduleFree or ProdigyPlusScheduleFree"),
    ],
)
def test_classes_that_cannot_run_are_refused_by_name(name: str, way_out: str) -> None:
    (error,) = run(1, names_what_cannot_run, name)
    assert f"optimizer.type='{name}' of the DeepSpeed config cannot run" in error and error.endswith(way_out)


def test_arguments_that_there_are_not_are_named() -> None:
    with pytest.raises(ValueError, match=r"optimizer.params.adam_w_mode=True .* leave it out; there are lr, betas"):
        getattr(torch.optim, OPTIMIZER["type"])([torch.nn.Parameter(torch.ones(3))], adam_w_mode=True)  # type: ignore[call-overload]


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": settings}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ratio": (zero(stage=3, offload_optimizer={"device": "cpu", "ratio": 0.5}), "offload_optimizer.ratio=0.5"),
    "super_offload": (zero(stage=3, offload_optimizer={"device": "cpu", "super_offload": True}), "super_offload=true"),
    "zenflow": (zero(stage=2, zenflow={"topk_ratio": 0.1}), "zero_optimization.zenflow"),
    "nvme": (zero(stage=3, offload_optimizer={"device": "nvme", "nvme_path": "/nvme"}), 'device="nvme"'),
    "elastic": (zero(stage=1, elastic_checkpoint=True), "elastic_checkpoint=true"),
    "universal": (
        {**zero(stage=2, round_robin_gradients=True), "checkpoint": {"load_universal": True}},
        "round_robin_gradients=true",
    ),
    "fp16_without_zero": ({"fp16": {"enabled": True}}, "fp16.enabled=true"),
    "fused_back_pass": ({"optimizer": {"params": {"fused_back_pass": True}}}, "fused_back_pass=true"),
    "tensor_parallel": ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(case: str, tmp_path: Path) -> None:
    settings, named = REFUSED[case]
    settings = {**settings, "gradient_clipping": 0.0}
    with pytest.raises(ValueError, match=named):
        check_config(settings)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=named):
        check_config(file)


def test_without_averages_weights_may_lie_on_disk() -> None:
    settings = {**REFUSED["nvme"][0], "gradient_clipping": 0.0}
    check_config({**settings, "optimizer": {"params": {"use_schedulefree": False}}})
    check_config(settings, averages=False)


def refused_by_initialize() -> str:
    """DeepSpeed itself would stop at an assertion about its own optimizer, which names no setting."""
    deepspeed = deepspeed_on_cpu()
    settings = {**config(3), "optimizer": OPTIMIZER}
    settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "ratio": 0.5}
    with pytest.raises(ValueError) as error:
        deepspeed.initialize(model=GivenGradients(initial_weights(SHAPES)), config=settings)
    return str(error.value)


def test_initialize_refuses_before_anything_is_built() -> None:
    (message,) = run(1, refused_by_initialize)
    assert "offload_optimizer.ratio=0.5" in message and "set it to 1.0" in message


def refused_at_every_first_step(stage: int) -> list[str]:
    """The messages of engines that cannot work, each with another call before its first step."""
    deepspeed = deepspeed_on_cpu()
    gradients = next(gradients_for(SHAPES, 1, torch.float32))
    bad = {**config(stage), "checkpoint": {"load_universal": True}}
    bad["zero_optimization"]["round_robin_gradients"] = True

    def evaluate(optimizer: ProdigyPlusScheduleFree) -> None:
        with averaged(optimizer):
            pass

    def switch(optimizer: ProdigyPlusScheduleFree) -> None:
        optimizer.eval()
        optimizer.train()

    def serve_another_engine(optimizer: ProdigyPlusScheduleFree) -> None:
        """At stage 0 nothing about the optimizer changes when an engine takes it over."""
        other = GivenGradients(initial_weights(SHAPES))
        engine, *_ = deepspeed.initialize(model=other, optimizer=optimizer, config=config(0))
        optimizer.zero_grad()
        engine.step()

    first = ProdigyPlusScheduleFree.state_dict, ProdigyPlusScheduleFree.get_d, evaluate, switch
    messages = []
    for call in (lambda _: None, *first, *([serve_another_engine] if stage == 0 else [])):
        model = GivenGradients(initial_weights(SHAPES))
        optimizer = ProdigyPlusScheduleFree(make_groups(model, 2))
        if call is serve_another_engine:
            call(optimizer)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=bad)
        if call is not serve_another_engine:
            call(optimizer)
        groups = list(optimizer.param_groups)
        # With ZeRO an engine does not outlive an exception in a step: DeepSpeed leaves half of param_groups hidden.
        for _ in range(1 if stage else 2):
            weights = [p.detach().clone() for p in model.parameters()]
            state = [{n: v for n, v in group.items() if n != "params"} for group in groups], dict(optimizer.state)
            with pytest.raises(ValueError) as error:
                feed(engine, gradients)
            messages.append(str(error.value))
            assert all(torch.equal(p, old) for p, old in zip(model.parameters(), weights, strict=True))
            assert state == (
                [{n: v for n, v in group.items() if n != "params"} for group in groups],
                {p: entries for p, entries in optimizer.state.items() if entries},
            )
    return messages


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_optimizer_of_ones_own_refuses_at_its_first_step_whatever_was_called_before(stage: int) -> None:
    (messages,) = run(1, refused_at_every_first_step, stage)
    assert len(messages) == (5 if stage else 12)
    assert all("round_robin_gradients=true" in message for message in messages)


def refused_in_the_backward_pass() -> str:
    """Hooks that step parameters before the engine has reduced their gradients."""
    deepspeed = deepspeed_on_cpu()
    model = GivenGradients(initial_weights(SHAPES))
    optimizer = ProdigyPlusScheduleFree(make_groups(model, 1), fused_back_pass=True)
    for param in optimizer.param_groups[0]["params"]:
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(optimizer.step_param)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(0))
    with pytest.raises(ValueError) as error:
        feed(engine, next(gradients_for(SHAPES, 1, torch.float32)))
    assert all(torch.equal(p, initial_weights(SHAPES)[n]) for n, p in model.named_parameters() if p.requires_grad)
    return str(error.value)


def test_steps_in_the_backward_pass_are_refused_before_the_first() -> None:
    (message,) = run(1, refused_in_the_backward_pass)
    assert "fused_back_pass=true" in message and "leave it out" in message


def refused_with_stages(named: bool) -> str:
    """A pipeline of one stage: what DeepSpeed would build of more."""
    deepspeed = deepspeed_on_cpu()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    model = deepspeed.pipe.PipelineModule([torch.nn.Linear(3, 3)], num_stages=1, loss_fn=torch.nn.MSELoss())
    settings = {**config(0), **({"optimizer": OPTIMIZER} if named else {})}
    optimizer = None if named else ProdigyPlusScheduleFree(model.parameters())
    with pytest.raises(NotImplementedError) as error:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        engine.train_batch(iter([(torch.ones(1, 3), torch.ones(1, 3))]))
    return str(error.value)


@pytest.mark.parametrize("named", [True, False])
def test_pipeline_stages_are_refused(named: bool) -> None:
    (message,) = run(1, refused_with_stages, named)
    assert "PipelineModule" in message and "process_group=" in message


def warnings_of_a_run(settings: dict[str, Any], named: bool) -> list[str]:
    """All warnings about clipping of two steps and an evaluation."""
    deepspeed = deepspeed_on_cpu()
    model = GivenGradients(initial_weights(SHAPES))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if named:
            engine, *_ = deepspeed.initialize(model=model, config={**settings, "optimizer": OPTIMIZER})
        else:
            optimizer = ProdigyPlusScheduleFree(make_groups(model, 2))
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        for gradients in gradients_for(SHAPES, 2, torch.float32):
            feed(engine, gradients)
    engine.destroy()
    return [str(warning.message) for warning in caught if "gradient_clipping" in str(warning.message)]


@pytest.mark.parametrize("stage,named", [(0, True), (0, False), (1, True), (1, False), (3, True), (3, False)])
def test_clipping_that_nobody_chose_is_warned_of_once(stage: int, named: bool) -> None:
    settings = config(stage)
    del settings["gradient_clipping"]
    ((message,),) = run(1, warnings_of_a_run, settings, named)
    assert '"gradient_clipping": 0.0' in message
    for chosen in (0.0, 1.0):
        assert run(1, warnings_of_a_run, settings | {"gradient_clipping": chosen}, named) == [[]]


@pytest.mark.parametrize("file", CONFIGS, ids=[file.stem for file in CONFIGS])
def test_the_configs_for_launching(file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_config(file)
    settings = json.loads(file.read_text())
    assert settings["zero_optimization"]["stage"] == int(file.stem[-1])
    assert settings["optimizer"]["type"] == OPTIMIZER["type"]


def test_there_is_a_config_for_every_stage() -> None:
    assert [file.name for file in CONFIGS] == [f"ds_config_zero{stage}.json" for stage in (1, 2, 3)]
