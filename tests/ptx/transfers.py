"""Loads, stores, atomic additions, asynchronous copies, matrices between lanes and shared memory.

Ordinary loads and stores take effect at once. An asynchronous copy reads its source when it is
issued and reaches shared memory as late as it may, when its thread waits for it; the race log takes
it to write at both times.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.ptx.arithmetic import NUMPY
from tests.ptx.block import WARP, Block, Step, whole_warps
from tests.ptx.operands import address, members, source, target
from tests.ptx.program import Instruction, Program

Array = npt.NDArray[Any]

_MOVE = re.compile(r"(ld|st)\.(global|shared|shared::cta)(?:\.v([24]))?\.([bus])(8|16|32|64)")
_ATOMIC = re.compile(r"atom\.(?:global\.gpu\.acq_rel|relaxed\.sys\.shared)\.add\.u(32|64)")
_MATRICES = re.compile(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16")


@dataclasses.dataclass(slots=True)
class Copy:
    """One instruction's copies, as long as they are under way.

    threads, offsets : int [copies]
    data : uint8 [copies, bytes]
    groups : int [copies], how many groups its thread has closed since, its own not counted; -1 as
        long as its own is open
    """

    instruction: Instruction
    threads: Array
    offsets: Array
    data: Array
    groups: Array

    def keep(self, some: Array) -> Copy:
        return Copy(
            self.instruction,
            self.threads[some],
            self.offsets[some],
            self.data[some],
            self.groups[some],
        )


def decode(program: Program, x: Instruction) -> Step | None:
    """None if it is not one of these instructions."""
    if match := re.fullmatch(r"ld\.param\.b(32|64)", x.opcode):
        return _parameter(program, x, f"u{match[1]}")
    if match := _MOVE.fullmatch(x.opcode):
        name, space, vector, kind, bits = match.groups()
        if name == "ld":
            return _load(program, x, space, kind, int(bits), int(vector or 1))
        return _store(program, x, space, int(bits), int(vector or 1))
    if match := _ATOMIC.fullmatch(x.opcode):
        return _add(program, x, f"u{match[1]}")
    if x.opcode in ("cp.async.cg.shared.global", "cp.async.ca.shared.global"):
        return _copy(program, x)
    if x.opcode == "cp.async.commit_group":
        return _commit
    if x.opcode == "cp.async.wait_group":
        latest = int(x.operands[0])  # groups that may stay under way
        return lambda block, lanes: _wait(block, lanes, latest)
    if match := _MATRICES.fullmatch(x.opcode):
        return _load_matrices(program, x, int(match[1]), bool(match[2]))
    if x.opcode == "stmatrix.sync.aligned.m8n8.x4.shared.b16":
        return _store_matrices(program, x)
    if x.opcode.startswith("fence.proxy.async"):
        return _nothing
    return None


def _nothing(block: Block, lanes: Array) -> None:
    """A fence: what was written is there anyway."""


def _parameter(program: Program, x: Instruction, kind: str) -> Step:
    name = x.operands[1].strip("[]")
    if name not in program.parameters:
        raise x.unknown(f"unknown parameter {name}")
    to = target(program, x, x.operands[0], kind)

    def step(block: Block, lanes: Array) -> None:
        to(block, np.array([block.parameters[name]], np.uint64).astype(NUMPY[kind]), lanes)

    return step


def _load(program: Program, x: Instruction, space: str, kind: str, bits: int, vector: int) -> Step:
    of = address(program, x, x.operands[1], "u64" if space == "global" else "u32")
    names = members(x.operands[0])
    if len(names) != vector:
        raise x.unknown(f"{vector} values into {len(names)} registers")
    # A register may be wider than what is loaded.
    widths = [max(program.registers.get(name, bits), bits) for name in names]
    to = [
        target(program, x, name, f"{kind}{width}")
        for name, width in zip(names, widths, strict=True)
    ]
    extended = [NUMPY[f"{kind}{width}"] for width in widths]

    def step(block: Block, lanes: Array) -> None:
        memory = block.memory if space == "global" else block.shared
        some = _in(lanes, of(block))
        data = memory.load(some, vector * bits // 8, block.access(x, lanes))
        values = data.view(NUMPY[f"{kind}{bits}"])
        for column, (write, dtype) in enumerate(zip(to, extended, strict=True)):
            whole = np.zeros(len(lanes), dtype)
            whole[lanes] = values[:, column]
            write(block, whole, lanes)

    return step


def _store(program: Program, x: Instruction, space: str, bits: int, vector: int) -> Step:
    of = address(program, x, x.operands[0], "u64" if space == "global" else "u32")
    names = members(x.operands[1])
    if len(names) != vector:
        raise x.unknown(f"{vector} values from {len(names)} registers")
    values = [source(program, x, name, f"u{max(bits, 16)}") for name in names]
    stored = NUMPY[f"u{bits}"]

    def step(block: Block, lanes: Array) -> None:
        memory = block.memory if space == "global" else block.shared
        columns = [_in(lanes, value(block)).astype(stored) for value in values]
        data = np.stack(columns, 1).view(np.uint8)
        memory.store(_in(lanes, of(block)), data, block.access(x, lanes))

    return step


def _add(program: Program, x: Instruction, kind: str) -> Step:
    shared = "shared" in x.opcode
    to = target(program, x, x.operands[0], kind)
    of = address(program, x, x.operands[1], "u32" if shared else "u64")
    value = source(program, x, x.operands[2], kind)

    def step(block: Block, lanes: Array) -> None:
        memory = block.shared if shared else block.memory
        before = np.zeros(len(lanes), NUMPY[kind])
        before[lanes] = memory.add(
            _in(lanes, of(block)), _in(lanes, value(block)), block.access(x, lanes)
        )
        to(block, before, lanes)

    return step


def _copy(program: Program, x: Instruction) -> Step:
    to, come = address(program, x, x.operands[0], "u32"), address(program, x, x.operands[1], "u64")
    width = int(x.operands[2], 0)
    size = source(program, x, x.operands[-1], "u32")

    def step(block: Block, lanes: Array) -> None:
        data = np.zeros((int(lanes.sum()), width), np.uint8)
        sizes = _in(lanes, size(block))
        read = sizes > 0  # of the others there is no source
        if not np.isin(sizes, (0, width)).all():
            raise x.unknown("a copy of a part of its bytes")
        if read.any():
            by = block.access(x, np.flatnonzero(lanes)[read])
            data[read] = block.memory.load(_in(lanes, come(block))[read], width, by)
        offsets = _in(lanes, to(block))
        block.shared.note_write(offsets, width, block.access(x, lanes))
        threads = block.threads[lanes]
        block.copies.append(Copy(x, threads, offsets, data, np.full(len(threads), -1)))

    return step


def _commit(block: Block, lanes: Array) -> None:
    for copy in block.copies:
        copy.groups[lanes[copy.threads]] += 1


def _wait(block: Block, lanes: Array, latest: int) -> None:
    left = []
    for copy in block.copies:
        done = (copy.groups >= latest) & lanes[copy.threads]
        if done.any():
            now = copy.keep(done)
            block.shared.store(now.offsets, now.data, block.access(now.instruction, now.threads))
        if not done.all():
            left.append(copy.keep(~done))
    block.copies = left


def _load_matrices(program: Program, x: Instruction, count: int, transposed: bool) -> Step:
    """Thread 8 i + r of a warp addresses row r of matrix i; thread t gets 4 bytes of row t / 4."""
    to = [target(program, x, name, "b32") for name in members(x.operands[0])]
    of = address(program, x, x.operands[1], "u32")

    def step(block: Block, lanes: Array) -> None:
        whole_warps(x, lanes)
        first = lanes & (block.threads % WARP < 8 * count)
        rows = block.shared.load(_in(first, of(block)), 16, block.access(x, first))
        matrices = rows.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, WARP)
        for matrix, write in enumerate(to):
            whole = np.zeros(len(lanes), np.uint32)
            whole[lanes] = words[:, matrix].reshape(-1)
            write(block, whole, lanes)

    return step


def _store_matrices(program: Program, x: Instruction) -> Step:
    """The way back of `_load_matrices`, of four."""
    of = address(program, x, x.operands[0], "u32")
    values = [source(program, x, name, "b32") for name in members(x.operands[1])]

    def step(block: Block, lanes: Array) -> None:
        whole_warps(x, lanes)
        words = np.stack([_in(lanes, value(block)).reshape(-1, WARP) for value in values], 1)
        block.shared.store(
            _in(lanes, of(block)), words.reshape(-1, 4).view(np.uint8), block.access(x, lanes)
        )

    return step


def _in(lanes: Array, values: Array) -> Array:
    """Of all threads, or one for all, those of some lanes."""
    return np.broadcast_to(values, lanes.shape)[lanes]
