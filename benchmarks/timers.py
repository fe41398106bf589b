"""Timers around the plugin's functions, for `benchmarks.timed_worker`. Product code has none.

Totals are per name: calls, seconds inside, and seconds inside without those of timed functions
that it called. They travel in `/server_info` (`internal_states[0]["vase"]["timers"]`).

    step.*        upstream's get_next_batch_to_run, run_batch, process_batch_result of decode
    scheduler.*   our hooks and allocation, without the stock code they call
    sampling.*    seeded sampling of the CPU platform
    linear        linear layers in tiles, the CPU's batch invariance
    attention     RadixAttention.forward, with the query ring inside
    ring          the store into the query ring
    round         rounds; round.score, round.victims, round.plan, round.move, round.digest and
                  round.positions are parts of the torch reference
    stock         what our hooks call upstream

Within `run_batch` of a prefill all names begin with "prefill.".
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]


class Timers:
    """Nested calls of a thread are told apart. Threads add up: parts may take longer than a whole
    that waits for them.
    """

    def __init__(self) -> None:
        self.totals: dict[str, list[float]] = {}
        self.prefix = ""  # of what is being timed now, such as "prefill."
        self._threads = threading.local()
        self._lock = threading.Lock()
        self._stock: dict[Function, Function] = {}

    def call(self, name: str, function: Function, *args: Any, **kwargs: Any) -> Any:
        self._stack().append(0.0)
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            self._add(name, time.perf_counter() - started)

    def call_named(
        self, name: Callable[[Any], str], function: Function, *args: Any, **kwargs: Any
    ) -> Any:
        """As `call`, for a name that the result decides."""
        self._stack().append(0.0)
        started = time.perf_counter()
        result = function(*args, **kwargs)
        self._add(name(result), time.perf_counter() - started)
        return result

    def wrap(self, name: str, function: Function) -> Function:
        return functools.wraps(function)(functools.partial(self.call, name, function))

    def around(self, name: str, function: Function) -> Function:
        """Of an AROUND hook: what it calls upstream counts as stock."""

        @functools.wraps(function)
        def timed(original: Function, *args: Any, **kwargs: Any) -> Any:
            stock = self._stock.get(original)
            if stock is None:
                stock = self._stock[original] = functools.partial(self.call, "stock", original)
            return self.call(name, function, stock, *args, **kwargs)

        return timed

    def method(self, name: str, owner: Any, attribute: str) -> None:
        """Replace a function of a module or class by its timed self. AttributeError if absent."""
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            return self.call(name, function, *args, **kwargs)

        setattr(owner, attribute, timed)

    def count(self, name: str, number: int) -> None:
        self.totals.setdefault(name, [0, 0.0, 0.0])[0] += number

    def _add(self, name: str, seconds: float) -> None:
        stack = self._stack()
        inner = stack.pop()
        if stack:
            stack[-1] += seconds
        with self._lock:
            total = self.totals.setdefault(self.prefix + name, [0, 0.0, 0.0])
            total[0] += 1
            total[1] += seconds
            total[2] += seconds - inner

    def _stack(self) -> list[float]:
        """Of this thread: per call that is running, the seconds of timed callees."""
        try:
            stack: list[float] = self._threads.stack
        except AttributeError:
            stack = self._threads.stack = []
        return stack


Totals = dict[str, list[float]]


def difference(after: Totals, before: Totals) -> Totals:
    """What came in between."""
    none = [0, 0.0, 0.0]
    return {
        name: [a - b for a, b in zip(total, before.get(name, none), strict=True)]
        for name, total in after.items()
    }


def shares(totals: Totals) -> dict[str, float]:
    """Parts of the decode time. `scheduler` is our hooks' own time, admission's included."""
    whole = decode_seconds(totals)
    groups = {
        "eviction": inside(totals, "round"),
        "query ring": inside(totals, "ring"),
        "scheduler": sum(t[2] for name, t in totals.items() if name.startswith("scheduler.")),
        "linear": inside(totals, "linear"),
        "attention": inside(totals, "attention") - inside(totals, "ring"),
        "sampling": sum(t[1] for name, t in totals.items() if name.startswith("sampling.")),
    }
    groups |= {
        f"eviction: {name.removeprefix('round.')}": total[2]
        for name, total in totals.items()
        if name.startswith("round.")
    }
    return {name: seconds / whole for name, seconds in groups.items()}


def decode_seconds(totals: Totals) -> float:
    """Of upstream's loop in decode. Raises ValueError if nothing was decoded."""
    seconds = sum(inside(totals, f"step.{part}") for part in ("prepare", "run", "result"))
    if not seconds:
        raise ValueError("no decode step was timed: is this a worker with timers?")
    return seconds


def inside(totals: Totals, name: str) -> float:
    return totals.get(name, [0, 0.0, 0.0])[1]
