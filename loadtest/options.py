"""The options of a load test, beside Locust's own."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loadtest.problems import BadSetup, explained
from loadtest.prompts import SYNTHETIC
from loadtest.scenarios import SCENARIOS, Scenario
from vase_sgl.client import Capacity
from vase_sgl.client.messages import Options as CallOptions
from vase_sgl.client.types import PromptMode
from vase_sgl.eviction.params import PROMPT_MODES, EvictionLimits, EvictionParams
from vase_sgl.eviction.policies import POLICIES
from vase_sgl.eviction.policies.base import ParameterError

#: What the usual chat templates (ChatML, Llama 3, Gemma) put around a message.
_MESSAGE_TOKENS = 5


class Settings(BaseModel):
    """What the calls of a test are. `of` makes it; every field is an option of the same name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenario: str
    budget: int | None = Field(ge=2)
    window: int | None = Field(ge=1)
    policy: str | None
    prompt_mode: str | None
    prompts: str
    prompt_tokens: int | None = Field(ge=1)
    prompt_seed: int
    max_new_tokens: int | None = Field(ge=1)
    temperature: float = Field(ge=0)
    stop_at_eos: bool
    think_seconds: float = Field(ge=0)
    call_timeout: float = Field(gt=0)
    turns: int | None = Field(ge=1)
    replay_share: float | None = Field(ge=0, le=1)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Settings from parsed options; "" counts as absent, as forms send it.

        Raises `BadSetup`.
        """
        given = {name: options[name] for name in cls.model_fields}
        try:
            return cls.model_validate({k: None if v == "" else v for k, v in given.items()})
        except ValidationError as error:
            raise BadSetup(explained(error, options=True)) from error

    @model_validator(mode="after")
    def _check(self) -> Settings:
        for name, value, known in (
            ("scenario", self.scenario, tuple(SCENARIOS)),
            ("policy", self.policy, tuple(POLICIES)),
            ("prompt-mode", self.prompt_mode, PROMPT_MODES),
        ):
            if value is not None and value not in known:
                raise ValueError(f"unknown --{name} {value!r}; choose from {', '.join(known)}")
        if self.turns is not None and not self._is_conversation:
            raise ValueError(f"--turns is for agent-loop, not for {self.scenario}")
        if self.replay_share is not None and self.load.calls != "replays":
            raise ValueError(f"--replay-share is for replay-mix, not for {self.scenario}")
        if self.prompts != SYNTHETIC:
            if self.prompt_tokens is not None:
                raise ValueError("--prompt-tokens is for synthetic prompts; leave it out")
            if self._is_conversation:
                raise ValueError("agent-loop makes up its prompts; leave --prompts out")
        if self.budget is None and (self.window is not None or self.prompt_mode is not None):
            raise ValueError("--window and --prompt-mode go with a --budget")
        return self

    @property
    def load(self) -> Scenario:
        """The scenario."""
        return SCENARIOS[self.scenario]

    @property
    def answer_tokens(self) -> int:
        """`max_new_tokens`, or the scenario's own."""
        return self.max_new_tokens or self.load.max_new_tokens

    @property
    def synthetic_tokens(self) -> int:
        """`prompt_tokens`, or the scenario's own."""
        return self.prompt_tokens or self.load.prompt_tokens

    @property
    def conversation_turns(self) -> int:
        """`turns`, or 5."""
        return self.turns or 5

    @property
    def share_of_replays(self) -> float:
        """`replay_share`, or a quarter."""
        return 0.25 if self.replay_share is None else self.replay_share

    def call_options(self) -> CallOptions:
        """What every generation is called with."""
        return CallOptions(
            budget=self.budget,
            window=self.window,
            policy=self.policy,
            prompt_mode=cast(PromptMode | None, self.prompt_mode),
            temperature=self.temperature,
            ignore_eos=not self.stop_at_eos,
        )

    def check_against(self, capacity: Capacity, tenant: str) -> None:
        """Raise `BadSetup` for what the gateway would refuse of this tenant anyway."""
        if self.policy is not None and self.policy not in capacity.policies:
            raise BadSetup(
                f"tenant {tenant} may not use policy {self.policy}, only "
                f"{', '.join(capacity.policies)}"
            )
        if self.budget is not None or self.policy is not None:
            wanted = {
                "budget": self.budget,
                "window": self.window,
                "policy": self.policy,
                "prompt": self.prompt_mode,
            }
            limits = EvictionLimits(capacity.max_budget, capacity.max_window)
            try:
                EvictionParams.parse({k: v for k, v in wanted.items() if v is not None}, limits)
            except ParameterError as error:
                raise BadSetup(f"tenant {tenant}: {error}") from error
        if self.answer_tokens > capacity.max_new_tokens:
            raise BadSetup(
                f"tenant {tenant} may ask for {capacity.max_new_tokens} tokens at most, not "
                f"{self.answer_tokens}; lower --max-new-tokens"
            )
        longest = self._longest_tokens
        if longest > capacity.context_length:
            raise BadSetup(
                f"about {longest} tokens do not fit the model's context of "
                f"{capacity.context_length}; lower --prompt-tokens, --max-new-tokens or --turns"
            )
        prompt = longest - self.answer_tokens
        if prompt > capacity.max_prompt_tokens:
            raise BadSetup(
                f"tenant {tenant} may send prompts of {capacity.max_prompt_tokens} tokens at most, "
                f"not of about {prompt}; lower --prompt-tokens"
                + (", --max-new-tokens or --turns" if self._is_conversation else "")
            )

    @property
    def _longest_tokens(self) -> int:
        """Prompt and answer of the longest call, about; of prompts of a file nothing is known."""
        turn = (self.synthetic_tokens if self._made_up else 1) + self.answer_tokens
        if not self._is_conversation:
            return turn
        return self.conversation_turns * (turn + 2 * _MESSAGE_TOKENS)

    @property
    def _is_conversation(self) -> bool:
        return self.load.calls == "conversation"

    @property
    def _made_up(self) -> bool:
        return self.prompts == SYNTHETIC


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module to Locust's parser, and change two of its defaults."""
    parser.set_defaults(stop_timeout=30.0, spawn_rate=100.0)
    add = parser.add_argument
    add("--scenario", choices=tuple(SCENARIOS), default="steady", help="Kind of load.")
    add("--budget", type=int, help="KV entries kept per layer and KV head; absent: the gateway's.")
    add("--window", type=int, help="Recent tokens that are never evicted.")
    add("--policy", choices=tuple(POLICIES), help="Eviction policy; `full` never evicts.")
    add("--prompt-mode", choices=PROMPT_MODES, help="What happens to the prompt's KV entries.")
    add("--prompts", default=SYNTHETIC, help="`synthetic`, or a JSONL file of prompts.")
    add("--prompt-tokens", type=int, help="Words of a synthetic prompt, about one token each.")
    add("--prompt-seed", type=int, default=0, help="What the prompts are drawn with.")
    add("--max-new-tokens", type=int, help="Tokens of an answer.")
    add("--temperature", type=float, default=1.0, help="0: greedy.")
    add("--stop-at-eos", action="store_true", help="Let the model end answers early.")
    add("--think-seconds", type=float, default=0.0, help="A user's pause between calls.")
    add("--call-timeout", type=float, default=600.0, help="Deadline of one call, in seconds.")
    add("--turns", type=int, help="agent-loop: turns of a conversation; 5 if absent.")
    add("--replay-share", type=float, help="replay-mix: share of replays; 0.25 if absent.")
    # Not in the web form: read before it is shown, or no business of who sees it.
    files: dict[str, Any] = {"include_in_web_ui": False}
    add("--tenants", help="YAML file of callers; absent: one, key in VASE_API_KEY.", **files)
    add("--gateway-ca", help="Connect with TLS; PEM file of who signs.", **files)
    add("--client-cert", help="The caller's own certificate, PEM.", **files)
    add("--client-key", help="Its private key, PEM.", **files)
    add("--slo", help="YAML file of thresholds; a missed one ends in exit status 3.", **files)
    add("--result", help="Write the result to this JSON file; -: to standard output.", **files)
