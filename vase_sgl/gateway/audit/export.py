"""Chains as JSON Lines, which can be checked without the store and without a key.

One object a line. `entry` is the text that `hash` is the SHA-256 of; `payload` is base64, as
stored, or null. Per tenant, in this order:

    {"kind": "start", "format": 2, "tenant", "sequence", "hash"}   0 and 64 zeros: what was pruned
                                                                   is told by checkpoints alone
    {"kind": "checkpoint", "tenant", "number", "last_sequence", "entry", "hash"}       0 or more
    {"kind": "record", "tenant", "sequence", "record_id", "created_unix_micros", "entry",
     "payload", "hash"}                                                                0 or more
    {"kind": "end", "tenant", "sequence", "hash"}                  where the chain ended then

And as the last line of the file, which shows that it was not cut off between two tenants:

    {"kind": "file-end", "chains"}                                 how many there are

Format 1 is the same without that line.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TextIO

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from vase_sgl.gateway.audit.chain import ChainCheck, Checkpoint, Damage, Problem
from vase_sgl.gateway.audit.entries import GENESIS, Row
from vase_sgl.gateway.audit.errors import AuditError
from vase_sgl.gateway.audit.reading import checkpoints_of, end_of, rows_of, snapshot

#: Version of this file format.
FORMAT = 2
#: The version whose files do not say where they end.
_ENDLESS_FORMAT = 1


async def lines(engine: AsyncEngine, tenants: Sequence[str]) -> AsyncGenerator[str, None]:
    """A file with the chains of these tenants, line by line without newlines.

    Each chain is as it was when it was begun.
    """
    for tenant in tenants:
        async with (
            snapshot(engine) as connection,
            aclosing(_chain_lines(connection, tenant)) as chain,
        ):
            async for line in chain:
                yield line
    yield _line("file-end", chains=len(tenants))


async def _chain_lines(connection: AsyncConnection, tenant: str) -> AsyncGenerator[str, None]:
    yield _line("start", format=FORMAT, tenant=tenant, sequence=0, hash=GENESIS)
    after = 0
    for checkpoint in await checkpoints_of(connection, tenant):
        yield _line("checkpoint", **vars(checkpoint))
        after = checkpoint.last_sequence
    async with aclosing(rows_of(connection, tenant, after=after)) as rows:
        async for row in rows:
            payload = None if row.payload is None else base64.b64encode(row.payload).decode()
            yield _line("record", **{**vars(row), "payload": payload})
    sequence, hash = await end_of(connection, tenant)
    yield _line("end", tenant=tenant, sequence=sequence, hash=hash)


class FileCheck:
    """The check of an export."""

    def __init__(self, known: Mapping[str, tuple[int, str]] | None = None) -> None:
        """known: as `ChainCheck` takes it, by tenant."""
        self._outline = _Outline()
        self._known = known or {}

    def chains(self, file: TextIO) -> Iterator[tuple[str, ChainCheck, Problem | None]]:
        """Each tenant of the file with its check, and the first problem if there is one.

        Reads line by line. Raises `AuditError` for a file that is not an export, or is seen not to
        be a whole one.
        """
        outline = self._outline
        check, problem = ChainCheck(""), None
        for number, text in enumerate(file, start=1):
            line = _parse(text, number)
            outline.add(line, number)
            match line["kind"]:
                case "start":
                    check = ChainCheck(line["tenant"], known=self._known.get(line["tenant"]))
                    problem = _start_problem(line)
                case "checkpoint" | "record":
                    problem = problem or _check(check, line)
                case "end":
                    yield outline.tenant, check, problem or _check(check, line)
        outline.finish()

    @property
    def may_be_cut_off(self) -> bool:
        """Whether whole chains may be gone from the end of the file, now that it was read: in
        format 1 nothing shows that."""
        return self._outline.endless


class _Outline:
    """Checks that the lines of a file come in an order that an export has.

    Methods raise `AuditError` if they do not. tenant: whose chain it is at, or was at last.
    """

    def __init__(self) -> None:
        self.tenant = ""
        self._format: int | None = None
        self._within_chain = False
        self._chains = 0
        self._ended = False

    def add(self, line: dict[str, Any], number: int) -> None:
        """The next line."""
        kind = line["kind"]
        if self._ended:
            raise AuditError(f"line {number}: a {kind} after the end of the file")
        if kind in ("start", "file-end"):
            if self._within_chain:
                raise AuditError(f"line {number}: the chain of {self.tenant} has no end")
        elif not self._within_chain:
            raise AuditError(f"line {number}: a {kind} without a start before it")
        match kind:
            case "start":
                self._start(line, number)
            case "end":
                self._within_chain = False
                self._chains += 1
            case "file-end":
                self._end(line["chains"], number)

    def finish(self) -> None:
        """There are no more lines."""
        if self._within_chain:
            raise AuditError(f"the file is cut off: the chain of {self.tenant} has no end")
        if not self._chains:
            raise AuditError("the file holds no chain")
        if not self._ended and not self.endless:
            raise AuditError("the file is cut off: its last line, a file-end, is not there")

    @property
    def endless(self) -> bool:
        """Whether it is a file that does not say where it ends."""
        return self._format == _ENDLESS_FORMAT

    def _start(self, line: dict[str, Any], number: int) -> None:
        found = line["format"]
        if self._format not in (None, found):
            raise AuditError(f"line {number}: export format {found} after {self._format}")
        self.tenant, self._format, self._within_chain = line["tenant"], found, True

    def _end(self, chains: int, number: int) -> None:
        if chains != self._chains:
            raise AuditError(
                f"line {number}: the file once held {chains} chains, and {self._chains} are there"
            )
        self._ended = True


def _start_problem(line: dict[str, Any]) -> Problem | None:
    """A chain whose beginning was cut off could start anywhere, and end with the right head."""
    if (line["sequence"], line["hash"]) == (0, GENESIS):
        return None
    return Problem(
        Damage.MISSING,
        "sequence 1",
        f"the chain starts after sequence {line['sequence']}, and no checkpoint says why",
    )


def _check(check: ChainCheck, line: dict[str, Any]) -> Problem | None:
    values = {name: value for name, value in line.items() if name != "kind"}
    match line["kind"]:
        case "checkpoint":
            return check.checkpoint(Checkpoint(**values))
        case "record":
            return check.record(Row(**values))
        case _:
            return check.end(line["sequence"], line["hash"])


_NUMBERS = {"format", "sequence", "number", "last_sequence", "created_unix_micros", "chains"}
_FIELDS = {
    "start": {"format", "tenant", "sequence", "hash"},
    "checkpoint": set(Checkpoint.__dataclass_fields__),
    "record": set(Row.__dataclass_fields__),
    "end": {"tenant", "sequence", "hash"},
    "file-end": {"chains"},
}


def _parse(text: str, number: int) -> dict[str, Any]:
    try:
        line = json.loads(text)
        # First: another format may have other fields.
        if line["kind"] == "start" and line["format"] not in (_ENDLESS_FORMAT, FORMAT):
            raise AuditError(
                f"line {number}: unknown export format {line['format']!r}; {_ENDLESS_FORMAT} and "
                f"{FORMAT} are known here, so use the version that wrote it"
            )
        fields = _FIELDS[line["kind"]]
        if fields == set(line) - {"kind"} and all(
            isinstance(line[name], int if name in _NUMBERS else str)
            for name in fields - {"payload"}
        ):
            if line.get("payload") is not None:
                line["payload"] = base64.b64decode(line["payload"], validate=True)
            return dict(line)
    except (ValueError, KeyError, TypeError, binascii.Error):
        pass
    raise AuditError(f"line {number} is not one of `vase-sgl audit export`")


def _line(kind: str, **values: Any) -> str:
    return json.dumps({"kind": kind, **values}, ensure_ascii=False, separators=(",", ":"))
