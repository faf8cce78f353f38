"""The numbers of a step that belong to a group or a parameter, kept as fp64 vectors on the device.

A step never waits for the host: everything that depends on d, k or a norm is computed here, in a handful of vector
operations over groups and parameters. The plain numbers in ``param_groups`` are copies for people and loggers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ppsf_dist.algorithm import averaging, second_moment, step_size
from ppsf_dist.algorithm.step_size import StepSize, StepSizeRule
from ppsf_dist.host import HostAccess, PendingCopy

logger = logging.getLogger(__name__)

Group = dict[str, Any]

GROUP_NUMBERS: dict[str, float] = {
    "d": 0.0,
    "d_prev": 0.0,
    "d_numerator": 0.0,
    "d_denom": 0.0,
    "prev_d_numerator": 0.0,
    "max_d_numerator": 0.0,
    "weight_sum": 0.0,
    "effective_lr": 1.0,
    "shared_d": 0.0,
    "k": 1.0,
    "skipped_steps": 0.0,
}
"""The adaptive numbers of a group and where they start (d at d0, effective_lr at lr)."""

VOID_NUMBERS = ("cause", "failures")
"""Numbers of a group that stay on the device and its copies: why the last void step changed nothing, and how many steps
failed on some rank."""

ROWS = (*GROUP_NUMBERS, *VOID_NUMBERS)
"""Of the table of all groups' numbers."""

PARAMETER_NUMBERS = ("step", "exp_avg_x0_dot", "max_x0_minus_l1_norm", "max_x0_minus_l2_norm")
"""Numbers of a parameter: how many updates it has had, and SPEED's memory."""

_HYPER = ("lr", "beta1", "beta2", "beta3", "weight_decay", "d0", "d_coef", "eps", "prodigy_steps", "schedulefree_c")
_HYPER_SWITCHES = ("d_limiter", "use_speed", "use_bias_correction", "use_schedulefree", "weight_decay_by_lr")


class Cause(IntEnum):
    """Why a step changes nothing. Some of them count as skipped."""

    NOTHING = 0
    NUMBER = 1
    """A number of a group is not finite."""
    WEIGHTS = 2
    """Weights or state are not finite."""
    GRADIENT = 3
    """A gradient is not finite, or its square is not in fp32."""
    FAILURE = 4
    """A rank could not step, or has another plan."""


def initial_numbers(group: Group) -> dict[str, Any]:
    """The adaptive numbers of a new group, as plain numbers."""
    return {
        **GROUP_NUMBERS,
        "d": float(group["d0"]),
        "d_prev": float(group["d0"]),
        "effective_lr": float(group["lr"]),
        "k": 1,
        "skipped_steps": 0,
        "shared_d": None,
    }


def _hyper_row(group: Group) -> tuple[float, ...]:
    """The arguments as numbers; 0 for a learning rate that is a tensor, which only the device reads."""
    beta1, beta2 = group["betas"]
    beta3 = beta2**0.5 if group["beta3"] is None else group["beta3"]
    numbers = {**group, "beta1": beta1, "beta2": beta2, "beta3": beta3, "eps": group["eps"] or 0.0}
    if isinstance(group["lr"], Tensor):
        numbers["lr"] = 0.0
    return tuple(float(numbers[name]) for name in _HYPER + _HYPER_SWITCHES)


