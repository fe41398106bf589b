"""The report: one Markdown text with plots, and the same as an HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from vase_sgl.eval import plots, tables
from vase_sgl.eval.arms import BASELINE
from vase_sgl.eval.cells import CONTROL_SHARE, Cell, Results, baseline, windows
from vase_sgl.eval.html_page import html_page
from vase_sgl.eval.items import GRADER_FAILED, NOT_COMPARED
from vase_sgl.eval.measures import LOOPS, MALFORMED, Measure, pareto_front, quality_of
from vase_sgl.eval.plots import Point
from vase_sgl.eval.rows import Row
from vase_sgl.eval.statistics import Estimate, sign_test
from vase_sgl.eval.tables import NOTHING, cell, plain, table
from vase_sgl.eval.trace import PREFIX, trace_of
from vase_sgl.eviction.params import DEFAULT_POLICY

_PLOTS = "plots"

_HOW_TO_READ = """\
Every share and score has its 95 % interval and the number of samples n. *Δ* is the mean of the
paired differences to `full` on the same items and seeds, with an interval over items (Bonett and
Price's for shares with one seed, else a bootstrap); *better : worse* counts the items, and *p* is
the exact sign test on them. An arm whose interval of Δ holds 0 is not shown to differ, nor to be
as good. *Evicted* is the share of samples in which an eviction happened; under {control:.0f} % a
row shows only that nothing broke (a *no-regression control*) and says nothing about the policy.
A sample that the worker aborted counts as wrong; everything else but the times is of the samples
with an answer (*completed*), and their n stands by where it differs.
*Slots* are memory in KV slots, one token in every layer: with a budget those reserved at the end of
the request, when it has settled, and of a full cache its final length. Policies that look at
attention also hold a *query ring* for each request, of the worker's largest window whatever the
request's is; its size in slots is among the *slots*. *Machine-seconds* is the time in which at
least one request of the arm ran, *slot-seconds* are slots times seconds from the admission on; both
divided by the samples that ended with an answer. Attempts of which no token came take no slots:
what they held is not known. Seconds and rates compare arms of this very run alone, and
only where the worker's prefix cache was emptied before each of them: else the first alone computes
the prompts. A gateway's clients cannot empty it; *Events* says where it was not. In plots over the
budget arms that keep the prompt (`+keep`) are dotted with hollow markers: their budget is of
generated tokens alone, so at the same budget they hold more than others, by the prompt."""


def write(results: Results, folder: Path, price_per_hour: float | None) -> tuple[Path, Path]:
    """Write report.html, report.md and its plots; the paths of the first two."""
    drawings: dict[str, str] = {}
    text = "\n\n".join(_report(results, price_per_hour, drawings)) + "\n"
    (folder / _PLOTS).mkdir(parents=True, exist_ok=True)
    for name, drawing in drawings.items():
        (folder / name).write_text(drawing, encoding="utf-8")
    page, markdown = folder / "report.html", folder / "report.md"
    markdown.write_text(text, encoding="utf-8")
    page.write_text(html_page("vase_sgl evaluation", text, drawings), encoding="utf-8")
    return page, markdown


def _report(
    results: Results, price_per_hour: float | None, drawings: dict[str, str]
) -> Iterator[str]:
    yield "# Evaluation"
    yield from _what_ran(results)
    yield "## How to read it"
    yield _HOW_TO_READ.format(control=100 * CONTROL_SHARE)
    arms = [c.name for found in results.cells.values() for c in found]
    styles = plots.styles_of(list(dict.fromkeys(arms)))
    for number, (task, cells) in enumerate(results.cells.items(), 1):
        yield f"## {task}"
        yield from _window(cells)
        yield from _shared_questions(cells)
        yield from _quality(cells)
        yield from _same_budget(cells)
        yield from _form(cells)
        yield from _cost(cells, price_per_hour)
        if task.startswith(PREFIX):
            yield from _traces(cells, price_per_hour)
        images = []
        for name, title, drawing in _drawings(task, cells, styles):
            path = f"{_PLOTS}/{number}-{name}.svg"
            drawings[path] = drawing
            images.append(f"![{cell(title)}]({path})")
        yield "\n".join(images)
        yield from _front(cells)
    yield "## Events"
    yield from _events(results)


def _what_ran(results: Results) -> Iterator[str]:
    for run in results.runs:
        configuration = run.configuration
        counts = ", ".join(f"{task} ({len(ids)})" for task, ids in configuration["items"].items())
        settings = ", ".join(
            f"{key} {value}"
            for key, value in configuration["settings"].items()
            if not isinstance(value, dict)
        )
        yield (
            f"Run `{run.run_id}`: tasks (items) {counts}; {configuration['seeds']} seeds per item; "
            f"{settings}."
        )
        keys = sorted({key for fingerprint in run.workers.values() for key in fingerprint})
        if keys:
            yield table(
                ["worker", *run.workers],
                [
                    [key, *(fingerprint.get(key, NOTHING) for fingerprint in run.workers.values())]
                    for key in keys
                ],
            )
    alone = {row.run_id for row in results.attempts} - {run.run_id for run in results.runs}
    if alone:
        ids = ", ".join(f"`{run_id}`" for run_id in sorted(alone))
        yield (
            f"Rows without a run's configuration, of {ids}: nothing tells whether they were asked "
            "the same of the same model."
        )


def _window(cells: Sequence[Cell]) -> Iterator[str]:
    """The window, unless there are several: then the arms' names tell."""
    match windows(cells):
        case [window]:
            yield f"Every arm with a budget has window {window}."


def _shared_questions(cells: Sequence[Cell]) -> Iterator[str]:
    """Of items that are not independent."""
    items = {row.item_id for c in cells for row in c.rows}
    questions = {row.unit[0] for c in cells for row in c.rows}
    if len(questions) < len(items):
        yield (
            f"Its {len(items)} items are {len(questions)} questions, each asked after several "
            "texts. Intervals are over questions, too narrow where these are few, and *better : "
            "worse* counts them."
        )


def _quality(cells: Sequence[Cell]) -> Iterator[str]:
    """Scores with intervals, paired with the baseline."""
    base = baseline(cells)
    for measure in quality_of(cells):
        yield f"### Quality: {measure.title}"
        if base is None:
            yield f"There is no arm `{BASELINE}` to compare with, so there are no differences."
        header = ["arm", "budget", "n", measure.title + (" %" if measure.share else "")]
        if base is not None:
            header += [f"Δ to `{BASELINE}`", "better : worse", "p"]
        yield table(
            [*header, "evicted"],
            [
                [*_name(c), str(c.n), _score(measure, c), *_against(measure, c, base), _evicted(c)]
                for c in cells
            ],
        )
    if not quality_of(cells):
        yield "The samples of this task have no grades."


def _same_budget(cells: Sequence[Cell]) -> Iterator[str]:
    """Policies against the default one, where budget, window and prompt mode are the same."""

    def setting(c: Cell) -> tuple[int | None, int | None, str | None]:
        return c.budget, c.window, c.rows[0].prompt_mode

    bases = {setting(c): c for c in cells if _is_default(c)}
    pairs = [
        (c, base) for c in cells if (base := bases.get(setting(c))) is not None and c is not base
    ]
    for measure in quality_of(cells) if pairs else []:
        yield f"### Policies at the same budget: {measure.title}"
        yield table(
            ["arm", "budget", "n", f"Δ to `{DEFAULT_POLICY}`", "better : worse", "p"],
            [[*_name(c), str(c.n), *_against(measure, c, base)] for c, base in pairs],
        )


def _is_default(c: Cell) -> bool:
    return c.evicts and c.arm.removesuffix("+keep") == DEFAULT_POLICY


def _form(cells: Sequence[Cell]) -> Iterator[str]:
    """Loops and malformed output."""
    measures = [measure for measure in (LOOPS, MALFORMED) if measure.applies(cells)]
    if not measures:
        return
    base = baseline(cells)
    deltas = [f"Δ to `{BASELINE}`"] if base is not None else []
    header = [part for m in measures for part in (f"{m.title} %", *deltas)]
    rows = []
    for c in cells:
        row = [*_name(c), str(c.n)]
        for measure in measures:
            row.append(_score(measure, c))
            if base is not None:
                row.append(NOTHING if c is base else _delta(measure, c, base))
        found = [kind for r in c.answered for kind in r.malformed]
        counts = ", ".join(f"{kind} {found.count(kind)}" for kind in sorted(set(found)))
        rows.append([*row, counts or NOTHING])
    yield "### Loops and malformed output"
    yield table(["arm", "budget", "n", *header, "kinds"], rows)


def _cost(cells: Sequence[Cell], price_per_hour: float | None) -> Iterator[str]:
    """Memory, speed and price."""
    price = [] if price_per_hour is None else ["price per sample"]
    rows = []
    for c in cells:
        slots, full = _slots(c), c.mean(lambda r: r.full_kv_slots)
        per = (c.completed or None) if c.timed else None
        row = [
            *_name(c),
            str(c.n),
            str(c.completed),
            plain(c.mean(lambda r: r.output_tokens), 0),
            plain(slots, 0),
            _ring(c),
            plain(100 * slots / full, 0) if slots is not None and full else NOTHING,
            plain(c.mean(lambda r: r.physical_length), 0),
            plain(c.mean(lambda r: r.rounds)),
            plain(per and c.tokens_per_second),
            plain(c.median_ttft(), 2),
            plain(per and c.machine_seconds / per, 2),
            plain(per and c.slot_seconds / per, 0),
        ]
        if price_per_hour is not None:
            row.append(plain(per and c.machine_seconds / 3600 * price_per_hour / per, 6))
        rows.append(row)
    yield "### Memory, speed and cost"
    yield table(
        [
            *("arm", "budget", "n", "completed", "output tokens", "slots", "query ring"),
            *("% of full", "cached at the end", "rounds", "tokens/s", "median TTFT s"),
            *("machine-seconds", "slot-seconds", *price),
        ],
        rows,
    )
    if without := [c for c in cells if c.ring_slots is None]:
        yield (
            f"It is not known how large the query rings of {_names(without, cells)} are; they are "
            "not among the slots."
        )
    if waited := [c for c in cells if c.timed and not c.queue_is_known]:
        yield (
            f"It is not known how long requests of {_names(waited, cells)} waited to be admitted "
            "(to tell, a worker needs --enable-metrics); these slot-seconds count that time, and "
            "are upper bounds."
        )


def _names(some: Sequence[Cell], cells: Sequence[Cell]) -> str:
    if len(some) == len(cells):
        return "any arm"
    return ", ".join(f"`{name}`" for name in dict.fromkeys(c.name for c in some))


def _ring(c: Cell) -> str:
    return "not known" if c.ring_slots is None else plain(c.ring_slots or None, 0)


def _traces(cells: Sequence[Cell], price_per_hour: float | None) -> Iterator[str]:
    """The same per conversation. One is completed if all of its turns are; slots and rounds are
    of these."""
    rows = []
    for c in cells:
        traces: dict[tuple[str, int], list[Row]] = {}
        for row in c.rows:
            traces.setdefault((trace_of(row.item_id), row.seed_index), []).append(row)
        completed = [
            turns for turns in traces.values() if all(r.status == "completed" for r in turns)
        ]
        per = len(completed) or None
        line = [
            *_name(c),
            str(len(traces)),
            str(len(completed)),
            plain(per and sum(max(map(c.slots, turns)) for turns in completed) / per, 0),
            plain(per and sum(r.rounds for turns in completed for r in turns) / per),
            plain(per and c.machine_seconds / per, 2),
            plain(per and c.slot_seconds / per, 0),
        ]
        if price_per_hour is not None:
            line.append(plain(per and c.machine_seconds / 3600 * price_per_hour / per, 6))
        rows.append(line)
    price = [] if price_per_hour is None else ["price per trace"]
    yield "### Cost per completed trace"
    yield table(
        [
            *("arm", "budget", "traces", "completed", "most slots", "rounds per trace"),
            *("machine-seconds", "slot-seconds", *price),
        ],
        rows,
    )


def _drawings(
    task: str, cells: Sequence[Cell], styles: plots.Styles
) -> Iterator[tuple[str, str, str]]:
    """Name, title and SVG of each plot."""
    qualities = quality_of(cells)
    measures = [*qualities, *(m for m in (LOOPS,) if m.applies(cells))]
    for measure in measures:
        title = f"{task}: {measure.title} over budget"
        found = [_point(measure, c, e, c.budget) for c, e in _estimates(measure, cells)]
        name = measure.title.replace(" ", "-").lower()
        if found:
            yield name, title, plots.over_budget(title, _axis(measure), found, styles)
    timed = [c for c in cells if c.timed]
    if timed:
        title = f"{task}: throughput over budget"
        found = [
            Point(c.name, c.budget, c.tokens_per_second, beside_prompt=c.keeps_prompt)
            for c in timed
        ]
        yield "throughput", title, plots.over_budget(title, "output tokens/s", found, styles)
    answered = [(c, slots) for c in cells if (slots := _slots(c)) is not None]
    if not answered:
        return
    title = f"{task}: memory over budget"
    found = [Point(c.name, c.budget, slots, beside_prompt=c.keeps_prompt) for c, slots in answered]
    yield "memory", title, plots.over_budget(title, "KV slots (mean)", found, styles)
    for measure in qualities[:1]:
        title = f"{task}: {measure.title} against memory"
        found, front = (
            [_point(measure, c, e, _slots(c)) for c, e in _estimates(measure, some)]
            for some in ([c for c, _ in answered], pareto_front(cells, measure))
        )
        yield "pareto", title, plots.pareto(title, _axis(measure), found, front, styles)


def _front(cells: Sequence[Cell]) -> Iterator[str]:
    for measure in quality_of(cells)[:1]:
        front = sorted((_slots(c) or 0.0, n, c) for n, c in enumerate(pareto_front(cells, measure)))
        names = ", ".join(
            f"{c.label} ({slots:.0f} slots{_n(c.completed, c)}, "
            f"{_score(measure, c)}{' %' if measure.share else ''}, n {c.n})"
            for slots, _, c in front
        )
        if names:
            yield f"Pareto front of {measure.title} against slots: {names}."


def _events(results: Results) -> Iterator[str]:
    """What went wrong on the way, also where a second attempt went well."""
    rows = []
    for cells in results.cells.values():
        for c in cells:
            bad = [r for r in c.attempts if r.status != "completed"]
            if bad:
                aborted = sum(r.status == "aborted" for r in bad)
                memory = sum("memory" in (r.error or "").lower() for r in bad)
                last = (bad[-1].error or "")[:200]
                counts = [str(aborted), str(len(bad) - aborted), str(memory)]
                rows.append([f"{c.task}, {c.label}", *counts, last])
    if rows:
        header = ["cell", "aborted by the worker", "failed attempts", "of both for memory"]
        yield table([*header, "the last one said"], rows)
    else:
        yield "No request was aborted by a worker and no attempt failed."
    yield from _unjudged([c for cells in results.cells.values() for c in cells])
    for session in results.sessions:
        counters = session["counters"]
        told = (
            "the worker could not be asked at the end"
            if counters is None
            else ", ".join(
                f"{name.replace('_', ' ')} {value:g}" for name, value in counters.items()
            )
        )
        if counters is not None and "retractions" not in counters:
            told += ", retractions not reported (start the worker with --enable-metrics)"
        warm = not session.get("prefix_cache_emptied", False)
        yield (
            f"The {session['worker']} worker, {session['ended'] - session['started']:.0f} s, "
            f"{session['total_slots']} slots in its pool: {told}."
            + (" Its prefix cache was not emptied before each arm." if warm else "")
        )


def _unjudged(cells: Sequence[Cell]) -> Iterator[str]:
    """Answers that are wrong for want of a verdict, if there are any."""
    rows = []
    for c in cells:
        reasons = [r.grade_reason or "" for r in c.rows]
        found = [text for text in reasons if text.startswith((GRADER_FAILED, NOT_COMPARED))]
        if found:
            rows.append([f"{c.task}, {c.label}", str(len(found)), found[-1][:200]])
    if rows:
        yield "Answers on which no grader came to a verdict count as wrong:"
        yield table(["cell", "answers", "why the last one"], rows)


def _name(c: Cell) -> list[str]:
    return [c.name, NOTHING if c.budget is None else str(c.budget)]


def _score(measure: Measure, c: Cell) -> str:
    estimate = measure.estimate(c)
    if estimate is None:
        return NOTHING
    written = tables.percent(estimate) if measure.share else tables.number(estimate)
    return written + _n(estimate.n, c)


def _delta(measure: Measure, c: Cell, base: Cell) -> str:
    estimate = measure.difference(c, base)
    if estimate is None:
        return NOTHING
    written = tables.points(estimate) if measure.share else tables.difference(estimate)
    return written + _n(estimate.n, c)


def _n(n: int, c: Cell) -> str:
    """Over how many samples, where not over all of the cell's."""
    return "" if n == c.n else f" (n {n})"


def _against(measure: Measure, c: Cell, base: Cell | None) -> list[str]:
    if base is None:
        return []
    if c is base:
        return [NOTHING] * 3
    signs = sign_test(measure.pairs(c), measure.pairs(base))
    better, worse = signs.wins, signs.losses
    if not measure.higher_is_better:
        better, worse = worse, better
    return [_delta(measure, c, base), f"{better} : {worse}", tables.p_value(signs.p_value)]


def _evicted(c: Cell) -> str:
    if not c.evicts or c.evicted_share is None:
        return NOTHING
    share = f"{100 * c.evicted_share:.0f} %{_n(c.completed, c)}"
    return f"{share}, no-regression control" if c.is_control else share


def _slots(c: Cell) -> float | None:
    return c.mean(c.slots)


def _estimates(measure: Measure, cells: Sequence[Cell]) -> list[tuple[Cell, Estimate]]:
    """Of the cells that have one."""
    return [(c, found) for c in cells if (found := measure.estimate(c)) is not None]


def _point(measure: Measure, c: Cell, estimate: Estimate, x: float | None) -> Point:
    scale = 100 if measure.share else 1
    value, low, high = (scale * v for v in (estimate.value, estimate.low, estimate.high))
    return Point(c.name, x, value, low, high, beside_prompt=c.keeps_prompt)


def _axis(measure: Measure) -> str:
    return f"{measure.title} %" if measure.share else measure.title
