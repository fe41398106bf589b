"""Checking a tenant's chain: what breaks it, record by record."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from typing import Any

from vase_sgl.gateway.audit.entries import GENESIS, Row, hash_of


class Damage(enum.StrEnum):
    """How a chain is broken."""

    #: The content is not what was hashed.
    ALTERED = "altered"
    #: Records are gone.
    MISSING = "missing"
    #: A record stands in another's place.
    REORDERED = "reordered"
    #: A record follows another one than that before it: two chains were written.
    FORK = "fork"


@dataclasses.dataclass(frozen=True)
class Problem:
    """The first place where a chain is broken. `str(problem)` is for people."""

    damage: Damage
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.damage} at {self.where}: {self.detail}"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as stored."""

    tenant: str
    number: int
    last_sequence: int
    entry: str
    hash: str


class ChainCheck:
    """Checks one tenant's checkpoints, then its records, oldest first. Methods mutate the state.

    Each method returns the problem that its argument shows, or None. After a problem the check is
    over. sequence and hash: the place that the next record must follow.
    """

    def __init__(self, tenant: str, *, known: tuple[int, str] | None = None) -> None:
        """known: a sequence and its hash as they were noted elsewhere; a chain that was written
        anew from some record on has another hash there. It has to be at or after what was pruned:
        before that nothing is left to compare it with."""
        self.sequence = 0
        self.hash = GENESIS
        self.records = 0
        self._known = known
        self._known_was_compared = False
        self._tenant = tenant
        self._checkpoints = 0
        self._checkpoint_hash = GENESIS

    def checkpoint(self, stored: Checkpoint) -> Problem | None:
        """The next checkpoint: records up to it were pruned."""
        where = f"checkpoint {stored.number}"
        entry = _parse(stored.entry)
        if entry is None or hash_of(stored.entry) != stored.hash:
            return Problem(Damage.ALTERED, where, "its content was changed")
        if not _repeats(entry, stored, "tenant", "number", "last_sequence"):
            return Problem(Damage.ALTERED, where, "its columns are not what its entry says")
        if stored.number != self._checkpoints + 1:
            return Problem(
                Damage.MISSING, where, f"checkpoint {self._checkpoints + 1} is not before it"
            )
        if (
            entry.get("previous_hash") != self._checkpoint_hash
            or stored.last_sequence <= self.sequence
        ):
            return Problem(Damage.FORK, where, "it does not follow the checkpoint before it")
        self._checkpoints, self._checkpoint_hash = stored.number, stored.hash
        self.sequence, self.hash = stored.last_sequence, str(entry.get("last_hash"))
        return self._known_problem(where)

    def record(self, row: Row) -> Problem | None:
        """The next record."""
        where = f"record {row.record_id} (sequence {row.sequence})"
        entry = _parse(row.entry)
        if entry is None or hash_of(row.entry) != row.hash:
            return Problem(Damage.ALTERED, where, "its content was changed")
        place = entry.get("sequence")
        if place != row.sequence and entry.get("tenant") == row.tenant:
            return Problem(Damage.REORDERED, where, f"it was stored as sequence {place}")
        if not _repeats(entry, row, "tenant", "record_id", "created_unix_micros"):
            return Problem(Damage.ALTERED, where, "its columns are not what its entry says")
        if row.tenant != self._tenant:
            return Problem(Damage.FORK, where, f"it belongs to tenant {row.tenant}")
        if row.sequence <= self.sequence:
            return Problem(
                Damage.FORK if row.sequence == self.sequence else Damage.REORDERED,
                where,
                f"it comes after sequence {self.sequence}",
            )
        if row.sequence != self.sequence + 1:
            return Problem(
                Damage.MISSING, where, f"the record with sequence {self.sequence + 1} is not there"
            )
        if entry.get("previous_hash") != self.hash:
            return Problem(Damage.FORK, where, "it does not follow the record before it")
        problem = _payload_problem(entry, row)
        if problem is not None:
            return Problem(Damage.ALTERED, where, problem)
        self.sequence, self.hash = row.sequence, row.hash
        self.records += 1
        return self._known_problem(where)

    def end(self, sequence: int, hash: str) -> Problem | None:
        """The chain's end, as noted apart from the records."""
        if sequence > self.sequence:
            return Problem(
                Damage.MISSING,
                f"sequence {self.sequence + 1}",
                f"the chain was noted to go on to sequence {sequence}",
            )
        if (sequence, hash) != (self.sequence, self.hash):
            return Problem(
                Damage.FORK,
                f"sequence {self.sequence}",
                f"the chain was noted to end at sequence {sequence} with hash {hash}",
            )
        if self._known is not None and self._known[0] > self.sequence:
            return Problem(
                Damage.MISSING,
                f"sequence {self.sequence + 1}",
                f"the chain once went on to sequence {self._known[0]}",
            )
        if self._known is not None and not self._known_was_compared:
            return Problem(
                Damage.MISSING,
                f"sequence {self._known[0]}",
                "it was pruned, so this head can no longer be checked; use one that was noted at "
                f"sequence {self.sequence - self.records} or later",
            )
        return None

    def _known_problem(self, where: str) -> Problem | None:
        if self._known is None or self._known[0] != self.sequence:
            return None
        self._known_was_compared = True
        if self._known[1] == self.hash:
            return None
        return Problem(Damage.FORK, where, f"its hash was {self._known[1]} once")


def _parse(entry: str) -> dict[str, Any] | None:
    # A damaged SQLite row may hold any type in any column.
    try:
        found = json.loads(entry) if isinstance(entry, str) else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _repeats(entry: dict[str, Any], stored: object, *names: str) -> bool:
    return all(entry.get(name) == getattr(stored, name) for name in names)


def _payload_problem(entry: dict[str, Any], row: Row) -> str | None:
    described = entry.get("payload")
    if described is None:
        return None if row.payload is None else "it has a payload that its entry does not know"
    if row.payload is None:
        return "its payload is gone"
    if hashlib.sha256(row.payload).hexdigest() != described["sha256"]:
        return "its payload was changed"
    return None
