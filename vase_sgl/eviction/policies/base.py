"""What every eviction policy declares. Scoring itself lives in `vase_kernels`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar


class ParameterError(ValueError):
    """A request's eviction parameters are wrong. The text names the field and the cure."""


def require(condition: bool, message: str) -> None:
    """Raise `ParameterError(message)` unless `condition` holds."""
    if not condition:
        raise ParameterError(message)


def require_int(name: str, value: object, low: int, high: int) -> None:
    """`value` must be an int (not a bool) in [low, high]."""
    require(
        isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
        f"{name} must be an integer from {low} to {high}, got {value!r}",
    )


def require_share(name: str, value: object) -> None:
    """`value` must be a number (not a bool) in [0, 1]."""
    require(
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1,
        f"{name} must be a number from 0 to 1, got {value!r}",
    )


def require_pool_width(value: int) -> None:
    """`value` must be an odd int in [1, 63]."""
    require_int("pool_width", value, 1, 63)
    require(value % 2 == 1, f"pool_width must be odd, got {value}")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Configuration of one policy: a name, its own fields and what it has to read.

    Subclasses are frozen dataclasses. Their fields are the policy's request parameters and reach
    `vase_kernels` unchanged as keyword arguments, so a field is declared exactly once.
    """

    name: ClassVar[str]
    evicts: ClassVar[bool] = True
    #: True if scoring reads the last `window` post-RoPE queries of every layer.
    needs_queries: ClassVar[bool] = False

    def validate(self, budget: int, window: int) -> None:
        """Raise `ParameterError` if the fields do not fit each other, `budget` or `window`."""

    def fields(self) -> dict[str, Any]:
        """The policy's own fields by name, as the kernels take them."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class SinkPolicy(Policy):
    """A policy that never evicts the first `num_sinks` token positions (attention sinks)."""

    num_sinks: int = 4

    def validate(self, budget: int, window: int) -> None:
        require_int("num_sinks", self.num_sinks, 0, 1024)
        require(
            self.num_sinks <= budget - window,
            f"num_sinks {self.num_sinks} does not fit: budget {budget} minus window {window} "
            f"leaves {budget - window} tokens outside the window; raise budget or lower num_sinks",
        )
