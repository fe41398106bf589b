"""The key that a worker asks its callers for, so that nobody reaches it past the gateway."""

from __future__ import annotations

#: Where a worker reads its key, and the gateway its setting `worker.api_key`: one secret serves
#: both. A variable, because command lines are open to every user of a machine.
WORKER_KEY = "VASE_WORKER__API_KEY"

_MIN_LENGTH = 16


def check_key(key: str) -> None:
    """Raise `ValueError` for a key that is easily guessed or cannot be sent."""
    visible = key.isascii() and key.isprintable() and " " not in key
    if len(key) < _MIN_LENGTH or not visible:
        raise ValueError(
            f"must be at least {_MIN_LENGTH} ASCII characters without spaces; "
            "`openssl rand -hex 32` makes one"
        )


class HiddenKey(str):
    """A key that does not show in a `repr`, by which SGLang logs its settings."""

    def __repr__(self) -> str:
        return "'***'"
