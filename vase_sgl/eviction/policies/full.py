"""Full KV cache: the baseline that never evicts."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vase_sgl.eviction.policies.base import Policy


@dataclasses.dataclass(frozen=True)
class Full(Policy):
    """Keeps every token. Budget and window are recorded, not applied."""

    name: ClassVar[str] = "full"
    evicts: ClassVar[bool] = False
