"""How an optimizer is built, and what is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import (  # noqa: E402
    OptimizerErrorEnum,
)

from ppsf_dist import ProdigyPlusScheduleFree
from tests.test_state import same
from tests.torch_suite.problem import INFO, INPUTS, Given, build, build_given, error_inputs, every_input


@pytest.mark.parametrize("index", range(len(error_inputs("cpu", torch.float32))))
def test_errors(index: int) -> None:
    error = INFO.optim_error_inputs_func("cpu", torch.float32)[index]
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = error.optimizer_error_input
    params = given.params or [nn.Parameter(torch.randn(1))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if issubclass(error.error_type, Warning):
            warnings.simplefilter("error", error.error_type)
        with pytest.raises(error.error_type, match=error.error_regex):
            ProdigyPlusScheduleFree(params, **given.kwargs)


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
        ProdigyPlusScheduleFree([])


def test_optim_infos_do_not_specify_global_cliquey_kwargs() -> None:
    assert not any({"foreach", "fused", "differentiable"} & given.kwargs.keys() for given in INPUTS)


@every_input
def test_optimizer_can_be_printed(given: Given) -> None:
    text = repr(build_given([nn.Parameter(torch.randn(2, 3))], given))
    assert text.startswith(f"{given.optimizer_class.__name__} (") and "lr:" in text
