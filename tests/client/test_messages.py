"""What never leaves the client because it cannot be right, and what is passed on as it is."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import grpc
import pytest

import vase_sgl.client
from vase_sgl.client import (
    NEVER,
    AsyncClient,
    Client,
    InvalidRequest,
    RetryPolicy,
    Tls,
    VaseError,
    types,
)
from vase_sgl.client.errors import from_status
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
        ("hi", {"budget": "128"}, "^budget: 'str' object"),
        ("hi", {"budget": True}, "^budget: .* got a boolean"),
        ("hi", {"seed": 2**63}, "^seed: Value out of range"),
        ("hi", {"top_k": 2**40}, "^top_k: Value out of range"),
        ("hi", {"temperature": 10**400}, "^temperature: int too large"),
        ("hi", {"stop": 5}, "^stop: must assign iterable"),
        ("hi", {"prompt_mode": "drop"}, "unknown prompt_mode 'drop'; choose one of evict, keep"),
        ([1.5], {}, "^prompt: 'float' object"),
        (5, {}, "^prompt: object of type 'int'"),
        (b"hi", {}, "^prompt: must be text, token ids or a list of messages, not bytes"),
        ({"role": "user", "content": "hi"}, {}, "^prompt: must be .*, not dict"),
        ([{"role": "user", "text": "hi"}], {}, "content is not one"),
        ([{"role": "user", "content": None}], {}, "content is not one"),
        ([{"role": "user", "content": "hi"}, 5], {}, "a message is a dict, not int"),
        ([5, {"role": "user", "content": "hi"}], {}, "^prompt: 'dict' object"),
        ([{"role": "user", "content": "hi", "name": "a"}], {}, 'no "name" field'),
    ],
)
def test_what_fits_no_message_is_refused(prompt: Any, options: Any, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        generate_request(prompt, 5, options)


@pytest.mark.parametrize("value", [2**40, 1.5, "12", True, float("nan")], ids=repr)
def test_every_call_says_which_number_is_none(value: Any) -> None:
    with Client("127.0.0.1:9", retry=NEVER) as client:
        for name in ("budget", "window", "prompt_tokens"):
            with pytest.raises(InvalidRequest, match=f"^{name}: ") as error:
                client.capacity(**{name: value})
            assert error.value.code == "INVALID_ARGUMENT"
        with pytest.raises(InvalidRequest, match=r"^max_new_tokens: "):
            client.generate("hi", max_new_tokens=value)
        with pytest.raises(InvalidRequest, match=r"^page_size: "):
            list(client.list_records(page_size=value))


async def test_every_async_call_does_too() -> None:
    async with AsyncClient("127.0.0.1:9", retry=NEVER) as client:
        with pytest.raises(InvalidRequest, match=r"^budget: "):
            await client.capacity(budget=2**40)
        with pytest.raises(InvalidRequest, match=r"^page_size: "):
            _ = [record async for record in client.list_records(page_size=2**40)]
        with pytest.raises(InvalidRequest, match=r"^record_id: "):
            await client.get_record("a\ud800")


@pytest.mark.parametrize("value", [datetime.date(2026, 11, 1), "2026-11-01"], ids=repr)
def test_a_moment_is_a_datetime(value: Any) -> None:
    with (
        Client("127.0.0.1:9", retry=NEVER) as client,
        pytest.raises(InvalidRequest, match="2026-11-01 is not a datetime with a time zone"),
    ):
        list(client.list_records(since=value))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e10, "12"], ids=repr)
def test_what_is_no_timeout_is_refused_at_once(value: Any) -> None:
    """gRPC takes the first three for moments that have passed."""
    with Client("127.0.0.1:9", retry=NEVER) as client:
        for call in (client.capacity, lambda timeout: client.generate("hi", timeout=timeout)):
            with pytest.raises(InvalidRequest, match=r"^timeout: must be seconds, up to 1e\+09"):
                call(timeout=value)


def test_every_type_that_a_call_gives_is_exported() -> None:
    made = {name for name, kind in vars(types).items() if dataclasses.is_dataclass(kind)}
    assert made <= set(vase_sgl.client.__all__)


def test_half_a_certificate_is_refused() -> None:
    """gRPC would abort the process."""
    for half in ({"certificate": b"PEM"}, {"key": b"PEM"}):
        with pytest.raises(ValueError, match="needs its key"):
            Tls(**half)


@pytest.mark.parametrize(
    "policy", [{"attempts": 0}, {"first_seconds": -1}, {"longest_seconds": float("nan")}], ids=str
)
def test_a_retry_policy_that_cannot_be(policy: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1 attempt and no negative wait"):
        RetryPolicy(**policy)


def test_a_timeout_that_passed_is_said_in_words() -> None:
    text = str(from_status(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))
    assert text == "the call's timeout passed; the request was aborted"


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("failed to connect to all addresses; last error: refused", "check host and port"),
        ("errors resolving gateway:1: Domain name not found", "check host and port"),
        ("errors resolving http://gateway:1: Misformatted domain name", "without http://"),
        ("failed to connect: Trying to connect an http1.x server", "take the gateway's gRPC port"),
        ("failed to connect: Socket closed", "does it want TLS, or a client's certificate"),
        ("failed to connect: Tls handshake failed: WRONG_VERSION_NUMBER", "TLS failed: check"),
        ("failed to connect: Hostname Verification Check failed.", "TLS failed: check"),
        ("failed to connect: Failed to create security handshaker.", "TLS failed: check"),
    ],
)
def test_a_failed_connection_says_what_to_check(said: str, advice: str) -> None:
    text = str(from_status(grpc.StatusCode.UNAVAILABLE, said))
    assert text.startswith("cannot connect to the gateway; ") and advice in text and said in text


@pytest.mark.parametrize("said", ["Stream removed (reset)", "Socket closed", "ping timeout"])
def test_a_lost_connection_says_so(said: str) -> None:
    text = str(from_status(grpc.StatusCode.UNAVAILABLE, said))
    assert text.startswith("the connection to the gateway was lost; ") and said in text


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
