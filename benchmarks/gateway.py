"""What the gateway costs: streamed tokens per second, time to the first token, memory per stream.

    python -m benchmarks.gateway [--json results.json]
    python -m benchmarks.gateway --model-path MODEL [--json results.json]

A worker without a model streams prepared events, one token each, as fast as they are taken; with
--model-path it is a real one, `vase-sgl worker`. It is asked directly over HTTP and through
`vase-sgl serve` over gRPC, in turn, in one run: only the ratios and differences say something, for
worker, gateway and client share this machine's cores. Worker and gateway are processes of their
own; this one is the client.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from benchmarks import environment
from benchmarks.gateway_arms import (
    IDLE_TOKENS,
    Direct,
    Through,
    gateway_to,
    real_worker,
    scripted_worker,
    until_ready,
)

Tokens = Callable[[int], Awaitable[tuple[int, float]]]


async def tokens_per_second(tokens: Tokens, streams: int, count: int) -> float:
    """Of so many streams side by side."""
    start = time.perf_counter()
    answers = await asyncio.gather(*(tokens(count) for _ in range(streams)))
    seconds = time.perf_counter() - start
    assert all(seen == count for seen, _ in answers), "tokens were lost"
    return streams * count / seconds


async def empty_call(through: Through, calls: int) -> float:
    """Median seconds of a gRPC call that the gateway refuses at once: what gRPC itself takes."""
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        with contextlib.suppress(grpc.aio.AioRpcError):
            await through.refused()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


async def first_token(tokens: Tokens, calls: int) -> float:
    """Median seconds to the first token, one request at a time."""
    return statistics.median([(await tokens(4))[1] for _ in range(calls)])


def resident_mib(pid: int) -> float:
    """Memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no memory")


async def idle_streams(through: Through, pid: int, count: int) -> dict[str, float]:
    """Open streams that wait for their next token: memory, and what a new request takes."""
    before = resident_mib(pid)
    calls = [through.call(IDLE_TOKENS) for _ in range(count)]
    for call in calls:
        while not (await call.read()).HasField("chunk"):
            pass
    after = resident_mib(pid)
    latency = await first_token(through.tokens, 20)
    for call in calls:
        call.cancel()
    await asyncio.sleep(2)
    return {
        "streams": count,
        "kib_per_stream": (after - before) * 1024 / count,
        "ttft_seconds": latency,
        "mib_before": before,
        "mib_open": after,
        "mib_closed": resident_mib(pid),
    }


async def alternately(ways: dict[str, Tokens], calls: int) -> dict[str, list[float]]:
    """Seconds to the first token, one request at a time, the ways in turn with every call."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(calls):
        for name in in_turn(ways, number):
            seconds[name].append((await ways[name](2))[1])
    return seconds


def in_turn(ways: dict[str, Tokens], number: int) -> list[str]:
    """The names, each of them first in turn."""
    names = list(ways)
    return names[number % len(names) :] + names[: number % len(names)]


def latencies(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of the ways, and of what the gateway adds over pairs of calls."""
    added = [through - direct for direct, through in zip(*seconds.values(), strict=True)]
    return {name: statistics.median(values) for name, values in seconds.items()} | {
        "added": statistics.median(added),
        "added_quartiles": statistics.quantiles(added),
    }


def rates(speed: dict[str, list[float]]) -> dict[str, float]:
    """Medians of the ways, and of their ratio over pairs of runs."""
    ratios = [through / direct for direct, through in zip(*speed.values(), strict=True)]
    return {name: statistics.median(values) for name, values in speed.items()} | {
        "ratio": statistics.median(ratios)
    }


