"""Instructions in which the threads of a warp see each other's registers.

Only whole warps take part: a mask other than all threads is unknown, and so is a shuffle that some
threads of a warp have not come to.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.ptx.block import WARP, Block, Step, whole_warps
from tests.ptx.operands import source, target
from tests.ptx.program import Instruction, Program

Array = npt.NDArray[Any]

_REDUCTIONS = {"add": np.add, "max": np.maximum, "min": np.minimum}


def decode(program: Program, x: Instruction) -> Step | None:
    """None if it is not one of these instructions."""
    if match := re.fullmatch(r"shfl\.sync\.(bfly|up|idx)\.b32", x.opcode):
        return _shuffle(program, x, match[1])
    if match := re.fullmatch(r"redux\.sync\.(add|max|min)\.([su]32)", x.opcode):
        return _reduce(program, x, _REDUCTIONS[match[1]], match[2])
    return None


def _shuffle(program: Program, x: Instruction, mode: str) -> Step:
    to = target(program, x, x.operands[0], "b32")
    value = source(program, x, x.operands[1], "b32")
    distance = source(program, x, x.operands[2], "u32")
    if x.operands[3:] != ("0" if mode == "up" else "31", "-1"):
        raise x.unknown("a shuffle within parts of a warp")

    def step(block: Block, lanes: Array) -> None:
        whole_warps(x, lanes)
        lane, by = block.threads % WARP, distance(block).astype(np.int64)
        if mode == "bfly":
            other = lane ^ by
        elif mode == "up":
            other = np.where(lane >= by, lane - by, lane)
        else:
            other = np.broadcast_to(by % WARP, lane.shape)
        values = np.broadcast_to(value(block), lane.shape)
        to(block, values[block.threads - lane + other], lanes)

    return step


def _reduce(program: Program, x: Instruction, over: np.ufunc, kind: str) -> Step:
    to = target(program, x, x.operands[0], kind)
    value = source(program, x, x.operands[1], kind)
    mask = source(program, x, x.operands[2], "u32")

    def step(block: Block, lanes: Array) -> None:
        whole_warps(x, lanes)
        if (np.broadcast_to(mask(block), lanes.shape)[lanes] != 0xFFFFFFFF).any():
            raise x.unknown("a reduction over some threads of a warp")
        values = np.broadcast_to(value(block), lanes.shape).reshape(-1, WARP)
        to(block, np.repeat(over.reduce(values, 1, dtype=values.dtype), WARP), lanes)

    return step
