"""Memory of a launch, byte by byte, and the log of races in it.

Global memory is what is mapped: tensors where they lie, nothing around them. A load or store
outside, or one that is not aligned to its own width, is an error.

A race is two accesses to one byte, one of them a write, which nothing orders: by two threads of a
program without a barrier between them, or by two programs of one launch. Two writes of the same
value are none, nor are two atomic additions. Which of the two wins here is not what matters: the
log does not depend on the order in which threads are run, only on the branches they take. Not
modelled: fences, the memory model's scopes, and what a launch before or after this one does.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tests.ptx.program import Instruction

Array = npt.NDArray[Any]
Role = Literal["read", "write", "atomic"]

_CLASHES: dict[Role, tuple[Role, ...]] = {
    "read": ("write", "atomic"),
    "write": ("read", "write", "atomic"),
    "atomic": ("read", "write"),
}
_NOBODY, _SEVERAL = -1, -2


class BadAccess(Exception):
    """An address outside of what is mapped, or not aligned; names the line."""


class Race(NamedTuple):
    """instruction : the later of the two; address : of the first byte concerned"""

    kernel: str
    instruction: Instruction
    space: str
    role: Role
    address: int
    thread: int
    programs: bool

    def __str__(self) -> str:
        who = "programs" if self.programs else "threads"
        return (
            f"{self.kernel}: two {who} without order at {self.space} address {self.address:#x}, "
            f"one a {self.role} by thread {self.thread} in line {self.instruction.line}: "
            f"{self.instruction.text}"
        )


@dataclasses.dataclass(slots=True)
class Access:
    """Who reads or writes: an instruction in some threads of one program.

    epoch : counts the barriers of a launch, over all its programs
    threads : int array, one number a lane that takes part
    """

    kernel: str
    instruction: Instruction
    program: int
    epoch: int
    threads: Array


class Touched:
    """By role, who touched each byte last within a period: one id, or several."""

    def __init__(self, size: int) -> None:
        self._owner = {role: np.full(size, _NOBODY, np.int32) for role in _CLASHES}
        self._period = {role: np.full(size, -1, np.int32) for role in _CLASHES}

    def note(self, role: Role, where: Array, who: Array, period: int, same: Array | None) -> Array:
        """Which of the bytes `where` others touched in the same period in a way that clashes.

        same : which bytes a write leaves as they are
        """
        clash = np.zeros(where.shape, np.bool_)
        for other in _CLASHES[role]:
            owner = self._owner[other][where]
            theirs = (self._period[other][where] == period) & (owner != who)
            if role == other == "write" and same is not None:
                theirs &= ~same
            clash |= theirs
        owner, now = self._owner[role], self._period[role]
        known = owner[where]
        new = np.where((now[where] != period) | (known == who), who, _SEVERAL)
        owner[where] = new
        shared = owner[where] != new  # by lanes of this very instruction
        if shared.any():
            owner[where[shared]] = _SEVERAL
        now[where] = period
        return clash


class RaceLog(list[Race]):
    """The first race of every instruction."""

    def add(self, race: Race) -> None:
        if not any(x.instruction is race.instruction for x in self):
            self.append(race)


class Region:
    """Bytes that lie together, the first at address `start`."""

    def __init__(self, space: str, start: int, data: Array, log: RaceLog) -> None:
        self.space, self.start, self.data = space, start, data
        self._log = log
        self._by_thread = Touched(len(data))
        self._by_program = Touched(len(data)) if space == "global" else None

    def load(self, addresses: Array, width: int, by: Access) -> Array:
        """uint8 [lanes, width]"""
        where = self._where(addresses, width, by)
        self._note("read", where, by, None)
        return np.asarray(self.data[where])

    def store(self, addresses: Array, values: Array, by: Access) -> None:
        """values: uint8 [lanes, width]. Of lanes that share an address, one wins: a race."""
        where = self._where(addresses, values.shape[1], by)
        clash = self._note("write", where, by, self.data[where] == values)
        self.data[where] = values
        torn = self.data[where] != values
        if torn.any() and not clash:
            self._report("write", where, torn, by, programs=False)

    def add(self, addresses: Array, values: Array, by: Access) -> Array:
        """Atomically, lane after lane; the values before. values: uint [lanes]"""
        width = values.dtype.itemsize
        where = self._where(addresses, width, by)
        self._note("atomic", where, by, None)
        before = np.empty_like(values)
        for lane, at in enumerate(where):
            cell = self.data[at].view(values.dtype)
            before[lane] = cell[0]
            self.data[at] = (cell + values[lane]).view(np.uint8)
        return before

    def note_read(self, addresses: Array, width: int, by: Access) -> None:
        self._note("read", self._where(addresses, width, by), by, None)

    def note_write(self, addresses: Array, width: int, by: Access) -> None:
        self._note("write", self._where(addresses, width, by), by, None)

    def _where(self, addresses: Array, width: int, by: Access) -> Array:
        first = addresses.astype(np.int64) - self.start
        if (first < 0).any() or (first + width > len(self.data)).any():
            raise BadAccess(_message(f"outside of {self.space} memory", by))
        if (addresses % addresses.dtype.type(width) != 0).any():
            raise BadAccess(_message(f"not aligned to its {width} bytes", by))
        return np.asarray(first[:, None] + np.arange(width))

    def _note(self, role: Role, where: Array, by: Access, same: Array | None) -> bool:
        who = np.broadcast_to(by.threads.astype(np.int32)[:, None], where.shape)
        clash = self._by_thread.note(role, where, who, by.epoch, same)
        if clash.any():
            self._report(role, where, clash, by, programs=False)
            return True
        if self._by_program is not None:
            program = np.full(where.shape, by.program, np.int32)
            clash = self._by_program.note(role, where, program, 0, same)
            if clash.any():
                self._report(role, where, clash, by, programs=True)
                return True
        return False

    def _report(self, role: Role, where: Array, clash: Array, by: Access, programs: bool) -> None:
        lane, byte = np.argwhere(clash)[0]
        address, thread = self.start + int(where[lane, byte]), int(by.threads[lane])
        self._log.add(Race(by.kernel, by.instruction, self.space, role, address, thread, programs))


class GlobalMemory:
    """Tensors on the CPU at their own addresses; those that overlap are one region."""

    def __init__(self, tensors: Sequence[Tensor], log: RaceLog) -> None:
        self._tensors = tensors  # kept alive
        self._regions: list[Region] = []
        end = -1
        spans: list[list[int]] = []
        for start, stop in sorted(_span(x) for x in tensors if x.numel()):
            if start < end:
                spans[-1][1] = end = max(end, stop)
            else:
                spans.append([start, stop])
                end = stop
        for start, stop in spans:
            held = (ctypes.c_uint8 * (stop - start)).from_address(start)
            data = np.ctypeslib.as_array(held)
            self._regions.append(Region("global", start, data, log))
        self._starts = np.array([x.start for x in self._regions], np.uint64)

    def load(self, addresses: Array, width: int, by: Access) -> Array:
        out = np.empty((len(addresses), width), np.uint8)
        for region, lanes, some in self._split(addresses, by):
            out[lanes] = region.load(addresses[lanes], width, some)
        return out

    def store(self, addresses: Array, values: Array, by: Access) -> None:
        for region, lanes, some in self._split(addresses, by):
            region.store(addresses[lanes], values[lanes], some)

    def add(self, addresses: Array, values: Array, by: Access) -> Array:
        before = np.empty_like(values)
        for region, lanes, some in self._split(addresses, by):
            before[lanes] = region.add(addresses[lanes], values[lanes], some)
        return before

    def _split(self, addresses: Array, by: Access) -> Iterator[tuple[Region, Array, Access]]:
        if not self._regions:
            raise BadAccess(_message("outside of global memory, which is empty", by))
        index = np.maximum(np.searchsorted(self._starts, addresses, "right") - 1, 0)
        for i in np.unique(index):
            lanes = np.flatnonzero(index == i)
            some = dataclasses.replace(by, threads=by.threads[lanes])
            yield self._regions[int(i)], lanes, some


def _span(x: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize


def _message(what: str, by: Access) -> str:
    return f"{by.kernel}, line {by.instruction.line}: {what}: {by.instruction.text}"
