"""The worker's own endpoints with a real model: budgets over HTTP and the OpenAI client."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.otlp_receiver import OtlpReceiver
from tests.e2e.worker_process import TOTAL_SLOTS, WorkerProcess, body
from tests.k8s import metrics as documented
from vase_sgl.demo.model import MODEL_NAME

pytestmark = pytest.mark.xdist_group("worker")  # shares one worker process

PROMPT = "<|im_start|>user\nTell me about the sea.<|im_end|>\n<|im_start|>assistant\n"
BUDGET: dict[str, Any] = {
    "budget": 24,
    "window": 8,
    "policy": "vase-attnv",
    "prompt": "evict",
    "seed": 1,
}
#: Of the state's slots, those that change.
SLOTS = ("total", "available", "reserved", "owned")
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "sampling_seed": 7}
TRACE_ID = "5a" * 16


@pytest.fixture(scope="module")
def streamed(worker: WorkerProcess) -> list[dict[str, Any]]:
    """Events of an answer past three rounds, whose trace is TRACE_ID."""
    with worker.http.stream(
        "POST",
        "/generate",
        json=body(PROMPT, vase=BUDGET, stream=True, new=45),
        headers={"traceparent": f"00-{TRACE_ID}-{'1' * 16}-01"},
    ) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_meta_info_reports_the_budget(streamed: list[dict[str, Any]]) -> None:
    answer = streamed[-1]
    info, vase = answer["meta_info"], answer["meta_info"]["vase"]
    logical = info["prompt_tokens"] + info["completion_tokens"]
    assert info["completion_tokens"] == len(answer["output_ids"]) == 45
    assert vase["logical_length"] == logical
    assert vase["rounds"] >= 3
    assert vase["evicted_tokens"] == vase["rounds"] * 8
    assert vase["physical_length"] == logical - 1 - vase["evicted_tokens"] <= 32
    assert vase["reserved_slots"] == 32
    assert len(vase["digest"]) == 16 and int(vase["digest"], 16) != 0
    assert vase["round_digests"][-1] == vase["digest"]
    # With --enable-metrics: what of its time a request held no slots.
    assert 0 < info["queue_time"] < info["e2e_latency"]


def test_a_request_without_a_budget_is_stock(worker: WorkerProcess) -> None:
    before = worker.state()
    budgets = (None, {"budget": 1000, "window": 32}, {"policy": "full"})
    with ThreadPoolExecutor() as executor:
        stock, large, full = executor.map(
            lambda vase: worker.generate(PROMPT, new=30, vase=vase), budgets
        )
    assert "vase" not in stock["meta_info"]
    assert worker.state()["rounds"] == before["rounds"]
    assert stock["output_ids"] == large["output_ids"] == full["output_ids"]
    assert large["meta_info"]["vase"]["rounds"] == full["meta_info"]["vase"]["rounds"] == 0


def test_statistics_grow_while_streaming(streamed: list[dict[str, Any]]) -> None:
    statistics = [event["meta_info"]["vase"] for event in streamed]
    assert all(info["physical_length"] <= 32 for info in statistics)
    rounds = [info["rounds"] for info in statistics]
    assert rounds == sorted(rounds)
    assert {0, 1, 2, 3} <= set(rounds)


@pytest.mark.parametrize(
    ("vase", "text"),
    [
        ({**BUDGET, "temperature": 1}, "unknown key temperature"),
        ({**BUDGET, "policy": "lru"}, "unknown policy 'lru'"),
        ({**BUDGET, "window": 24}, "budget 24 must be greater than window 24"),
        ({**BUDGET, "budget": 10**6}, "from 1 to 16384"),
        ({**BUDGET, "budget": TOTAL_SLOTS, "window": 64}, "lower the budget"),
    ],
)
def test_wrong_parameters_are_a_400(worker: WorkerProcess, vase: Any, text: str) -> None:
    with pytest.raises(httpx.HTTPStatusError) as error:
        worker.generate(PROMPT, vase=vase, new=8000)
    assert error.value.response.status_code == 400
    assert text in error.value.response.text
    assert worker.http.get("/health").status_code == 200


def test_an_empty_prompt_is_a_400(worker: WorkerProcess) -> None:
    """Unchecked, it ends SGLang's scheduler and the server with it."""
    with pytest.raises(httpx.HTTPStatusError) as error:
        worker.generate("", vase=BUDGET, new=5)
    assert error.value.response.status_code == 400
    assert "the prompt is empty" in error.value.response.text
    assert worker.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sampling_params": {"top_k": 2**40}}, "top_k"),
        ({"sampling_params": {"min_new_tokens": 1, "stop_token_ids": [10**9]}}, "stop_token_ids"),
        ({"session_params": {"id": {"a": 1}}}, "session_params"),
        ({"positional_embed_overrides": {}}, "positional_embed_overrides"),
        ({"return_logprob": True, "top_logprobs_num": 10**6, "stream": True}, "top_logprobs_num"),
    ],
)
def test_what_would_end_the_scheduler_is_a_400(
    worker: WorkerProcess, fields: dict[str, Any], named: str
) -> None:
    answer = worker.http.post("/generate", json={"text": PROMPT, **fields})
    streamed = answer.text.removeprefix("data: ").removesuffix("data: [DONE]\n\n")
    error = json.loads(streamed)["error"] if fields.get("stream") else answer.json()["error"]
    assert error["message"].startswith(f"{named}: ")
    assert (error.get("code") if fields.get("stream") else answer.status_code) == 400
    assert worker.generate(PROMPT, new=2)["output_ids"]


