"""`VASE_CHECK_INTEGRITY` sees what it is for: random schedules and `make soak` rely on it.

"A slot is owned twice" is in test_failures_others_met.py, with what becomes of an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sglang.srt.environ import envs

from tests.engine.scheduler_harness import SteppedScheduler
from vase_sgl.engine import integrity, plugin
from vase_sgl.engine.integrity_log import IntegrityError
from vase_sgl.engine.pool import BudgetPool
from vase_sgl.engine.request_cache import RequestCache, cache_of

#: Mode `keep`: the prefix tree's slots stay the request's, columns 0 to 19.
BUDGET: dict[str, Any] = {"budget": 24, "window": 8, "policy": "vase-attnv", "prompt": "keep"}
PROMPT = [2 + (17 * i) % 250 for i in range(20)]


@dataclasses.dataclass
class Live:
    """The last request of a batch, past its first round: columns 20 to 43 hold what was kept
    of tokens 20 to 51."""

    scheduler: Any
    kv: Any
    cache: RequestCache
    patch: pytest.MonkeyPatch

    @property
    def lengths(self) -> torch.Tensor:
        return self.scheduler.running_batch.seq_lens_cpu

    @property
    def row(self) -> torch.Tensor:
        return self.scheduler.req_to_token_pool.req_to_token[self.kv.req_pool_idx]

    @property
    def positions(self) -> torch.Tensor:
        """Of the last layer and head: all of them are looked at."""
        return BudgetPool.of(self.scheduler.req_to_token_pool).token_positions[-1, :, -1]

    def allocate(self, slots: int) -> None:
        self.patch.setattr(self.kv, "kv_allocated_len", slots)

    def grow(self, entries: int) -> None:
        self.lengths[-1] = entries
        self.allocate(entries)

    def share(self, columns: int) -> None:
        self.patch.setattr(self.kv, "cache_protected_len", columns)

    def own_shared(self) -> None:
        self.row[51] = self.row[0]

    def free(self, column: int, pages: str) -> None:
        allocator = self.scheduler.token_to_kv_pool_allocator
        free = getattr(allocator, pages)
        slot = self.row[column : column + 1].to(free.dtype)
        self.patch.setattr(allocator, pages, torch.cat([free, slot]))

    def token(self, which: int, becomes: int) -> None:
        """The kept token at place `which`, by age, says that it is the one at `becomes`."""
        kept = self.row[20:44]
        self.positions[kept[self.positions[kept].argsort()[which]]] = becomes


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("tokens", [40, 300], ids=["a prompt just prefilled", "between its chunks"])
def test_it_sees_prompts(stepped: SteppedScheduler, tokens: int, overlap: bool) -> None:
    stepped.configure(overlap=overlap)
    with torch.inference_mode():
        stepped.submit("r", [2 + i % 250 for i in range(tokens)], max_new_tokens=2, vase=BUDGET)
        stepped.step()
        scheduler = stepped.scheduler
        assert not stepped.running and (scheduler.chunked_req is not None) == (tokens == 300)
        (req,) = scheduler.last_batch.reqs
        row = scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        saved = row[3].item()
        row[3] = row[4]
        with pytest.raises(IntegrityError, match="a slot is owned twice"):
            scheduler.invariant_checker.self_check_during_busy()
        row[3] = saved
        stepped.run()
    stepped.configure()


@pytest.fixture(scope="module")
def _live(stepped: SteppedScheduler) -> Iterator[Live]:
    stepped.configure(prefix_cache=True)
    for name, prompt in (("neighbour", PROMPT[::-1]), ("last", PROMPT)):
        stepped.submit(name, prompt, max_new_tokens=60, vase=BUDGET)
    for _ in range(40):
        stepped.step()
    req = stepped.running[-1]
    cache = cache_of(req)
    assert req.rid == "last" and cache is not None and cache.planned_rounds == 1
    assert (cache.pinned, cache.kept_length, cache.trigger) == (20, 44, 52)
    yield Live(stepped.scheduler, req.kv, cache, pytest.MonkeyPatch())
    stepped.abort("")  # whatever it is called
    stepped.run()
    stepped.configure()


@pytest.fixture
def live(_live: Live) -> Iterator[Live]:
    """As it was, after each test."""
    tensors = (_live.lengths, _live.row, _live.positions)
    saved = [tensor.clone() for tensor in tensors]
    integrity.check_bookkeeping(_live.scheduler.invariant_checker)
    yield _live
    _live.patch.undo()
    for tensor, before in zip(tensors, saved, strict=True):
        tensor.copy_(before)
    integrity.check_bookkeeping(_live.scheduler.invariant_checker)


@pytest.mark.parametrize(
    ("text", "corrupt"),
    [
        ("51 entries in 50 slots", lambda live: live.allocate(50)),
        ("53 entries, round due at 52", lambda live: live.grow(53)),
        ("53 slots, reservation 52", lambda live: live.allocate(53)),
        ("1 columns of the prefix tree are writable", lambda live: live.share(21)),
        ("a token position is kept twice", lambda live: live.token(0, 51)),
        ("the recent window is not kept whole", lambda live: live.token(-1, 52)),
        ("a pinned position was moved", lambda live: live.token(0, 19)),
        ("a shared slot is owned by a request too", Live.own_shared),
        ("an owned slot is in the free list", lambda live: live.free(51, "free_pages")),
        ("an owned slot is in the free list", lambda live: live.free(51, "release_pages")),
        ("a shared slot is in the free list", lambda live: live.free(0, "free_pages")),
    ],
)
def test_it_sees(live: Live, text: str, corrupt: Callable[[Live], None]) -> None:
    corrupt(live)
    with pytest.raises(IntegrityError, match=f"(^|: ){text}$"):
        integrity.check_bookkeeping(live.scheduler.invariant_checker)


def test_it_sees_what_is_nobodys(live: Live) -> None:
    """A leak, which would show when the worker is next idle, or out of slots."""
    allocator = live.scheduler.token_to_kv_pool_allocator
    live.patch.setattr(allocator, "free_pages", allocator.free_pages[:-7])
    with pytest.raises(IntegrityError, match="Full Pool Mem Leak Detected"):
        live.scheduler.invariant_checker.self_check_during_busy()


def test_sglang_is_asked_to_check_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its event loops look at the variable after each."""
    monkeypatch.setenv(envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.name, "0")
    monkeypatch.setattr(plugin.HookRegistry, "register", lambda *_: None)
    monkeypatch.setattr(plugin, "register_attention_backend", lambda _: lambda factory: factory)
    plugin.register()
    assert envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.get() == 1
