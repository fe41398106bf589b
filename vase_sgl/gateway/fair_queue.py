"""A fair, bounded line in front of the workers.

Tenants take turns, one request each, whatever the length of their own lines; within a tenant the
first comes first. A request at the head that no worker has room for waits without being overtaken
by its own tenant's later ones; other tenants go on. When it has waited so for long, it may keep
from them what it needs, or small requests of one tenant would shut out a large one of another.
"""

from __future__ import annotations

import asyncio
import collections
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Generic, Protocol, TypeVar

from vase_sgl.gateway.errors import LimitExceeded

#: Past grants that tell how fast the line moves, since somebody began to wait.
_REMEMBERED_GRANTS = 64
#: Share of the longest wait after which a request at the head of its line may keep what it needs.
_PATIENCE = 0.25
#: Seconds between dispatches, at most, while requests arrive: time alone may have made room or
#: ended somebody's patience.
_DISPATCH_SECONDS = 1.0


class Releasable(Protocol):
    """What the queue hands out."""

    def release(self) -> None:
        """Give it back."""


T = TypeVar("T", bound=Releasable)


class _Waiter(Generic[T]):
    def __init__(
        self, place: Place[T], take: Callable[[], T | None], keep: Callable[[], None]
    ) -> None:
        self.place = place
        self.take = take
        self.keep = keep
        #: When `take` returned nothing for the first time.
        self.refused_at: float | None = None
        self.granted: asyncio.Future[T] = asyncio.get_running_loop().create_future()


class Party:
    """Requests of which each ends all when it is refused, such as the samples of one call."""

    def __init__(self) -> None:
        #: Whether one of them was granted something. None of the others gives way any more.
        self.served = False


class Place(Generic[T]):
    """A place in the queue, held from a request's arrival on."""

    def __init__(self, queue: FairQueue[T], tenant: str, party: Party, *, in_excess: bool) -> None:
        self._queue = queue
        self.tenant = tenant
        self.party = party
        #: Whether it is one of those that `max_waiting` bounds: until it is granted something.
        self.counted = False
        #: Whether the queue was full, so that another one makes room if this has to wait.
        self.in_excess = in_excess

    async def wait(
        self, take: Callable[[], T | None], keep: Callable[[], None] = lambda: None
    ) -> T:
        """What `take` returned, once it is this request's turn and `take` returns something.

        keep: called after a `take` in vain when those before it have been so for long; it may see
        to it that `take` of others returns nothing meanwhile, until `wait` is over.
        Raises what `take` raises, and `LimitExceeded` after the longest wait, or when the queue is
        full, the tenant's line one of the longest and this its last.
        """
        return await self._queue._wait(self, take, keep)


