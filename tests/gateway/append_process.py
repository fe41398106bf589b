"""Appends records to a store, as one of several gateways would: URL, first number, count."""

from __future__ import annotations

import asyncio
import sys

from tests.gateway.audit_records import numbered
from vase_sgl.gateway.audit import AuditStore


async def main(url: str, first: int, count: int) -> None:
    store = await AuditStore.open(url)
    print("open", flush=True)
    sys.stdin.readline()  # all begin together
    records = [numbered(n, tenant=f"t{n % 3}") for n in range(first, first + count)]
    for start in range(0, count, 10):  # many commits, so that the processes meet often
        await asyncio.gather(*map(store.append, records[start : start + 10]))
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
