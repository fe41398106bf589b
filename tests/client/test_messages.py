"""What never leaves the client because it cannot be right, and what is passed on as it is."""

from __future__ import annotations

from typing import Any

import pytest

from vase_sgl.client import InvalidRequest, VaseError
from vase_sgl.client.messages import generate_request, record, summary, verdict
from vase_sgl.rpc.v1 import gateway_pb2 as pb


def test_only_what_is_given_is_sent() -> None:
    request = generate_request("hi", 5, {"temperature": 0, "budget": None})
    assert not request.HasField("eviction") and not request.HasField("seed")
    assert request.sampling.HasField("temperature") and not request.sampling.HasField("top_p")
    request = generate_request("hi", 5, {"budget": 64, "num_sinks": 0, "seed": 0})
    assert request.eviction.HasField("num_sinks") and not request.eviction.HasField("window")
    assert request.HasField("seed") and not request.HasField("sampling")


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("hi", "text"),
        ("", "text"),
        ([1, 2], "token_ids"),
        ((1, 2), "token_ids"),
        ([], "token_ids"),
        ([{"role": "user", "content": "hi"}], "chat"),
    ],
)
def test_the_kind_of_prompt_is_told_by_its_type(prompt: Any, kind: str) -> None:
    assert generate_request(prompt, 5, {}).WhichOneof("input") == kind


def test_one_stop_string_is_not_taken_for_its_letters() -> None:
    assert list(generate_request("hi", 5, {"stop": "END"}).sampling.stop) == ["END"]


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        ("hi", {"tempature": 0.5}, "unknown option tempature; known are budget"),
        ("hi", {"budget": "128"}, "an option does not fit"),
        ("hi", {"seed": 2**63}, "an option does not fit"),
        ("hi", {"prompt_mode": "drop"}, "unknown prompt_mode 'drop'; choose one of evict, keep"),
        ([1.5], {}, "an option does not fit"),
        ([{"role": "user", "text": "hi"}], {}, "an option does not fit"),
    ],
)
def test_what_fits_no_message_is_refused(prompt: Any, options: Any, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        generate_request(prompt, 5, options)


@pytest.mark.parametrize("value", [0, 99])
def test_what_a_newer_or_older_gateway_says_is_unknown(value: Any) -> None:
    """Enums of proto3 are open: a number without a name arrives as it is."""
    same = pb.ReplayVerdict.OUTCOME_MATCH
    assert verdict(pb.ReplayVerdict(outcome=same, seed_check=value)).seed_check == "UNKNOWN"
    eviction = pb.EvictionParams(policy="new", prompt_mode=value)
    whole = record(pb.Record(status=value, retention=value, eviction=eviction))
    assert (whole.status, whole.retention) == ("unknown", "unknown")
    assert whole.eviction is not None and whole.eviction.prompt_mode == "unknown"
    short = summary(pb.RecordSummary(status=value, retention=value))
    assert (short.status, short.retention) == ("unknown", "unknown")


def test_an_outcome_that_is_not_known_is_an_error() -> None:
    with pytest.raises(VaseError, match="outcome 99, which this client does not know"):
        verdict(pb.ReplayVerdict(outcome=99))  # type: ignore[arg-type]
