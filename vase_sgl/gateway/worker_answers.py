"""What the answers of a worker's HTTP server mean: output, state, errors."""

from __future__ import annotations

import contextlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vase_sgl.gateway.errors import GatewayError, InvalidRequest, WorkerUnavailable
from vase_sgl.gateway.workers import (
    CacheStats,
    Finish,
    Thinking,
    TokenPrefix,
    WorkerChunk,
    WorkerInfo,
)

#: The payload that ends a stream.
DONE = b"[DONE]"
#: Characters that an answer may have for each of its tokens. The longest of DeepSeek V3, gpt-oss,
#: Llama 3 and Qwen 3 have 128 (blanks), and of added tokens nobody has one of such a length.
MAX_TOKEN_CHARS = 1024
#: What an answer of another shape than SGLang's leads to.
NOT_UNDERSTOOD = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,  # a token id of more than 32 bits
    RecursionError,
)


class Output:
    """The output of one generation so far. `chunks` mutates it.

    SGLang streams either all of the output with every event or, under
    `--incremental-streaming-output`, what is new; `completion_tokens` tells which. It never sends
    more than `max_new_tokens`, whatever ends the answer, nor the prompt.
    """

    def __init__(self, max_new_tokens: int) -> None:
        self._max_new_tokens = max_new_tokens
        self._text = ""
        #: Text that was not put together yet.
        self._new_text: list[str] = []
        #: Characters in both.
        self._chars = 0
        #: 4 bytes each: a list of what JSON gives takes 40.
        self._token_ids = array("i")
        self._meta: Mapping[str, Any] = {}
        self._rounds = 0
        self._is_new = False

    def chunks(self, events: Iterable[bytes]) -> Iterator[WorkerChunk]:
        """The output after these events, which came together; and after each eviction round.

        So under load messages are fewer, and still every round's digest is seen. Raises
        `InvalidRequest` or `WorkerUnavailable` for an error, after what came before it.
        """
        try:
            for event in events:
                if event != DONE:
                    before = self._rounds
                    self._add(json.loads(event))
                    if self._rounds != before:
                        yield self._chunk()
        except (GatewayError, *NOT_UNDERSTOOD):
            if self._is_new:
                yield self._chunk()
            raise
        if self._is_new:
            yield self._chunk()

    def _add(self, event: Mapping[str, Any]) -> None:
        _raise_for_error(event)
        meta, text = event["meta_info"], event["text"]
        token_ids = array("i", event["output_ids"])
        whole = len(token_ids) == meta["completion_tokens"]
        tokens = len(token_ids) + (0 if whole else len(self._token_ids))
        chars = len(text) + (0 if whole else self._chars)
        if tokens != meta["completion_tokens"]:
            raise WorkerUnavailable("the worker's stream lost output; try again")
        if tokens > self._max_new_tokens:
            raise WorkerUnavailable(
                f"the worker answered with more tokens than max_new_tokens={self._max_new_tokens}; "
                "try again"
            )
        if chars > tokens * MAX_TOKEN_CHARS:
            raise WorkerUnavailable(
                f"the worker answered with more text than its tokens can be, {chars} characters "
                f"for {tokens} tokens; try again"
            )
        if whole:
            self._text, self._new_text, self._token_ids = text, [], token_ids
        else:
            self._new_text.append(text)
            self._token_ids += token_ids
        self._chars = chars
        self._meta = meta
        self._rounds = (meta.get("vase") or {}).get("rounds", 0)
        self._is_new = True

    def _chunk(self) -> WorkerChunk:
        self._text = "".join((self._text, *self._new_text))
        self._new_text = []
        self._is_new = False
        finish = self._meta.get("finish_reason")
        vase = self._meta.get("vase")
        return WorkerChunk(
            text=self._text,
            token_ids=TokenPrefix(self._token_ids),
            cache=None if vase is None else _cache(vase),
            finish=None
            if finish is None
            else Finish(finish["type"], finish.get("message") or "", finish.get("status_code")),
            round_digests=() if vase is None else tuple(vase.get("round_digests", ())),
            retractions=self._meta.get("num_retractions") or 0,
            stamp=self._meta.get("vase_fingerprint"),
            queue_seconds=self._meta.get("queue_time"),  # with --enable-metrics
        )


