"""The client of a vase_sgl gateway. Needs grpcio and protobuf only.

from vase_sgl.client import Client

with Client("127.0.0.1:50051", api_key="vsk_...") as client:
    with client.generate("Tell me a story.", max_new_tokens=512, budget=128) as stream:
        for chunk in stream:
            print(chunk.text, end="", flush=True)
    print(stream.result.cache)
    print(client.replay(stream.request_id).verdict)
"""

from __future__ import annotations

from vase_sgl.client.aio import AsyncClient, AsyncGeneration, AsyncReplay
from vase_sgl.client.channels import Tls
from vase_sgl.client.errors import (
    AuthenticationError,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    PermissionError_,
    RateLimited,
    Unavailable,
    VaseError,
)
from vase_sgl.client.retries import NEVER, RetryPolicy
from vase_sgl.client.sync import Client, Generation, Replay
from vase_sgl.client.types import (
    CacheStats,
    Capacity,
    Chunk,
    Completion,
    ContentDigests,
    Eviction,
    FingerprintDifference,
    Message,
    Prompt,
    Record,
    RecordSummary,
    ReplayProgress,
    Result,
    Seeds,
    Timings,
    Usage,
    Verdict,
)

__all__ = [
    "NEVER",
    "AsyncClient",
    "AsyncGeneration",
    "AsyncReplay",
    "AuthenticationError",
    "CacheStats",
    "Cancelled",
    "Capacity",
    "Chunk",
    "Client",
    "Completion",
    "ContentDigests",
    "DeadlineExceeded",
    "Eviction",
    "FingerprintDifference",
    "Generation",
    "InvalidRequest",
    "Message",
    "NotFound",
    "PermissionError_",
    "Prompt",
    "RateLimited",
    "Record",
    "RecordSummary",
    "Replay",
    "ReplayProgress",
    "Result",
    "RetryPolicy",
    "Seeds",
    "Timings",
    "Tls",
    "Unavailable",
    "Usage",
    "VaseError",
    "Verdict",
]
