"""A worker without a model behind the real HTTP interface: deterministic, and it fails on order.

Tokens depend on prompt, sampling seed and position; eviction follows the static budget's
arithmetic, with digests that depend on policy, budget, window and seed. Faults are attributes to
set.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import json
import os
import ssl
from typing import Any, Self

from aiohttp import web

from vase_sgl.worker_key import WORKER_KEY

VOCAB = 50_000

#: After `Faults.new_weights_at`.
_NEW_STAMP = "cd" * 8

FINGERPRINT = {
    "model": "scripted",
    "weights_digest": "0123456789abcdef",
    "vase_sgl": "0",
    "sglang": "0",
    "device": "none",
}


@dataclasses.dataclass
class Faults:
    """What goes wrong. Positions count output tokens from 0, rounds from 1."""

    healthy: bool = True
    refuse_status: int | None = None
    error_event: str | None = None
    cut_after_tokens: int | None = None
    cut_before_done: bool = False
    abort_after_tokens: int | None = None
    other_token_at: int | None = None
    other_digest_at_round: int | None = None
    #: At which of an answer's tokens its weights become others, for good.
    new_weights_at: int | None = None
    has_new_weights: bool = False
    end_after_tokens: int | None = None
    length_ceiling: int | None = None
    #: How far it goes on beyond what it was asked for.
    unasked_tokens: int = 0
    retractions: int = 0
    tokenizing_seconds: float = 0.0
    #: Of the fingerprint with which answers end; None: as before anybody has asked for it.
    stamp: str | None = "0" * 16


class ScriptedWorker:
    """Serve with `async with ScriptedWorker() as worker`, at `worker.url`."""

    def __init__(
        self,
        port: int = 0,
        host: str = "127.0.0.1",
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.url = ""
        self.faults = Faults()
        self.fingerprint = dict(FINGERPRINT)
        #: None: as a worker that does not report it.
        self.model_name: str | None = None
        self.default_eviction: dict[str, Any] | None = None
        self.max_budget = 4096
        self.max_window = 64
        self.context_length = 8192
        self.hides_vocabulary = False
        self.can_inspect = True
        self.total_slots = 10_000
        self.available_slots = 9_000
        self.reserved_slots = 1_000
        self.query_ring_slots = 24.0
        self.rounds = 7
        self.evicted_tokens = 224
        #: Pause before each token. Without one, tokens reach the gateway many at a time.
        self.token_seconds = 0.0
        #: What every answer's text begins with.
        self.opening = ""
        #: Text of an answer's first tokens, in place of their own.
        self.pieces: tuple[str, ...] = ()
        #: How it says that thoughts are marked, and chats that it was given to tokenize.
        self.thinking: dict[str, Any] | None = None
        self.chats: list[list[dict[str, str]]] = []
        #: Events carry what is new, as under `--incremental-streaming-output`, and not all output.
        self.incremental = False
        #: Letters added to each token's text, to make chunks big.
        self.padding = 0
        self.bodies: list[dict[str, Any]] = []
        #: Prompts it was given to tokenize.
        self.tokenized = 0
        #: Body of the last of them.
        self.last_tokenized: dict[str, Any] = {}
        #: Header `traceparent` of each /generate.
        self.traceparents: list[str | None] = []
        self.aborted: list[str] = []
        self.running: set[str] = set()
        #: Requests with output so far.
        self.answered: set[str] = set()
        self.most_running = 0
        self.health_checks = 0
        #: Requests received before each time its prefix cache was emptied.
        self.flushes: list[int] = []
        self.max_running_requests = 64
        self.max_query_requests = 64
        self.prefix_cache = True
        self.tokens_written = 0
        self._api_key = api_key
        self._host = host
        self._port = port
        self._tls = tls
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=2**26, middlewares=[self._authenticate])
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/v1/tokenize", self._tokenize)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_post("/flush_cache", self._flush_cache)
        app.router.add_get("/health", self._health)
        app.router.add_get("/server_info", self._server_info)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port, ssl_context=self._tls)
        await site.start()
        assert site._server is not None
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        self.url = f"{'https' if self._tls else 'http'}://{self._host}:{port}"
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def kill(self) -> None:
        """Cut every connection and stop listening, as a process that dies does."""
        assert self._runner is not None and self._runner.server is not None
        for connection in self._runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()
        for site in list(self._runner.sites):
            await site.stop()

    async def noticed(self) -> None:
        """Return when the gateway has seen this worker as it is now.

        The next check may have begun before now; at the one after the next, the next is done with.
        """
        after = self.health_checks + 3
        async with asyncio.timeout(10):
            while self.health_checks < after:
                await asyncio.sleep(0.01)

    async def wait_for_abort(self, seconds: float = 5.0) -> str:
        """The first aborted request id, as soon as nothing runs any more."""
        async with asyncio.timeout(seconds):
            while not self.aborted or self.running:
                await asyncio.sleep(0.01)
        return self.aborted[0]

    async def wait_for_abort_of(self, count: int) -> None:
        """Wait until so many requests were aborted."""
        async with asyncio.timeout(5):
            while len(self.aborted) < count:
                await asyncio.sleep(0.01)

    @web.middleware
    async def _authenticate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """As SGLang's: everything but the health checks asks for the key."""
        given = request.headers.get("Authorization")
        if self._api_key and request.path != "/health" and given != f"Bearer {self._api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        response: web.StreamResponse = await handler(request)
        return response

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = self.last_tokenized = await request.json()
        self.tokenized += 1
        await asyncio.sleep(self.faults.tokenizing_seconds)
        words = (
            [w for m in body["messages"] for w in (m["role"], *m["content"].split())]
            if "messages" in body
            else body["prompt"].split()
        )
        if words == ["unrenderable"]:
            return web.json_response(
                {"object": "error", "message": "the template refuses this"}, status=400
            )
        answer: dict[str, Any] = {"tokens": [token_of(w) for w in words], "count": len(words)}
        if "messages" in body:
            self.chats.append(body["messages"])
            answer["vase"] = {"thinking": self.thinking}
        return web.json_response(answer)

    async def _abort(self, request: web.Request) -> web.Response:
        rid = (await request.json())["rid"]
        self.aborted.append(rid)
        self.running = {r for r in self.running if not r.startswith(rid)}
        return web.Response()

    async def _flush_cache(self, request: web.Request) -> web.Response:
        """As SGLang's, which refuses while requests run."""
        if self.running:
            return web.Response(status=400, text="Flush cache failed.")
        self.flushes.append(len(self.bodies))
        return web.Response()

    async def _health(self, request: web.Request) -> web.Response:
        self.health_checks += 1
        return web.Response(status=200 if self.faults.healthy else 503)

    async def _server_info(self, request: web.Request) -> web.Response:
        vase = {
            **({} if self.model_name is None else {"model_name": self.model_name}),
            "fingerprint": self.fingerprint,
            "fingerprint_stamp": _NEW_STAMP if self.faults.has_new_weights else "0" * 16,
            "limits": {
                "max_budget": self.max_budget,
                "max_window": self.max_window,
                "max_requests": self.max_query_requests,
            },
            "inspect": self.can_inspect,
            "default": self.default_eviction,
            "slots": {
                "total": self.total_slots,
                "available": self.available_slots,
                "reserved": self.reserved_slots,
                "query_ring": self.query_ring_slots,
            },
            "rounds": self.rounds,
            "evicted_tokens": self.evicted_tokens,
            "running_requests": len(self.running),
            "context_length": self.context_length,
            "max_running_requests": self.max_running_requests,
            "prefix_cache": self.prefix_cache,
            "page_size": 1,
            **({} if self.hides_vocabulary else {"vocab_size": VOCAB}),
        }
        return web.json_response(
            {
                "internal_states": [{"vase": vase}],
                "incremental_streaming_output": self.incremental,
            }
        )

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.traceparents.append(request.headers.get("traceparent"))
        if self.faults.refuse_status is not None:
            return web.json_response(
                {"error": {"message": "refused on order"}}, status=self.faults.refuse_status
            )
        rid = body["rid"]
        self.running.add(rid)
        self.most_running = max(self.most_running, len(self.running))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            await self._stream(body, response)
        except ConnectionError:
            pass  # the gateway closed the stream
        finally:
            self.running.discard(rid)
        return response

    async def _stream(self, body: dict[str, Any], response: web.StreamResponse) -> None:
        if self.faults.error_event is not None:
            error = {"message": self.faults.error_event, "code": 400}
            await response.write(_event({"error": error}))
            await response.write(b"data: [DONE]\n\n")
            return
        sampling = body["sampling_params"]
        run = Run(body["input_ids"], sampling, self.faults)
        text = self.opening
        letters = tokens = 0
        while run.finish is None:
            if self.token_seconds:
                await asyncio.sleep(self.token_seconds)
            if body["rid"] in self.aborted:
                run.finish = {"type": "abort", "message": "Aborted by request."}
            elif self.faults.cut_after_tokens == len(run.tokens):
                _cut(response)
                return
            elif self.faults.abort_after_tokens == len(run.tokens):
                run.finish = {"type": "abort", "message": "out of luck", "status_code": 500}
            else:
                token = run.step()
                piece = self.pieces[len(run.tokens) - 1 : len(run.tokens)]
                text += piece[0] if piece else f"w{token}{'x' * self.padding} "
                for stop in sampling["stop"]:
                    if stop in text:
                        text = text[: text.index(stop)]
                        run.finish = {"type": "stop", "matched": stop}
            event = run.event(body["rid"], text)
            if self.incremental:
                event |= {"text": text[letters:], "output_ids": run.tokens[tokens:]}
            await response.write(_event(event))
            letters, tokens = len(text), len(run.tokens)
            self.tokens_written = tokens
            self.answered.add(body["rid"])
        if self.faults.cut_before_done:
            await asyncio.sleep(0.05)  # what was written arrives
            _cut(response)
        else:
            await response.write(b"data: [DONE]\n\n")


