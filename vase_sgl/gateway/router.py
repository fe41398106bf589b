"""Which worker gets a request: health, breaker, room, load and prefix affinity.

A worker whose breaker is open gets none, and one that is half-open none while a request tries it.
Among those with room the one with the smallest share of reserved slots wins; among equals the one
with fewer requests in flight; then they take turns. With affinity the worker that the prompt's
first tokens hash to (rendezvous hashing: when a worker comes or goes, only its own prompts move)
goes first.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
from collections.abc import Awaitable, Callable, Collection, Iterator

from vase_sgl.gateway.breaker import BreakerState
from vase_sgl.gateway.errors import GatewayError, WorkerUnavailable
from vase_sgl.gateway.fleet import Fleet
from vase_sgl.gateway.leases import Claim, Lease, WorkerLoad
from vase_sgl.gateway.need import Need
from vase_sgl.gateway.refusals import Refusals
from vase_sgl.gateway.shared_state import SharedState
from vase_sgl.gateway.workers import Worker, WorkerInfo


class WorkerRouter:
    """Hands out the workers of a fleet. Of its own it has only whose turn it is."""

    def __init__(self, fleet: Fleet, *, affinity_tokens: int = 0) -> None:
        """`affinity_tokens`: how many first tokens of a prompt choose its worker; 0: none."""
        self._fleet = fleet
        self._affinity_tokens = affinity_tokens
        #: Whose turn it is to be asked, and to be leased.
        self._turn, self._lease_turn = itertools.count(), itertools.count()
        self._refusals = Refusals()

    def take(
        self,
        need: Need,
        *,
        exclude: Collection[str] = (),
        only: str | None = None,
        claim: Claim | None = None,
    ) -> Lease | None:
        """A lease on a worker, or None while none that could serve has room.

        claim: whose request it is; workers that are kept for others have no room for it.
        Raises `WorkerUnavailable` if no worker could serve, however long one waits.
        """
        able = [load for load in self._able(need, exclude, only) if load.breaker.allows]
        for load in self._order(able, need.prompt_token_ids):
            if load.kept_for in (None, claim) and load.has_room(need):
                return Lease(load, need)
        return None

    @contextlib.contextmanager
    def claim(self, need: Need, *, exclude: Collection[str] = ()) -> Iterator[Claim]:
        """A claim to a worker outside `exclude`. After the body nothing is kept for it."""
        claim = Claim(
            need,
            take=lambda claim: self.take(need, exclude=exclude, claim=claim),
            able=lambda: self._able(need, exclude),
            refusals=self._refusals,
            anywhere=not exclude,
        )
        try:
            yield claim
        finally:
            claim.end()

    @contextlib.contextmanager
    def sweep(self) -> Iterator[None]:
        """For the body, that awaits nothing and releases nothing, many claims are cheap.

        Those that need as much as one that found no room take nothing without looking for it.
        """
        try:
            ready = self._available()
        except WorkerUnavailable:  # which each claim is told
            ready = []
        with self._refusals.remembered(load.info for load in ready if load.info):
            yield

    def _able(
        self, need: Need, exclude: Collection[str], only: str | None = None
    ) -> list[WorkerLoad]:
        """Those that could serve. Raises `WorkerUnavailable` if there is none."""
        possible = [
            load
            for load in self._available()
            if load.worker.name not in exclude and only in (None, load.worker.name)
        ]
        if only is not None and not possible:
            raise WorkerUnavailable(f"worker {only} is no longer ready; try again later")
        if not possible:
            raise WorkerUnavailable("no other worker is ready; try again later", retry_seconds=1.0)
        able = [load for load in possible if load.info and need.fits(load.info)]
        if not any(load.info and need.is_for(load.info) for load in possible):
            raise WorkerUnavailable(
                "no other worker with the model that the request was tokenized for is ready; try "
                "again",
                retry_seconds=1.0,
            )
        if not able:
            raise WorkerUnavailable(
                "the workers that are ready allow less than this request needs; try again later, "
                "or give all workers the same flags"
            )
        return able

    def ready(self) -> list[tuple[Worker, WorkerInfo]]:
        """Every worker that takes requests, the next in turn first.

        The states are those of the last health check; lengths, limits and fingerprint hold.
        Raises `WorkerUnavailable` if there is none.
        """
        return [(load.worker, load.info) for load in self._in_turn() if load.info]

    def has_other(self, need: Need, exclude: Collection[str]) -> bool:
        """Whether a worker outside `exclude` could serve."""
        try:
            return bool(self._able(need, exclude))
        except WorkerUnavailable:
            return False

    def with_leases(self, worker: Worker, told: WorkerInfo) -> WorkerInfo:
        """The state that `worker` told just now, and what it has of this gateway beside that."""
        load = self._fleet.loads.get(worker.name)
        return told if load is None else load.with_leases(told)

    async def current(self) -> list[tuple[Worker, WorkerInfo]]:
        """As `ready`, but with states after this call; a worker that does not answer is left out.

        Those who ask at the same time share the answers, as they do for `recent`.
        """
        return await self._states(SharedState.now)

    async def recent(self) -> list[tuple[Worker, WorkerInfo]]:
        """As `current`, but states may be from up to `RECENT_SECONDS` ago."""
        return await self._states(SharedState.recent)

    async def _states(
        self, ask: Callable[[SharedState], Awaitable[WorkerInfo]]
    ) -> list[tuple[Worker, WorkerInfo]]:
        loads = self._in_turn()
        infos = await asyncio.gather(*(ask(load.state) for load in loads), return_exceptions=True)
        states: list[tuple[Worker, WorkerInfo]] = []
        for load, info in zip(loads, infos, strict=True):
            if isinstance(info, WorkerInfo):
                states.append((load.worker, info))
            elif not isinstance(info, GatewayError):
                raise info
        if not states:
            raise WorkerUnavailable("no worker answers; try again later")
        return states

    def _in_turn(self) -> list[WorkerLoad]:
        """Those that take requests, the next in turn first. Raises as `_available`."""
        loads = self._available()
        first = next(self._turn) % len(loads)
        return loads[first:] + loads[:first]

    def _available(self) -> list[WorkerLoad]:
        """Those that take requests. Raises `WorkerUnavailable` if there is none."""
        loads = self._fleet.loads.values()
        ready = [load for load in loads if load.info is not None]
        if not ready:
            reasons = "; ".join(load.failure for load in loads)
            raise WorkerUnavailable(
                f"no worker is ready: {reasons or 'none was found yet; try again later'}",
                retry_seconds=1.0,
            )
        # One whose breaker is half-open while another request tries it is worth waiting for.
        tried = [load for load in ready if load.breaker.state is not BreakerState.OPEN]
        if not tried:
            seconds = max(min(load.breaker.open_seconds for load in ready), 1.0)
            raise WorkerUnavailable(
                "every worker failed too often lately and is left alone for a while; come back "
                f"in {seconds:.0f} s",
                retry_seconds=seconds,
            )
        return tried

    def _order(self, loads: list[WorkerLoad], prompt: tuple[int, ...]) -> list[WorkerLoad]:
        turn = next(self._lease_turn) % max(len(loads), 1)
        rotated = loads[turn:] + loads[:turn]
        ordered = sorted(rotated, key=_share)  # stable: equals keep their turn
        width = self._affinity_tokens
        if loads and width and len(prompt) >= width:
            prefix = b"".join(token.to_bytes(4, "little") for token in prompt[:width])
            own = max(loads, key=lambda load: _weight(prefix, load))
            ordered.sort(key=lambda load: load is not own)
        return ordered


def _share(load: WorkerLoad) -> tuple[float, int]:
    """The reserved share of a worker's slots, then requests of this gateway."""
    assert load.info is not None
    return load.reserved / max(load.info.total_slots, 1), load.in_flight


def _weight(prefix: bytes, load: WorkerLoad) -> bytes:
    """Rendezvous weight: the worker with the greatest one is the prefix's own."""
    return hashlib.blake2b(prefix + load.worker.name.encode(), digest_size=8).digest()
