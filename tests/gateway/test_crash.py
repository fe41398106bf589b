"""kill -9 on a real gateway process: what a client was told is stored, and no chain is torn."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from tests.gateway.running import add_tenant, until_ready
from tests.gateway.scripted_worker import ScriptedWorker
from tests.gateway.test_audit_store import problems
from tests.gateway.test_serve_command import serve, target_of
from vase_sgl.client import AsyncClient, VaseError
from vase_sgl.gateway.audit import AuditStore, RecordStatus

CALLERS = 12
ROUNDS = 2


async def call_until_killed(client: AsyncClient, seen: dict[str, tuple[int, ...]]) -> str:
    """Generate again and again, noting each answer whose result arrived; the id that did not."""
    while True:
        stream = client.generate("tell me", max_new_tokens=5, budget=8, window=2)
        tokens: list[int] = []
        request_id = ""
        try:
            request_id = await stream.started()
            async for chunk in stream:
                tokens += chunk.token_ids
        except VaseError:
            return request_id
        assert stream.result.finish_reason == "length"
        seen[request_id] = tuple(tokens)


async def test_no_confirmed_record_is_lost_and_no_chain_is_torn(
    tmp_path: Path, audit_url: str
) -> None:
    await (await AuditStore.open(audit_url, migrate=True)).close()
    keys = [add_tenant(tmp_path / ".vase-sgl" / "tenants.yaml", name) for name in ("alice", "bob")]
    draw = random.Random(1)
    seen: list[dict[str, tuple[int, ...]]] = [{}, {}]
    cut: set[str] = set()
    async with ScriptedWorker() as worker:
        options = ("--worker-url", worker.url, "--grpc-port", "0", "--audit-url", audit_url)
        for _ in range(ROUNDS):
            before = [len(answers) for answers in seen]
            async with serve(tmp_path, *options, "--log-level", "warning") as process:
                target = await target_of(process)
                clients = [AsyncClient(target, key) for key in keys]
                await until_ready(clients[0])
                callers = [
                    asyncio.create_task(call_until_killed(clients[n % 2], seen[n % 2]))
                    for n in range(CALLERS)
                ]
                while any(len(a) < b + 10 for a, b in zip(seen, before, strict=True)):
                    await asyncio.sleep(0.01)
                await asyncio.sleep(draw.uniform(0, 0.3))
                process.kill()
                cut.update(await asyncio.wait_for(asyncio.gather(*callers), 20))
                for client in clients:
                    await client.close()
            assert await problems(audit_url) == {"alice": None, "bob": None}
    assert len(cut - {""}) > ROUNDS, "the gateway was idle when it was killed"
    store = await AuditStore.open(audit_url)
    for tenant, answers in zip(("alice", "bob"), seen, strict=True):
        for request_id, tokens in answers.items():
            stored = await store.get(tenant, request_id)
            assert stored is not None, f"{request_id} was confirmed and is not stored"
            assert stored.record.status is RecordStatus.COMPLETED
            assert stored.record.output_token_ids == tokens
    await store.close()
