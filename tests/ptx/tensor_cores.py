"""Products on tensor cores: float32 sums of bfloat16, float16 or TF32 factors.

`wgmma.mma_async` multiplies for a warpgroup, m64: its factors lie in shared memory as descriptors
say (swizzles of 32, 64 and 128 bytes, base offset 0), or the first one in registers. `mma.sync`
multiplies for a warp, m16n8, all in registers. The sum over k of one instruction is computed in
float64 and added in float32; what a device rounds on the way is not specified, so its last bits may
differ.

A product of a warpgroup takes effect at once, although its registers are promised only after the
wait; the race log takes it to read shared memory when it is issued and when it is waited for. Not
modelled: what happens without `wgmma.fence` or `fence.proxy.async`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.ptx.arithmetic import from_bfloat16
from tests.ptx.block import WARP, WARPGROUP, Block, Step, whole_warps
from tests.ptx.operands import Source, members, source, target
from tests.ptx.program import Instruction, Program

Array = npt.NDArray[Any]

_PRODUCT = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32)\.\3")
_WARP_PRODUCT = re.compile(
    r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32"
)
_SWIZZLED_BYTES = {1: 128, 2: 64, 3: 32}
_LANE = np.arange(WARP)
_UNPACK: dict[str, Callable[[Array], Array]] = {
    "bf16": lambda x: from_bfloat16(x).astype(np.float64),
    "f16": lambda x: x.view(np.float16).astype(np.float64),
    "tf32": lambda x: (x & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64),
}


@dataclasses.dataclass(slots=True)
class Factor:
    """What a product under way reads of shared memory.

    thread : the first of the warpgroup
    words : addresses of 4 bytes each
    groups : how many groups the warpgroup has closed since, its own not counted; -1 as long as its
        own is open
    """

    instruction: Instruction
    thread: int
    words: Array
    groups: int = -1

    def note_read(self, block: Block) -> None:
        by = block.access(self.instruction, np.full(len(self.words), self.thread))
        block.shared.note_read(self.words, 4, by)


def decode(program: Program, x: Instruction) -> Step | None:
    """None if it is not one of these instructions."""
    if match := _PRODUCT.fullmatch(x.opcode):
        return _product(program, x, int(match[1]), int(match[2]), match[3])
    if match := _WARP_PRODUCT.fullmatch(x.opcode):
        return _warp_product(program, x, int(match[1]), match[2])
    if x.opcode == "wgmma.fence.sync.aligned":
        return lambda block, lanes: whole_warps(x, lanes, WARPGROUP)
    if x.opcode == "wgmma.commit_group.sync.aligned":
        return lambda block, lanes: _commit(block, x, lanes)
    if x.opcode == "wgmma.wait_group.sync.aligned":
        latest = int(x.operands[0])  # groups that may stay under way
        return lambda block, lanes: _wait(block, x, lanes, latest)
    return None


def _commit(block: Block, x: Instruction, lanes: Array) -> None:
    whole_warps(x, lanes, WARPGROUP)
    for factor in block.factors:
        factor.groups += int(lanes[factor.thread])


def _wait(block: Block, x: Instruction, lanes: Array, latest: int) -> None:
    whole_warps(x, lanes, WARPGROUP)
    left = []
    for factor in block.factors:
        if lanes[factor.thread] and factor.groups >= latest:
            factor.note_read(block)
        else:
            left.append(factor)
    block.factors = left


def _product(program: Program, x: Instruction, columns: int, depth: int, kind: str) -> Step:
    names, first, second, scale, *rest = x.operands
    sums = members(names)
    in_registers = first.startswith("{")
    # Signs of both factors, then whether each that lies in shared memory is transposed.
    transposed = rest[2:]
    if rest[:2] != ["1", "1"] or len(transposed) != (
        0 if kind == "tf32" else 1 if in_registers else 2
    ):
        raise x.unknown("unknown operands")
    if len(sums) != columns // 2:
        raise x.unknown(f"{len(sums)} registers for {columns} columns")
    flags = [flag == "1" for flag in transposed] or [False]
    size, unpack = (4 if kind == "tf32" else 2), _UNPACK[kind]
    before = [source(program, x, name, "f32") for name in sums]
    after = [target(program, x, name, "f32") for name in sums]
    kept = source(program, x, scale, "pred")
    # Registers, or one descriptor.
    held = [source(program, x, name, "b32" if in_registers else "u64") for name in members(first)]
    described = source(program, x, second, "u64")

    def shared(block: Block, thread: int, descriptor: Array, rows: int, across: bool) -> Array:
        """float64 [rows, depth]"""
        where = _addresses(x, int(descriptor[thread]), rows, depth, size, across)
        factor = Factor(x, thread, np.unique(where // 4 * 4))
        factor.note_read(block)
        block.factors.append(factor)
        data = block.shared.data[where[..., None] + np.arange(size)]
        return unpack(data.view(np.uint32 if size == 4 else np.uint16)[..., 0])

    def step(block: Block, lanes: Array) -> None:
        whole_warps(x, lanes, WARPGROUP)
        for start in range(0, len(lanes), WARPGROUP):
            if not lanes[start]:
                continue
            group = slice(start, start + WARPGROUP)
            if in_registers:
                mine = [_all(block, read)[group] for read in held]
                a = _fragment(mine, 16, depth, kind).reshape(64, depth)
            else:
                a = shared(block, start, _all(block, held[0]), 64, flags[0])
            b = shared(block, start, _all(block, described), columns, flags[-1])
            product = _times(a, b).reshape(4, 16, columns)
            keep = bool(np.broadcast_to(kept(block), lanes.shape)[start])
            here = np.zeros(len(lanes), np.bool_)
            here[group] = True
            for j, (read, write) in enumerate(zip(before, after, strict=True)):
                row, column = _place(j)
                values = np.zeros(len(lanes), np.float32)
                added = read(block)[group] if keep else np.float32(0)
                values[group] = product[:, row, column].reshape(-1) + added
                write(block, values, here)

    return step


def _all(block: Block, of: Source) -> Array:
    return np.broadcast_to(of(block), block.threads.shape)


def _warp_product(program: Program, x: Instruction, depth: int, kind: str) -> Step:
    after = [target(program, x, name, "f32") for name in members(x.operands[0])]
    first, second = (
        [source(program, x, name, "b32") for name in members(text)] for text in x.operands[1:3]
    )
    before = [source(program, x, name, "f32") for name in members(x.operands[3])]
    if (len(first), len(second), len(after), len(before)) != (4, 2, 4, 4):
        raise x.unknown("unknown operands")

    def step(block: Block, lanes: Array) -> None:
        whole_warps(x, lanes)
        # All warps at once: what those outside of `lanes` would get is not written.
        a = _fragment([_all(block, f) for f in first], 16, depth, kind)
        b = _fragment([_all(block, f) for f in second], 8, depth, kind)
        product = _times(a, b)
        sums = [
            product[:, *_place(j)].reshape(-1) + _all(block, read) for j, read in enumerate(before)
        ]
        for write, values in zip(after, sums, strict=True):
            write(block, values, lanes)

    return step


def _times(a: Array, b: Array) -> Array:
    """float32 [..., rows, columns] of float64 [..., rows, depth] and [..., columns, depth]."""
    return np.asarray(np.einsum("...ik,...jk->...ij", a, b).astype(np.float32))


def _place(j: int) -> tuple[Array, Array]:
    """Row and column of a warp's sums that its lanes hold in register j."""
    return _LANE // 4 + 8 * (j % 4 // 2), j // 4 * 8 + _LANE % 4 * 2 + j % 2


