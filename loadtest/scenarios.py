"""What the users of a test do, and how many of them there are over time."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

#: Steps in which a ramp climbs.
_RAMP_STEPS = 20
#: Share of the users that a spike starts from and falls back to.
_SPIKE_BASE = 0.1


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A kind of load.

    calls: what one user repeats: single `answers`, a growing `conversation`, or `replays` among
    answers. prompt_tokens, max_new_tokens: defaults of the options of the same names.
    """

    summary: str
    shape: Literal["steady", "ramp", "spike"] = "steady"
    calls: Literal["answers", "conversation", "replays"] = "answers"
    prompt_tokens: int = 128
    max_new_tokens: int = 128


SCENARIOS = {
    "steady": Scenario("all users from the start"),
    "ramp": Scenario("from none to all users over the run time", shape="ramp"),
    "spike": Scenario("a tenth of the users; all of them in the middle third", shape="spike"),
    "long-thinkers": Scenario("short prompts, very long answers", max_new_tokens=4096),
    "noisy-neighbour": Scenario("tenants marked `noisy` pay no heed to limits, the others do"),
    "agent-loop": Scenario(
        "conversations whose prompt grows with every turn", calls="conversation", prompt_tokens=64
    ),
    "replay-mix": Scenario("answers, and replays of the user's own answers", calls="replays"),
}


def users_at(scenario: Scenario, users: int, seconds: float, run_time: float | None) -> int | None:
    """Users wanted after `seconds`; None: the test is over. Without a run time it never is.

    `ramp` and `spike` need a run time.
    """
    if run_time is None:
        return users
    if seconds >= run_time:
        return None
    share = seconds / run_time
    match scenario.shape:
        case "steady":
            return users
        case "ramp":
            return math.ceil(users * (math.floor(share * _RAMP_STEPS) + 1) / _RAMP_STEPS)
        case "spike":
            return users if 1 / 3 <= share < 2 / 3 else math.ceil(users * _SPIKE_BASE)
