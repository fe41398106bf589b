"""Workers with two models behind one gateway, as while one replaces the other."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.gateway.running import Running, run_gateway, until
from tests.gateway.scripted_worker import ScriptedWorker
from vase_sgl.client import Unavailable
from vase_sgl.gateway.errors import WorkerUnavailable
from vase_sgl.gateway.need import Need
from vase_sgl.gateway.workers import WorkerInfo

CHAT: Any = [{"role": "user", "content": "tell me"}]


@dataclasses.dataclass
class TwoModels:
    running: Running
    old: ScriptedWorker
    new: ScriptedWorker

    def api(self) -> AsyncOpenAI:
        url = f"{self.running.http_url}/v1"
        return AsyncOpenAI(base_url=url, api_key=self.running.key, max_retries=0, timeout=20)


@asynccontextmanager
async def two_models(folder: Path, *names: str) -> AsyncIterator[TwoModels]:
    """Both ready; answers begin with the digit that the weights' digest is made of."""
    async with ScriptedWorker() as old, ScriptedWorker() as new:
        for worker, name, digit in zip((old, new), names, "01", strict=True):
            worker.model_name, worker.opening = name, digit
            worker.fingerprint["weights_digest"] = digit * 32
        section = {"urls": [old.url, new.url]}
        async with run_gateway(folder, worker=section, http={"port": 0}) as running:
            await until(lambda: len(running.gateway._router.ready()) == 2)
            yield TwoModels(running, old, new)


async def test_a_request_runs_on_the_model_that_it_names(tmp_path: Path) -> None:
    async with two_models(tmp_path, "old", "new") as f, f.api() as api:
        for _ in range(4):
            for model, worker in (("old", f.old), ("new", f.new)):
                tokenized, generated = worker.tokenized, len(worker.bodies)
                answer = await api.chat.completions.create(model=model, messages=CHAT, max_tokens=2)
                assert answer.model == model
                assert (answer.choices[0].message.content or "")[0] == worker.opening
                assert (worker.tokenized, len(worker.bodies)) == (tokenized + 1, generated + 1)
                ids = await api.completions.create(model=model, prompt=[1, 2], max_tokens=2)
                assert ids.choices[0].text[0] == worker.opening


async def test_a_request_runs_on_the_model_that_tokenized_it(tmp_path: Path) -> None:
    """Over gRPC it names none. Busy workers of the other model are no reason to change."""
    async with two_models(tmp_path, "m", "m") as f:
        f.old.token_seconds = f.new.token_seconds = 0.01

        async def one(prompt: Any) -> None:
            await f.running.client.generate_once(prompt, max_new_tokens=3)

        await asyncio.gather(*(one("tell me") for _ in range(10)))
        assert f.old.tokenized == len(f.old.bodies) > 0
        assert f.new.tokenized == len(f.new.bodies) > 0


async def test_another_model_is_no_retry(tmp_path: Path) -> None:
    async with two_models(tmp_path, "old", "new") as f, f.api() as api:
        f.old.faults.refuse_status = 500
        for _ in range(2):
            with pytest.raises(Exception, match="refused on order"):
                await api.chat.completions.create(model="old", messages=CHAT, max_tokens=2)
        assert not f.new.bodies and f.new.tokenized == 0
        failed = 0
        for _ in range(2):
            try:
                await f.running.client.generate_once("tell me", max_new_tokens=2)
            except Unavailable:
                failed += 1
        assert (failed, len(f.new.bodies), f.new.tokenized) == (1, 1, 1)


async def test_all_samples_are_of_one_model(tmp_path: Path) -> None:
    """Which is tokenized for once, though both models have the name."""
    async with two_models(tmp_path, "m", "m") as f, f.api() as api:
        for number in range(1, 5):
            answer = await api.chat.completions.create(model="m", messages=CHAT, max_tokens=2, n=4)
            texts = [choice.message.content or "" for choice in answer.choices]
            assert len({text[0] for text in texts}) == 1 and len(texts) == 4
            assert f.old.tokenized + f.new.tokenized == number


async def test_a_model_that_leaves_takes_those_that_wait_for_it_away(tmp_path: Path) -> None:
    """They may come back, and are tokenized anew."""
    async with two_models(tmp_path, "m", "m") as f:
        router = f.running.gateway._router
        models = {worker.name: info.model for worker, info in router.ready()}
        need = Need((1, 2), 1, None, False, models[f.old.url])
        lease = router.take(need)
        assert lease is not None and lease.worker.name == f.old.url
        lease.release()
        f.old.faults.healthy = False
        await until(lambda: [worker.name for worker, _ in router.ready()] == [f.new.url])
        with pytest.raises(WorkerUnavailable, match="with the model that the request was token"):
            router.take(need)
        assert not router.has_other(need, ())


def told(**fingerprint: str) -> WorkerInfo:
    return WorkerInfo(fingerprint, None, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, model_name="m")


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ({"weights_digest": "0" * 32, "model": "a"}, {"weights_digest": "0" * 32}, True),
        ({"weights_digest": "0" * 32}, {"weights_digest": "1" * 32}, False),
        # What stands for a digest that could not be had is each worker's own.
        ({"weights_digest": "unknown-0", "model": "a"}, {"model": "a"}, True),
        ({"weights_digest": "unknown-0", "model": "a"}, {"model": "b"}, False),
        ({"tokenizer_digest": "unknown-0"}, {"tokenizer_digest": "unknown-1"}, True),
        ({"tokenizer_digest": "0" * 32}, {"tokenizer_digest": "1" * 32}, False),
    ],
)
def test_what_tells_models_from_each_other(
    one: dict[str, str], other: dict[str, str], equal: bool
) -> None:
    assert (told(**one).model == told(**other).model) is equal
    assert told(**one).model != dataclasses.replace(told(**one), model_name="n").model
