"""Tasks: how they are asked for, their items, their grades."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import threading
import types
from pathlib import Path

import pytest

from vase_sgl.eval import math_answers
from vase_sgl.eval.items import Item
from vase_sgl.eval.math_answers import Comparison, MathAnswers
from vase_sgl.eval.sandbox import LAYERS
from vase_sgl.eval.tasks import TaskError, code, open_task, records

DATA = Path(__file__).parent / "data"
MATH500 = f"math500:{DATA / 'math500.jsonl'}"
AIME = f"aime:{DATA / 'aime.jsonl'}"
GSM8K = f"gsm8k:{DATA / 'gsm8k.jsonl'}"
CHOICE = f"choice:{DATA / 'choice.jsonl'}"
CODE = f"code:{DATA / 'code.jsonl'}"
EVERY = [
    pytest.param(spec, id=spec.partition(":")[0])
    for spec in (MATH500, AIME, GSM8K, CHOICE, CODE, "passkey", "state-tracking")
]


def _item(spec: str, item_id: str) -> Item:
    return next(item for item in open_task(spec).items(None, 0) if item.item_id == item_id)


def _write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("spec", EVERY)
def test_items_are_deterministic_and_grow(spec: str) -> None:
    task = open_task(spec)
    few, more = task.items(2, seed=7), task.items(4, seed=7)
    assert [item for item in more if item in few] == few
    assert len(few) == 2
    assert open_task(spec).items(4, seed=7) == more
    everything = task.items(None, seed=7)
    assert len({item.item_id for item in everything}) == len(everything)
    assert any(task.items(2, seed=seed) != few for seed in range(8, 12))
    for item in everything:
        assert item.task == task.name
        again = json.loads(json.dumps(dataclasses.asdict(item)))
        assert Item(**{**again, "messages": tuple(again["messages"])}) == item
    with pytest.raises(ValueError, match="at least 1"):
        task.items(0, seed=7)


@pytest.mark.parametrize("spec", EVERY)
@pytest.mark.parametrize(
    "text", ["", "\ufffd\ud83d", "\\boxed{", "<think>", "```python\n", "1" * 5000]
)
def test_every_text_gets_a_grade(spec: str, text: str) -> None:
    task = open_task(spec)
    grade = task.grade(task.items(1, 0)[0], text)
    assert not grade.correct
    assert grade.reason and "\n" not in grade.reason


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("maths", "unknown task 'maths'; known are aime, choice, code, gsm8k, math500, passkey"),
        ("passkey?step=3", "passkey: unknown parameter step; known are steps"),
        ("passkey?steps=0", "steps=0 is not within 1 to 10000"),
        ("passkey?steps=ten", "steps='ten' is not a whole number"),
        ("passkey?steps", "parameters are written"),
        ("passkey?steps=1&steps=2", "given twice"),
        ("passkey:a.jsonl", "takes no data"),
        ("state-tracking?steps=2", "steps=2 is below variables=4"),
        ("math500", r"math500:PATH.jsonl or math500:hf:DATASET\[:split\]; a line looks like"),
        ("math500:data.json", "data is a PATH.jsonl or hf:DATASET"),
        ("math500:nowhere.jsonl", "nowhere.jsonl: No such file"),
        ("math500:hf:", "a data set is written"),
        ("math500:hf:a/b:", "a data set is written"),
        (f"{MATH500}?config=main", "unknown parameter config; it takes none"),
    ],
)
def test_what_cannot_be_opened(spec: str, text: str) -> None:
    with pytest.raises(TaskError, match=text):
        open_task(spec)


def test_a_data_set_of_the_hub_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match="pip install datasets"):
        open_task("gsm8k:hf:openai/gsm8k:test?config=main")


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    # In place of the library, which would download; called the way its documentation says.
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        return [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "?", "answer": "#### 3"}]

    library = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", library)
    items = open_task("gsm8k:hf:openai/gsm8k?config=main").items(None, 0)
    assert [(item.item_id, item.answer) for item in items] == [("1", "2"), ("2", "3")]
    open_task("gsm8k:hf:openai/gsm8k:train")
    assert asked == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", None, "train")]


@pytest.mark.parametrize(
    ("name", "row", "text"),
    [
        ("math500", {"question": "1?"}, "data.jsonl:1: no field 'problem'; it has 'question'"),
        ("math500", {"problem": " ", "answer": "1"}, "'problem' must be a text, not ' '"),
        ("math500", ["a"], "not a JSON object"),
        ("aime", {"problem": "?", "answer": 1000}, "number from 0 to 999, not '1000'"),
        ("gsm8k", {"question": "?", "answer": "ten"}, "must end in '#### NUMBER', not 'ten'"),
        ("choice", {"question": "?", "choices": ["a"], "answer": "A"}, "2 to 26 texts"),
        ("choice", {"question": "?", "choices": ["a", "b"], "answer": "C"}, "from A to B"),
        ("code", {"prompt": "p", "entry_point": "a b", "tests": "1"}, "a function's name"),
        ("code", {"prompt": "p", "entry_point": "f", "tests": "1 +"}, "the tests are no Python"),
    ],
)
def test_bad_rows_are_named(name: str, row: object, text: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "data.jsonl", row)
    with pytest.raises(TaskError, match=text):
        open_task(f"{name}:{path}")


def test_an_id_occurs_once(tmp_path: Path) -> None:
    row = {"problem": "?", "answer": "1", "id": "a"}
    with pytest.raises(TaskError, match="the id 'a' occurs twice"):
        open_task(f"math500:{_write(tmp_path / 'data.jsonl', row, row)}")


def test_a_torn_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"problem": "?", "answer": "1"}\n\n{"problem": "?"')
    with pytest.raises(TaskError, match=r"data\.jsonl:3: not JSON"):
        open_task(f"math500:{path}")


@pytest.mark.parametrize("spec", [MATH500, AIME, GSM8K])
def test_every_reference_answers_itself(spec: str) -> None:
    task = open_task(spec)
    for item in task.items(None, 0):
        assert task.grade(item, f"So it is \\boxed{{{item.answer}}}.").correct, item


@pytest.mark.parametrize(
    ("spec", "item_id", "text", "correct"),
    [
        (MATH500, "test/precalculus/807.json", r"\boxed{(3, \pi/2)}", True),
        (MATH500, "test/precalculus/807.json", r"\boxed{(\pi/2, 3)}", False),
        (MATH500, "test/algebra/1349.json", r"\boxed{Evelyn}", True),
        (MATH500, "test/algebra/1349.json", r"\boxed{\text{nylEve}}", False),
        (MATH500, "test/algebra/2584.json", r"The final answer is $\dfrac{28}{6}$.", True),
        (AIME, "0", r"\boxed{070}", True),
        (AIME, "0", r"\boxed{71}", False),
        (AIME, "0", "70", False),
        (GSM8K, "eggs", "Final answer: $18 dollars", True),
        (GSM8K, "eggs", r"\boxed{18.00}", True),
        (GSM8K, "eggs", r"\boxed{18 or 19}", False),
        (GSM8K, "house", r"\boxed{\$70,000}", True),
        (GSM8K, "house", r"\boxed{70}", False),
    ],
)
def test_mathematics(spec: str, item_id: str, text: str, correct: bool) -> None:
    grade = open_task(spec).grade(_item(spec, item_id), text)
    assert grade.correct is correct, grade


@pytest.mark.parametrize(
    ("reference", "answer", "correct"),
    [
        ("40_9", "40_9", True),
        ("40_9", "40_{9}", True),
        ("40_9", "$n = 40_9$", True),
        ("40_9", r"40_9\text{ in base 9}", True),
        ("101_2", "0101_2", True),
        ("1101_2", r"1\,101_2", True),
        ("1A_{12}", "1A_{12}", True),
        ("40_9", "40_8", False),
        ("40_9", "40_{10}", False),
        ("40_9", "41_9", False),
        ("40_9", "40", False),
        ("10_2", "10_3", False),
        ("1133", "1133_{10}", True),
        ("1133_{10}", "1133", True),
        ("58,500", r"58\,500", True),
        ("58,500", r"58,\!500", True),
        ("58,500", "58{,}500", True),
        (r"1\,234\,567", "1234567", True),
        ("1000", "1~000", True),
        ("58,500", r"58\,501", False),
        ("(3, 500)", r"(3,\,500)", True),
        ("500", r"3\,500", False),
        ("5", "x = 5", True),
    ],
)
def test_how_numbers_are_written(
    reference: str, answer: str, correct: bool, tmp_path: Path
) -> None:
    row = {"problem": "How many?", "answer": reference}
    task = open_task(f"math500:{_write(tmp_path / 'data.jsonl', row)}")
    grade = task.grade(task.items(None, 0)[0], rf"\boxed{{{answer}}}")
    assert (grade.correct, grade.extracted) == (correct, answer), grade


@pytest.mark.parametrize(
    ("reference", "answer", "correct"),
    [
        ("58500", r"58\,500\text{ dollars}", True),
        ("58500", r"\$58\ 500", True),
        ("500", r"58\,500", False),
        ("10", "10 million", False),
        ("10", r"10\text{ million}", False),
        ("10000000", r"10\text{ million}", True),
        ("2000", "2 thousand", True),
        ("2500", "$2.5 thousand dollars", True),
        ("10", "10 less than x", False),
        ("10", "10 at least", False),
        ("2", "2x", False),
        ("2", "2 x", False),
        ("2", "2i", False),
        ("2", "2 pi", False),
        ("2", "2 dozen", False),
        ("2", "2 or more", False),
        ("2", r"2\text{ or more}", False),
        ("2", "2 and a half hours", False),
        ("12", "12 km/h", True),
        ("12", r"12\text{ miles per hour}", True),
        ("18", r"18~\text{dollars}", True),
        ("18", r"18\,\mathrm{dollars}", True),
        ("18", r"$18\%$ of all", True),
        ("18", "18cm", True),
        ("5", "5 times", True),
        ("5", "5 more apples", True),
    ],
)
def test_a_unit_is_not_another_number(
    reference: str, answer: str, correct: bool, tmp_path: Path
) -> None:
    row = {"question": "How many?", "answer": f"#### {reference}"}
    task = open_task(f"gsm8k:{_write(tmp_path / 'data.jsonl', row)}")
    grade = task.grade(task.items(None, 0)[0], rf"\boxed{{{answer}}}")
    assert grade.correct is correct, grade


def test_a_busy_machine_makes_no_answer_wrong() -> None:
    """The time of a comparison is that which its process computed for."""
    answers = MathAnswers(seconds=0.5)
    found: list[Comparison] = []
    try:
        assert answers.compare("2", "2") == "equal"
        assert answers._process is not None
        answers._process.send_signal(signal.SIGSTOP)
        comparing = threading.Thread(target=lambda: found.append(answers.compare("2", "2")))
        comparing.start()
        comparing.join(1.5)
        answers._process.send_signal(signal.SIGCONT)
        comparing.join()
        assert found == ["equal"]
    finally:
        answers.close()


def test_a_comparison_that_computes_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answers, "_WALL", 1)
    answers = MathAnswers(seconds=0.5)
    try:
        assert answers.compare("2", "2") == "equal"
        assert answers._process is not None
        answers._process.send_signal(signal.SIGSTOP)
        assert answers.compare("2", "2") == "stalled"
        assert answers.compare("2", "2") == "equal"
    finally:
        answers.close()


def test_an_answer_that_never_ends() -> None:
    answers = MathAnswers(seconds=2.0)
    try:
        assert answers.compare("2", "2") == "equal"
        assert answers.compare("2", "9^{9^{9^{9}}}") == "timeout"
        assert answers.compare("2", "3") == "different"
        assert answers._process is not None
        answers._process.kill()
        answers._process.wait()
        assert answers.compare("2", "2") == "equal"
    finally:
        answers.close()


@pytest.mark.parametrize(
    ("text", "correct", "extracted"),
    [
        (r"\boxed{B}", True, "B"),
        (r"\boxed{\text{(b)}}", True, "B"),
        ("Final answer: **B. Mars**", True, "B"),
        ("Final answer: (B)", True, "B"),
        (r"\boxed{C}", False, "C"),
        (r"\boxed{E}", False, None),
        (r"\boxed{B or C}", False, None),
        ("A planet. B it is.", False, None),
    ],
)
def test_choice(text: str, correct: bool, extracted: str | None) -> None:
    grade = open_task(CHOICE).grade(_item(CHOICE, "planet"), text)
    assert (grade.correct, grade.extracted) == (correct, extracted), grade


@pytest.mark.parametrize(
    "answer",
    [
        r"\text{B. 4}",
        r"\text{(B) 4}",
        r"\textbf{B}",
        r"\mathrm{B}",
        r"\textbf{(B)}",
        r"\textbf{\text{B}}.",
        r"\mathbf{B}. 4",
        r"B \text{ 4}",
        "B. 4.",
    ],
)
@pytest.mark.parametrize("choice", ["4", "4 ", " 4."])
def test_a_letter_with_its_choice_in_any_style(answer: str, choice: str, tmp_path: Path) -> None:
    row = {"question": "2 + 2?", "choices": ["3", choice], "answer": "B"}
    task = open_task(f"choice:{_write(tmp_path / 'data.jsonl', row)}")
    grade = task.grade(task.items(None, 0)[0], rf"\boxed{{{answer}}}")
    assert grade.correct, grade


@pytest.mark.parametrize(
    ("choice", "answer", "correct"),
    [
        (".5", "B. .5", True),
        (".5", "(B) .5", True),
        ("Paris.", "B. Paris", True),
        (r"$\frac{\sqrt{3}}{2}$", r"\text{B. $\frac{\sqrt{3}}{2}$}", True),
        ("5", "B. -5", False),
        ("5", r"\text{B} or \text{A}", False),
        ("5", r"\text{" * 1000 + "B" + "}" * 1000, True),
    ],
)
def test_a_choice_that_looks_like_punctuation(
    choice: str, answer: str, correct: bool, tmp_path: Path
) -> None:
    row = {"question": "?", "choices": ["1", choice], "answer": "B"}
    task = open_task(f"choice:{_write(tmp_path / 'data.jsonl', row)}")
    grade = task.grade(task.items(None, 0)[0], rf"\boxed{{{answer}}}")
    assert grade.correct is correct, grade


def test_a_choice_by_place_becomes_a_letter() -> None:
    assert _item(CHOICE, "2").answer == "C"


_GOOD = "```python\ndef has_close_elements(numbers, threshold):\n    return {}\n```\n"
_FUTURE = "from __future__ import annotations"
_RIGHT = "any(abs(a - b) < threshold for i, a in enumerate(numbers) for b in numbers[:i])"


@pytest.mark.parametrize(
    ("text", "correct", "reason"),
    [
        (_GOOD.format(_RIGHT), True, "tests pass"),
        ("<think>" + _GOOD.format("1") + "</think>" + _GOOD.format(_RIGHT), True, "tests pass"),
        (_GOOD.format(_RIGHT) + "Use it:\n```python\nprint(1)\n```", True, "tests pass"),
        ("```bash\npython a.py\n```\nIn it:\n" + _GOOD.format(_RIGHT), True, "tests pass"),
        (_GOOD.format("1") + "```text\n-1\n```\n" + _GOOD.format(_RIGHT), True, "tests pass"),
        (_GOOD.format(_RIGHT).replace("python", "python3"), True, "tests pass"),
        (_GOOD.format(_RIGHT).replace("\n", "\r\n"), True, "tests pass"),
        (_GOOD.format(_RIGHT).replace("def", f"{_FUTURE}\ndef", 1), True, "tests pass"),
        (_GOOD.format(_RIGHT).replace("def", f"{_FUTURE}; import re\ndef"), True, "tests pass"),
        (_GOOD.format("False"), False, "AssertionError"),
        (_GOOD.format("List()"), False, "TypeError"),  # the prompt's imports are there
        (_GOOD.format("exit(0)"), False, "ended before its tests had run"),
        (_GOOD.format("1 +"), False, "SyntaxError"),
        ("```python\ndef other():\n    pass\n```", False, "no fenced code block that defines"),
        ("def has_close_elements(numbers, threshold):\n    return True", False, "no fenced"),
        (_GOOD.format(_RIGHT).removesuffix("```\n"), False, "no fenced"),
    ],
)
def test_code(text: str, correct: bool, reason: str) -> None:
    grade = open_task(CODE).grade(_item(CODE, "HumanEval/0"), text)
    assert grade.correct is correct, grade
    assert reason in grade.reason


def test_code_with_plain_asserts() -> None:
    task = open_task(CODE)
    answer = "```python\ndef add(a, b):\n    return a + b\n```"
    assert task.grade(_item(CODE, "add"), answer).correct


_GUARD = 'if __name__ == "__main__":\n    '


@pytest.mark.parametrize(
    "script",
    [
        "a, b = map(int, input().split())",
        "import sys\n    print(add(int(sys.argv[1]), int(sys.argv[2])))",
        "import unittest\n    unittest.main()",
        "exit()",
    ],
)
def test_code_that_is_also_a_script(script: str) -> None:
    task = open_task(CODE)
    answer = f"```python\ndef add(a, b):\n    return a + b\n{_GUARD}{script}\n```"
    grade = task.grade(_item(CODE, "add"), answer)
    assert grade.correct, grade


def test_the_tests_of_code_are_a_script() -> None:
    """A block of theirs is run, and the code's own is not."""
    task = open_task(CODE)
    item = dataclasses.replace(_item(CODE, "add"), answer=f"{_GUARD}assert add(1, 2) == 3")
    assert task.grade(item, "```python\ndef add(a, b):\n    return a + b\n```").correct
    wrong = task.grade(item, "```python\ndef add(a, b):\n    return a - b\n```")
    assert (wrong.correct, wrong.reason) == (False, "AssertionError")


