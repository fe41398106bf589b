"""The audit store: every generation, append-only, hash-chained per tenant."""

from __future__ import annotations

from vase_sgl.gateway.audit.records import Record, RecordStatus, StoredRecord, Timings
from vase_sgl.gateway.audit.store import AuditError, AuditStore

__all__ = ["AuditError", "AuditStore", "Record", "RecordStatus", "StoredRecord", "Timings"]
