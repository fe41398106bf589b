"""`make demo`: a real model through gateway, worker and SDK, with a fixed KV budget, replayed."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vase_sgl.client import Client, Completion, Message, VaseError
from vase_sgl.demo.gateway import GatewayFailed, GatewayProcess, add_tenant
from vase_sgl.demo.model import MODEL_NAME, ModelError, ensure_model
from vase_sgl.demo.view import RoundView

PROMPT = (
    "Write a long story about a lighthouse keeper who finds a message in a bottle. "
    "Describe the sea, the keeper and every step of the journey that follows."
)
BUDGET, WINDOW = 128, 32
#: The demo's one request needs little, and a small pool starts faster.
_WORKER_FLAGS = ("--max-total-tokens", "4096", "--max-running-requests", "8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vase_sgl.demo", description=__doc__)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    options = parser.parse_args()
    console = Console(highlight=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="vase-sgl-demo-") as folder:
            return _run(console, ensure_model(), Path(folder), options.max_new_tokens)
    except KeyboardInterrupt:
        console.print("\nstopped; nothing is left running")
        return 130
    except (GatewayFailed, ModelError, VaseError) as error:
        console.print(f"the demo failed: {error}", markup=False, soft_wrap=True)
        return 1


_interrupted = False


def _interrupt(*_: object) -> None:
    """Stop in order. The exception may be raised, and lost, in a callback of gRPC: so the loops
    look at the flag as well."""
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def _raise_if_interrupted() -> None:
    if _interrupted:
        raise KeyboardInterrupt


def _run(console: Console, model: Path, folder: Path, max_new_tokens: int) -> int:
    _title(console, f"Start gateway and worker ({MODEL_NAME}, SGLang on this CPU)")
    tenants = folder / "tenants.yaml"
    key = add_tenant("demo", tenants, "--seed-policy", "client")
    with _serve(console, model, folder, tenants) as target, Client(target, key) as client:
        _title(console, f"One long answer: budget {BUDGET}, window {WINDOW}, seed 1")
        first = _generate(console, client, seed=1, max_new_tokens=max_new_tokens)
        _title(console, f"Replay the record {first.request_id}")
        replayed = _replay(console, client, first.request_id)
        _title(console, "The same request with seed 2")
        second = _generate(console, client, seed=2, max_new_tokens=max_new_tokens)
        differs = _compare_digests(console, first, second)
        _title(console, "What it took")
        _show_memory(console, model, first)
    console.print("\nEverything has been stopped.")
    return 0 if replayed and differs else 1


@contextmanager
def _serve(console: Console, model: Path, folder: Path, tenants: Path) -> Iterator[str]:
    """A gateway with an embedded worker; yields its host:port. All its files lie in `folder`."""
    arguments = (
        *("--model-path", str(model), "--tenants-file", str(tenants)),
        *("--audit-url", f"sqlite+aiosqlite:///{folder / 'audit.sqlite3'}", "--", *_WORKER_FLAGS),
    )
    with ExitStack() as stack:
        started = time.monotonic()
        with console.status("loading") as status:
            gateway = GatewayProcess(
                arguments,
                {"VASE_WORKER__LOG_FILE": str(folder / "worker.log")},
                lambda seconds: status.update(f"loading SGLang and the model: {seconds:.0f} s"),
            )
            stack.enter_context(gateway)
        seconds = time.monotonic() - started
        console.print(f"serving gRPC on {gateway.target} after {seconds:.0f} s")
        yield gateway.target


def _generate(console: Console, client: Client, *, seed: int, max_new_tokens: int) -> Completion:
    stream = client.generate(
        [Message(role="user", content=PROMPT)],
        max_new_tokens=max_new_tokens,
        budget=BUDGET,
        window=WINDOW,
        policy="vase-attnv",
        seed=seed,
        temperature=1.0,  # at 0.7 a model this small repeats itself
        top_p=0.95,
        ignore_eos=True,
    )
    with stream, RoundView(console) as view:
        chunks = []
        for chunk in stream:
            _raise_if_interrupted()
            view.add(chunk)
            chunks.append(chunk)
    result = stream.result
    speed = result.usage.completion_tokens / result.timings.total_seconds
    console.print(
        f"{result.usage.completion_tokens} tokens in {result.timings.total_seconds:.1f} s "
        f"({speed:.1f} tokens/s), {len(result.round_digests)} eviction rounds"
    )
    return Completion(
        stream.request_id,
        "".join(chunk.text for chunk in chunks),
        tuple(token for chunk in chunks for token in chunk.token_ids),
        result,
    )


def _replay(console: Console, client: Client, record_id: str) -> bool:
    replay = client.replay(record_id)
    with console.status("running it again") as status:
        for step in replay:
            _raise_if_interrupted()
            status.update(
                f"{step.tokens_compared}/{step.tokens_total} tokens and "
                f"{step.rounds_compared}/{step.rounds_total} rounds are equal"
            )
    verdict = replay.verdict
    console.print(
        f"{verdict.outcome}: {verdict.tokens_compared} tokens and {verdict.rounds_compared} "
        "eviction rounds compared",
        style="bold green" if verdict.outcome == "MATCH" else "bold red",
    )
    return verdict.outcome == "MATCH"


def _compare_digests(console: Console, first: Completion, second: Completion) -> bool:
    digests = [answer.result.cache.digest for answer in (first, second) if answer.result.cache]
    differs = len(set(digests)) == 2
    console.print(
        f"eviction digest, seed 1: {digests[0]}\neviction digest, seed 2: {digests[1]}\n"
        f"{'different' if differs else 'EQUAL'}: the seed decides which tokens are forgotten"
    )
    return differs


def _show_memory(console: Console, model: Path, answer: Completion) -> None:
    cache = answer.result.cache
    assert cache is not None  # the request carried a budget
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    entry = 2 * config["num_key_value_heads"] * config["head_dim"]  # one key and one value
    slot_bytes = config["num_hidden_layers"] * entry * 2  # bfloat16
    table = Table("KV cache of this request", "slots", "MiB")
    for name, slots in (
        ("full KV would have reserved", answer.result.full_kv_slots),
        ("reserved with the budget", cache.reserved_slots),
    ):
        table.add_row(name, str(slots), f"{slots * slot_bytes / 2**20:.2f}")
    console.print(table)
    ratio = answer.result.full_kv_slots / cache.reserved_slots
    console.print(f"{ratio:.1f} x less, and it stays there however long the answer gets.")


def _title(console: Console, text: str) -> None:
    console.print(f"\n== {text}", style="bold")


if __name__ == "__main__":
    sys.exit(main())
