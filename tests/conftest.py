"""Shared by every test: the environment of a test run, and the folders it may use."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Generator, Iterator

import pytest

from tests.triton.device import INTERPRETED

# Upstream's leak checks and our own integrity check are on in every process a test starts.
os.environ.setdefault("VASE_CHECK_INTEGRITY", "1")
os.environ.setdefault("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "1")
os.environ.setdefault("SGLANG_CHECK_KV_PAGE_INVARIANTS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As `vase-sgl worker` has it on a CPU: a compilation of SGLang's repetition penalty takes seconds.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Small tensors: threads that wait for each other on a busy machine only cost time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where a test asks for several, they sleep until there is work: spinning took half of its CPU time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if INTERPRETED:
    from tests.triton.interpreter import spare_repeated_work

    spare_repeated_work()

# Until the tests are collected, which is mostly imports: a third of their time is the collector's.
gc.disable()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        gc.freeze()  # what was imported stays, and no collection needs to search it
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _cheap_hashes_of_keys() -> Iterator[None]:
    """Keys that tests make are hashed as ever, but in no time; each gateway begins with two.

    The kernels' tests run on machines with a GPU and little else: no gateway's packages.
    """
    if importlib.util.find_spec("argon2") is None:
        yield
        return
    import argon2

    from vase_sgl.gateway import keys

    with pytest.MonkeyPatch.context() as patch:
        cheap = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
        patch.setattr(keys, "_HASHER", cheap)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A whole suite in one test goes first: begun last, one process would end alone with it."""
    items.sort(key=lambda item: item.get_closest_marker("whole_suite") is None)