class Run:
    """One generation: tokens, and the cache under the static budget."""

    def __init__(self, prompt: list[int], sampling: dict[str, Any], faults: Faults) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        self.finish: dict[str, Any] | None = None
        self.digests: list[str] = []
        self._sampling = sampling
        self._faults = faults
        given = sampling.get("custom_params", {}).get("vase")
        self._vase = None if given is None else {"budget": 4096, "window": 64, **given}
        self._physical = len(prompt)
        self._due = 0
        if self._vase is not None:
            self._due = max(len(prompt), self._vase["budget"]) + self._vase["window"]

    def step(self) -> int:
        """Draw a token; evict if due."""
        self._physical += 1
        if (
            self._vase is not None
            and self._vase["policy"] != "full"
            and self._physical == self._due
        ):
            self._evict()
        position = len(self.tokens)
        token = _hash(self.prompt, self._sampling["sampling_seed"], position) % VOCAB
        self._faults.has_new_weights |= self._faults.new_weights_at == position
        if self._faults.other_token_at == position or self._faults.has_new_weights:
            token = (token + 1) % VOCAB
        self.tokens.append(token)
        if len(self.tokens) == self._faults.end_after_tokens:
            self.finish = {"type": "stop"}
        elif len(self.tokens) in (
            self._sampling["max_new_tokens"] + self._faults.unasked_tokens,
            self._faults.length_ceiling,
        ):
            self.finish = {"type": "length"}
        return token

    def event(self, rid: str, text: str) -> dict[str, Any]:
        """The state as /generate reports it."""
        meta: dict[str, Any] = {
            "id": rid,
            "finish_reason": self.finish,
            "prompt_tokens": len(self.prompt),
            "completion_tokens": len(self.tokens),
            "num_retractions": self._faults.retractions,
            "queue_time": 1e-6,
        }
        if self._vase is not None:
            logical = len(self.prompt) + len(self.tokens)
            meta["vase"] = {
                "rounds": len(self.digests),
                "evicted_tokens": logical - self._physical,
                "physical_length": self._physical,
                "logical_length": logical,
                "reserved_slots": self._reserved(),
                "digest": self.digests[-1] if self.digests else "0" * 16,
            }
            if self.finish is not None:
                meta["vase"]["round_digests"] = self.digests
        if self.finish is not None:
            changed = self._faults.has_new_weights
            meta["vase_fingerprint"] = _NEW_STAMP if changed else self._faults.stamp
        return {"text": text, "output_ids": self.tokens, "meta_info": meta}

    def _reserved(self) -> int:
        """Slots under the prefix cache: most of them in the first round, fewer ever after."""
        prompt, steady = len(self.prompt), self._vase["budget"] + self._vase["window"]
        total = prompt + self._sampling["max_new_tokens"]
        if self.digests:
            return int(steady)
        first = max(prompt, self._vase["budget"]) + self._vase["window"]
        return int(total if total <= first else first + min(prompt, steady))

    def _evict(self) -> None:
        self._physical = self._vase["budget"]
        self._due = self._vase["budget"] + self._vase["window"]
        number = len(self.digests) + 1
        previous = self.digests[-1] if self.digests else ""
        seed: Any = self._vase["seed"]
        if self._faults.other_digest_at_round == number:
            seed = "other"
        chosen_by = [self._vase[name] for name in ("policy", "budget", "window")]
        self.digests.append(f"{_hash(previous, seed, number, chosen_by):016x}")


def token_of(word: str) -> int:
    """The token id of a word."""
    return _hash(word) % VOCAB


def _cut(response: web.StreamResponse) -> None:
    assert response._req is not None
    if response._req.transport is not None:  # else the gateway was first
        response._req.transport.abort()


def _hash(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big")


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


async def _serve(port: int) -> None:
    async with ScriptedWorker(port, api_key=os.environ.get(WORKER_KEY)):
        await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    asyncio.run(_serve(parser.parse_args().port))
