"""The key that a worker asks its callers for, so that nobody reaches it past the gateway."""

from __future__ import annotations

#: Where a worker reads its key, and the gateway its setting `worker.api_key`: one secret serves
#: both. A variable, because command lines are open to every user of a machine.
WORKER_KEY = "VASE_WORKER__API_KEY"


class HiddenKey(str):
    """A key that does not show in a `repr`, by which SGLang logs its settings."""

    def __repr__(self) -> str:
        return "'***'"
