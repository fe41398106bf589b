"""Recorded conversations as questions, and their cost per trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.eval.running_eval import rows, run_eval
from tests.gateway.scripted_worker import ScriptedWorker
from vase_sgl.eval.trace import TraceError, TraceTask, trace_of

CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CONVERSATION = {
    "id": "a",
    "tools": TOOLS,
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Rain in Oslo?"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "assistant", "content": "Yes, it rains."},
    ],
}


def write(path: Path, *conversations: Any) -> Path:
    path.write_text("".join(json.dumps(c) + "\n" for c in conversations), encoding="utf-8")
    return path


def test_each_assistant_turn_is_asked_after_the_recorded_context(tmp_path: Path) -> None:
    task = TraceTask.read(write(tmp_path / "t.jsonl", CONVERSATION, CONVERSATION["messages"]))
    assert task.name == "trace:t.jsonl"
    call, answer, bare_call, bare_answer = task.items(None, 0)
    assert [call.item_id, answer.item_id] == ["a#2", "a#4"]
    assert [trace_of(i.item_id) for i in (answer, bare_call)] == ["a", "line2"]
    system, user = call.messages
    assert system["content"].startswith("# Tools") and system["content"].endswith("\nBe brief.")
    assert json.dumps(TOOLS[0]) in system["content"]
    assert user == {"role": "user", "content": "Rain in Oslo?"}
    assert answer.messages[:2] == call.messages
    assert answer.messages[2:] == (
        {
            "role": "assistant",
            "content": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n'
            "</tool_call>",
        },
        {"role": "user", "content": "<tool_response>\nrain\n</tool_response>"},
    )
    assert bare_answer.messages[0] == {"role": "system", "content": "Be brief."}
    assert len(TraceTask.read(tmp_path / "t.jsonl", limit=1).turns) == 2


def test_a_line_of_a_file_ends_where_json_lines_do(tmp_path: Path) -> None:
    """JSON strings may hold U+2028 and others at which Python ends a line."""
    said = "one\u2028two\u2029three\x85four"
    turns = [{"role": "user", "content": said}, {"role": "assistant", "content": "five"}]
    (tmp_path / "t.jsonl").write_text(json.dumps(turns, ensure_ascii=False) + "\r\n\n", "utf-8")
    (item,) = TraceTask.read(tmp_path / "t.jsonl").turns
    assert item.messages == ({"role": "user", "content": said},)


@pytest.mark.parametrize(
    ("text", "correct", "reason"),
    [
        (
            '<think>not <tool_call>\n{"name": "x"}\n</tool_call></think>\n<tool_call>'
            '{"arguments": {"city": "Oslo"}, "name": "weather"}</tool_call>',
            True,
            "1 tool calls as recorded",
        ),
        ('<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>', False, ""),
        ('<tool_call>{"name": "weather", "arguments": {"city"</tool_call>', False, "not JSON"),
        ('<tool_call>{"name": "weather"', False, "not JSON"),
        ("It rains.", False, "called none; recorded were weather"),
        (
            '<think>so <tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>',
            False,
            "called none",
        ),
    ],
)
def test_a_turn_is_right_if_it_calls_what_was_called(
    tmp_path: Path, text: str, correct: bool, reason: str
) -> None:
    task = TraceTask.read(write(tmp_path / "t.jsonl", CONVERSATION))
    call, answer = task.items(None, 0)
    grade = task.grade(call, text)
    assert grade.correct is correct and reason in grade.reason
    assert (grade.extracted is None) == ("not JSON" in grade.reason)
    assert task.grade(answer, "Whatever it says.").correct
    assert not task.grade(answer, '<tool_call>{"name": "weather"}</tool_call>').correct


@pytest.mark.parametrize(
    ("called", "correct"),
    [
        ({"confirm": True, "n": [0, {"x": None}]}, True),
        ({"n": [0.0, {"x": None}], "confirm": True}, True),
        ({"confirm": 1, "n": [0, {"x": None}]}, False),
        ({"confirm": True, "n": [False, {"x": None}]}, False),
        ({"confirm": True, "n": [0, {"x": 0}]}, False),
        ({"confirm": True, "n": [0]}, False),
        ({"confirm": True}, False),
    ],
)
def test_arguments_are_equal_as_json(tmp_path: Path, called: object, correct: bool) -> None:
    recorded = {"name": "f", "arguments": {"confirm": True, "n": [0, {"x": None}]}}
    turns = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [{"function": recorded}]},
    ]
    (item,) = (task := TraceTask.read(write(tmp_path / "t.jsonl", turns))).turns
    text = json.dumps({"name": "f", "arguments": called})
    assert task.grade(item, f"<tool_call>{text}</tool_call>").correct is correct


@pytest.mark.parametrize(
    ("conversation", "text"),
    [
        ({"tools": []}, "line 1: is not a conversation: it needs a list `messages`"),
        ([{"role": "user", "content": "a"}], "has no assistant turn after another message"),
        ([{"role": "robot", "content": "a"}], "message 0 needs a role of system, developer,"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "message 0 has a content that is not text; images and audio cannot be replayed",
        ),
        (
            [
                {"role": "user", "content": "a"},
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                },
            ],
            "message 1 has a tool call without a name, or its arguments are no JSON",
        ),
        (
            [{"role": "assistant", "function_call": {"name": "f"}}],
            "message 0 has the old `function_call`; write it as `tool_calls`",
        ),
    ],
)
def test_a_wrong_conversation_is_named(tmp_path: Path, conversation: object, text: str) -> None:
    with pytest.raises(TraceError) as caught:
        TraceTask.read(write(tmp_path / "t.jsonl", conversation))
    assert text in str(caught.value)
    with pytest.raises(TraceError, match="line 2: the id 'a' is there twice"):
        TraceTask.read(write(tmp_path / "t.jsonl", CONVERSATION, CONVERSATION))


async def test_the_command_reports_the_cost_of_a_completed_trace(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", CONVERSATION, {**CONVERSATION, "id": "b"})
    out = tmp_path / "out"
    async with ScriptedWorker() as worker:
        await run_eval(
            *("trace", file, "--worker", worker.url, "--policies", "full,snapkv", "-o", out),
            *("--budgets", 32, "--window", 8, "-n", 40, "--price-per-hour", 3600),
        )
    assert len(rows(out)) == 8
    report = (out / "report.md").read_text()
    lines = report[report.index("### Cost per completed trace") :].splitlines()
    header = [c.strip() for c in lines[2].strip("|").split("|")]
    line = next(line for line in lines if line.startswith("| snapkv"))
    cells = dict(zip(header, (c.strip() for c in line.strip("|").split("|")), strict=True))
    mine = [r for r in rows(out) if r["arm"] == "snapkv"]
    assert (cells["traces"], cells["completed"], cells["budget"]) == ("2", "2", "32")
    assert float(cells["rounds per trace"]) == sum(r["rounds"] for r in mine) / 2 > 0
    ring = 24  # as the worker says
    most = {
        t: max(r["reserved_slots"] + ring for r in mine if r["item_id"].startswith(t))
        for t in ("a", "b")
    }
    assert cells["most slots"] == f"{sum(most.values()) / 2:.0f}"
    slot_seconds = sum((r["reserved_slots"] + ring) * r["total_seconds"] for r in mine) / 2
    assert cells["slot-seconds"] == f"{slot_seconds:.0f}"
    # At 3600 an hour a second costs 1.
    assert float(cells["price per trace"]) == pytest.approx(
        float(cells["machine-seconds"]), abs=0.005
    )