def test_classes_of_code_find_their_module() -> None:
    task = open_task(CODE)
    lines = [
        "from __future__ import annotations",
        "import dataclasses, pickle",
        "@dataclasses.dataclass",
        "class Pair:",
        "    a: int",
        "    b: dataclasses.InitVar[int]",
        "def add(a, b):",
        "    return pickle.loads(pickle.dumps(Pair(a, b))).a + b",
    ]
    grade = task.grade(_item(CODE, "add"), "\n".join(["```python", *lines, "```"]))
    assert grade.correct, grade


def test_passkey() -> None:
    task = open_task("passkey?steps=3")
    assert task.name == "passkey?steps=3"
    item = task.items(1, 0)[0]
    steps = "Step 1: 5\nStep 2: 6\n**Step 3:** 7\n"
    right = f"The passkey is {item.answer}."
    assert item.answer in item.messages[0]["content"]
    assert task.grade(item, steps + right).reason == "passkey right; 3 of 3 steps written"
    assert task.grade(item, f"{steps}The passkey is: **{item.answer}**").correct
    thousands = f"{int(item.answer):,}"
    assert task.grade(item, f"{steps}The passkey, as told, was {thousands}, not 999.").correct
    for stated in (
        f"{right}\n\nI kept the passkey in mind through all 3 steps.",
        f"{right} The passkey has 5 digits.",
        f"{right} The passkey is 5 digits long.",
        f"{right[:-1]}, not 11111.",
        f"The passkey is:\n{item.answer}",
        f"The passkey is:\n\n\\[\n\\boxed{{{item.answer}}}\n\\]",
        f"Passkey = $\\text{{{item.answer}}}$",
        f"The passkey I was told: {item.answer}",
        f"Passkey {item.answer}; the passkey has 5 digits",
        f"{right} Steps done.",
        f"{right}\nSteps: 3 of 3",
        f"{right[:-1]}\nSteps: 3 of 3",
        f"{right[:-1]} (digits checked)",
        f"{right[:-1]}, steps done",
        f"{right} The passkey is a 5-digit number.",
        f"{right} The passkey is *5* digits long.",
    ):
        assert task.grade(item, steps + stated).correct, stated
    for stated in (
        "I kept the passkey in mind through all 3 steps.",
        "The passkey has 5 digits.",
        f"{right} So the passkey was 1234.",
        f"{right} So the passkey is:\n1234",
        f"The passkey is important.\nThere are {item.answer} apples.",
        f"The passkey is {item.answer}0",
    ):
        assert not task.grade(item, steps + stated).correct, stated
    early = task.grade(item, right + "\n" + steps)
    assert (early.correct, early.extracted) == (False, None)
    wrong = task.grade(item, f"{steps}{right} No. The passkey is 11111.")
    assert (wrong.correct, wrong.extracted) == (False, "11111")
    assert not task.grade(item, f"<think>{steps}{right}").correct


