"""The PTX of one kernel, parsed: registers, parameters, instructions with their labels.

What Triton writes is read, not all of PTX: one entry a module, one statement a line, no calls. Of
the module's variables only `global_smem` can be an operand, the shared memory whose size the launch
sets. Registers that inline assembly declares in a scope of its own are known by name alone, so a
name has one width.
"""

from __future__ import annotations

import dataclasses
import re

#: Bits of a register by its declared type.
_WIDTHS = {"pred": 1, "b16": 16, "f16": 16, "b32": 32, "f32": 32, "b64": 64, "f64": 64}
#: Statements that say nothing about what is executed.
_SILENT = (".loc", ".pragma")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


class UnknownPTX(Exception):
    """An instruction, operand or declaration that is not modelled; names the line."""


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One line of the kernel's body.

    opcode : with its modifiers, as written
    operands : as written; {...} and [...] are one each, without inner spaces
    guard : register of the predicate and the value it must have, or None
    target : index of the instruction that a branch goes to
    """

    line: int
    text: str
    opcode: str
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None
    target: int | None = None

    def unknown(self, what: str) -> UnknownPTX:
        return UnknownPTX(f"line {self.line}: {what}: {self.text}")


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """A kernel.

    parameters : names in order
    threads : of a block
    registers : width in bits by name
    """

    name: str
    parameters: tuple[str, ...]
    threads: int
    registers: dict[str, int]
    instructions: tuple[Instruction, ...]


def parse(ptx: str) -> Program:
    """The single kernel of a module; `UnknownPTX` names the first line that is not understood."""
    lines = [re.sub(r"//.*", "", line).strip() for line in ptx.split("\n")]
    entries = [n for n, line in enumerate(lines) if line.startswith(".visible .entry")]
    if len(entries) != 1:
        raise UnknownPTX(f"{len(entries)} kernels in a module, want 1")
    body = lines.index("{", entries[0])
    head = " ".join(lines[entries[0] : body])
    threads = re.search(r"\.reqntid (\d+)", head)
    name = re.search(r"\.entry (\w+)", head)
    if threads is None or name is None:
        raise UnknownPTX(f"line {entries[0] + 1}: no .reqntid: {head}")
    registers: dict[str, int] = {}
    labels: dict[str, int] = {}
    found: list[Instruction] = []
    depth = 0
    for number, line in enumerate(lines[body:], body + 1):
        statement = line.rstrip(";").strip()
        depth += {"{": 1, "}": -1}.get(statement, 0)
        if depth == 0:
            break
        if statement in ("", "{", "}") or statement.startswith(_SILENT):
            continue
        if statement.startswith(".reg"):
            registers |= _declared(number, statement)
        elif statement.endswith(":"):
            labels[statement[:-1]] = len(found)
        else:
            found.append(_instruction(number, statement))
    return Program(
        name=name[1],
        parameters=tuple(re.findall(rf"\b{name[1]}_param_\d+", head)),
        threads=int(threads[1]),
        registers=registers,
        instructions=tuple(_with_target(x, labels) for x in found),
    )


def _declared(number: int, statement: str) -> dict[str, int]:
    match = re.fullmatch(r"\.reg\s+\.(\w+)\s+([%\w]+)(?:<(\d+)>)?", statement)
    if match is None or match[1] not in _WIDTHS:
        raise UnknownPTX(f"line {number}: unknown declaration: {statement}")
    names = [match[2]] if match[3] is None else [f"{match[2]}{i}" for i in range(int(match[3]))]
    return dict.fromkeys(names, _WIDTHS[match[1]])


def _instruction(number: int, statement: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", statement)
    if match is None:
        raise UnknownPTX(f"line {number}: unknown statement: {statement}")
    negated, guard, opcode, operands = match.groups(default="")
    return Instruction(
        line=number,
        text=statement,
        opcode=opcode,
        operands=tuple(re.sub(r"\s+", "", x) for x in _OPERAND.findall(operands)),
        guard=(guard, not negated) if guard else None,
    )


def _with_target(x: Instruction, labels: dict[str, int]) -> Instruction:
    if x.opcode not in ("bra", "bra.uni"):
        return x
    if x.operands[0] not in labels:
        raise x.unknown("unknown label")
    return dataclasses.replace(x, target=labels[x.operands[0]])