async def measure_alone(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The gateway before a worker that costs nothing. Ratios and differences are as below."""
    with scripted_worker(folder) as url, gateway_to(url, folder) as (target, key, pid):
        async with Direct(url) as direct, Through(target, key) as through:
            ways: dict[str, Tokens] = {"direct": direct.tokens, "gateway": through.tokens}
            await until_ready(through)
            speed: dict[str, list[float]] = {name: [] for name in ways}
            ttft: dict[str, list[float]] = {name: [] for name in ways}
            empty = []
            for number in range(options.repeats):
                empty.append(await empty_call(through, options.calls))
                for name, seconds in (await alternately(ways, options.calls)).items():
                    ttft[name] += seconds
                for name in in_turn(ways, number):
                    speed[name].append(
                        await tokens_per_second(ways[name], options.streams, options.tokens)
                    )
            idle = await idle_streams(through, pid, options.idle)
            again = await idle_streams(through, pid, options.idle)
    return {
        "tokens_per_second": rates(speed),
        "ttft_seconds": latencies(ttft),
        "empty_grpc_call_seconds": statistics.median(empty),
        "idle": idle,
        "idle_again": again,
        "all": {"tokens_per_second": speed, "ttft_seconds": ttft},
    }


async def measure_engine(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The gateway before a real engine. Ratios and differences are medians over pairs."""
    with (
        real_worker(folder, options.model_path) as url,
        gateway_to(url, folder) as (target, key, _),
    ):
        async with Direct(url) as direct, Through(target, key) as through:
            ways: dict[str, Tokens] = {"direct": direct.tokens, "gateway": through.tokens}
            await until_ready(through)
            for way in ways.values():  # connections, and every batch size once
                await asyncio.gather(*(way(2) for _ in range(max(options.engine_streams))))
            ttft = await alternately(ways, options.engine_calls)
            speed: dict[int, dict[str, list[float]]] = {}
            for streams in options.engine_streams:
                speed[streams] = {name: [] for name in ways}
                for number in range(options.engine_repeats):
                    for name in in_turn(ways, number):
                        speed[streams][name].append(
                            await tokens_per_second(ways[name], streams, options.engine_tokens)
                        )
    return {
        "ttft_seconds": latencies(ttft),
        "tokens_per_second": {streams: rates(pairs) for streams, pairs in speed.items()},
        "all": {"tokens_per_second": speed, "ttft_seconds": ttft},
    }


def added(ttft: dict[str, Any]) -> str:
    """What the gateway adds to the first token."""
    low, _, high = ttft["added_quartiles"]
    return f"{ttft['added'] * 1e3:.2f} added (quartiles {low * 1e3:.2f}, {high * 1e3:.2f})"


def report_alone(results: dict[str, Any]) -> str:
    """The table."""
    speed, ttft, idle = results["tokens_per_second"], results["ttft_seconds"], results["idle"]
    return "\n".join(
        (
            f"{'':24}{'direct':>12}{'gateway':>12}{'':4}",
            f"{'tokens/s, streamed':24}{speed['direct']:12,.0f}{speed['gateway']:12,.0f}"
            f"    {speed['ratio']:.2f} of direct",
            f"{'TTFT, ms':24}{ttft['direct'] * 1e3:12.2f}{ttft['gateway'] * 1e3:12.2f}"
            f"    {added(ttft)}; an empty gRPC call takes "
            f"{results['empty_grpc_call_seconds'] * 1e3:.2f}",
            f"{idle['streams']:.0f} idle streams: {idle['kib_per_stream']:.0f} KiB each, "
            f"TTFT beside them {idle['ttft_seconds'] * 1e3:.2f} ms, gateway's memory "
            f"{idle['mib_before']:.0f} -> {idle['mib_open']:.0f} -> {idle['mib_closed']:.0f} MiB, "
            f"and once more -> {results['idle_again']['mib_open']:.0f} MiB",
        )
    )


def report_engine(results: dict[str, Any]) -> str:
    """The table."""
    ttft = results["ttft_seconds"]
    lines = [f"{'':24}{'direct':>12}{'gateway':>12}"]
    lines += [
        f"{f'tokens/s, {streams} streams':24}{speed['direct']:12.1f}{speed['gateway']:12.1f}"
        f"    {speed['ratio']:.3f} of direct"
        for streams, speed in results["tokens_per_second"].items()
    ]
    lines.append(
        f"{'TTFT, ms':24}{ttft['direct'] * 1e3:12.1f}{ttft['gateway'] * 1e3:12.1f}    {added(ttft)}"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write everything there")
    alone = parser.add_argument_group("with a worker without a model")
    alone.add_argument("--streams", type=int, default=32, help="streams side by side")
    alone.add_argument("--tokens", type=int, default=512, help="tokens of each")
    alone.add_argument("--calls", type=int, default=50, help="pairs of requests for TTFT")
    alone.add_argument("--idle", type=int, default=1000, help="open streams that wait")
    alone.add_argument("--repeats", type=int, default=5, help="of each measurement, in turn")
    engine = parser.add_argument_group("with a real engine")
    engine.add_argument("--model-path", type=Path, help="measure with this model instead")
    engine.add_argument(
        "--engine-streams", type=int, nargs="+", default=[1, 8, 32], help="streams side by side"
    )
    engine.add_argument("--engine-tokens", type=int, default=48, help="tokens of each")
    engine.add_argument("--engine-calls", type=int, default=30, help="pairs of requests for TTFT")
    engine.add_argument("--engine-repeats", type=int, default=3, help="pairs for each tokens/s")
    options = parser.parse_args()
    with_engine = options.model_path is not None
    told = {"environment": environment.describe(), "options": environment.options(options)}
    with tempfile.TemporaryDirectory() as folder:
        measure = measure_engine if with_engine else measure_alone
        results = asyncio.run(measure(options, Path(folder)))
    print((report_engine if with_engine else report_alone)(results))
    if options.json is not None:
        options.json.write_text(json.dumps(told | results, indent=2) + "\n")


if __name__ == "__main__":
    main()
