"""One program of a launch: its threads, their registers, the order in which they go on.

Every thread has a program counter. Those that are furthest behind go first and together, which
brings threads of a branch together again where it ends. With `shuffled`, one group of threads
chosen at random runs ahead to its next barrier instead, as hardware may: a warp, or the four warps
that share one tensor core product. A barrier is `bar.sync 0`, for all threads that have not ended.

Not modelled: time, and memory that is seen late. The order of a warp's own threads on two sides of
a branch is one of those allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.ptx.memory import Access, GlobalMemory, RaceLog, Region
from tests.ptx.program import Instruction, Program

Array = npt.NDArray[Any]
#: What an instruction does to a block, in the lanes that execute it.
Step = Callable[["Block", Array], None]

WARP, WARPGROUP = 32, 128
_WIDTHS = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class Registers(dict[str, Array]):
    """Zero until written."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def __missing__(self, name: str) -> Array:
        dtype = _WIDTHS[self._program.registers[name]]
        self[name] = np.zeros(self._program.threads, dtype)
        return self[name]


class Block:
    """One program, to be run once.

    parameters : value of each parameter by name, as bits
    number, place, grid : of this program in its launch; place and grid are (x, y, z)
    epoch : the barriers that the launch's earlier programs passed
    shared : bytes of shared memory
    shuffled : generator of the order of groups, or None for lockstep
    """

    def __init__(
        self,
        program: Program,
        steps: Sequence[Step | None],
        parameters: dict[str, int],
        memory: GlobalMemory,
        log: RaceLog,
        *,
        number: int,
        place: tuple[int, int, int],
        grid: tuple[int, int, int],
        epoch: int,
        shared: int,
        shuffled: np.random.Generator | None,
    ) -> None:
        self.program, self.parameters, self.memory = program, parameters, memory
        self.registers = Registers(program)
        self.shared = Region("shared", 0, np.full(shared, 0xA5, np.uint8), log)
        self.number, self.epoch = number, epoch
        self.threads = np.arange(program.threads)
        self.special = {"%tid.x": self.threads.astype(np.uint32)} | {"global_smem": _word(0)}
        for axis, at, size in zip("xyz", place, grid, strict=True):
            self.special |= {f"%ctaid.{axis}": _word(at), f"%nctaid.{axis}": _word(size)}
        #: Instructions of warps so far, also those that a guard holds back in all of its lanes.
        self.issued = 0
        #: Under way: `transfers.Copy`, `tensor_cores.Factor`.
        self.copies: list[Any] = []
        self.factors: list[Any] = []
        self._steps, self._shuffled = steps, shuffled
        products = any(x.opcode.startswith("wgmma") for x in program.instructions)
        self._group = self.threads // (WARPGROUP if products else WARP)
        self._ahead = -1

    def run(self) -> int:
        """All threads to their end; returns the epoch after it."""
        instructions = self.program.instructions
        counter = np.zeros(self.program.threads, np.int64)
        live = np.ones(self.program.threads, np.bool_)
        waiting = np.zeros(self.program.threads, np.bool_)
        while live.any():
            ready = live & ~waiting
            if not ready.any():
                waiting[:] = False
                self.epoch += 1
                continue
            if self._shuffled is not None:
                ready &= self._group == self._next_group(ready, self._shuffled)
            at = int(counter[ready].min())
            together = ready & (counter == at)
            others = counter[ready & ~together]
            until = int(others.min()) if len(others) else len(instructions)
            warps, first = int(together.reshape(-1, WARP).any(1).sum()), at
            while at < until:
                x, step = instructions[at], self._steps[at]
                lanes = together
                if x.guard is not None:
                    name, wanted = x.guard
                    lanes = together & (self.registers[name] == wanted)
                at += 1
                if step is None:
                    counter[together] = at
                    if x.target is not None:
                        counter[lanes] = x.target
                    elif x.opcode == "bar.sync":
                        waiting |= lanes
                    else:
                        live &= ~lanes
                    break
                if lanes.any():
                    step(self, lanes)
            else:
                counter[together] = at
                live &= counter < len(instructions)
            self.issued += warps * (at - first)
        return self.epoch + 1

    def access(self, x: Instruction, lanes: Array) -> Access:
        """Of an instruction in the threads `lanes`, bool or numbers."""
        return Access(self.program.name, x, self.number, self.epoch, self.threads[lanes])

    def _next_group(self, ready: Array, shuffled: np.random.Generator) -> int:
        groups = np.unique(self._group[ready])
        if self._ahead not in groups:
            self._ahead = int(shuffled.choice(groups))
        return self._ahead


def whole_warps(x: Instruction, lanes: Array, size: int = WARP) -> None:
    """`UnknownPTX` unless all threads of a warp take part, or of a warpgroup."""
    of_group = lanes.reshape(-1, size)
    if (of_group.any(1) != of_group.all(1)).any():
        raise x.unknown("threads that must meet here have parted")


def _word(value: int) -> Array:
    return np.array([value], np.uint32)