def test_the_length_of_a_passkey_prompt_does_not_depend_on_the_steps() -> None:
    short, long = (open_task(f"passkey?steps={steps}").items(1, 0)[0] for steps in (10, 9999))
    short_prompt, long_prompt = (item.messages[0]["content"] for item in (short, long))
    assert len(long_prompt) - len(short_prompt) < 10


@pytest.mark.parametrize("variables", [1, 4, 26])
def test_state_tracking_knows_what_python_computes(variables: int) -> None:
    task = open_task(f"state-tracking?variables={variables}&steps=300")
    for item in task.items(3, seed=1):
        program = item.messages[0]["content"].split("\n\n")[1]
        assert len(program.splitlines()) == 300
        state: dict[str, int] = {}
        exec(program, {}, state)
        assert item.answer == ", ".join(f"{name}={value}" for name, value in state.items())
        assert all(abs(value) <= 999 for value in state.values())


def test_state_tracking_grades_the_whole_state() -> None:
    task = open_task("state-tracking?variables=2&steps=6")
    item = dataclasses.replace(task.items(1, 0)[0], answer="a=3, b=-12")
    assert task.grade(item, r"\boxed{a = 3, b = -12}").correct
    assert task.grade(item, r"\boxed{b=\u221212, a=3}".replace("\\u2212", "\u2212")).correct
    assert task.grade(item, "Final answer: a: 3, b: -12").correct
    assert task.grade(item, r"\boxed{a=3}").reason == "1 of 2 variables right"
    assert not task.grade(item, r"\boxed{a=3, b=12}").correct
    surplus = task.grade(item, r"\boxed{a=3, b=-12, c=1}")
    assert (surplus.correct, surplus.reason) == (
        False,
        "2 of 2 variables right; not in the program: c",
    )
    assert task.grade(item, "a=3, b=-12").extracted is None


