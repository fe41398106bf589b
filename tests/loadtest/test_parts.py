"""The parts of a load test that need no Locust."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from loadtest import calls, compare, prompts, results, slo, span, tenants
from loadtest.options import Settings
from loadtest.problems import BadSetup
from loadtest.rows import Row, bucket
from loadtest.scenarios import SCENARIOS, users_at
from loadtest.session import Session
from loadtest.span import Span
from tests.gateway.running import Running
from vase_sgl.client import Capacity

OPTIONS: dict[str, Any] = {
    "scenario": "steady",
    "budget": None,
    "window": None,
    "policy": None,
    "prompt_mode": None,
    "prompts": "synthetic",
    "prompt_tokens": None,
    "prompt_seed": 0,
    "max_new_tokens": None,
    "temperature": 1.0,
    "stop_at_eos": False,
    "think_seconds": 0.0,
    "call_timeout": 600.0,
    "turns": None,
    "replay_share": None,
}
FILES = dict.fromkeys(("tenants", "slo", "gateway_ca", "client_cert", "client_key", "run_time"))

CAPACITY = Capacity(
    **{field.name: 0 for field in dataclasses.fields(Capacity)}  # type: ignore[arg-type]
    | {
        "context_length": 8192,
        "max_budget": 4096,
        "max_window": 64,
        "max_new_tokens": 8192,
        "max_prompt_tokens": 4096,
        "policies": ("vase-attnv", "full"),
    }
)


# Options


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"scenario": "storm"}, "unknown --scenario 'storm'; choose from steady, ramp"),
        ({"policy": "lru"}, "unknown --policy 'lru'; choose from vase-attnv"),
        (
            {"budget": 64, "prompt_mode": "drop"},
            "unknown --prompt-mode 'drop'; choose from evict",
        ),
        ({"budget": 1}, "--budget: Input should be greater"),
        ({"temperature": -1}, "--temperature: Input should be greater"),
        ({"turns": 3}, "--turns is for agent-loop, not for steady"),
        ({"replay_share": 0.5}, "--replay-share is for replay-mix, not for steady"),
        ({"window": 8}, "--window and --prompt-mode go with a --budget"),
        ({"prompts": "p.jsonl", "prompt_tokens": 8}, "--prompt-tokens is for synthetic"),
        ({"prompts": "p.jsonl", "scenario": "agent-loop"}, "agent-loop makes up its prompts"),
    ],
)
def test_options_that_make_no_sense_are_refused(changed: Mapping[str, Any], complaint: str) -> None:
    with pytest.raises(BadSetup) as error:
        Settings.of({**OPTIONS, **changed})
    assert str(error.value).startswith(complaint)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"policy": "streaming", "budget": 128}, "may not use policy streaming, only vase-attnv"),
        ({"budget": 8192}, "budget must be an integer from 1 to 4096"),
        ({"budget": 32}, "budget 32 must be greater than window 64"),
        ({"policy": "vase-attnv"}, "budget is missing"),
        ({"max_new_tokens": 9000}, "may ask for 8192 tokens at most, not 9000"),
        ({"scenario": "agent-loop", "turns": 50}, "do not fit the model's context of 8192"),
        (
            {"prompt_tokens": 4097},
            "may send prompts of 4096 tokens at most, not of about 4097; lower --prompt-tokens",
        ),
        # Questions, all answers but the last, and what the template puts around each of them.
        (
            {"scenario": "agent-loop", "turns": 22},
            "not of about 4316; lower --prompt-tokens, --max-new-tokens or --turns",
        ),
    ],
)
def test_what_the_gateway_would_refuse_is_refused_first(
    changed: Mapping[str, Any], complaint: str
) -> None:
    settings = Settings.of({**OPTIONS, **changed})
    with pytest.raises(BadSetup) as error:
        settings.check_against(CAPACITY, "alice")
    assert complaint in str(error.value)


def test_values_of_a_form_are_strings_and_empty_ones_are_absent() -> None:
    settings = Settings.of({**OPTIONS, "budget": "128", "window": "32", "max_new_tokens": ""})
    assert (settings.budget, settings.window, settings.answer_tokens) == (128, 32, 128)
    settings.check_against(CAPACITY, "alice")
    call = settings.call_options()
    assert (call["budget"], call["window"], call["ignore_eos"]) == (128, 32, True)


# Scenarios


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("steady", [60, 60, 60, 60, 60, 60, None]),
        ("ramp", [3, 12, 21, 33, 42, 51, None]),
        ("spike", [6, 6, 60, 60, 6, 6, None]),
    ],
)
def test_users_over_time(name: str, expected: list[int | None]) -> None:
    seen = [users_at(SCENARIOS[name], 60, seconds, 60) for seconds in (0, 10, 20, 30, 40, 50, 60)]
    assert seen == expected


def test_every_scenario_reaches_all_its_users_and_never_more() -> None:
    for scenario in SCENARIOS.values():
        seen = [users_at(scenario, 7, second, 100) for second in range(100)]
        assert max(u for u in seen if u is not None) == 7
        assert min(u for u in seen if u is not None) >= 1
        assert users_at(scenario, 7, 100, 100) is None


# Prompts and tenants


def test_synthetic_prompts_repeat_with_their_seed_only() -> None:
    source = prompts.Synthetic(20)
    first, _ = source.draw(random.Random("0/0/1"))
    assert source.draw(random.Random("0/0/1")) == (first, None)
    assert source.draw(random.Random("0/0/2")) != (first, None)
    assert len(str(first).split()) == 20


def test_prompts_of_a_file_keep_their_form(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines: list[dict[str, Any]] = [
        {"text": "Why?", "max_new_tokens": 5},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"token_ids": [1, 2, 3]},
    ]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    source, rng = prompts.read_jsonl(path), random.Random(0)
    drawn = [source.draw(rng) for _ in range(50)]
    for expected in (
        ("Why?", 5),
        ([{"role": "user", "content": "Hi"}], None),
        ((1, 2, 3), None),
    ):
        assert expected in drawn


def test_a_prompt_may_hold_what_python_ends_a_line_at(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "one\u2028two\u2029three\x85four"}\r\n\n', encoding="utf-8")
    drawn, _ = prompts.read_jsonl(path).draw(random.Random(0))
    assert drawn == "one\u2028two\u2029three\x85four"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "a"', ":2: not JSON"),
        ('{"prompt": "a"}', ":2: prompt: unknown key"),
        ('{"text": "a", "token_ids": [1]}', ":2: give one of text, messages and token_ids"),
        ('{"text": "a", "max_new_tokens": 0}', ":2: max_new_tokens: Input should be greater"),
    ],
)
def test_bad_prompts_are_named_by_line(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(BadSetup) as error:
        prompts.read_jsonl(path)
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("tenants: []", "at least 1 item"),
        ("tenants: [{name: a, key: vsk_secret}]", "tenants.0.key: unknown key"),
        ("tenants: [{name: a}, {name: a}]", "a name of its own"),
        ("tenants: [{name: a, key_env: A, key_file: /a}]", "key_env or key_file, not both"),
        ("tenants: [", "is not YAML"),
    ],
)
def test_bad_tenants_files(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(content)
    with pytest.raises(BadSetup) as error:
        tenants.load(path)
    assert complaint in str(error.value)
    assert "vsk_secret" not in str(error.value)


def test_keys_come_from_the_environment_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("vsk_file\n")
    (tmp_path / "tenants.yaml").write_text(
        f"tenants: [{{name: a, key_file: {tmp_path / 'key'}}}, {{name: b, key_env: B_KEY}}]"
    )
    monkeypatch.setenv("B_KEY", "vsk_env")
    a, b = tenants.load(tmp_path / "tenants.yaml")
    assert (a.api_key(), b.api_key()) == ("vsk_file", "vsk_env")
    monkeypatch.delenv("B_KEY")
    with pytest.raises(BadSetup, match="set the variable B_KEY"):
        b.api_key()


def test_the_example_files_are_valid() -> None:
    folder = Path(tenants.__file__).parent
    assert [t.name for t in tenants.load(folder / "tenants.example.yaml")] == ["quiet", "noisy"]
    assert slo.load(folder / "slo.example.yaml", ["default"]).ttft_ms is not None


def test_the_kubernetes_job_comes_suspended_and_without_rights() -> None:
    manifest = Path(tenants.__file__).parent / "k8s" / "job.yaml"
    _, job = yaml.safe_load_all(manifest.read_text())
    assert job["spec"]["suspend"] is True and job["spec"]["backoffLimit"] == 0
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert set(container["resources"]) == {"requests", "limits"}


# Session


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"scenario": "noisy-neighbour"}, "needs --tenants with `noisy: true` for some"),
        ({"client_cert": "c.pem"}, "cannot read c.pem"),
        ({"slo": "nowhere.yaml"}, "cannot read SLO file nowhere.yaml"),
        ({"prompts": "nowhere.jsonl"}, "cannot read prompt file nowhere.jsonl"),
    ],
)
def test_sessions_that_cannot_start(changed: Mapping[str, Any], complaint: str) -> None:
    with pytest.raises(BadSetup) as error:
        Session({**OPTIONS, **FILES, **changed})
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        (None, "--host is missing"),
        ("http://127.0.0.1:1", "--host is host:port"),
        ("127.0.0.1:1", "cannot connect to the gateway"),
    ],
)
def test_a_gateway_that_is_not_there(target: str | None, complaint: str) -> None:
    session = Session({**OPTIONS, **FILES})
    with pytest.raises(BadSetup) as error:
        session.capacity(target, session.tenants[0])
    assert complaint in str(error.value)


async def test_a_key_that_is_not_known(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VASE_API_KEY", "vsk_000000000000_" + "0" * 64)
    session = Session({**OPTIONS, **FILES})
    with pytest.raises(BadSetup, match="does not serve tenant default"):
        await asyncio.to_thread(session.capacity, running.target, session.tenants[0])


def test_ramp_and_spike_need_an_end() -> None:
    session = Session({**OPTIONS, **FILES, "scenario": "spike"})
    with pytest.raises(BadSetup, match="spike needs a --run-time"):
        session.check_times()


# Results


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=200))
def test_percentiles_are_those_of_the_sorted_list(values: list[float]) -> None:
    """By the definition: the smallest value that so many are not above; three digits kept."""
    histogram: dict[float, int] = {}
    for value in values:
        histogram[bucket(value)] = histogram.get(bucket(value), 0) + 1
    row = Row("ttft", "a", len(values), 0, sum(values), max(values), 0, histogram)
    found = results.summary([row], 1.0)["ttft_ms"]
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99)):
        exact = sorted(values)[math.ceil(share * len(values)) - 1]
        assert found[name] == pytest.approx(exact, rel=0.006)
    assert found["max"] == max(values) and found["count"] == len(values)
    assert found["mean"] == pytest.approx(sum(values) / len(values))


def rows(tenant: str, times: list[float], rejected: int = 0, failed: int = 0) -> list[Row]:
    def row(kind: str, size: int = 0, count: int = len(times), failures: int = 0) -> Row:
        histogram = {bucket(t): 1 for t in times}
        return Row(kind, tenant, count, failures, sum(times), max(times), size, histogram)

    return [
        row("generate", size=80, count=len(times) + failed, failures=failed),
        row("unfinished", size=20, count=1),
        row("e2e"),
        row("ttft", size=40),
        *([row("rejected", count=rejected)] if rejected else []),
    ]


def result(**changed: Any) -> dict[str, Any]:
    found = rows("quiet", [10, 20, 30]) + rows("noisy", [1000], rejected=6, failed=1)
    gateway = {"target": "a:1", "fingerprint": {"device": "cpu"}, "total_slots": 100}
    more: dict[str, Any] = {"users": 4, "run_time": 2, "options": dict(OPTIONS), "gateway": gateway}
    return results.document(found, 0.0, 2.0, [], **{**more, **changed})


@pytest.mark.parametrize(
    ("messages", "tpot"), [([10, 10], 0.1), ([1, 4, 5], 2 / 9), ([20], None), ([1], None)]
)
def test_tokens_of_the_first_message_took_no_time_after_it(
    messages: list[int], tpot: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream(list[SimpleNamespace]):
        request_id = "r"
        result = SimpleNamespace(
            usage=SimpleNamespace(prompt_tokens=3, completion_tokens=sum(messages)),
            timings=SimpleNamespace(queue_seconds=0.0),
        )

    stream = Stream(SimpleNamespace(token_ids=(1,) * count, text="x") for count in messages)
    client: Any = SimpleNamespace(generate=lambda *_, **__: nullcontext(stream))
    monkeypatch.setattr(calls, "time", SimpleNamespace(perf_counter=iter(range(9)).__next__))
    found = calls.generate(client, "prompt", 20, 60.0, {}, lambda count: None)
    assert (found.status, found.ttft_seconds) == ("completed", 1)
    assert found.tpot_seconds == (None if tpot is None else pytest.approx(tpot))


def test_a_result_adds_tenants_up() -> None:
    document = result()
    everyone, noisy = document["all"], document["tenants"]["noisy"]
    assert (everyone["completed"], noisy["completed"]) == (4, 1)
    assert (everyone["failed"], everyone["rejected"], everyone["unfinished"]) == (1, 6, 2)
    assert everyone["failure_ratio"] == pytest.approx(1 / 5)
    assert noisy["rejection_ratio"] == pytest.approx(6 / 8)
    assert (everyone["output_tokens"], everyone["output_tokens_per_second"]) == (200, 100)
    assert (everyone["e2e_ms"]["p50"], everyone["e2e_ms"]["max"]) == (20, 1000)
    assert everyone["tpot_ms"] is None and everyone["replay_match_ratio"] is None


def test_a_test_lasts_to_its_last_event_by_one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the wall clocks say, one of which is set back here."""
    passed = iter(range(100))
    clock = SimpleNamespace(perf_counter=lambda: now, time=lambda: 1000 - next(passed))
    monkeypatch.setattr(span, "time", clock)
    hooks = ("test_start", "reset_stats", "spawning_complete", "report_to_master", "worker_report")

    def process() -> tuple[Span, dict[str, Callable[..., None]]]:
        listeners: dict[str, Callable[..., None]] = {}
        events = {
            name: SimpleNamespace(add_listener=partial(listeners.__setitem__, name))
            for name in hooks
        }
        environment = SimpleNamespace(events=SimpleNamespace(**events), reset_stats=False)
        return Span(environment), listeners

    now = 5.0
    (leading, here), (other, there) = process(), process()

    def report() -> None:
        data: dict[str, Any] = {}
        there["report_to_master"](client_id="w", data=data)
        here["worker_report"](client_id="w", data=json.loads(json.dumps(data)))

    now = 10.0
    here["test_start"](environment=None)
    report()
    assert (leading.started, leading.seconds) == (998, 0)
    now = 12.0
    other.extend()
    now = 15.0
    report()
    assert leading.seconds == 2
    here["spawning_complete"](user_count=1)
    assert leading.seconds == 2
    here["reset_stats"]()
    report()
    assert leading.seconds == 0
    leading.extend()
    now = 20.0
    leading.extend()
    report()
    assert leading.seconds == 5


