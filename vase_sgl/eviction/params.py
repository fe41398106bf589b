"""A request's eviction parameters: parsed and validated alike by gateway and engine.

Imports no torch, so that the gateway can use it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vase_sgl.eviction.policies import Policy, policy_class
from vase_sgl.eviction.policies.base import ParameterError, require, require_int

#: `evict`: the budget covers prompt and output (the paper's setting). `keep`: the prompt is never
#: evicted and the budget covers generated tokens alone.
PROMPT_MODES = ("evict", "keep")
DEFAULT_WINDOW = 64
DEFAULT_POLICY = "vase-attnv"
#: Of every seed, sampling's too: 63 bits fit into a signed integer of 64.
MAX_SEED = 2**63 - 1
_WIDEST_BUDGET = 2**20
_WIDEST_WINDOW = 4096

_COMMON_KEYS = ("budget", "window", "policy", "prompt", "seed", "inspect")


@dataclasses.dataclass(frozen=True)
class EvictionLimits:
    """Server-side ceilings a request may not pass."""

    max_budget: int = 16384
    max_window: int = 64

    def __post_init__(self) -> None:
        require_int("max_window", self.max_window, 1, _WIDEST_WINDOW)
        require_int("max_budget", self.max_budget, 2, _WIDEST_BUDGET)


#: Ceilings as wide as a server may have them: for who does not know the server's own.
WIDEST = EvictionLimits(_WIDEST_BUDGET, _WIDEST_WINDOW)


@dataclasses.dataclass(frozen=True)
class EvictionParams:
    """Validated eviction parameters of one request.

    budget: KV entries kept per layer and KV head after a round, the recent window included;
        with prompt mode `keep`, beside the prompt.
    window: recent tokens never evicted; also the eviction period and the query window.
    prompt: one of `PROMPT_MODES`.
    seed: key of every random draw; the same seed forgets the same tokens.
    inspect: write what is kept to a file. It changes neither tokens nor digests.
    """

    budget: int
    window: int
    policy: Policy
    prompt: str
    seed: int
    inspect: bool = False

    @classmethod
    def parse(cls, raw: object, limits: EvictionLimits | None = None) -> EvictionParams:
        """Parse `custom_params["vase"]`. Raises `ParameterError`; unknown keys are errors."""
        limits = limits or EvictionLimits()
        if not isinstance(raw, Mapping):
            raise ParameterError(f"vase must be an object with at least a budget, got {raw!r}")
        policy_type = policy_class(raw.get("policy", DEFAULT_POLICY))
        own = [f.name for f in dataclasses.fields(policy_type)]
        unknown = sorted(str(key) for key in raw if key not in _COMMON_KEYS and key not in own)
        require(
            not unknown,
            f"unknown key {', '.join(unknown)} in vase; policy {policy_type.name} "
            f"takes {', '.join([*_COMMON_KEYS, *own])}",
        )
        if policy_type.evicts:
            require("budget" in raw, "vase.budget is missing: the KV entries to keep per head")
        window = raw.get("window", min(DEFAULT_WINDOW, limits.max_window))
        budget = raw.get("budget", limits.max_budget)
        prompt = raw.get("prompt", "evict")
        seed = raw.get("seed", 0)
        inspect = raw.get("inspect", False)
        # Without evictions they are recorded and not applied: another worker's stay as they are.
        ceilings = limits if policy_type.evicts else WIDEST
        require_int("window", window, 1, ceilings.max_window)
        require_int("budget", budget, 1, ceilings.max_budget)
        require_int("seed", seed, 0, MAX_SEED)
        require(
            isinstance(prompt, str) and prompt in PROMPT_MODES,
            f"prompt must be one of {', '.join(PROMPT_MODES)}, got {prompt!r}",
        )
        require(isinstance(inspect, bool), f"inspect must be true or false, got {inspect!r}")
        if policy_type.evicts:
            require(
                budget > window,
                f"budget {budget} must be greater than window {window}: the window alone fills it; "
                "raise budget or lower window",
            )
        policy = policy_type(**{name: raw[name] for name in own if name in raw})
        policy.validate(budget, window)
        return cls(budget, window, policy, prompt, seed, inspect)

    def to_mapping(self) -> dict[str, Any]:
        """The full, explicit form: `parse(to_mapping())` gives an equal object."""
        return {
            "budget": self.budget,
            "window": self.window,
            "policy": self.policy.name,
            "prompt": self.prompt,
            "seed": self.seed,
            **({"inspect": True} if self.inspect else {}),
            **self.policy.fields(),
        }

    def pinned(self, prompt_tokens: int) -> int:
        """Leading columns that are never evicted, scored or written: the prompt, if it is kept."""
        return prompt_tokens if self.prompt == "keep" else 0

    def kept_length(self, prompt_tokens: int) -> int:
        """Cached tokens right after a round."""
        return self.pinned(prompt_tokens) + self.budget

    def steady_slots(self, prompt_tokens: int) -> int:
        """KV slots that it holds from the first round on."""
        return self.kept_length(prompt_tokens) + self.window

    def first_round_length(self, prompt_tokens: int) -> int:
        """Cached tokens at which the first round is due: the most the request ever has.

        What is reserved may be more for the moment of that round, see `reserved_slots`.
        `max(prompt, budget) + window` in prompt mode `evict`, `prompt + budget + window` in `keep`.
        """
        return _first_round(prompt_tokens, self.budget, self.window, self.prompt)

    def reserved_slots(
        self, prompt_tokens: int, max_new_tokens: int, *, prefix_cache: bool, page_size: int = 1
    ) -> int:
        """As the function `reserved_slots`; all tokens for a policy that never evicts."""
        if not self.policy.evicts:
            return _in_pages(prompt_tokens + max_new_tokens, page_size)
        return reserved_slots(
            prompt_tokens,
            max_new_tokens,
            budget=self.budget,
            window=self.window,
            prompt=self.prompt,
            prefix_cache=prefix_cache,
            page_size=page_size,
        )


def reserved_slots(
    prompt_tokens: int,
    max_new_tokens: int,
    *,
    budget: int,
    window: int,
    prompt: str,
    prefix_cache: bool,
    page_size: int,
) -> int:
    """KV slots, in whole pages, that a worker reserves for a request when it lets it in.

    From the first round on it holds `budget + window`, and the prompt in prompt mode `keep`. The
    most it holds, for one moment, is in that round: in prompt mode `evict` with a prefix cache the
    prompt belongs to the cache's tree, and what is kept of it is copied into slots of its own.
    An answer too short for a round takes its tokens alone.
    """
    total = prompt_tokens + max_new_tokens
    first_round = _first_round(prompt_tokens, budget, window, prompt)
    if total <= first_round:
        return _in_pages(total, page_size)
    copied = 0
    if prefix_cache and prompt == "evict":
        copied = min(prompt_tokens, _in_pages(budget + window, page_size))
    return _in_pages(first_round, page_size) + _in_pages(copied, page_size)


#: Pages beside these that an idle worker must have to let a request in: SGLang's PrefillAdder wants
#: one more than it needs, and strictly less than what is free.
SPARE_PAGES = 2


def _first_round(prompt_tokens: int, budget: int, window: int, prompt: str) -> int:
    """Cached tokens at which the first round is due."""
    if prompt == "keep":
        return prompt_tokens + budget + window
    return max(prompt_tokens, budget) + window


def _in_pages(slots: int, page_size: int) -> int:
    return -(-slots // page_size) * page_size
