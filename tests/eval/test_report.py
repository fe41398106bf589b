"""Cells, measures and the report, on rows whose numbers can be checked by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from vase_sgl.eval.cells import IncompleteError, load
from vase_sgl.eval.configuration import ConfigurationError, RunFolder
from vase_sgl.eval.measures import ACCURACY, LOOPS, NLL, pareto_front, quality_of
from vase_sgl.eval.report import write
from vase_sgl.eval.rows import Row, RowError
from vase_sgl.eval.statistics import sign_test


def row(arm: str, budget: int | None, item: str, seed: int = 0, **fields: object) -> Row:
    common = Row(
        run_id="r",
        arm=arm,
        policy="full" if budget is None else "random",
        budget=budget,
        task="t|<b>",
        item_id=item,
        seed_index=seed,
        status="completed",
        started=100.0,
        total_seconds=4.0,
        correct=True,
        output_tokens=10,
        reserved_slots=budget or 1000,
        full_kv_slots=1000,
        rounds=0 if budget is None else 3,
    )
    return dataclasses.replace(common, **fields)  # type: ignore[arg-type]


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[Iterable[Row]], Path]:
    def store(rows: Iterable[Row]) -> Path:
        path = tmp_path / "forced.jsonl"
        path.write_text("".join(r.to_json() + "\n" for r in rows), encoding="utf-8")
        return path

    return store


def grid(items: int = 8) -> list[Row]:
    """`full` is always right; `a` where the item is even, and it loops elsewhere."""
    full = [row("full", None, str(i)) for i in range(items)]
    evicting = [
        row("a", budget, str(i), correct=i % 2 == 0, loop=i % 2 == 1)
        for budget in (64, 128)
        for i in range(items)
    ]
    return full + evicting


def test_scores_differences_and_the_front(stored: Callable[[Iterable[Row]], Path]) -> None:
    (cells,) = load([stored(grid())]).cells.values()
    full, small, _ = cells
    assert [c.label for c in cells] == ["full", "a @ 64", "a @ 128"]
    assert quality_of(cells) == [ACCURACY]
    estimate = ACCURACY.estimate(small)
    assert estimate is not None
    assert (estimate.value, estimate.n) == (0.5, 8) and estimate.low == pytest.approx(0.2152, 1e-3)
    difference = ACCURACY.difference(small, full)
    assert difference is not None
    assert difference.value == -0.5  # four of eight lost, which the sign test gives p 0.125
    assert (difference.low, difference.high) == pytest.approx((-0.811, 0.011), abs=5e-4)
    loops = LOOPS.estimate(small)
    assert loops is not None and loops.value == 0.5
    assert pareto_front(cells, ACCURACY) == [full, small]
    assert not small.is_control and small.evicted_share == 1


def test_time_is_counted_once_however_many_requests_share_it(
    stored: Callable[[Iterable[Row]], Path],
) -> None:
    times = [(100.0, 4.0), (102.0, 4.0), (110.0, 1.0), (100.5, 0.5)]
    found = [
        row("a", 50, str(i), started=start, total_seconds=seconds)
        for i, (start, seconds) in enumerate(times)
    ]
    again = row("a", 50, "0", started=90.0, total_seconds=3.0, status="failed", output_tokens=0)
    (cells,) = load([stored([again, *found])]).cells.values()
    assert cells[0].machine_seconds == 3 + 6 + 1
    assert cells[0].tokens_per_second == 40 / 10
    assert cells[0].slot_seconds == 50 * (3 + 4 + 4 + 1 + 0.5)
    assert cells[0].completed == cells[0].n == 4


def test_sessions_do_not_share_time_whatever_their_clocks_say(
    stored: Callable[[Iterable[Row]], Path],
) -> None:
    """The second was on a clock that is behind, the third an hour later."""
    times = [(100.0, 100.0), (100.0, 102.0), (98.0, 101.0), (98.0, 103.0), (3700.0, 3700.0)]
    found = [
        row("a", 50, str(i), session=session, started=start)
        for i, (session, start) in enumerate(times)
    ]
    (cells,) = load([stored(found)]).cells.values()
    assert cells[0].machine_seconds == 6 + 6 + 4


def test_aborted_samples_are_wrong_and_nothing_else(
    stored: Callable[[Iterable[Row]], Path], tmp_path: Path
) -> None:
    """Not memory, rounds, loops and faults of form of 0: what they took is not known."""

    def lost(aborted: Row) -> Row:
        return row(
            *(aborted.arm, aborted.budget, aborted.item_id),
            status="aborted",
            correct=False,
            **dict.fromkeys(("rounds", "reserved_slots", "full_kv_slots", "output_tokens"), 0),
        )

    looping = {"correct": False, "loop": True, "malformed": ("truncated",)}
    full = [row("full", None, str(i)) for i in range(8)]
    some = [row("a", 64, str(i), prompt_mode="evict", **looping) for i in range(8)]
    some[:6] = map(lost, some[:6])
    none = [lost(row("b", 32, str(i))) for i in range(8)]
    (cells,) = load([stored([*full, *some, *none])]).cells.values()
    base, few, gone = cells
    assert (few.n, few.completed, few.evicted_share) == (8, 2, 1.0)
    loops = LOOPS.estimate(few)
    assert loops is not None and (loops.value, loops.n) == (1.0, 2)
    difference = LOOPS.difference(few, base)
    assert difference is not None and (difference.value, difference.n) == (1.0, 2)
    assert gone.evicted_share is None and not gone.is_control
    assert LOOPS.estimate(gone) is None and LOOPS.difference(gone, base) is None
    assert pareto_front(cells, ACCURACY) == [base, few]
    _, markdown = write(load([stored([*full, *some, *none])]), tmp_path, price_per_hour=None)
    text = markdown.read_text()
    quality, form, cost = (line for line in text.splitlines() if line.startswith("| a | 64"))
    assert quality.startswith("| a | 64 | 8 | 0.0 [0.0, 32.4] | -100.0 [")
    assert quality.endswith(" | 100 % (n 2) |")
    assert form.startswith("| a | 64 | 8 | 100.0 [34.2, 100.0] (n 2) | +100.0 [")
    assert form.endswith("(n 2) | truncated 2 |")
    assert cost.startswith("| a | 64 | 8 | 2 | 10 | 64 | - | 6 | 0 | 3.0 |")
    assert "| b | 32 | 8 | 0 | - | - | - | - | - | - |" in text
    assert "| b | 32 | 8 | - | - | - | - | - |" in text
    assert "a @ 64 (64 slots (n 2), 0.0 [0.0, 32.4] %, n 8), full (" in text


def test_slots_and_rounds_of_a_trace_are_of_completed_ones(
    stored: Callable[[Iterable[Row]], Path], tmp_path: Path
) -> None:
    rows = [
        row("a", 64, f"{trace}#{turn}", task="trace:f", rounds=turn, reserved_slots=70 + turn)
        for trace in "xyz"
        for turn in (1, 2)
    ]
    nothing = {"status": "aborted", "correct": False, "rounds": 0, "reserved_slots": 0}
    rows[-1] = dataclasses.replace(rows[-1], **nothing)  # type: ignore[arg-type]
    _, markdown = write(load([stored(rows)]), tmp_path, price_per_hour=None)
    _, _, section = markdown.read_text().partition("### Cost per completed trace")
    (line,) = (line for line in section.splitlines() if line.startswith("| a |"))
    assert line.startswith("| a | 64 | 3 | 2 | 72 | 3.0 |")


def test_seeds_without_an_answer_take_their_item_with_them(
    stored: Callable[[Iterable[Row]], Path],
) -> None:
    """Items have the same weight in a mean over several seeds."""
    rows = [row("full", None, str(i), seed, loop=i == 0) for i in range(4) for seed in range(2)]
    rows[-1] = dataclasses.replace(rows[-1], status="aborted", correct=False)
    (cells,) = load([stored(rows)]).cells.values()
    estimate = LOOPS.estimate(cells[0])
    assert estimate is not None and (estimate.value, estimate.n) == (pytest.approx(1 / 3), 6)


def test_no_share_has_an_interval_without_width(stored: Callable[[Iterable[Row]], Path]) -> None:
    rows = [row("full", None, str(i), seed, correct=seed == 0) for i in range(4) for seed in (0, 1)]
    (cells,) = load([stored(rows)]).cells.values()
    estimate = ACCURACY.estimate(cells[0])
    assert estimate is not None and (estimate.value, estimate.n) == (0.5, 8)
    assert (estimate.low, estimate.high) == pytest.approx((0.15, 0.85), abs=1e-3)


def test_the_report_has_every_number_with_n_and_interval(
    stored: Callable[[Iterable[Row]], Path], tmp_path: Path
) -> None:
    page, markdown = write(load([stored(grid())]), tmp_path / "out", price_per_hour=900)
    text, html = markdown.read_text(), page.read_text()
    lines = [line for line in text.splitlines() if line.startswith("| a | 64")]
    quality, form, cost = lines
    assert quality.startswith("| a | 64 | 8 | 50.0 [21.5, 78.5] | -50.0 [-")
    assert quality.endswith("| 0 : 4 | 0.125 | 100 % |")
    assert form.startswith("| a | 64 | 8 | 50.0 [21.5, 78.5] | +50.0 [")
    # 4 s for 8 samples at 900 an hour.
    assert (
        cost == "| a | 64 | 8 | 8 | 10 | 64 | - | 6 | 0 | 3.0 | 20.0 | - | 0.50 | 256 | 0.125000 |"
    )
    assert "Pareto front of correct against slots: a @ 64 (64 slots, 50.0" in text
    # The task's name is text, not markup.
    assert "<h2>t|&lt;b&gt;</h2>" in html and "<b>" not in html
    assert html.count("<svg") == 5 == text.count("![")
    assert "100 %" in html and "no-regression control</td>" not in html


def test_a_full_cache_takes_its_final_length(
    stored: Callable[[Iterable[Row]], Path], tmp_path: Path
) -> None:
    """Not the longest answer allowed, for which nobody reserves slots."""
    rows = [dataclasses.replace(r, reserved_slots=5000) if r.budget is None else r for r in grid(8)]
    results = load([stored(rows)])
    (cells,) = results.cells.values()
    assert cells[0].slot_seconds == 8 * 1000 * 4
    _, markdown = write(results, tmp_path, price_per_hour=None)
    text = markdown.read_text()
    assert "| full | - | 8 | 8 | 10 | 1000 | - | 100 | 0 | 0.0 | 20.0 | - | 0.50 | 4000 |" in text
    assert "full (1000 slots, 100.0" in text


def test_policies_are_compared_at_the_same_budget_and_prompt_mode(
    stored: Callable[[Iterable[Row]], Path], tmp_path: Path
) -> None:
    default = [row("vase-attnv", 64, str(i), correct=i < 6, prompt_mode="evict") for i in range(8)]
    kept = [row("vase-attnv+keep", 64, str(i), prompt_mode="keep") for i in range(8)]
    other = [dataclasses.replace(r, prompt_mode="evict") for r in grid() if r.arm == "a"]
    _, markdown = write(load([stored([*default, *kept, *other])]), tmp_path, price_per_hour=None)
    _, _, section = markdown.read_text().partition("### Policies at the same budget: correct")
    rows = [line for line in section.partition("###")[0].splitlines() if line.startswith("| a |")]
    (line,) = rows  # not at budget 128, where the default policy is missing
    assert line.startswith("| a | 64 | 8 | -25.0 [") and line.endswith("| 1 : 3 | 0.625 |")


def test_plots_tell_budgets_beside_the_prompt(
    stored: Callable[[Iterable[Row]], Path], tmp_path: Path
) -> None:
    """They hold the prompt too: of one budget with others they are not at one memory."""
    note = "dotted, hollow: kept beside the whole prompt"
    drawn = {}
    for mode in ("evict", "keep"):
        rows = [
            dataclasses.replace(r, prompt_mode=None if r.budget is None else mode) for r in grid()
        ]
        write(load([stored(rows)]), tmp_path / mode, price_per_hour=None)
        plots = sorted((tmp_path / mode / "plots").iterdir())
        drawn[mode] = {plot.name: plot.read_text(encoding="utf-8") for plot in plots}
    for name, drawing in drawn["keep"].items():
        over_budget = "pareto" not in name
        assert (note in drawing) is over_budget and note not in drawn["evict"][name]
        dashes = (d.count("stroke-dasharray") for d in (drawing, drawn["evict"][name]))
        assert (next(dashes) > next(dashes)) is over_budget


def test_memory_holds_the_query_ring(
    stored: Callable[[Iterable[Row]], Path], tmp_path: Path
) -> None:
    """Of policies that look at attention; with it `vase-attnv` is not on the front here."""
    full = [row("full", None, str(i)) for i in range(4)]
    drawn = [row("random", 64, str(i), correct=i > 0) for i in range(4)]
    attending = [
        dataclasses.replace(r, arm="vase-attnv", policy="vase-attnv", reserved_slots=60)
        for r in drawn
    ]
    rows = [*full, *drawn, *attending]
    arms = [
        {"name": "full", "eviction": {}},
        *({"name": name, "eviction": {"budget": 64}} for name in ("random", "vase-attnv")),
    ]
    run = _folder(tmp_path / "run", None, arms=arms)
    (run / "rows.jsonl").write_text("".join(r.to_json() + "\n" for r in rows))
    told = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**told, "query_ring_slots": {"production": 192}}))
    results = load([run])
    (cells,) = results.cells.values()
    assert [c.mean(c.slots) for c in cells] == [1000, 64, 252]
    assert [c.label for c in pareto_front(cells, ACCURACY)] == ["full", "random @ 64"]
    assert [c.slot_seconds for c in cells] == [4 * 4 * slots for slots in (1000, 64, 252)]
    _, markdown = write(results, tmp_path / "out", price_per_hour=None)
    text = markdown.read_text()
    assert "| random | 64 | 4 | 4 | 10 | 64 | - | 6 |" in text
    assert "| vase-attnv | 64 | 4 | 4 | 10 | 252 | 192 | 25 |" in text
    assert "how large the query rings" not in text
    # Rows alone do not tell.
    _, markdown = write(load([stored(rows)]), tmp_path / "alone", price_per_hour=None)
    text = markdown.read_text()
    assert "| vase-attnv | 64 | 4 | 4 | 10 | 60 | not known | 6 |" in text
    assert "how large the query rings of `vase-attnv` are; they are not among the slots" in text


def test_a_run_keeps_one_size_of_query_ring(tmp_path: Path) -> None:
    """It is noted once, also in the folder of a version that did not."""
    run = RunFolder.read(_folder(tmp_path / "run", 64))
    assert run.with_worker("production", {"model": "m"}, None).query_ring_slots == {}
    noted = run.with_worker("production", {"model": "m"}, 192.0)
    assert RunFolder.read(tmp_path / "run") == noted
    assert noted.query_ring_slots == {"production": 192.0}
    assert noted.with_worker("production", {"model": "m"}, None) == noted
    with pytest.raises(ConfigurationError, match="there 192 slots, now 96"):
        noted.with_worker("production", {"model": "m"}, 96.0)


def test_slots_are_charged_from_the_admission_on(
    stored: Callable[[Iterable[Row]], Path], tmp_path: Path
) -> None:
    """Two at a time for a second each: the last of eight waits three seconds."""
    rows = [
        row("full", None, str(i), total_seconds=i // 2 + 1.0, queue_seconds=i // 2)
        for i in range(8)
    ]
    results = load([stored(rows)])
    (cells,) = results.cells.values()
    assert cells[0].slot_seconds == 8 * 1000
    _, markdown = write(results, tmp_path / "told", price_per_hour=None)
    assert "upper bounds" not in markdown.read_text()
    lost = {"status": "failed", "reserved_slots": 0, "full_kv_slots": 0}
    again = dataclasses.replace(rows[0], queue_seconds=None, **lost)  # type: ignore[arg-type]
    assert next(iter(load([stored([again, *rows])]).cells.values()))[0].queue_is_known
    untold = [dataclasses.replace(r, queue_seconds=None) for r in rows]
    _, markdown = write(load([stored(untold)]), tmp_path / "untold", price_per_hour=None)
    assert "how long requests of any arm waited to be admitted" in markdown.read_text()


def test_a_question_asked_after_two_texts_counts_once(
    stored: Callable[[Iterable[Row]], Path], tmp_path: Path
) -> None:
    """As forced tasks of older runs did."""
    ids = [f"{text}/passkey-forced/0/{i}" for text in ("gpl", "rust") for i in range(4)]
    rows = [row("full", None, item) for item in ids]
    rows += [row("a", 64, item, correct=item.startswith("gpl")) for item in ids]
    results = load([stored(rows)])
    ((base, cell),) = results.cells.values()
    signs = sign_test(ACCURACY.pairs(cell), ACCURACY.pairs(base))
    assert (signs.n, signs.losses, signs.p_value) == (4, 4, 0.125)
    _, markdown = write(results, tmp_path, price_per_hour=None)
    text = markdown.read_text()
    assert "Its 8 items are 4 questions" in text and "| 0 : 4 | 0.125 |" in text


def test_answers_that_were_not_judged_are_counted(
    stored: Callable[[Iterable[Row]], Path], tmp_path: Path
) -> None:
    rows = grid()
    _, markdown = write(load([stored(rows)]), tmp_path, price_per_hour=None)
    assert "came to a verdict" not in markdown.read_text()
    reasons = ("the grader failed: E", "math-verify cannot compare it: timeout")
    for place, reason in enumerate(reasons):
        rows[place] = dataclasses.replace(rows[place], correct=False, grade_reason=reason)
    _, markdown = write(load([stored(rows)]), tmp_path, price_per_hour=None)
    _, _, events = markdown.read_text().partition("## Events")
    assert f"| t\\|<b>, full | 2 | {reasons[1]} |" in events


def test_windows_are_told_apart(stored: Callable[[Iterable[Row]], Path], tmp_path: Path) -> None:
    """An arm of one name and budget may come twice, and is compared at its own window alone."""

    def at(arm: str, window: int, right: int) -> list[Row]:
        return [row(arm, 64, str(i), window=window, correct=i < right) for i in range(8)]

    full = [row("full", None, str(i)) for i in range(8)]
    rows = [*full, *at("vase-attnv", 16, 8), *at("vase-attnv", 32, 4), *at("a", 32, 2)]
    _, markdown = write(load([stored(rows)]), tmp_path, price_per_hour=None)
    text = markdown.read_text()
    assert "| full | - | 8 |" in text
    assert "| vase-attnv, window 16 | 64 | 8 | 100.0 [" in text
    assert "| vase-attnv, window 32 | 64 | 8 | 50.0 [" in text
    _, _, section = text.partition("### Policies at the same budget: correct")
    (line,) = (line for line in section.partition("###")[0].splitlines() if ", window" in line)
    assert line.startswith("| a, window 32 | 64 | 8 | -25.0 [")
    alone = write(load([stored([*full, *at("a", 32, 2)])]), tmp_path, price_per_hour=None)
    text = alone[1].read_text()
    assert "Every arm with a budget has window 32." in text and "| a | 64 | 8 | 25.0 [" in text


def test_few_evictions_are_a_control_and_said_so(
    stored: Callable[[Iterable[Row]], Path], tmp_path: Path
) -> None:
    rows = [r if r.item_id == "0" else dataclasses.replace(r, rounds=0) for r in grid()]
    _, markdown = write(load([stored(rows)]), tmp_path, price_per_hour=None)
    assert markdown.read_text().count("| 12 %, no-regression control |") == 2


def test_incomplete_cells_are_refused_by_name(stored: Callable[[Iterable[Row]], Path]) -> None:
    rows = grid()
    with pytest.raises(IncompleteError) as caught:
        load([stored(rows[:-2])])
    assert "t|<b>, a @ 128, 8 samples: 2 not run: 6 seed 0, 7 seed 0" in str(caught.value)
    failed = dataclasses.replace(rows[-1], status="failed", error="it was lost")
    with pytest.raises(IncompleteError) as caught:
        load([stored([*rows[:-1], failed])])
    assert "1 failed: 7 seed 0; the last one said: it was lost" in str(caught.value)
    with pytest.raises(IncompleteError) as caught:
        load([stored([*rows, row("full", None, "0", seed=1)])])
    assert "full, 8 samples" not in str(caught.value)
    assert "a @ 64, 9 samples: 1 not run: 0 seed 1" in str(caught.value)
    with pytest.raises(IncompleteError, match="there are no rows"):
        load([stored([])])


def _folder(path: Path, budget: int | None, **changes: object) -> Path:
    """A run of `full`, or of `a` at a budget, with changed entries of its configuration."""
    arm = "full" if budget is None else "a"
    items = [str(i) for i in range(4)]
    configuration = {
        "items": {"t|<b>": items},
        "items_digest": "1",
        "arms": [{"name": arm, "eviction": {} if budget is None else {"budget": budget}}],
        "settings": {"max_new_tokens": 10, "temperature": 0.0},
        "seeds": 1,
        "seed": 0,
    }
    workers = {"production": {"model": changes.pop("model", "m")}}
    run = {
        "format": "vase-sgl-eval/1",
        "run_id": "r",
        "configuration": {**configuration, **changes},
        "workers": workers,
    }
    path.mkdir()
    (path / "run.json").write_text(json.dumps(run))
    rows = [
        row(arm, budget, item, task=task)
        for task in run["configuration"]["items"]
        for item in items
    ]
    (path / "rows.jsonl").write_text("".join(r.to_json() + "\n" for r in rows))
    return path


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"items_digest": "2"}, "items of t|<b> have the same ids, but other questions or answers"),
        (
            {"settings": {"max_new_tokens": 99, "temperature": 0.0}},
            "max_new_tokens is 99, there 10",
        ),
        ({"seed": 7}, "seed is 7, there 0"),
        ({"model": "other"}, "production worker, model is other, there m"),
    ],
)
def test_runs_that_did_not_measure_the_same_are_refused(
    changes: dict[str, object], difference: str, tmp_path: Path
) -> None:
    first, same = _folder(tmp_path / "first", None), _folder(tmp_path / "same", 64)
    assert len(load([first, same]).attempts) == 8
    unlike = _folder(tmp_path / "unlike", 128, **changes)
    with pytest.raises(IncompleteError) as caught:
        load([first, same, unlike])
    assert f"{unlike} against {first}: {difference}" in str(caught.value)
    assert str(same) not in str(caught.value)


def test_runs_of_other_tasks_are_compared_by_the_tasks_they_share(tmp_path: Path) -> None:
    ids = [str(i) for i in range(4)]
    digests = {"t|<b>": "1", "u": "2"}
    one = _folder(tmp_path / "one", None, task_digests=digests)
    both = {"items": {"u": ids, "t|<b>": ids}, "items_digest": "12", "task_digests": digests}
    two = _folder(tmp_path / "two", 64, **both)
    assert list(load([one, two]).cells) == ["t|<b>", "u"]
    other = _folder(tmp_path / "other", 128, task_digests={"t|<b>": "3"})
    with pytest.raises(IncompleteError, match=r"other against .*one: items of t.* other questions"):
        load([one, two, other])
    # Only an older version's digest of all items: nothing can be said about one of the tasks.
    del both["task_digests"]
    load([one, _folder(tmp_path / "old", 256, **both)])
    # Runs without a common task are not compared with each other.
    alone = {"items": {"v": ids}, "settings": {"max_new_tokens": 99}, "model": "other"}
    assert "v" in load([one, _folder(tmp_path / "alone", 64, **alone)]).cells


def test_rows_without_a_configuration_are_named_beside_a_run(
    stored: Callable[[Iterable[Row]], Path], tmp_path: Path
) -> None:
    rows = stored(row("b", 64, str(i), run_id="s") for i in range(4))
    run = _folder(tmp_path / "run", None)
    _, markdown = write(load([run, rows]), tmp_path / "out", price_per_hour=None)
    assert "Rows without a run's configuration, of `s`: nothing tells" in markdown.read_text()


def test_a_torn_line_of_counters_is_named(
    stored: Callable[[Iterable[Row]], Path], tmp_path: Path
) -> None:
    stored(grid()).rename(tmp_path / "rows.jsonl")
    (tmp_path / "run.json").write_text(
        json.dumps(
            {
                "format": "vase-sgl-eval/1",
                "run_id": "r",
                "configuration": {"items": {}, "arms": [], "seeds": 1},
                "workers": {},
            }
        )
    )
    (tmp_path / "sessions.jsonl").write_text('{"worker": "production", "tar')
    with pytest.raises(RowError, match=r"sessions\.jsonl, line 1 is not JSON .*; remove that line"):
        load([tmp_path])


def test_nll_rows_without_a_worker(stored: Callable[[Iterable[Row]], Path], tmp_path: Path) -> None:
    rows = [
        dataclasses.replace(
            r,
            correct=None,
            worker="in-process",
            nll_sum=100.0 * (2.0 if r.budget is None else 2.0 + 16 / r.budget),
            nll_tokens=100,
        )
        for r in grid()
    ]
    results = load([stored(rows)])
    (cells,) = results.cells.values()
    assert quality_of(cells) == [NLL] and not LOOPS.applies(cells)
    loss = NLL.estimate(cells[1])
    assert loss is not None and loss.value == 2.25
    assert pareto_front(cells, NLL) == cells
    _, markdown = write(results, tmp_path, price_per_hour=1.0)
    text = markdown.read_text()
    assert "| a | 64 | 8 | 2.2500 [2.2500, 2.2500] | +0.2500 [+0.2500, +0.2500] | 0 : 8 |" in text
    # Its arms shared their forward passes, so no arm has a time of its own.
    assert "| a | 64 | 8 | 8 | 10 | 64 | - | 6 | 0 | 3.0 | - | - | - | - | - |" in text
    assert "waited to be admitted" not in text
    assert "throughput over budget" not in text
