"""The audit store: every generation, append-only, hash-chained per tenant."""

from __future__ import annotations

from vase_sgl.gateway.audit.encryption import KeyRing
from vase_sgl.gateway.audit.errors import AuditError
from vase_sgl.gateway.audit.records import (
    ContentDigests,
    Record,
    RecordStatus,
    StoredRecord,
    Summary,
    Timings,
    newer_record,
)
from vase_sgl.gateway.audit.store import AuditStore

__all__ = [
    "AuditError",
    "AuditStore",
    "ContentDigests",
    "KeyRing",
    "Record",
    "RecordStatus",
    "StoredRecord",
    "Summary",
    "Timings",
    "newer_record",
]
