"""torch's own tensor parallelism, with and without fully_shard, with sequence-parallel norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from ppsf_dist import ProdigyPlusScheduleFree, averaged
from tests.harness.layouts import gather
from tests.harness.models import D0
from tests.harness.pool import run

pytestmark = pytest.mark.dist


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(40), nn.Linear(40, 64), nn.Linear(64, 40)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.block, self.last = nn.Linear(12, 40), Block(), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        out: Tensor = self.last(hidden + self.block(hidden))
        return out


def place(model: Model, dp: int, tp: int, sequence_parallel: bool) -> None:
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    plan: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if sequence_parallel:
        plan = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Replicate()),
        }
        wrapped = PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
        )
        parallelize_module(model.block, mesh["tp"], wrapped)
    parallelize_module(model.block, mesh["tp"], plan)
    if dp > 1:
        fully_shard(model.block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])


def script(dp: int, tp: int, sequence_parallel: bool = False, **switches: Any) -> dict[str, Any]:
    model = Model()
    if dp * tp > 1:
        place(model, dp, tp, sequence_parallel)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=D0, **switches)
    losses = []
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(4, 6, 12, generator=generator), torch.randn(4, 6, 3, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with averaged(optimizer, model), torch.no_grad():
        losses.append(float((model(x) - y).square().mean()))
    return {"losses": losses, "d": optimizer.get_d(), "weights": gather(dict(model.named_parameters()))}


@pytest.mark.parametrize("switches", [{}, {"use_speed": True}], ids=["default", "speed"])
@pytest.mark.parametrize(("dp", "tp", "sequence_parallel"), [(1, 2, False), (2, 2, False), (1, 2, True), (2, 2, True)])
def test_real_tensor_parallelism(dp: int, tp: int, sequence_parallel: bool, switches: dict[str, Any]) -> None:
    (expected,) = run(1, script, 1, 1, **switches)
    for of_rank in run(dp * tp, script, dp, tp, sequence_parallel, **switches):
        assert of_rank["d"] == pytest.approx(expected["d"], rel=1e-6)
        assert of_rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(of_rank["weights"][name], weight, rtol=1e-4, atol=1e-6)
    assert expected["d"][0] > D0


def on_equal_meshes() -> list[float]:
    """Parameters on meshes that compare equal and have different roots, as torch's caches of meshes leave them."""
    parameters = []
    for mesh in (init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))["tp"],
                 init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))):  # fmt: skip
        # nn.Parameter() would hit the cache, which has the first mesh for both.
        parameters.append(distribute_tensor(torch.ones(34, 40), mesh, [Shard(0)]).requires_grad_())
    first, second = parameters
    assert isinstance(first, DTensor) and isinstance(second, DTensor)
    assert first.device_mesh == second.device_mesh
    assert first.device_mesh._get_root_mesh() != second.device_mesh._get_root_mesh()
    optimizer = ProdigyPlusScheduleFree(parameters, d0=D0)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return optimizer.get_d()


def test_equal_meshes_may_have_different_roots() -> None:
    first, second = run(2, on_equal_meshes)
    assert first == second
