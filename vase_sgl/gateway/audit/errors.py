"""What an operator is told about a store that cannot be used."""

from __future__ import annotations


class AuditError(Exception):
    """The store cannot be used. The text says where it is and what to do."""


def described(error: Exception) -> str:
    """The error's text, or its type where it has none, as that of a time limit."""
    return str(error) or type(error).__name__
