"""The hash chain of a tenant's records: a changed, removed or reordered record breaks it."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from vase_sgl.gateway.audit.records import Record, StoredRecord

#: What the first record of a tenant follows.
GENESIS = "0" * 64


def chain_hash(record: Record, sequence: int, previous_hash: str) -> str:
    """SHA-256, in hex, over record, sequence and previous hash as canonical JSON.

    Canonical: keys sorted, no spaces, UTF-8, floats as Python's shortest repr. It is a contract:
    another encoding would break every chain there is.
    """
    content = {
        **dataclasses.asdict(record),
        "sequence": sequence,
        "previous_hash": previous_hash,
    }
    canonical = json.dumps(
        content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


class ChainCheck:
    """Checks a tenant's records one by one, oldest first. `add` mutates the state."""

    def __init__(self) -> None:
        self._sequence = 0
        self._hash = GENESIS

    def add(self, stored: StoredRecord) -> str | None:
        """How `stored` breaks the chain, or None if it continues it."""
        name = f"record {stored.record.record_id} (sequence {stored.sequence})"
        if stored.sequence != self._sequence + 1:
            return f"{name}: the record with sequence {self._sequence + 1} is missing before it"
        if stored.previous_hash != self._hash:
            return f"{name}: it does not follow the record before it"
        if stored.hash != chain_hash(stored.record, stored.sequence, stored.previous_hash):
            return f"{name}: its content was changed"
        self._sequence, self._hash = stored.sequence, stored.hash
        return None
