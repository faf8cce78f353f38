"""The numbers of an optimizer's groups, kept as fp64 vectors on the device.

A step never waits for the host: what depends on d, k or a norm is computed from here, in a handful of vector operations
over groups (``ppsf_dist.methods.base.StepNumbers``). The plain numbers in ``param_groups`` are copies for people
and loggers.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ppsf_dist.engine.host import HostAccess, PendingCopy
from ppsf_dist.methods.base import Group, Method

News = list[dict[str, float]]
"""The numbers of each group after a step, by name."""

logger = logging.getLogger(__name__)

OF_THE_STEP = ("gradient_norm", "update_norm", "cause", "failures")
"""Numbers of a group that stay on the device and its copies: norms of the last step, why the last void step changed
nothing, and how many steps failed on some rank."""


class GroupNumbers:
    """The adaptive numbers of all groups as one tensor on the device, and their copies in ``param_groups``.

    Args:
        method: what the numbers are.
        groups: as they start.
        host: what the host may read when.

    Attributes:
        rows: names of the rows of the table: the ``adaptive`` numbers of the method, and ``OF_THE_STEP``.
        values: the table, rows by groups.
        heard, told: those of the first group as the host last heard of them after a step, and as observers were told.
    """

    def __init__(self, method: Method, groups: Sequence[Group], host: HostAccess) -> None:
        self._method, self._host = method, host
        self.adaptive = tuple(method.numbers)
        self.rows = (*self.adaptive, *OF_THE_STEP)
        self.published = [self._row(group) for group in groups]
        rows = [[*row, *[0.0] * len(OF_THE_STEP)] for row in self.published]
        self.values = host.upload(rows).t().contiguous()
        self._hyper_rows: list[tuple[float, ...]] = []
        self.hyper_table = torch.empty(0)
        self._hyper: dict[str, Tensor] = {}
        self._in_flight: deque[PendingCopy] = deque()
        self.heard = self.told = dict(zip(self.rows, rows[0], strict=True))

    def _row(self, group: Group) -> list[float]:
        return [float(group[name] or 0.0) for name in self._method.numbers]

    def __getitem__(self, name: str) -> Tensor:
        return self.values[self.rows.index(name)]

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
                    _name_unsound(self.rows[index], now, column)
            self.published[column] = row

    def hyper(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """The groups' arguments as vectors over groups; copied to the device only when one has changed."""
        names = self._method.hyper
        rows = [self._hyper_row(group) for group in groups]
        if rows != self._hyper_rows:
            for index, (row, before) in enumerate(zip(rows, self._hyper_rows or rows, strict=True)):
                for name, value, old in zip(names, row, before, strict=True):
                    if repr(value) != repr(old) or not self._hyper_rows:
                        _name_unsound(name, value, index)
            table = self._host.upload(rows).t().contiguous()
            # In place, as all that a captured graph would read.
            if self._hyper_rows:
                self.hyper_table.copy_(table)
            else:
                self.hyper_table = table
                self._hyper = dict(zip(names, table.unbind(), strict=True))
            self._hyper_rows = rows
        for column, group in enumerate(groups):
            if isinstance(group["lr"], Tensor):
                self.hyper_table[names.index("lr"), column].copy_(group["lr"].detach().squeeze(), non_blocking=True)
        return self._hyper

    def _hyper_row(self, group: Group) -> tuple[float, ...]:
        """0 for a learning rate that is a tensor, which only the device reads."""
        return self._method.hyper_row({**group, "lr": 0.0} if isinstance(group["lr"], Tensor) else group)

    def end_step(self, groups: Sequence[Group]) -> list[News]:
        """Begin to copy the numbers after a step to the host, and write those that have arrived into ``param_groups``.

        Nothing waits: an accelerator's groups show the numbers of an earlier step.

        Returns:
            The numbers of each step that has arrived and was not told of before, in order.
        """
        if self.values.is_meta or self._host.captures:
            return []
        if self._host.free:
            return [self._write(groups, self.values.tolist())]
        news = self._arrived(groups, wait=False)
        self._in_flight.append(self._host.start_copy(self.values))
        return news

    def publish(self, groups: Sequence[Group]) -> list[News]:
        """Write the numbers as they are now into ``param_groups``, waiting for the device if need be.

        Returns:
            As ``end_step``.
        """
        if self.values.is_meta:
            return []
        news = self._arrived(groups, wait=True)
        self._write(groups, self.values.tolist())
        return news

    def _arrived(self, groups: Sequence[Group], *, wait: bool) -> list[News]:
        news = []
        while self._in_flight:
            arrived = self._in_flight[0].take(wait=wait)
            if arrived is None:
                break
            self._in_flight.popleft()
            news.append(self._write(groups, arrived.numpy().tolist()))
        return news

    def _write(self, groups: Sequence[Group], table: list[list[float]]) -> News:
        news = [dict(zip(self.rows, column, strict=True)) for column in zip(*table, strict=True)]
        for column, (group, numbers) in enumerate(zip(groups, news, strict=True)):
            for name in self.adaptive:
                group[name] = self._method.plain_number(name, numbers[name])
            self.published[column] = self._row(group)
        return news


def _name_unsound(name: str, value: float, group: int) -> None:
    """Say which number is not finite, when it becomes so."""
    if not math.isfinite(value):
        logger.warning(
            "%s=%s in parameter group %d: steps change nothing until it is a finite number", name, value, group
        )