class FairQueue(Generic[T]):
    """The line. `dispatch` or `dispatch_soon` is to be called whenever something got free."""

    def __init__(
        self,
        *,
        max_waiting: int,
        max_waiting_per_tenant: int,
        max_wait_seconds: float,
        max_arriving: int = 0,
        sweep: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """The bounds hold from a request's arrival on, before it is known whether it has to wait.

        max_arriving: the bound in place of `max_waiting` while nobody is in line, if it is higher:
        whoever would find room at once is not refused as waiting.
        sweep: entered for each dispatch, in which many ask and nothing gets free.
        """
        self._max = max_waiting
        self._max_arriving = max_arriving
        self._max_per_tenant = max_waiting_per_tenant
        self._max_wait = max_wait_seconds
        #: Requests between arrival and grant, by tenant.
        self._waiting: collections.Counter[str] = collections.Counter()
        #: Those that ask for a grant, by tenant; the tenant whose turn it is comes first.
        self._lines: collections.OrderedDict[str, collections.deque[_Waiter[T]]] = (
            collections.OrderedDict()
        )
        self._sweep = sweep
        self._dispatched = -math.inf
        #: A dispatch that is due.
        self._soon: asyncio.Handle | None = None
        #: When somebody began to wait and the grants since then, or the last of these alone.
        self._moves: collections.deque[float] = collections.deque(maxlen=_REMEMBERED_GRANTS + 1)

    @property
    def waiting(self) -> int:
        """Requests that have arrived and were granted nothing yet."""
        return self._waiting.total()

    @contextmanager
    def place(self, tenant: str, party: Party | None = None) -> Iterator[Place[T]]:
        """A place for one request, maybe of a party. Raises `LimitExceeded` if the queue is full.

        Full for all, it has room for a tenant that has fewer waiting than another, whose last one
        gives way; not before the new one waits, which until then may itself be refused.
        """
        if self._waiting[tenant] >= self._max_per_tenant:
            raise self._full(
                f"tenant {tenant} has {self._max_per_tenant} requests waiting, which is as many "
                "as may wait",
                "queue_tenant",
                self._waiting[tenant],
            )
        full = self.waiting >= self._max
        if (
            full
            and (self._lines or self.waiting >= self._max_arriving)
            and self._last_beyond(self._waiting[tenant] + 1) is None
        ):
            raise self._full_for_all()
        place = Place(self, tenant, party or Party(), in_excess=full)
        self._waiting[tenant] += 1
        place.counted = True
        try:
            yield place
        finally:
            self._uncount(place)

    def _last_beyond(self, count: int) -> _Waiter[T] | None:
        """Who gives way: the last in line of the tenant with most waiting, above `count`.

        A tenant may have none in line: its prompts are being tokenized.
        """
        for tenant, waiting in self._waiting.most_common():
            if waiting <= count:
                break
            for waiter in reversed(self._lines.get(tenant, ())):
                place = waiter.place
                if place.counted and not place.party.served and not waiter.granted.done():
                    return waiter
        return None

    def _make_room(self, waiter: _Waiter[T]) -> None:
        """Refuse another tenant's last one for one that waits in excess; else that one itself."""
        place = waiter.place
        if place.counted and place.in_excess and self.waiting > self._max:
            last = self._last_beyond(self._waiting[place.tenant]) or waiter
            if last.place.party.served:  # it is the waiter itself
                return
            last.granted.set_exception(self._full_for_all())
            self._leave(last)

    def _uncount(self, place: Place[T]) -> None:
        if place.counted:
            place.counted = False
            self._waiting[place.tenant] -= 1
            if not self._waiting[place.tenant]:
                del self._waiting[place.tenant]

    def dispatch(self) -> None:
        """Grant whatever can be granted, in turn."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        self._dispatched = time.monotonic()
        with self._sweep():
            granted = True
            while granted:
                granted = False
                for tenant in list(self._lines):
                    granted |= self._serve(tenant)

    def dispatch_soon(self) -> None:
        """Dispatch in the event loop's next turn, once for all that got free in this one."""
        if self._lines and self._soon is None:
            self._soon = asyncio.get_running_loop().call_soon(self.dispatch)

    def _serve(self, tenant: str) -> bool:
        """Serve the head of one line; whether it was granted something."""
        line = self._lines[tenant]
        waiter = line[0]
        if waiter.granted.done():  # given up, and not yet gone from the line
            self._leave(waiter)
            return True
        try:
            taken = waiter.take()
        except Exception as error:
            waiter.granted.set_exception(error)
        else:
            if taken is None:
                self._refused(waiter)
                return False
            self._moves.append(time.monotonic())
            waiter.place.party.served = True
            waiter.granted.set_result(taken)
        self._leave(waiter)
        if tenant in self._lines:
            self._lines.move_to_end(tenant)
        return True

    def _refused(self, waiter: _Waiter[T]) -> None:
        now = time.monotonic()
        if waiter.refused_at is None:
            waiter.refused_at = now
        if now - waiter.refused_at >= _PATIENCE * self._max_wait:
            waiter.keep()

    async def _wait(
        self, place: Place[T], take: Callable[[], T | None], keep: Callable[[], None]
    ) -> T:
        waiter = _Waiter(place, take, keep)
        now = time.monotonic()
        if not self._lines:  # a time in which nobody waited would look like a slow line
            self._moves.clear()
            self._moves.append(now)
        self._lines.setdefault(place.tenant, collections.deque()).append(waiter)
        # What got free in this turn of the event loop may be room enough.
        due = place.in_excess and self._soon is not None
        if due or now - self._dispatched >= _DISPATCH_SECONDS:
            self.dispatch()
        else:
            self._serve_first(waiter)
        self._make_room(waiter)
        if waiter.granted.done():
            return waiter.granted.result()
        try:
            async with asyncio.timeout(self._max_wait):
                return await waiter.granted
        except TimeoutError as error:
            what = f"no worker had room within {self._max_wait:g} s"
            refusal = self._full(what, "queue_time", self.waiting)  # itself included
            self._give_up(waiter)
            raise refusal from error
        except BaseException:
            self._give_up(waiter)
            raise

    def _give_up(self, waiter: _Waiter[T]) -> None:
        granted = waiter.granted
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            granted.result().release()  # granted in the moment it was given up
        else:
            self._serve_first(waiter)  # the next one may need less
            self._leave(waiter)

    def _serve_first(self, waiter: _Waiter[T]) -> None:
        """Serve a line if that one is at its head; nothing got free, so the others wait on."""
        tenant = waiter.place.tenant
        line = self._lines.get(tenant)
        if line is not None and line[0] is waiter and self._soon is None:
            while tenant in self._lines and self._serve(tenant):
                pass

    def _leave(self, waiter: _Waiter[T]) -> None:
        self._uncount(waiter.place)
        line = self._lines.get(waiter.place.tenant)
        if line is not None and waiter in line:
            line.remove(waiter)
            if not line:
                del self._lines[waiter.place.tenant]

    def _full_for_all(self) -> LimitExceeded:
        return self._full(
            f"{self._max} requests are waiting at this gateway, which is as many as may wait",
            "queue_total",
            self.waiting,
        )

    def _full(self, what: str, reason: str, ahead: int) -> LimitExceeded:
        seconds = self._drain_seconds(ahead)
        return LimitExceeded(
            f"{what}; come back in {seconds:.0f} s", reason=reason, retry_seconds=seconds
        )

    def _drain_seconds(self, ahead: int) -> float:
        """How long the line took lately for so many requests, from 1 s to the longest wait.

        As long as it has not moved, if it is not known how fast it does.
        """
        if not self._lines:
            return 1.0  # all are on their way
        seconds = time.monotonic() - self._moves[0]
        if (grants := len(self._moves) - 1) >= 2:
            seconds *= ahead / grants
        return min(max(seconds, 1.0), max(self._max_wait, 1.0))