@pytest.mark.parametrize("blank", ["\n", "\t", "\u00a0"])
def test_state_tracking_reads_a_minus_with_any_blank(blank: str) -> None:
    task = open_task("state-tracking?variables=2&steps=6")
    item = dataclasses.replace(task.items(1, 0)[0], answer="a=3, b=-12")
    assert task.grade(item, rf"\boxed{{a=3, b=-{blank}12}}").correct


def test_state_tracking_grades_a_number_without_an_end() -> None:
    task = open_task("state-tracking?variables=2&steps=6")
    item = dataclasses.replace(task.items(1, 0)[0], answer="a=3, b=-12")
    grade = task.grade(item, "Final answer: a=3, b=-12, b=1" + "0" * 5000)
    assert (grade.correct, grade.reason) == (False, "1 of 2 variables right")


def test_a_line_of_data_ends_at_a_newline_only(tmp_path: Path) -> None:
    """JSON may hold other line separators as they are."""
    file = tmp_path / "data.jsonl"
    file.write_text('{"a": "one\u2028two\x85three"}\r\n\n{"a": "four"}', encoding="utf-8")
    assert [row.fields["a"] for row in records._jsonl_rows(file)] == [
        "one\u2028two\x85three",
        "four",
    ]


def test_code_tells_what_its_sandbox_lacks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(code, "check_sandbox", lambda: frozenset({"user", *LAYERS}))
    open_task(CODE)
    assert not caplog.records
    monkeypatch.setattr(code, "check_sandbox", lambda: frozenset({"landlock"}))
    open_task(CODE)
    assert "run here without namespaces; docs/security.md" in caplog.text
