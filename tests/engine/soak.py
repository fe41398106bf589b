"""Random load on the real scheduler for minutes: `make soak`, or `python -m tests.engine.soak`.

Arrivals, aborts, budgets, policies, prompt modes and shared prompts at random, overlap loop and
prefix cache on. Upstream's leak checks and the integrity check run after every step; any failure
ends the run. At the end every slot must be free again and memory must not have grown.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

for _name in ("VASE_CHECK_INTEGRITY", "SGLANG_CHECK_KV_PAGE_INVARIANTS"):
    os.environ[_name] = "1"

from vase_sgl.engine.torchvision_cpu import declare_torchvision_operators  # noqa: E402

declare_torchvision_operators()

from sglang.srt.plugins import load_plugins  # noqa: E402

load_plugins()

import torch  # noqa: E402

from tests.engine.scheduler_harness import SteppedScheduler  # noqa: E402
from tests.engine.tiny_model import VOCAB, write_tiny_model  # noqa: E402
from vase_sgl.engine.pool import BudgetPool  # noqa: E402
from vase_sgl.eviction import POLICIES  # noqa: E402

_SLOTS = 400
_MIB = 2**20
#: Growth of the resident set that counts as a leak, after the first tenth of the run.
_TOLERATED_MIB = 48


def _request(rng: random.Random, number: int) -> dict[str, Any]:
    budget = rng.randint(12, 60)
    window = rng.randint(1, min(16, budget // 2))
    name = rng.choice([*POLICIES, "stock"])
    vase: dict[str, Any] | None = {"policy": name, "seed": number}
    if name == "stock":
        vase = None
    elif POLICIES[name].evicts:
        vase |= {"budget": budget, "window": window, "prompt": rng.choice(["evict", "keep"])}
        vase["num_sinks"] = rng.randint(0, 4)
    shared = rng.random() < 0.5
    start = rng.randint(0, 2) if shared else number
    length = rng.choice([1, 5, 20, 60, 120, 170])
    return {
        "prompt": [2 + (7 * i + start) % (VOCAB - 2) for i in range(length)],
        "max_new_tokens": rng.choice([1, 8, 40, 90, 300]),
        "vase": vase,
        "temperature": rng.choice([0.0, 0.9]),
        "sampling_seed": number,
    }


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / _MIB


def soak(minutes: float, seed: int) -> dict[str, Any]:
    """Run; returns what was seen. Raises on the first broken invariant."""
    rng = random.Random(seed)
    folder = Path(tempfile.mkdtemp())
    stepped = SteppedScheduler(write_tiny_model(folder), slots=_SLOTS, chunked_prefill_size=64)
    stepped.configure(overlap=True, prefix_cache=True)
    started, reported, number = time.monotonic(), 0.0, 0
    live: list[str] = []
    finished = aborted = refused = 0
    early_mib = None
    while (elapsed := time.monotonic() - started) < 60 * minutes:
        if len(live) < 14 and rng.random() < 0.25:
            rid = f"s{number:08d}"
            stepped.submit(rid, **_request(rng, number))
            live.append(rid)
            number += 1
        if live and rng.random() < 0.02:
            stepped.abort(rng.choice(live))
            aborted += 1
        stepped.step()
        for rid in [rid for rid in live if (a := stepped.answers.get(rid)) and a.finish]:
            finish = stepped.answers.pop(rid).finish or {}
            live.remove(rid)
            finished += 1
            if finish.get("status_code") == 503:
                raise AssertionError(f"{rid} ended with {finish}")
            refused += finish.get("status_code") == 400
        if early_mib is None and elapsed > 6 * minutes:
            gc.collect()
            early_mib = _resident_mib()
        if elapsed - reported > 10:
            reported = elapsed
            print(
                f"{elapsed:6.0f} s  {finished} answered, {aborted} aborts, {stepped.steps} steps, "
                f"{_resident_mib():.0f} MiB",
                file=sys.stderr,
            )
    stepped.run()
    gc.collect()
    compaction = BudgetPool.of(stepped.scheduler.req_to_token_pool).compaction
    result = {
        "minutes": minutes,
        "seed": seed,
        "requests": number,
        "answered": finished,
        "aborts": aborted,
        "refused": refused,
        "steps": stepped.steps,
        "rounds": compaction.rounds,
        "slots_lost": _SLOTS - stepped.free_slots,
        "resident_growth_mib": round(_resident_mib() - (early_mib or _resident_mib()), 1),
    }
    if result["slots_lost"] or result["resident_growth_mib"] > _TOLERATED_MIB:
        raise AssertionError(f"leak: {result}")
    if not compaction.rounds:
        raise AssertionError("no round happened: nothing was tested")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, help="of an earlier run; else another each time")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", file=sys.stderr)
    with torch.inference_mode():
        print(json.dumps(soak(options.minutes, seed), indent=2))


if __name__ == "__main__":
    main()