def test_openai_client_with_a_budget(worker: WorkerProcess) -> None:
    before = worker.state()
    client = openai.OpenAI(base_url=f"{worker.url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": "Tell me about the sea."}],
        max_tokens=50,
        temperature=0.7,
        seed=3,
        extra_body={"custom_params": {"vase": BUDGET}, "ignore_eos": True},
    )
    assert answer.choices[0].message.content
    assert answer.usage is not None and answer.usage.completion_tokens == 50
    after = worker.state()
    # Chat adds the template's tokens, so at least as many rounds as the plain prompt.
    assert after["rounds"] - before["rounds"] >= 4
    assert after["evicted_tokens"] - before["evicted_tokens"] >= 4 * 8
    with pytest.raises(openai.BadRequestError, match="unknown key horizon"):
        client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": "Hi"}],
            extra_body={"custom_params": {"vase": {**BUDGET, "horizon": 1}}},
        )


def _outcome(answer: dict[str, Any]) -> tuple[list[int], list[str]]:
    return answer["output_ids"], answer["meta_info"]["vase"]["round_digests"]


def test_alone_among_others_and_in_another_process(
    worker: WorkerProcess, second_worker: WorkerProcess
) -> None:
    """At temperature 0.8, past many rounds: same tokens, same digests, in every company."""

    def target(process: WorkerProcess) -> dict[str, Any]:
        return process.generate(PROMPT, vase=BUDGET, new=45, **SAMPLED)

    def neighbour(index: int) -> dict[str, Any]:
        return worker.generate(
            "Count to a hundred. " * (index + 1),
            vase=None if index % 3 == 0 else {**BUDGET, "policy": "vase-dkv", "seed": index},
            new=8 * (index + 1),
            temperature=1.0,
            sampling_seed=index if index % 2 else None,
        )

    alone = _outcome(target(worker))
    with ThreadPoolExecutor(8) as executor:
        others = [executor.submit(neighbour, index) for index in range(3)]
        together = executor.submit(target, worker)
        others += [executor.submit(neighbour, index) for index in range(3, 5)]
        other_seed = executor.submit(
            lambda: worker.generate(PROMPT, vase={**BUDGET, "seed": 2}, new=45, **SAMPLED)
        )
        assert _outcome(together.result()) == alone
        for other in others:
            other.result()
    assert _outcome(target(second_worker)) == alone
    assert set(_outcome(other_seed.result())[1]).isdisjoint(alone[1])


def _series(worker: WorkerProcess) -> dict[tuple[str, str], float]:
    """Samples of `/metrics` with our prefix, by name and policy."""
    families = text_string_to_metric_families(worker.http.get("/metrics").text)
    return {
        (sample.name, sample.labels.get("policy", "")): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("vase:") and sample.labels.get("evicted") != "false"
    }


def _refreshed_series(worker: WorkerProcess) -> dict[tuple[str, str], float]:
    """`_series`, once they say what the worker's state does: they are refreshed once a second."""
    deadline = time.monotonic() + 20
    while True:
        state, series = worker.state(), _series(worker)
        said = {name: series.get((f"vase:{name}_slots", "")) for name in SLOTS}
        slots = {name: state["slots"][name] for name in SLOTS}
        if series.get(("vase:rounds_total", "")) == state["rounds"] and said == slots:
            return _series(worker)  # a refresh writes other counters a little later
        assert time.monotonic() < deadline, (series, state)
        time.sleep(0.1)


