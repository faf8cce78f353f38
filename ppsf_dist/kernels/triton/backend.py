"""The passes in Triton: the same formulas as in ``kernels/eager``, over all shards at once, without a host wait."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
from torch import Tensor

from ppsf_dist.kernels.codes import ADDRESSES, SUMS, Piece, Sum
from ppsf_dist.kernels.interface import Buffers, KnownGates
from ppsf_dist.kernels.memory import Memory, State
from ppsf_dist.kernels.pieces import LIKE_WEIGHTS, all_pieces
from ppsf_dist.kernels.triton import between, passes
from ppsf_dist.kernels.triton.cutting import Cut, Launch, cut, only_whole_matrices, vectors_of
from ppsf_dist.kernels.triton.launching import run
from ppsf_dist.kernels.triton.tables import ADDRESS_COLUMNS, Columns, MomentsOnDevice, On, Plan, Rows, Sizes
from ppsf_dist.methods.sums import Stat
from ppsf_dist.methods.switches import Switches
from ppsf_dist.sharding import Shard
from ppsf_dist.state.moments import FactoredMoments
from ppsf_dist.state.writes import Writes

BLOCK = 1024
"""Numbers of a program between the passes."""
TASKS_AT_ONCE = 256
SUMS_AT_ONCE = {"few": (8, 256), "many": (64, 64)}
"""Sums along lines: tiles and columns, of matrices that are so few high or more."""
VECTOR_AT_ONCE = 128
OF_16_BYTES = 16

OF_PASS_1 = (Sum.LARGEST_SQUARE, Sum.DOT, Sum.S_L1, Sum.DELTA_L1, Sum.DELTA_SQUARE, Sum.EARLY_MASK, Sum.GG)


class TritonKernels:
    """Implements ``ppsf_dist.kernels.interface.Kernels`` for what ``pieces.why_not`` has nothing against."""

    def prepare(
        self,
        shards: Sequence[Shard],
        slots: Sequence[int],
        switches: Sequence[Switches],
        moments: FactoredMoments,
        state: State,
        buffers: Buffers,
    ) -> TritonPasses:
        return TritonPasses(shards, slots, switches, moments, state, buffers)


class TritonPasses:
    """Implements ``ppsf_dist.kernels.interface.Passes``.

    Tensors that kernels read live as long as this and are written in place, so that a captured graph finds them.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        slots: Sequence[int],
        switches: Sequence[Switches],
        moments: FactoredMoments,
        state: State,
        buffers: Buffers,
    ) -> None:
        self._buffers, self._device = buffers, buffers.sums.device
        self._memory = Memory(shards, switches, state)
        pieces = all_pieces(shards, slots, switches, moments, state)
        boxes = only_whole_matrices(pieces)
        self._cut = cut(pieces)
        self._rows = Rows.of(buffers.coefficients.names)
        self._plan = self._tables(pieces, len(shards))
        self._columns = [self._sums_along_lines(columns) for columns in self._cut.columns]
        vectors, rows, lengths = vectors_of(boxes, shards, slots, moments)
        self._vectors = (*self._blocks(lengths, VECTOR_AT_ONCE, vectors), self._ints(rows))
        self._of_slot = self._tasks_of_slots(self._cut)
        self._moments = _Moments(moments, buffers, self._plan, self._rows)
        self._bound = array("q")

    def _ints(self, rows: Sequence[Any]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._device)

    def _tables(self, pieces: Sequence[Piece], shards: int) -> Plan:
        buffers, tasks = self._buffers, self._cut.tasks
        stats = buffers.stats
        sizes = Sizes(buffers.coefficients.table.shape[1], len(tasks), stats.shape[1], int(Stat.LARGEST_SQUARE))
        as_bytes = b"".join(bytes(piece) for piece in pieces)
        device = self._device
        return Plan(
            pieces=self._ints(array("q", as_bytes)),
            tasks=self._ints(tasks).view(-1),
            addresses=torch.zeros(shards * len(ADDRESS_COLUMNS), dtype=torch.int64, device=device),
            sizes=self._ints(sizes),
            coefficients=buffers.coefficients.table,
            scales=buffers.scales,
            factors=buffers.factors,
            keys=buffers.keys,
            sums=buffers.sums,
            moments_gate=buffers.gates.moments.view(torch.uint8),
            weights_gate=buffers.gates.weights.view(torch.uint8),
            partial=torch.empty(self._cut.partial, device=device),
            results=torch.zeros(SUMS * len(tasks), dtype=torch.float64, device=device),
            done=torch.zeros(len(tasks), dtype=torch.uint8, device=device),
        )

    def _blocks(self, lengths: Sequence[int], block: int, rows: Sequence[Any]) -> tuple[Tensor, Tensor, int]:
        """A table of vectors, and of programs that take ``block`` of one each: which vector, and from where on."""
        programs = [(index, start) for index, n in enumerate(lengths) for start in range(0, n, block)]
        return self._ints(rows), self._ints(programs), len(programs)

    def _sums_along_lines(self, columns: Sequence[Columns]) -> list[tuple[Tensor, Tensor, int, tuple[int, int]]]:
        """Of a round: the tables of one launch for those of few tiles, and of one for the others."""
        few, _ = SUMS_AT_ONCE["few"]
        parts = {
            "few": [column for column in columns if column.tiles <= few],
            "many": [column for column in columns if column.tiles > few],
        }
        return [
            (*self._blocks([column.n for column in part], SUMS_AT_ONCE[name][1], part), SUMS_AT_ONCE[name])
            for name, part in parts.items()
        ]

    def _tasks_of_slots(self, of: Cut) -> tuple[Tensor, Tensor, Tensor, int]:
        """The parameters that have tasks, where those of each begin in the order of tasks, and that order."""
        order = sorted(range(len(of.tasks)), key=lambda task: (of.slots[task], task))
        counts = sorted(Counter(of.slots).items())
        firsts = [0, *accumulate(count for _, count in counts)]
        return self._ints([slot for slot, _ in counts]), self._ints(firsts), self._ints(order), len(counts)

    @property
    def kept(self) -> int:
        plan = self._plan
        own = [plan.pieces, plan.tasks, plan.addresses, plan.partial, plan.results, plan.done]
        own += [packed for packed in self._memory.packed if packed is not None]
        return sum(tensor.nbytes for tensor in own)

    def fits(self, weights: Sequence[Tensor]) -> bool:
        return all(map(Tensor.is_contiguous, weights))

    def bind(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        self._memory.bind(weights, gradients)
        if self._memory.table != self._bound:
            self._bound = self._memory.table[:]
            host = torch.frombuffer(self._with_alignment(), dtype=torch.int64)
            if self._device.type == "cuda":
                # A new one each time: the allocator of pinned memory waits with its next owner until it has arrived.
                host = host.pin_memory()
            self._plan.addresses.copy_(host, non_blocking=True)
        self._plan.done.zero_()
        if self._memory.z_was_written():
            self._launch_where(passes.pack, lambda on: on.statistics and on.schedulefree)

    def _with_alignment(self) -> array[int]:
        """The addresses, and whether 16 bytes divide all of a shard's that its elements are read at."""
        table, width = self._memory.table, len(ADDRESSES)
        columns = [table[ADDRESSES.index(name) :: width] for name in ("weights", "gradient", *LIKE_WEIGHTS)]
        found = array("q", bytes(8 * len(ADDRESS_COLUMNS) * len(columns[0])))
        for column in range(width):
            found[column :: len(ADDRESS_COLUMNS)] = table[column::width]
        aligned = [int(not (a | b | c | d | e) % OF_16_BYTES) for a, b, c, d, e in zip(*columns, strict=True)]
        found[width :: len(ADDRESS_COLUMNS)] = array("q", aligned)
        return found

    def release(self) -> None:
        self._memory.release()

    def _launch(self, kernel: Any, launch: Launch) -> None:
        variant = launch.variant
        warps, registers = variant.launched(kernel.__name__)
        limits = {} if torch.version.hip is not None else {"maxnreg": registers}
        run(
            kernel, launch.tasks, self._plan, launch.first, ON=variant.on, ROWS=self._rows, AXES=variant.axes,
            BM=variant.tile.lines, BN=variant.tile.along, BS=variant.tile.along // variant.apart, SHORT=variant.short,
            num_warps=warps, **limits,
        )  # fmt: skip

    def _launch_where(self, kernel: Any, asks: Callable[[On], bool]) -> int:
        """Launch a kernel for the variants that ask for it; how many do."""
        launches = [launch for launch in self._cut.launches if asks(launch.variant.on)]
        for launch in launches:
            self._launch(kernel, launch)
        return len(launches)

    def pass_1(self, *, goes_on: bool) -> None:
        plan = self._plan
        for launches, sums in zip(self._cut.rounds, self._columns, strict=True):
            for launch in launches:
                self._launch(passes.pass_1, launch)
            for columns, blocks, programs, (tiles, at_once) in sums:
                run(between.add_columns, programs, plan, columns, blocks, BT=tiles, BN=at_once)
        vectors, blocks, programs, boxes = self._vectors
        run(between.add_vectors, programs, plan, vectors, boxes, blocks, BLOCK=VECTOR_AT_ONCE)
        self._add_results(self._buffers.stats, OF_PASS_1)

    def _add_results(self, table: Tensor, sums: tuple[Sum, ...]) -> None:
        slots, firsts, order, count = self._of_slot
        of = tuple(int(sum_) for sum_ in sums)
        run(
            between.add_results, count * len(of), self._plan, table, slots, firsts, order, SUMS=of, COUNT=len(of),
            BT=TASKS_AT_ONCE,
        )  # fmt: skip

    def update_moments(self) -> None:
        self._moments.update()

    def fill_factors(self) -> None:
        self._moments.fill_factors()

    def pass_2(self) -> None:
        launches = [
            launch for launch in self._cut.launches if launch.variant.on.needs_norms and launch.variant.on.owned
        ]
        for launch in launches:
            self._launch(passes.pass_2, launch)
        if launches:
            self._add_results(self._buffers.stats, (Sum.UU,))

    def count_masks(self) -> None:
        assert self._buffers.masks is not None
        if self._launch_where(passes.count_masks, lambda on: on.cautious and on.schedulefree and on.owned):
            self._add_results(self._buffers.masks, (Sum.LATE_MASK,))

    def write_moments(self, writes: Writes) -> None:
        self._moments.write()

    def pass_3(self, known: KnownGates | None, writes: Writes) -> None:
        # Called again, it writes what is not done.
        self._launch_where(passes.pass_3, lambda on: True)
        # As torch's own writes do: autograd refuses a backward pass through weights that are no longer there.
        torch.autograd.graph.increment_version(self._memory.weights)


class _Moments:
    """The factored moments between the passes.

    Args:
        moments, buffers: of the plan.
        plan: what kernels read.
        rows: where the coefficients stand.
    """

    def __init__(self, moments: FactoredMoments, buffers: Buffers, plan: Plan, rows: Rows) -> None:
        self._count, self._buffers, self._plan, self._rows = len(moments), buffers, plan, rows
        self._moments = moments
        # What ADOPT divides by is made apart, if there is any.
        divides = buffers.new_moments if buffers.adopt is None else torch.empty_like(buffers.new_moments)
        nothing = torch.zeros(1, dtype=torch.uint8, device=moments.values.device)
        self._tables = MomentsOnDevice(
            kept=moments.values,
            of_factors=divides,
            slot_of=moments.slot_of,
            inverse_n=moments.inverse_n,
            in_bf16=nothing if moments.in_bf16 is None else moments.in_bf16.view(torch.uint8),
            rows=moments.rows,
            own_mean=moments.own_mean.view(torch.uint8),
            cell_of=moments.cell_of,
            ordered=moments.ordered,
        )
        self._cells = len(moments.lengths)
        self._starts = torch.nn.functional.pad(moments.lengths.cumsum(0), (1, 0))
        self._means = torch.empty(self._cells, device=moments.values.device)

    def update(self) -> None:
        run(
            between.update_moments, triton.cdiv(self._count, BLOCK), self._plan, self._tables,
            self._buffers.new_moments, self._count, ROWS=self._rows, BLOCK=BLOCK,
            ANY_BF16=self._moments.in_bf16 is not None,
        )  # fmt: skip

    def fill_factors(self) -> None:
        buffers, tables, rows = self._buffers, self._tables, len(self._moments.rows)
        if buffers.adopt is not None and self._count:
            waits = buffers.adopt[self._moments.slot_of]
            torch.where(waits, self._moments.values, buffers.new_moments, out=tables.of_factors)
        run(between.fill_roots, triton.cdiv(self._count, BLOCK), self._plan, tables, self._count, BLOCK=BLOCK)
        run(between.average_cells, self._cells, tables, self._means, self._starts, BLOCK=BLOCK)
        run(
            between.scale_rows, triton.cdiv(rows, BLOCK), self._plan, tables, self._means, rows, BLOCK=BLOCK,
            ANY_CELLS=self._cells > 0,
        )  # fmt: skip

    def write(self) -> None:
        run(
            between.write_moments, triton.cdiv(self._count, BLOCK), self._plan, self._tables,
            self._buffers.new_moments, self._count, BLOCK=BLOCK,
        )  # fmt: skip
