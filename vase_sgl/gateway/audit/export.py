"""Chains as JSON Lines, which can be checked without the store and without a key.

One object a line. `entry` is the text that `hash` is the SHA-256 of; `payload` is base64, as
stored, or null. Per tenant, in this order:

    {"kind": "start", "format": 1, "tenant", "sequence", "hash"}   what the first record follows
    {"kind": "checkpoint", "tenant", "number", "last_sequence", "entry", "hash"}       0 or more
    {"kind": "record", "tenant", "sequence", "record_id", "created_unix_micros", "entry",
     "payload", "hash"}                                                                0 or more
    {"kind": "end", "tenant", "sequence", "hash"}                  where the chain ended then
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, TextIO

from sqlalchemy.ext.asyncio import AsyncConnection

from vase_sgl.gateway.audit.chain import ChainCheck, Checkpoint, Problem
from vase_sgl.gateway.audit.entries import GENESIS, Row
from vase_sgl.gateway.audit.errors import AuditError
from vase_sgl.gateway.audit.reading import checkpoints_of, rows_of

#: Version of this file format.
FORMAT = 1


async def lines(
    connection: AsyncConnection, tenant: str, end: tuple[int, str]
) -> AsyncGenerator[str, None]:
    """The tenant's chain, line by line without newlines; `ends` said that it ends at `end`."""
    yield _line("start", format=FORMAT, tenant=tenant, sequence=0, hash=GENESIS)
    after = 0
    for checkpoint in await checkpoints_of(connection, tenant):
        yield _line("checkpoint", **vars(checkpoint))
        after = checkpoint.last_sequence
    async with aclosing(rows_of(connection, tenant, after=after)) as rows:
        async for row in rows:
            payload = None if row.payload is None else base64.b64encode(row.payload).decode()
            yield _line("record", **{**vars(row), "payload": payload})
    yield _line("end", tenant=tenant, sequence=end[0], hash=end[1])


def verify_file(file: TextIO) -> Iterator[tuple[str, ChainCheck, Problem | None]]:
    """Each tenant of an export with its check, and the first problem if there is one.

    Reads line by line. Raises `AuditError` for a file that is not an export, or not a whole one.
    """
    check: ChainCheck | None = None
    problem: Problem | None = None
    tenant = ""
    for number, text in enumerate(file, start=1):
        line = _parse(text, number)
        if line["kind"] == "start":
            if check is not None:
                raise AuditError(f"line {number}: the chain of {tenant} has no end")
            if line["format"] != FORMAT:
                raise AuditError(f"line {number}: unknown export format {line['format']}")
            tenant = line["tenant"]
            check, problem = ChainCheck(tenant, line["sequence"], line["hash"]), None
            continue
        if check is None:
            raise AuditError(f"line {number}: a {line['kind']} without a start before it")
        problem = problem or _check(check, line)
        if line["kind"] == "end":
            yield tenant, check, problem
            check = None
    if check is not None:
        raise AuditError(f"the file is cut off: the chain of {tenant} has no end")


def _check(check: ChainCheck, line: dict[str, Any]) -> Problem | None:
    values = {name: value for name, value in line.items() if name != "kind"}
    match line["kind"]:
        case "checkpoint":
            return check.checkpoint(Checkpoint(**values))
        case "record":
            return check.record(Row(**values))
        case _:
            return check.end(line["sequence"], line["hash"])


_NUMBERS = {"format", "sequence", "number", "last_sequence", "created_unix_micros"}
_FIELDS = {
    "start": {"format", "tenant", "sequence", "hash"},
    "checkpoint": set(Checkpoint.__dataclass_fields__),
    "record": set(Row.__dataclass_fields__),
    "end": {"tenant", "sequence", "hash"},
}


def _parse(text: str, number: int) -> dict[str, Any]:
    try:
        line = json.loads(text)
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