def _fragment(registers: list[Array], rows: int, depth: int, kind: str) -> Array:
    """A factor that lies in registers, float64 [warps, rows, depth].

    Of a register after the other: rows of 8 first, if there are 16, then the depth.
    """
    out = np.zeros((len(registers[0]) // WARP, rows, depth))
    for i, value in enumerate(registers):
        row, part = _LANE // 4 + 8 * (i % (rows // 8)), i // (rows // 8)
        words = value.reshape(-1, WARP)
        if kind == "tf32":
            out[:, row, _LANE % 4 + 4 * part] = _UNPACK[kind](words)
            continue
        for half in (0, 1):
            bits = (words >> np.uint32(16 * half)).astype(np.uint16)
            out[:, row, _LANE % 4 * 2 + half + 8 * part] = _UNPACK[kind](bits)
    return out


def _addresses(
    x: Instruction, descriptor: int, rows: int, depth: int, size: int, across: bool
) -> Array:
    """Of a factor's elements in shared memory, int [rows, depth].

    across : rows lie next to each other, not the elements of a row
    """
    start, leading, stride = (((descriptor >> n) & 0x3FFF) << 4 for n in (0, 16, 32))
    mode = descriptor >> 62
    if mode not in _SWIZZLED_BYTES or (descriptor >> 49) & 7:
        raise x.unknown(f"unknown descriptor {descriptor:#x}")
    width = _SWIZZLED_BYTES[mode]
    row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if across:
        along = row * size
        at = start + along % width + along // width * leading + k % 8 * width + k // 8 * stride
    else:
        at = start + row % 8 * width + row // 8 * stride + k * size
    return np.asarray(at ^ (((at >> 7) & (width // 16 - 1)) << 4))
