"""The RPCs of VaseGateway: who may call, what runs, how the answer is worded."""

from __future__ import annotations

import functools
import re

from google.protobuf.message import Message

from vase_sgl.eviction.params import DEFAULT_WINDOW, reserved_slots
from vase_sgl.gateway import validation, wire
from vase_sgl.gateway.admission import Admissions
from vase_sgl.gateway.audit import AuditStore, Summary
from vase_sgl.gateway.auth import current_tenant
from vase_sgl.gateway.comparison import Outcome, Progress, Verdict
from vase_sgl.gateway.errors import InvalidRequest, NotFound, as_status
from vase_sgl.gateway.generation import Generations
from vase_sgl.gateway.interceptor import Context, write
from vase_sgl.gateway.need import max_prompt_tokens
from vase_sgl.gateway.replay import Replays
from vase_sgl.gateway.router import WorkerRouter
from vase_sgl.gateway.seeds import SeedCheck
from vase_sgl.gateway.tenants import Role
from vase_sgl.gateway.validation import require
from vase_sgl.gateway.workers import WorkerInfo
from vase_sgl.rpc.v1 import gateway_pb2 as pb
from vase_sgl.rpc.v1 import gateway_pb2_grpc

#: Any of these may read the tenant's own records.
READERS = (Role.GENERATE, Role.REPLAY, Role.AUDIT)
DEFAULT_PAGE = 50
MAX_PAGE = 1000

_OUTCOMES = {
    Outcome.MATCH: pb.ReplayVerdict.OUTCOME_MATCH,
    Outcome.DIVERGED: pb.ReplayVerdict.OUTCOME_DIVERGED,
    Outcome.INCOMPARABLE: pb.ReplayVerdict.OUTCOME_INCOMPARABLE,
}
_SEED_CHECKS = {
    SeedCheck.VERIFIED: pb.SEED_CHECK_VERIFIED,
    SeedCheck.MISMATCH: pb.SEED_CHECK_MISMATCH,
    SeedCheck.VERSION_REMOVED: pb.SEED_CHECK_VERSION_REMOVED,
    SeedCheck.ORIGIN_UNKNOWN: pb.SEED_CHECK_ORIGIN_UNKNOWN,
}