def test_metrics_prove_that_the_budget_acts(worker: WorkerProcess) -> None:
    worker.generate(PROMPT, vase=BUDGET, new=3)
    before = _refreshed_series(worker)
    state = worker.state()
    worker.generate(PROMPT, vase={**BUDGET, "policy": "vase-dkv"}, new=45)
    after = _refreshed_series(worker)
    gained = {name: value - before.get(name, 0) for name, value in after.items()}
    rounds = worker.state()["rounds"] - state["rounds"]
    assert rounds >= 3
    assert gained["vase:rounds_total", ""] == rounds
    assert gained["vase:evicted_tokens_total", ""] == 8 * rounds
    assert gained["vase:compaction_seconds_total", ""] > 0
    assert gained["vase:requests_total", "vase-dkv"] == 1
    assert gained["vase:finished_requests_total", "vase-dkv"] == 1  # with evicted="true"
    assert gained["vase:budget_tokens_count", "vase-dkv"] == 1
    assert after["vase:total_slots", ""] == after["vase:available_slots", ""] == TOTAL_SLOTS
    assert after["vase:reserved_slots", ""] == after["vase:owned_slots", ""] == 0
    assert after["vase:physical_to_logical_ratio", ""] == 1
    assert after["vase:integrity_errors_total", ""] == 0
    page = worker.http.get("/metrics").text
    assert "sglang:num_running_reqs" in page
    # What alerts and dashboard of the chart may name is really there.
    for name, kind in documented.worker().items():
        assert f"# TYPE {name.removesuffix('_total')}" in page, (name, kind)


def test_rounds_are_events_of_the_request_s_trace(
    streamed: list[dict[str, Any]], traces: OtlpReceiver
) -> None:
    """Through SGLang's own OpenTelemetry option, to a real OTLP receiver."""
    statistics = streamed[-1]["meta_info"]["vase"]
    deadline = time.monotonic() + 30
    while len(events := _events(traces)) < statistics["rounds"] and time.monotonic() < deadline:
        time.sleep(0.2)  # exported in batches
    assert [event["vase.round"] for event in events] == list(range(1, statistics["rounds"] + 1))
    assert {event["vase.physical_length"] for event in events} == {32}
    assert {event["vase.kept_length"] for event in events} == {24}
    assert [event["vase.logical_length"] for event in events] == [
        32 + 8 * index for index in range(statistics["rounds"])
    ]


def _events(traces: OtlpReceiver) -> list[dict[str, int]]:
    found = [
        {item.key: item.value.int_value for item in event.attributes}
        for span in list(traces.spans)
        if span.trace_id.hex() == TRACE_ID
        for event in span.events
        if event.name == "vase.evict"
    ]
    return sorted(found, key=lambda event: event["vase.round"])


def test_a_repeated_prompt_is_cached_and_the_answer_the_same(worker: WorkerProcess) -> None:
    """Overlap scheduler and prefix cache are on, as SGLang starts."""
    info = worker.http.get("/server_info").json()
    assert not info["disable_radix_cache"] and not info["disable_overlap_schedule"]
    prompt = PROMPT.replace("the sea", "the prefix cache of a serving engine")

    def answers() -> list[dict[str, Any]]:
        """Of both modes, at once."""
        with ThreadPoolExecutor() as executor:
            return list(
                executor.map(
                    lambda mode: worker.generate(
                        prompt, vase={**BUDGET, "prompt": mode}, new=35, **SAMPLED
                    ),
                    ("evict", "keep"),
                )
            )

    for first, again in zip(answers(), answers(), strict=True):
        cached = again["meta_info"]["cached_tokens"]
        assert cached == again["meta_info"]["prompt_tokens"] - 1 > 16
        assert _outcome(again) == _outcome(first)


def test_disconnect_frees_every_slot(worker: WorkerProcess) -> None:
    with worker.http.stream(
        "POST", "/generate", json=body(PROMPT, vase=BUDGET, stream=True, new=5000)
    ) as response:
        for _, line in zip(range(2 * 30), response.iter_lines(), strict=False):
            assert line is not None
        assert worker.state()["slots"]["reserved"] == 32  # past the first round
    worker.wait_until_idle()
