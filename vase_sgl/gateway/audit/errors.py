"""What an operator is told about a store that cannot be used."""

from __future__ import annotations


class AuditError(Exception):
    """The store cannot be used. The text says where it is and what to do."""