class GatewayService(gateway_pb2_grpc.VaseGatewayServicer):
    """Thin: each RPC checks the role, delegates, and words the answer.

    Streams are written with `context.write`, not yielded: a cancelled call then raises inside
    the code that runs it, which frees the request's slots at once.
    """

    def __init__(
        self,
        router: WorkerRouter,
        store: AuditStore,
        admissions: Admissions,
        generations: Generations,
        replays: Replays,
        *,
        client_stall_seconds: float,
    ) -> None:
        self._router = router
        self._store = store
        self._admissions = admissions
        self._generations = generations
        self._replays = replays
        self._client_stall = client_stall_seconds

    async def Generate(  # type: ignore[override]  # the stub knows only generators
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        async with as_status(context, "Generate"):
            tenant = current_tenant(Role.GENERATE)
            send = functools.partial(self._write, context)
            async with self._admissions.admit(tenant, "generate") as passage:
                record = await self._generations.run(passage, request, send)
            await send(pb.GenerateResponse(result=wire.result(record)))

    async def GenerateOnce(  # type: ignore[override]
        self, request: pb.GenerateOnceRequest, context: Context
    ) -> pb.GenerateOnceResponse | None:
        async with as_status(context, "GenerateOnce"):
            tenant = current_tenant(Role.GENERATE)
            async with self._admissions.admit(tenant, "generate") as passage:
                record = await self._generations.run(passage, request.request, _discard)
            return pb.GenerateOnceResponse(
                request_id=record.record_id,
                text=record.text,
                token_ids=record.output_token_ids,
                result=wire.result(record),
            )
        return None

    async def Replay(  # type: ignore[override]
        self, request: pb.ReplayRequest, context: Context
    ) -> None:
        async def send(progress: Progress) -> None:
            message = pb.ReplayProgress(**vars(progress))
            await self._write(context, pb.ReplayResponse(progress=message))

        async with as_status(context, "Replay"):
            tenant = current_tenant(Role.REPLAY)
            with self._admissions.unlimited(tenant, "replay"):
                verdict = await self._replays.run(tenant, request.record_id, send)
            await self._write(context, pb.ReplayResponse(verdict=_verdict(verdict)))

    async def GetRecord(  # type: ignore[override]
        self, request: pb.GetRecordRequest, context: Context
    ) -> pb.GetRecordResponse | None:
        async with as_status(context, "GetRecord"):
            tenant = current_tenant(*READERS)
            stored = await self._store.get(tenant.name, request.record_id)
            if stored is None:
                raise NotFound(
                    f"there is no record {request.record_id!r} of tenant {tenant.name}; "
                    "ListRecords (`vase-sgl records list`) shows those there are"
                )
            return pb.GetRecordResponse(record=wire.record(stored))
        return None

    async def ListRecords(  # type: ignore[override]
        self, request: pb.ListRecordsRequest, context: Context
    ) -> pb.ListRecordsResponse | None:
        async with as_status(context, "ListRecords"):
            tenant = current_tenant(*READERS)
            size = request.page_size or DEFAULT_PAGE
            require(
                1 <= size <= MAX_PAGE,
                f"page_size: must be from 1 to {MAX_PAGE}, or 0 for {DEFAULT_PAGE}, got {size}",
            )
            has = request.HasField
            before = _page_position(request.page_token)
            timed = has("since_unix_micros") or has("until_unix_micros")
            # A token tells the order: one of a version that had no other is a sequence alone.
            by_arrival = timed if before is None else len(before) > 1
            # One more than asked for tells whether there is a next page.
            found = await self._store.latest(
                tenant.name,
                before=before,
                count=size + 1,
                since_unix_micros=request.since_unix_micros if has("since_unix_micros") else None,
                until_unix_micros=request.until_unix_micros if has("until_unix_micros") else None,
                by_arrival=by_arrival,
            )
            page = found[:size]
            return pb.ListRecordsResponse(
                records=[wire.summary(stored) for stored in page],
                next_page_token=_page_token(page[-1], by_arrival) if len(found) > size else "",
            )
        return None

    async def GetCapacity(  # type: ignore[override]
        self, request: pb.GetCapacityRequest, context: Context
    ) -> pb.GetCapacityResponse | None:
        async with as_status(context, "GetCapacity"):
            limits = current_tenant().limits
            infos = [info for _, info in await self._router.recent()]
            max_window = min(info.max_window for info in infos)
            context_length = min(info.context_length for info in infos)
            response = pb.GetCapacityResponse(
                total_slots=sum(info.total_slots for info in infos),
                available_slots=sum(info.available_slots for info in infos),
                reserved_slots=sum(info.reserved_slots for info in infos),
                running_requests=sum(info.running_requests for info in infos),
                rounds=sum(info.rounds for info in infos),
                evicted_tokens=sum(info.evicted_tokens for info in infos),
                context_length=context_length,
                max_budget=min(limits.max_budget, *(info.max_budget for info in infos)),
                max_window=max_window,
                max_new_tokens=min(limits.max_new_tokens, context_length),
                max_prompt_tokens=min(limits.max_prompt_tokens, *map(max_prompt_tokens, infos)),
                policies=limits.policies,
                fingerprint=infos[0].fingerprint,
            )
            rings = [i.query_ring_slots for i in infos if i.query_ring_slots is not None]
            if rings:
                response.query_ring_slots = max(rings)
            if request.HasField("budget"):
                default = min(DEFAULT_WINDOW, max_window)
                window = request.window if request.HasField("window") else default
                require(
                    0 < window < request.budget,
                    f"budget: must be greater than window {window}, got {request.budget}",
                )
                require(
                    request.prompt_tokens >= 0,
                    f"prompt_tokens: must not be negative, got {request.prompt_tokens}",
                )
                prompt = validation.prompt_mode_of("prompt_mode", request.prompt_mode) or "evict"
                # Per worker: a request does not span two of them.
                slots = [
                    reserved_slots(
                        request.prompt_tokens,
                        response.max_new_tokens,
                        budget=request.budget,
                        window=window,
                        prompt=prompt,
                        prefix_cache=info.prefix_cache,
                        page_size=info.page_size,
                    )
                    for info in infos
                ]
                response.slots_per_request = max(slots)
                response.requests_that_fit = sum(map(_that_fit, infos, slots))
            else:
                for name in ("window", "prompt_tokens", "prompt_mode"):
                    require(
                        not getattr(request, name),
                        f"{name}: says nothing without a budget; set budget, or leave it out",
                    )
            return response
        return None

    async def _write(self, context: Context, message: Message) -> None:
        """Write to the client's stream; waits while the client does not read.

        So the gateway holds one message of each stream, and gRPC a few megabytes of a connection.
        Raises `ClientGone`, and `ClientStalled` for a client that does not read for too long.
        """
        await write(context, message, self._client_stall)


async def _discard(message: pb.GenerateResponse) -> None:
    """GenerateOnce answers from the record; what streams by is not needed."""


def _page_token(last: Summary, by_arrival: bool) -> str:
    sequence = str(last.sequence)
    return f"{last.created_unix_micros}-{sequence}" if by_arrival else sequence


def _page_position(token: str) -> tuple[int, ...] | None:
    """What `AuditStore.latest` takes as `before`."""
    if token == "":
        return None
    if not re.fullmatch(r"([0-9]{1,18}-)?[0-9]{1,18}", token):
        raise InvalidRequest(
            f"page_token: {token!r} is not one; send next_page_token of the page before"
        )
    return tuple(int(number) for number in token.split("-"))


def _that_fit(info: WorkerInfo, slots: int) -> int:
    """How many more requests with so many slots and a query ring the worker could take."""
    fit = info.unreserved_slots // slots
    for most in (info.max_running_requests, info.max_query_requests):
        if most:
            fit = min(fit, max(most - info.running_requests, 0))
    return fit


def _verdict(verdict: Verdict) -> pb.ReplayVerdict:
    token = verdict.token
    return pb.ReplayVerdict(
        outcome=_OUTCOMES[verdict.outcome],
        first_differing_token=token.position if token else None,
        expected_token=token.expected if token else None,
        actual_token=token.actual if token else None,
        first_differing_round=verdict.round,
        differences=[
            pb.FingerprintDifference(key=d.key, recorded=d.recorded, current=d.current)
            for d in verdict.differences
        ],
        tokens_compared=verdict.tokens_compared,
        rounds_compared=verdict.rounds_compared,
        seed_check=_SEED_CHECKS[verdict.seed_check],
    )
