"""Launches of Triton kernels, compiled for sm_90 and executed here.

Within `executed_ptx` this takes the place of `JITFunction.run`. Arguments are specialised as Triton
does it (alignment, ones, constants), so that the PTX is that of the same launch on a GPU; it is
compiled once, then every program of the grid is run, one after the other.

A result that is right here is right for the instructions that a GPU would be given, up to what
`block`, `memory`, `arithmetic`, `transfers`, `warps` and `tensor_cores` say they leave out: no
timing, no memory model, no assembler behind the PTX, rounding of approximate instructions.
"""

# mypy: disable-error-code="import-untyped"
from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from vase_kernels.pool import PoolView

from tests.ptx import arithmetic, tensor_cores, transfers, warps
from tests.ptx.block import Array, Block, Step
from tests.ptx.memory import GlobalMemory, RaceLog
from tests.ptx.operands import members, source, target
from tests.ptx.program import Instruction, Program, parse

TARGET = GPUTarget("cuda", 90, 32)
_CONTROL = ("bra", "bra.uni", "ret")


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """Compiled and decoded.

    steps : by instruction, what it does
    given : names of the arguments that are passed
    shared : bytes of shared memory
    """

    program: Program
    steps: tuple[Step | None, ...]
    given: tuple[str, ...]
    shared: int


class Launcher:
    """Executes launches and remembers their races.

    races : of all launches
    launches : how many, by kernel
    issued : instructions of warps in them, by kernel
    shuffled : generator of the order in which warps run, or None for lockstep
    """

    _compiled: dict[tuple[Any, ...], Kernel] = {}  # noqa: RUF012 - for the whole process

    def __init__(self, shuffled: np.random.Generator | None = None) -> None:
        self.races = RaceLog()
        self.launches: collections.Counter[str] = collections.Counter()
        self.issued: collections.Counter[str] = collections.Counter()
        self.shuffled = shuffled
        self._mapped: list[Tensor] = []

    def map(self, *tensors: Tensor) -> None:
        """Memory that kernels reach by addresses in a tensor, beside their arguments."""
        self._mapped.extend(tensors)

    def run(
        self, kernel: JITFunction[Any], *args: Any, grid: Sequence[int], warmup: bool, **kwargs: Any
    ) -> None:
        """A launch, as `JITFunction.run` is called for it; none is a warm-up."""
        assert not warmup
        compiled, values = self._kernel(kernel, args, kwargs)
        self.launches[kernel.__name__] += 1
        tensors = [x for x in values if isinstance(x, Tensor)]
        memory = GlobalMemory([*self._mapped, *tensors], self.races)
        bits = [_bits(x) for x in values]
        names = compiled.program.parameters
        # Behind the arguments: Triton's own scratch, which no kernel here has.
        parameters = dict(zip(names, bits + [0] * (len(names) - len(bits)), strict=True))
        x, y, z = (*grid, 1, 1)[:3]
        places = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
        epoch = 0
        with np.errstate(all="ignore"):
            for number, place in enumerate(places):
                block = Block(
                    compiled.program,
                    compiled.steps,
                    parameters,
                    memory,
                    self.races,
                    number=number,
                    place=place,
                    grid=(x, y, z),
                    epoch=epoch,
                    shared=compiled.shared,
                    shuffled=self.shuffled,
                )
                epoch = block.run()
                self.issued[kernel.__name__] += block.issued

    def _kernel(
        self, kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Kernel, list[Any]]:
        backend = make_backend(TARGET)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, _ = bind(*args, **kwargs)
        key = (kernel.cache_key, str(specialization), str(kwargs))
        if key not in self._compiled:
            options, signature, constants, attributes = kernel._pack_args(
                backend, kwargs, bound, specialization, None
            )
            binary = triton.compile(
                ASTSource(kernel, signature, constants, attributes),
                target=TARGET,
                options=options.__dict__,
            )
            program = parse(binary.asm["ptx"])
            self._compiled[key] = Kernel(
                program=program,
                steps=tuple(decode(program, x) for x in program.instructions),
                given=tuple(name for name, kind in signature.items() if kind != "constexpr"),
                shared=binary.metadata.shared,
            )
        found = self._compiled[key]
        return found, [bound[name] for name in found.given]


@contextlib.contextmanager
def executed_ptx(shuffled: np.random.Generator | None = None) -> Iterator[Launcher]:
    """Every launch within goes to the launcher, on the pools that are made within."""
    launcher, view_of = Launcher(shuffled), PoolView.of

    def mapped(*args: Any, **kwargs: Any) -> PoolView:
        view = view_of(*args, **kwargs)
        launcher.map(*view.buffers)
        return view

    def run(kernel: JITFunction[Any], *args: Any, **kwargs: Any) -> None:
        launcher.run(kernel, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(PoolView, "of", mapped)
        yield launcher


def decode(program: Program, x: Instruction) -> Step | None:
    """What an instruction does; None for branches, barriers and ends, which `Block` knows.

    `UnknownPTX` names the line of anything that is not modelled, be it reached or not.
    """
    if x.opcode in _CONTROL or (x.opcode == "bar.sync" and x.operands == ("0",)):
        return None
    step = (
        transfers.decode(program, x) or warps.decode(program, x) or tensor_cores.decode(program, x)
    )
    if step is not None:
        return step
    if x.opcode.startswith("mov.") and any(text.startswith("{") for text in x.operands):
        return _packed(program, x)
    found = arithmetic.operation(x.opcode)
    if found is None:
        raise x.unknown("unknown instruction")
    if len(x.operands) != 1 + len(found.sources):
        raise x.unknown(f"{len(x.operands)} operands")
    to = target(program, x, x.operands[0], found.result)
    come = [
        source(program, x, text, kind)
        for text, kind in zip(x.operands[1:], found.sources, strict=True)
    ]
    compute = found.compute
    return lambda block, lanes: to(block, compute(*[read(block) for read in come]), lanes)


def _packed(program: Program, x: Instruction) -> Step:
    """A register taken apart, or put together, the lower half first."""
    wide = x.opcode.removeprefix("mov.")
    if wide not in ("b32", "b64"):
        raise x.unknown("unknown parts")
    half = "b16" if wide == "b32" else "b32"
    apart = x.operands[0].startswith("{")
    names = members(x.operands[0 if apart else 1])
    if len(names) != 2:
        raise x.unknown("unknown parts")
    if apart:
        whole = source(program, x, x.operands[1], wide)
        to = [target(program, x, name, half) for name in names]

        def take_apart(block: Block, lanes: Array) -> None:
            halves = whole(block).view(arithmetic.NUMPY[half]).reshape(-1, 2)
            for i, write in enumerate(to):
                write(block, np.ascontiguousarray(halves[:, i]), lanes)

        return take_apart
    put = target(program, x, x.operands[0], wide)
    come = [source(program, x, name, half) for name in names]

    def put_together(block: Block, lanes: Array) -> None:
        halves = np.stack([np.broadcast_to(read(block), lanes.shape) for read in come], 1)
        put(block, halves.view(arithmetic.NUMPY[wide])[:, 0], lanes)

    return put_together


def _bits(value: Any) -> int:
    """Of an argument, as its parameter holds them."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return int(np.float32(value).view(np.uint32))
    return int(value) % 2**64
