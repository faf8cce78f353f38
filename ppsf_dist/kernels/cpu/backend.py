"""The passes in C++: the same formulas as in ``kernels/eager``, over all shards at once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ppsf_dist.kernels.codes import COEFFICIENTS, SUMS, Piece
from ppsf_dist.kernels.cpu.library import Library
from ppsf_dist.kernels.cpu.tables import Job, MomentsTable, Pass, PlanTable, Task
from ppsf_dist.kernels.cpu.threads import Crew
from ppsf_dist.kernels.interface import Buffers, KnownGates
from ppsf_dist.kernels.memory import Memory, State
from ppsf_dist.kernels.pieces import all_pieces
from ppsf_dist.methods.sums import Stat
from ppsf_dist.methods.switches import Switches
from ppsf_dist.sharding import Shard
from ppsf_dist.state.moments import FactoredMoments
from ppsf_dist.state.writes import Writes

IN_CACHE = 1 << 19
"""Elements of gradients that a core finds again in its cache, a megabyte or two."""


class NativeKernels:
    """Implements ``ppsf_dist.kernels.interface.Kernels`` for shards that ``pieces.why_not`` has nothing against.

    Args:
        library: the compiled passes.
    """

    def __init__(self, library: Library) -> None:
        self._library = library

    def prepare(
        self,
        shards: Sequence[Shard],
        slots: Sequence[int],
        switches: Sequence[Switches],
        moments: FactoredMoments,
        state: State,
        buffers: Buffers,
    ) -> NativePasses:
        pieces = all_pieces(shards, slots, switches, moments, state)
        return NativePasses(self._library, shards, switches, pieces, state, moments, buffers)


class NativePasses:
    """Implements ``ppsf_dist.kernels.interface.Passes``."""

    def __init__(
        self,
        library: Library,
        shards: Sequence[Shard],
        switches: Sequence[Switches],
        pieces: Sequence[Piece],
        state: State,
        moments: FactoredMoments,
        buffers: Buffers,
    ) -> None:
        self._library, self._buffers = library, buffers
        self._pieces = (Piece * len(pieces))(*pieces)
        self._tasks, partial = _cut(library, self._pieces)
        self._batches = _batches(self._tasks)
        self._stretches = _stretches(self._pieces, self._tasks)
        slots = {piece.slot for piece in pieces}
        # Whether nobody else's parameters are factored.
        self._owns_moments = all(of is None or slot in slots for slot, of in enumerate(moments.placed))
        self._went_on = False
        self._partial = torch.empty(partial)
        self._results = torch.empty(len(self._tasks), SUMS, dtype=torch.float64)
        self._memory = Memory(shards, switches, state)
        self._norms = any(switch.needs_norms for switch in switches)
        self._masks = any(switch.counts_mask_late for switch in switches)
        self._plan, self._moments = self._table(), _moments_table(moments, buffers)
        self._crew = Crew(library, self._plan)
        self._write: Job | None = None

    def _table(self) -> PlanTable:
        buffers, coefficients = self._buffers, self._buffers.coefficients
        rows = [coefficients.names.index(name) if name in coefficients.names else -1 for name in COEFFICIENTS]
        return PlanTable(
            pieces=self._pieces,
            tasks=self._tasks,
            addresses=self._memory.table.buffer_info()[0],
            coefficients=coefficients.table.data_ptr(),
            slots=coefficients.table.shape[1],
            rows=(ctypes.c_int64 * len(rows))(*rows),
            factors=buffers.factors.data_ptr(),
            scales=buffers.scales.data_ptr(),
            keys=buffers.keys.data_ptr(),
            moments_gate=buffers.gates.moments.data_ptr(),
            weights_gate=buffers.gates.weights.data_ptr(),
            sums=buffers.sums.data_ptr(),
            stats=buffers.stats.data_ptr(),
            stat_columns=buffers.stats.shape[1],
            masks=0 if buffers.masks is None else buffers.masks.data_ptr(),
            partial=self._partial.data_ptr(),
            results=self._results.data_ptr(),
        )

    @property
    def kept(self) -> int:
        tensors = [self._partial, self._results, *[packed for packed in self._memory.packed if packed is not None]]
        return sum(tensor.nbytes for tensor in tensors) + ctypes.sizeof(self._pieces) + ctypes.sizeof(self._tasks)

    def fits(self, weights: Sequence[Tensor]) -> bool:
        # model.to(memory_format=torch.channels_last) in mid-run changes the order of elements, and nothing else.
        return all(map(Tensor.is_contiguous, weights))

    def bind(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        self._crew.wait()
        self._write = None
        self._memory.bind(weights, gradients)
        # The samples of z are packed again if anybody else has written to it, past torch too.
        if self._memory.z_was_written() or not self._library.is_packed(self._plan, len(self._tasks)):
            self._library.pack(self._plan, len(self._tasks))

    def release(self) -> None:
        self._crew.wait()
        self._memory.release()

    def pass_1(self, *, goes_on: bool) -> None:
        # Several threads have more to do at once if nothing waits in between.
        stretches = self._stretches if goes_on and torch.get_num_threads() == 1 else None
        self._went_on = stretches is not None
        if stretches is not None:
            for first, last, *slots in stretches:
                self._sum_squares(first, last)
                self._library.update_moments(self._plan, self._moments, *slots)
                self._library.fill_factors(self._plan, self._moments, *slots)
                self._take_norms(first, last)
            return
        for first, last in self._batches:
            self._sum_squares(first, last)

    def _sum_squares(self, first: int, last: int) -> None:
        self._crew.finish(Pass.SUMS_OF_SQUARES, Job(first, last))
        self._library.add_partial(self._plan, first, last)
        self._add_results(first, last)

    def _take_norms(self, first: int, last: int) -> None:
        self._crew.finish(Pass.NORMS, Job(first, last))
        self._add_results(first, last)

    def pass_2(self) -> None:
        if self._norms and not self._went_on:
            self._take_norms(0, len(self._tasks))

    def count_masks(self) -> None:
        if self._masks:
            self._crew.finish(Pass.MASKS, Job(0, len(self._tasks)))
            self._add_results(0, len(self._tasks), masks=True)

    def _add_results(self, first: int, last: int, *, masks: bool = False) -> None:
        self._library.add_results(self._plan, first, last, int(Stat.LARGEST_SQUARE), int(masks))

    def update_moments(self) -> None:
        if not (self._went_on and self._owns_moments):
            self._library.update_moments(self._plan, self._moments, 0, self._plan.slots)

    def fill_factors(self) -> None:
        if not (self._went_on and self._owns_moments):
            self._library.fill_factors(self._plan, self._moments, 0, self._plan.slots)

    def write_moments(self, writes: Writes) -> None:
        self._library.write_moments(self._plan, self._moments)

    def pass_3(self, known: KnownGates | None, writes: Writes) -> None:
        # One job for the whole step: called again it does what is left.
        self._write = self._write or Job(0, len(self._tasks))
        self._crew.finish(Pass.WRITE, self._write)
        # As torch's own writes do: autograd refuses a backward pass through weights that are no longer there.
        torch.autograd.graph.increment_version(self._memory.weights)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _moments_table(moments: FactoredMoments, buffers: Buffers) -> MomentsTable:
    ends = [len(moments), len(moments.rows), len(moments.lengths), len(moments.ordered)]
    begins = [ends]
    for placed in reversed(moments.placed):
        begins.append(begins[-1] if placed is None else [placed.row.start, placed.rows, placed.cells, placed.ordered])
    places, means = torch.tensor(begins[::-1]), torch.empty(len(moments.lengths))
    table = MomentsTable(
        begins=places.data_ptr(),
        values=moments.values.data_ptr(),
        after=buffers.new_moments.data_ptr(),
        inverse_n=moments.inverse_n.data_ptr(),
        in_bf16=_address(moments.in_bf16),
        adopt=_address(buffers.adopt),
        own_mean=moments.own_mean.data_ptr(),
        cell_of=moments.cell_of.data_ptr(),
        ordered=moments.ordered.data_ptr(),
        lengths=moments.lengths.data_ptr(),
        means=means.data_ptr(),
    )
    # They live as long as the table.
    table.held = (moments, places, means)
    return table


def _cut(library: Library, pieces: ctypes.Array[Piece]) -> tuple[ctypes.Array[Task], int]:
    """The tasks of all pieces, and how many floats of partial sums they need."""
    partial = ctypes.c_int64()
    count = library.cut(pieces, len(pieces), None, 0, partial)
    tasks = (Task * count)()
    library.cut(pieces, len(pieces), tasks, count, partial)
    return tasks, partial.value


def _batches(tasks: ctypes.Array[Task]) -> list[tuple[int, int]]:
    """First and last task of each batch."""
    firsts = [i for i, task in enumerate(tasks) if i == 0 or task.batch != tasks[i - 1].batch]
    return list(zip(firsts, [*firsts, len(tasks)][1:], strict=True))


def _stretches(pieces: ctypes.Array[Piece], tasks: ctypes.Array[Task]) -> list[tuple[int, int, int, int]] | None:
    """Tasks of some parameters whose gradients fit a cache together, from and to, and these parameters.

    None where a parameter comes in several rounds, because its moments have to wait for the last, and where all shards
    of this rank are empty.
    """
    if not len(tasks) or any(piece.round for piece in pieces):
        return None
    slots = [pieces[task.piece].slot for task in tasks]
    firsts, elements = [0], 0
    for number, task in enumerate(tasks):
        begins, other_batch = slots[number] != slots[number - 1], number and task.batch != tasks[number - 1].batch
        if other_batch and not begins:
            return None
        if number and begins and (elements > IN_CACHE or other_batch):
            firsts.append(number)
            elements = 0
        elements += (task.last_line - task.first_line) * (task.end - task.begin)
    ends = [*firsts[1:], len(tasks)]
    return [(first, end, slots[first], slots[end - 1] + 1) for first, end in zip(firsts, ends, strict=True)]