# Thresholds


def objectives(tmp_path: Path, text: str) -> slo.Slo:
    path = tmp_path / "slo.yaml"
    path.write_text(text)
    return slo.load(path, ["quiet", "noisy"])


def test_each_threshold_is_checked_and_named(tmp_path: Path) -> None:
    wanted = objectives(
        tmp_path,
        "e2e_ms: {p50: 20, max: 999}\n"
        "tpot_ms: {p95: 5}\n"
        "completed: {min: 4, max: 4}\n"
        "tenants: {quiet: {rejected: {max: 0}}, noisy: {rejection_ratio: {max: 0.5}}}\n",
    )
    checks = slo.evaluate(wanted, result())
    assert [str(check) for check in checks] == [
        "MISSED: tpot_ms p95 of all tenants: nothing was measured, at most 5",
        "kept: e2e_ms p50 of all tenants: 20, at most 20",
        "MISSED: e2e_ms max of all tenants: 1000, at most 999",
        "kept: completed of all tenants: 4, at least 4",
        "kept: completed of all tenants: 4, at most 4",
        "kept: rejected of tenant quiet: 0, at most 0",
        "MISSED: rejection_ratio of tenant noisy: 0.75, at most 0.5",
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tfft_ms: {p95: 1}", "tfft_ms: unknown key"),
        ("ttft_ms: {p42: 1}", "ttft_ms.p42: unknown key"),
        ("completed: {}", "completed: give min, max or both"),
        ("tenants: {loud: {completed: {min: 1}}}", "no tenant loud in this test, only noisy"),
        ("", "has no threshold"),
        ("ttft_ms: {}", "has no threshold"),
        ("- a", "Input should be"),
    ],
)
def test_bad_thresholds(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(BadSetup) as error:
        objectives(tmp_path, text)
    assert complaint in str(error.value)


# Comparison


def test_compare_says_what_differs_and_divides_b_by_a(tmp_path: Path) -> None:
    a, b = result(), result(options={**OPTIONS, "budget": 128})
    b["all"]["output_tokens_per_second"] = 250.0
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, document in zip(paths, (a, b), strict=True):
        path.write_text(json.dumps(document))
    run = subprocess.run(
        [sys.executable, compare.__file__, *map(str, paths)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "- options.budget: None | 128\n" in run.stdout
    assert "| output_tokens_per_second | 100 | 250 | 2.5 |" in run.stdout
    assert "| quiet: e2e_ms p50 | 20 | 20 | 1 |" in run.stdout
    assert run.stdout.count("\n- ") == 1


def test_compare_refuses_what_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("{}")
    with pytest.raises(compare.NotAResult, match="is not a result of a load test"):
        compare.read(path)
    with pytest.raises(compare.NotAResult, match="cannot read"):
        compare.read(tmp_path / "none.json")