def token_ids_of(tokens: Any) -> tuple[int, ...]:
    """Raises `TypeError` for what is no list of integers. Quick: this is on the event loop."""
    if not isinstance(tokens, list) or set(map(type, tokens)) - {int}:
        raise TypeError("tokens that are no integers")
    return tuple(tokens)


def thinking_of(vase: Mapping[str, Any] | None) -> Thinking | None:
    """Raises one of `NOT_UNDERSTOOD`."""
    told = None if vase is None else vase["thinking"]
    if told is None:
        return None
    thinking = Thinking(
        start=str(told["start"]),
        end=str(told["end"]),
        begun=bool(told["begun"]),
        end_ids=token_ids_of(told.get("end_ids", [])),
    )
    if not (thinking.start and thinking.end):
        raise ValueError("a marker without characters")
    return thinking


def _raise_for_error(event: Mapping[str, Any]) -> None:
    if "error" not in event:
        return
    message = _error_message(event)
    code = event["error"].get("code") if isinstance(event["error"], Mapping) else None
    if code in (None, 400, 422):
        raise InvalidRequest("the worker refused the request", said=message)
    raise WorkerUnavailable("the worker gave up", said=message)


def _cache(vase: Mapping[str, Any]) -> CacheStats:
    return CacheStats(**{f: vase[f] for f in CacheStats.__dataclass_fields__})


def worker_info(answer: Mapping[str, Any]) -> WorkerInfo:
    """The state of a worker from /server_info.

    With data parallelism SGLang reports one state per rank; slots and counters are summed.
    """
    states = [state["vase"] for state in answer["internal_states"]]
    for state in states:
        if "not_ready" in state:
            raise WorkerUnavailable(f"the worker is not ready: {state['not_ready']}")
    first = states[0]
    vocab_size = first.get("vocab_size")
    default = first.get("default")
    ring = first["slots"].get("query_ring")
    totals = [int(state["slots"]["total"]) for state in states]
    readers = [state.get("query_requests") for state in states]
    return WorkerInfo(
        fingerprint={str(k): str(v) for k, v in first["fingerprint"].items()},
        default_eviction=None if default is None else dict(default),
        max_budget=int(first["limits"]["max_budget"]),
        max_window=int(first["limits"]["max_window"]),
        context_length=int(first["context_length"]),
        vocab_size=None if vocab_size is None else int(vocab_size),
        total_slots=sum(totals),
        available_slots=sum(int(state["slots"]["available"]) for state in states),
        reserved_slots=sum(int(state["slots"]["reserved"]) for state in states),
        running_requests=sum(int(state["running_requests"]) for state in states),
        rounds=sum(int(state["rounds"]) for state in states),
        evicted_tokens=sum(int(state["evicted_tokens"]) for state in states),
        stamp=first.get("fingerprint_stamp"),
        model_name=str(first.get("model_name") or first["fingerprint"]["model"]),
        waiting_requests=sum(int(state.get("waiting_requests", 0)) for state in states),
        max_running_requests=_sum(state.get("max_running_requests") for state in states),
        max_query_requests=_sum(state["limits"].get("max_requests") for state in states),
        query_requests=None if None in readers else sum(map(int, readers)),
        query_ring_slots=None if ring is None else float(ring),
        prefix_cache=bool(first.get("prefix_cache", True)),
        page_size=int(first.get("page_size", 1)),
        can_inspect=bool(first.get("inspect", False)),
        rank_slots=max(totals),
    )


def _sum(values: Iterable[Any]) -> int | None:
    """The sum over the ranks; None if a rank does not say."""
    known = [int(value) for value in (*values,) if value is not None]
    return sum(known) or None


def error_text(body: bytes) -> str:
    """The message inside an error body, whichever of SGLang's shapes it has."""
    with contextlib.suppress(ValueError, AttributeError):
        return _error_message(json.loads(body))
    return body.decode(errors="replace")[:500].strip()


def _error_message(answer: Mapping[str, Any]) -> str:
    error = answer.get("error", answer)
    if isinstance(error, Mapping):
        error = error.get("message") or error.get("detail") or ""
    return str(error)
