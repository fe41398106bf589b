"""Operands of an instruction, bound once: how to read and write them in a block of threads."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tests.ptx.arithmetic import NUMPY
from tests.ptx.program import Instruction, Program

Array = npt.NDArray[Any]


class State(Protocol):
    """registers : unsigned [threads] by name, bool for predicates; special : uint32 by name"""

    @property
    def registers(self) -> dict[str, Array]: ...

    @property
    def special(self) -> dict[str, Array]: ...


Source = Callable[[State], Array]
Target = Callable[[State, Array, Array], None]

_INTEGER = re.compile(r"-?(0x[0-9A-Fa-f]+|\d+)")
#: Special registers, and the one symbol: shared addresses count from it.
_SPECIAL = re.compile(r"%tid\.x|%n?ctaid\.[xyz]|global_smem")


def width_of(kind: str) -> int:
    """Bits of a PTX type; 1 of a predicate."""
    return 1 if kind == "pred" else np.dtype(NUMPY[kind]).itemsize * 8


def source(program: Program, x: Instruction, text: str, kind: str) -> Source:
    """Read an operand as `kind`: [threads], or one element for a constant."""
    if text in program.registers:
        _check_width(program, x, text, kind)
        dtype = NUMPY[kind]
        return lambda state: state.registers[text].view(dtype)
    if _SPECIAL.fullmatch(text) and width_of(kind) == 32:
        return lambda state: state.special[text]
    constant = _constant(x, text, kind)
    return lambda state: constant


def target(program: Program, x: Instruction, text: str, kind: str) -> Target:
    """Write values of `kind` to a register, in some lanes; `_` takes them and drops them."""
    if text == "_":
        return lambda state, values, lanes: None
    if text not in program.registers:
        raise x.unknown(f"{text} is no register")
    _check_width(program, x, text, kind)
    bits = np.bool_ if kind == "pred" else NUMPY[f"u{width_of(kind)}"]

    def write(state: State, values: Array, lanes: Array) -> None:
        np.copyto(state.registers[text], values.view(bits), where=lanes)

    return write


def members(text: str) -> list[str]:
    """Of a vector operand, or the operand itself."""
    return text.strip("{}").split(",")


def address(program: Program, x: Instruction, text: str, kind: str) -> Source:
    """Of `[register + offset]`: u32 in shared memory, u64 in global."""
    match = re.fullmatch(r"\[([%\w]+?)(?:\+(-?\d+))?\]", text)
    if match is None:
        raise x.unknown(f"unknown address {text}")
    base, offset = source(program, x, match[1], kind), int(match[2] or 0)
    return lambda state: base(state) + np.array([offset]).astype(NUMPY[kind])


def _check_width(program: Program, x: Instruction, text: str, kind: str) -> None:
    if program.registers[text] != width_of(kind):
        raise x.unknown(f"{text} has {program.registers[text]} bits, {kind} has {width_of(kind)}")


def _constant(x: Instruction, text: str, kind: str) -> Array:
    if text.startswith("0f") and len(text) == 10 and width_of(kind) == 32:
        return np.array([int(text[2:], 16)], np.uint32).view(NUMPY[kind])
    if not _INTEGER.fullmatch(text):
        raise x.unknown(f"unknown operand {text}")
    value = int(text, 0)
    if kind == "pred":
        return np.array([value != 0])
    width = width_of(kind)
    return np.array([value % 2**width], NUMPY[f"u{width}"]).view(NUMPY[kind])