class GroupNumbers:
    """The adaptive numbers of all groups as one tensor on the device, and their copies in ``param_groups``.

    Attributes:
        heard: those of the first group as the host last heard of them after a step.
    """

    def __init__(self, groups: Sequence[Group], host: HostAccess) -> None:
        self._host = host
        self.published = [self._row(group) for group in groups]
        rows = [[*row, *[0.0] * len(VOID_NUMBERS)] for row in self.published]
        self.values = host.upload(rows).t().contiguous()
        self._hyper_rows: list[tuple[float, ...]] = []
        self.hyper_table = torch.empty(0)
        self._in_flight: PendingCopy | None = None
        self.heard = dict(zip(ROWS, rows[0], strict=True))

    @staticmethod
    def _row(group: Group) -> list[float]:
        return [float(group[name] or 0.0) for name in GROUP_NUMBERS]

    def __getitem__(self, name: str) -> Tensor:
        return self.values[ROWS.index(name)]

    def absorb(self, groups: Sequence[Group]) -> None:
        """Take over what somebody wrote into ``param_groups`` since the last step (d, for instance)."""
        for column, group in enumerate(groups):
            row = self._row(group)
            if row == self.published[column]:
                continue
            for index, (now, before) in enumerate(zip(row, self.published[column], strict=True)):
                # NaN differs from itself, but that is no news.
                if now != before and not (math.isnan(now) and math.isnan(before)):
                    self.values[index, column] = now
                    _name_unsound(ROWS[index], now, column)
            self.published[column] = row

    def hyper(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """The groups' arguments as vectors over groups; copied to the device only when one has changed."""
        rows = [_hyper_row(group) for group in groups]
        if rows != self._hyper_rows:
            for index, (row, before) in enumerate(zip(rows, self._hyper_rows or rows, strict=True)):
                for name, value, old in zip(_HYPER, row, before, strict=False):
                    if repr(value) != repr(old) or not self._hyper_rows:
                        _name_unsound(name, value, index)
            self._hyper_rows, self.hyper_table = rows, self._host.upload(rows).t().contiguous()
        for column, group in enumerate(groups):
            if isinstance(group["lr"], Tensor):
                self.hyper_table[_HYPER.index("lr"), column].copy_(group["lr"].detach().squeeze(), non_blocking=True)
        return dict(zip(_HYPER + _HYPER_SWITCHES, self.hyper_table.unbind(), strict=True))

    def publish(self, groups: Sequence[Group], *, wait: bool) -> list[dict[str, float]] | None:
        """Copy the numbers into ``param_groups``.

        Args:
            groups: the groups to write to.
            wait: write this step's numbers, waiting for the device if need be. Without it an accelerator's groups
                show the numbers of an earlier step, and nothing waits.

        Returns:
            :data:`ROWS` of each group as they have arrived; None if they have not.
        """
        if self.values.is_meta:
            return None
        if wait or self._host.free:
            self._in_flight = None
            return self._write(groups, self.values.tolist())
        news = None
        if self._in_flight is not None:
            arrived = self._in_flight.take()
            if arrived is None:
                return None
            news = self._write(groups, arrived.numpy().tolist())
        self._in_flight = self._host.start_copy(self.values)
        return news

    def _write(self, groups: Sequence[Group], table: list[list[float]]) -> list[dict[str, float]]:
        news = [dict(zip(ROWS, column, strict=True)) for column in zip(*table, strict=True)]
        for column, (group, numbers) in enumerate(zip(groups, news, strict=True)):
            for name in GROUP_NUMBERS:
                value: float | int | None = numbers[name]
                if name in ("k", "skipped_steps"):
                    value = int(numbers[name])
                elif name == "shared_d" and value == 0:
                    value = None
                group[name] = value
            self.published[column] = self._row(group)
        return news


def _name_unsound(name: str, value: float, group: int) -> None:
    """Say which number is not finite, when it becomes so."""
    if not math.isfinite(value):
        logger.warning(
            "%s=%s in parameter group %d: steps change nothing until it is a finite number", name, value, group
        )


class StepNumbers:
    """The numbers of one step that belong to a group: what it starts with, and what its parts add up to.

    Attributes:
        totals: the sums of the parts so far, rows by groups: numerator, denominator, whether anything moved, and the
            :class:`Cause` of a part that changed nothing.
        unsound: how many groups have a number that is not finite.
    """

    def __init__(self, numbers: GroupNumbers, groups: Sequence[Group], seed: int) -> None:
        self._numbers, self._groups, self.seed = numbers, groups, seed
        h = self.hyper = numbers.hyper(groups)
        self.k, self.d = numbers["k"].clone(), numbers["d"].clone()
        shared = numbers["shared_d"]
        delta = torch.where(shared > 0, shared, self.d) * h["lr"]
        radam_beta2, rectification = second_moment.radam(self.k, h["beta2"])
        corrects = h["use_bias_correction"] > 0
        self.beta2 = torch.where(corrects, radam_beta2, h["beta2"])
        self.delta = torch.where(corrects, delta * rectification, delta)
        self.c, self.q, self._weight_sum = averaging.averaging_weight(
            self.delta, numbers["weight_sum"], h["beta1"], h["schedulefree_c"]
        )
        self.adapts = (h["prodigy_steps"] == 0) | (self.k < h["prodigy_steps"])
        self.totals = torch.zeros(4, len(groups), dtype=torch.float64, device=self.d.device)
        self.unsound = (~(numbers.hyper_table.isfinite().all(0) & self.d.isfinite())).sum()
        self._after: Tensor | None = None

    def commit(self) -> None:
        """The numbers after the step: d and the sums behind it, the averaging weight, k. Nothing if it was void.

        An exception leaves them as they were, or as they will be: call it again to bring it to its end.
        """
        if self._after is None:
            self._after = self._numbers_after()
        self._numbers.values.copy_(self._after)

    def _numbers_after(self) -> Tensor:
        numbers, h = self._numbers, self.hyper
        after = numbers.values.clone()
        _, _, moved, cause = self.totals
        moved, ok = moved > 0, (cause == Cause.NOTHING).all()

        def put(name: str, value: Tensor, where: Tensor) -> None:
            row = after[ROWS.index(name)]
            row.copy_(torch.where(where, value, row))

        pooled = not self._groups[0]["split_groups"]
        adapts = self.adapts[:1].expand_as(self.d) if pooled else self.adapts
        for name, value in vars(self._adapted(pooled)).items():
            put(name, value, adapts & ok)
        put("d_prev", self.d, adapts & ok)
        averages = h["use_schedulefree"] > 0
        put("weight_sum", self._weight_sum, moved & averages & ok)
        effective_lr = torch.where(averages, h["lr"] * self.q, h["lr"])
        put("effective_lr", effective_lr, (moved | ~averages) & ok)
        if self._groups[0]["split_groups"] and self._groups[0]["split_groups_mean"]:
            put("shared_d", step_size.harmonic_mean(after[ROWS.index("d")]).expand_as(self.d), ok)
        after[ROWS.index("k")].add_(ok)
        after[ROWS.index("skipped_steps")].add_((cause == Cause.GRADIENT) | (cause == Cause.NUMBER))
        after[ROWS.index("failures")].add_(cause == Cause.FAILURE)
        put("cause", cause, ~ok)
        return after

    def _adapted(self, pooled: bool) -> StepSize:
        """The step size after the step; with one for all groups, group 0's arguments and the sums of all."""
        numbers, h = self._numbers, self.hyper
        numerator, denominator = self.totals[0], self.totals[1]
        if pooled:
            numerator, denominator = (x.sum().expand_as(x) for x in (numerator, denominator))
        history = (numbers[n] for n in ("d_numerator", "d_denom", "prev_d_numerator", "max_d_numerator"))
        rule = StepSizeRule(
            beta3=h["beta3"],
            d0=h["d0"],
            d_coef=h["d_coef"],
            d_limiter=h["d_limiter"] > 0,
            use_speed=h["use_speed"] > 0,
            quirks=self._groups[0]["reference_quirks"],
        )
        new = step_size.adapted(StepSize(self.d, *history), numerator, denominator, rule)
        return StepSize(*(value[:1].expand_as(value) for value in vars(new).values())) if pooled else new
