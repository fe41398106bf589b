"""Opens the target of each worker configuration: one that runs, or a worker started for it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vase_sgl.eval.arms import WORKER_FLAGS, Arm
from vase_sgl.eval.targets import (
    STALL_SECONDS,
    GatewayTarget,
    Target,
    TargetError,
    WorkerTarget,
)
from vase_sgl.worker_key import WORKER_KEY

if TYPE_CHECKING:
    from vase_sgl.client import AsyncClient

_START_SECONDS = 1800.0
_STOP_SECONDS = 20.0

#: Makes the client of a gateway at host:port.
Dial = Callable[[str], "AsyncClient"]


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the model is. Exactly one of the three is given.

    workers, gateways: address by worker configuration. model: what to start a worker with, and
    `worker_args` for every such worker.
    """

    workers: Mapping[str, str]
    gateways: Mapping[str, str]
    model: str | None
    worker_args: Sequence[str]

    def __post_init__(self) -> None:
        if sum(map(bool, (self.workers, self.gateways, self.model))) != 1:
            raise TargetError(
                "say where the model is: --model to start a worker, --worker URL or "
                "--gateway HOST:PORT for one that runs; one of the three"
            )
        if self.worker_args and not self.model:
            raise TargetError("--worker-arg needs --model: it is for workers that are started here")

    def check(self, arms: Sequence[Arm]) -> None:
        """Raise `TargetError` if an arm needs a worker that is not there."""
        given = {**self.workers, **self.gateways}
        if self.model is not None:
            return
        for arm in arms:
            if arm.worker not in given:
                flags = " ".join(WORKER_FLAGS[arm.worker]) or "none"
                option = "--worker" if self.workers else "--gateway"
                raise TargetError(
                    f"arm {arm.name} needs a {arm.worker} worker (its flags: {flags}); name one "
                    f"with {option} {arm.worker}=…, or give --model instead, or leave the arm out"
                )


@contextlib.asynccontextmanager
async def connect(
    places: Places,
    worker: str,
    *,
    folder: Path,
    windows: Sequence[int],
    dial: Dial,
    say: Callable[[str], None],
) -> AsyncIterator[Target]:
    """The target of a worker configuration, until the block is left.

    windows: that the arms ask for; a worker that is started allows the largest. say: told what is
    being waited for. Raises `TargetError` if a worker does not start.
    """
    if worker in places.gateways:
        address = places.gateways[worker]
        gateway = GatewayTarget(address, dial(address), say)
        try:
            yield gateway
        finally:
            await gateway.close()
    elif worker in places.workers:
        from vase_sgl.gateway.worker_http import HttpWorker

        key = os.environ.get(WORKER_KEY)
        running = WorkerTarget(
            HttpWorker(places.workers[worker], stall_seconds=STALL_SECONDS, api_key=key)
        )
        try:
            yield running
        finally:
            await running.close()
    else:
        async with _started(places, worker, folder, windows, say) as started:
            yield started


@contextlib.asynccontextmanager
async def _started(
    places: Places, worker: str, folder: Path, windows: Sequence[int], say: Callable[[str], None]
) -> AsyncIterator[Target]:
    from vase_sgl.eviction import EvictionLimits
    from vase_sgl.gateway.worker_embedded import EmbeddedWorker, WorkerStartError, worker_command

    assert places.model is not None
    flags = ["--enable-metrics", *WORKER_FLAGS[worker], *places.worker_args]
    largest = max(windows, default=0)
    if largest > EvictionLimits().max_window and "--vase-max-window" not in flags:
        flags += ["--vase-max-window", str(largest)]
    process = EmbeddedWorker(
        worker_command(places.model, flags),
        log=folder / f"worker-{worker}.log",
        start_timeout_seconds=_START_SECONDS,
        stop_grace_seconds=_STOP_SECONDS,
        stall_seconds=STALL_SECONDS,
    )
    try:
        try:
            await process.start(
                lambda seconds: say(
                    f"starting the {worker} worker with {places.model} {seconds:.0f} s"
                )
            )
        except WorkerStartError as error:
            raise TargetError(str(error)) from error
        yield WorkerTarget(process)
    finally:
        await process.close()


def by_worker(option: str, values: Sequence[str]) -> dict[str, str]:
    """`[NAME=]ADDRESS` of an option, by worker configuration; without a name it is production's.

    Raises `TargetError`.
    """
    found: dict[str, str] = {}
    for value in values:
        name, equals, address = value.partition("=")
        if not equals:
            name, address = next(iter(WORKER_FLAGS)), value
        if name not in WORKER_FLAGS:
            raise TargetError(
                f"{option}: there is no worker configuration {name!r}; there are "
                f"{', '.join(WORKER_FLAGS)}"
            )
        if name in found:
            raise TargetError(f"{option}: the {name} worker is named twice")
        found[name] = address
    return found
