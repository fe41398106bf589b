"""Arms of the comparison: how the KV cache is kept, and by what kind of worker.

An arm is written `NAME[+keep][?FIELD=VALUE[&FIELD=VALUE…]]`: a policy, with the prompt never
evicted, with fields of the policy's own. `full` takes two more names, for other worker flags.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from vase_sgl.eviction.params import WIDEST, EvictionParams
from vase_sgl.eviction.policies import POLICIES, ParameterError

#: Name of the arm that the others are compared with.
BASELINE = "full"
#: The arms of the whole matrix, by the name `matrix`.
MATRIX = "matrix"

PRODUCTION = "production"
CONSTRAINED = "constrained"
FP8 = "fp8"

#: Worker configurations and what they add to the flags of the user.
WORKER_FLAGS: Mapping[str, tuple[str, ...]] = {
    # SGLang as it is run in production. Policies need nothing switched off.
    PRODUCTION: (),
    # What other evicting engines demand: shows what those flags alone cost.
    CONSTRAINED: ("--disable-radix-cache", "--disable-overlap-schedule"),
    FP8: ("--kv-cache-dtype", "fp8_e4m3"),
}
#: Each against its default shows one part, the first two against each other the draw alone.
_ISOLATING = ("vase-attnv?protected_share=0", "snapkv?num_sinks=4", "rkv?mix_lambda=0.5")
_FULL_ARMS = {BASELINE: PRODUCTION, "full-constrained": CONSTRAINED, "full-fp8": FP8}


class ArmError(ValueError):
    """An arm that does not exist or whose parameters are wrong. The text names the cure."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to keep the cache.

    name: as it was written. worker: a key of `WORKER_FLAGS`. eviction: the explicit parameters as
    `EvictionParams.to_mapping` gives them, without the seed; only the policy for a full cache.
    """

    name: str
    worker: str
    eviction: Mapping[str, Any]

    @property
    def policy(self) -> str:
        return str(self.eviction["policy"])

    @property
    def budget(self) -> int | None:
        """KV entries kept per layer and KV head; None for a full cache."""
        return self.eviction.get("budget")

    @property
    def window(self) -> int | None:
        return self.eviction.get("window")

    @property
    def prompt_mode(self) -> str | None:
        return self.eviction.get("prompt")

    @property
    def label(self) -> str:
        """Name and budget, for people."""
        return self.name if self.budget is None else f"{self.name} @ {self.budget}"

    def params(self, seed: int) -> dict[str, Any]:
        """The request's `vase` parameters."""
        return {**self.eviction, "seed": seed}


def matrix_names() -> list[str]:
    """Every arm: full caches, each policy, each of VaSE's and `random` with the prompt kept.

    And `_ISOLATING`.
    """
    evicting = [name for name, policy in POLICIES.items() if policy.evicts]
    kept = [f"{name}+keep" for name in evicting if name.startswith("vase-") or name == "random"]
    return [*_FULL_ARMS, *evicting, *kept, *_ISOLATING]


def plan(names: Sequence[str], budgets: Sequence[int], window: int) -> list[Arm]:
    """An arm per name and budget, grouped by worker configuration; full caches have no budget.

    Raises `ArmError`.
    """
    expanded = [each for name in names for each in (matrix_names() if name == MATRIX else [name])]
    arms = [arm for name in dict.fromkeys(expanded) for arm in _arms(name, budgets, window)]
    if not arms:
        raise ArmError("no arms: name at least one policy")
    order = list(WORKER_FLAGS)
    return sorted(arms, key=lambda arm: order.index(arm.worker))


def _arms(name: str, budgets: Sequence[int], window: int) -> list[Arm]:
    if name in _FULL_ARMS:
        return [Arm(name, _FULL_ARMS[name], {"policy": "full"})]
    base, _, query = name.partition("?")
    policy, plus, mode = base.partition("+")
    if policy in _FULL_ARMS:
        raise ArmError(f"{name}: a full cache takes no further parameters; write {policy}")
    if policy not in POLICIES:
        known = [*(p for p in POLICIES if p not in _FULL_ARMS), *_FULL_ARMS, MATRIX]
        raise ArmError(f"there is no policy {policy!r}; choose from {', '.join(known)}")
    if plus and mode != "keep":
        raise ArmError(f"{name}: after the + only `keep` is known, which never evicts the prompt")
    if not budgets:
        raise ArmError(f"{name} needs a budget: give --budgets, such as 256,512")
    raw = {
        "policy": policy,
        "window": window,
        "prompt": "keep" if plus else "evict",
        **_fields(name, query),
    }
    return [Arm(name, PRODUCTION, _explicit(name, {**raw, "budget": b})) for b in budgets]


def _fields(name: str, query: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        field, equals, value = part.partition("=")
        if field in ("budget", "window", "prompt", "policy", "seed") or not equals:
            raise ArmError(
                f"{name}: after the ? stand fields of the policy's own, as FIELD=NUMBER; budget, "
                "window and seeds are options"
            )
        try:
            fields[field] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ArmError(f"{name}: {field} is not a number: {value!r}") from error
    return fields


def _explicit(name: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Validated, with every default filled in. A worker's own ceilings are checked later."""
    try:
        params = EvictionParams.parse(raw, WIDEST)
    except ParameterError as error:
        raise ArmError(f"{name} at budget {raw['budget']}: {error}") from error
    return {key: value for key, value in params.to_mapping().items() if key != "seed"}
