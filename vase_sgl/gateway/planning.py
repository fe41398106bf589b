"""What is known of a generation before it runs: all that a record needs to run it again."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from typing import Any

from vase_sgl.gateway import validation
from vase_sgl.gateway.cache_salt import CacheSalts
from vase_sgl.gateway.errors import WorkerUnavailable
from vase_sgl.gateway.need import Need
from vase_sgl.gateway.router import WorkerRouter
from vase_sgl.gateway.seeds import Seeds, seeds_for
from vase_sgl.gateway.tenants import Tenant
from vase_sgl.gateway.tokenizing import Tokenizing
from vase_sgl.gateway.workers import Model, Tokenized, Worker, WorkerInfo, WorkerRequest
from vase_sgl.rpc.v1 import gateway_pb2 as pb


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about a generation that is known before it runs."""

    tenant: Tenant
    request: WorkerRequest
    need: Need
    input_kind: str
    seeds: Seeds
    sample_index: int

    @property
    def operation(self) -> str:
        """What the GenAI semantic conventions call it."""
        return operation(self.input_kind)


class Shared:
    """What all samples of one request have in common: the model, and the prompt's tokens for it."""

    def __init__(
        self, model_name: str | None = None, reasoning: Mapping[int, str] | None = None
    ) -> None:
        """`model_name`: what the request calls its model; None: it leaves the choice.

        `reasoning`: of messages of its chat, by index.
        """
        self.model_name = model_name
        self._reasoning = reasoning or {}
        self.model: Model | None = None
        self.tokenized: Tokenized | None = None
        #: Held while the first of them has the prompt tokenized.
        self.tokenizing = asyncio.Lock()

    def with_reasoning(self, prompt: validation.Prompt) -> validation.Prompt:
        """The prompt, as the chat template gets it."""
        chat = list(prompt.chat)
        for index, text in self._reasoning.items():
            chat[index] = {**chat[index], "reasoning_content": text}
        return dataclasses.replace(prompt, chat=tuple(chat))


class Planner:
    """Checks requests, derives their seeds and has their prompts tokenized."""

    def __init__(
        self,
        router: WorkerRouter,
        tokenizing: Tokenizing,
        salts: CacheSalts,
        *,
        default_eviction: Mapping[str, Any] | None,
        allow_inspect: bool,
    ) -> None:
        """`default_eviction`: of requests that bring none.

        `allow_inspect`: tenants with the role may have what their requests keep written to a
        worker's disk.
        """
        self._router = router
        self._tokenizing = tokenizing
        self._salts = salts
        self._default_eviction = default_eviction
        self._allow_inspect = allow_inspect

    async def plan(
        self,
        tenant: Tenant,
        request: pb.GenerateRequest,
        request_id: str,
        *,
        clip: bool,
        shared: Shared,
    ) -> Plan:
        """The plan of one sample; `clip` and `shared` as for `Generations.run`.

        Changes `shared`: the first sample fixes the model and tokenizes. Raises `GatewayError`.
        """
        prompt = shared.with_reasoning(validation.prompt_of(request, tenant))
        max_new_tokens = validation.max_new_tokens_of(request, tenant, clip=clip)
        sampling = validation.sampling_of(request.sampling)
        validation.check_seed(request)
        seeds = seeds_for(
            tenant,
            request_id=request_id,
            request_seed=request.seed if request.HasField("seed") else None,
            sample_index=request.sample_index,
        )
        workers = self._workers_for(shared)
        # All workers with one model have the same flags: any one's ceilings are right.
        _, info = workers[0]
        validation.check_min_p(sampling["min_p"], info)
        validation.check_prompt_bytes(prompt, tenant, info)
        # Whatever applies is made explicit, so that the record is complete.
        fields = (
            validation.eviction_fields(request.eviction)
            if request.HasField("eviction")
            else self._default_eviction or info.default_eviction
        )
        eviction = validation.eviction_of(fields, seed=seeds.eviction, tenant=tenant, info=info)
        if request.inspect:
            validation.check_inspect(
                eviction, tenant=tenant, info=info, allowed=self._allow_inspect
            )
        async with shared.tokenizing:
            if shared.tokenized is None:
                shared.tokenized = await self._tokenizing.tokens(tenant.name, prompt, workers)
        token_ids = shared.tokenized.token_ids
        validation.check_prompt_tokens(prompt.kind, token_ids, tenant, info)
        max_new_tokens = validation.within_context(max_new_tokens, len(token_ids), info, clip=clip)
        to_worker = WorkerRequest(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling={
                "max_new_tokens": max_new_tokens,
                **sampling,
                "sampling_seed": seeds.sampling,
            },
            eviction=None if eviction is None else eviction.to_mapping(),
            inspect=request.inspect,
            cache_salt=self._salts.of(tenant),
        )
        need = Need.of(to_worker, info.model)
        validation.check_slots(need, (info for _, info in workers))
        return Plan(
            tenant=tenant,
            request=to_worker,
            need=need,
            input_kind=prompt.kind,
            seeds=seeds,
            sample_index=request.sample_index,
        )

    def _workers_for(self, shared: Shared) -> list[tuple[Worker, WorkerInfo]]:
        """All ready workers with one model: the request's if it was chosen, else it is now.

        Each model has its own tokenizer, so there is no way from one to the other after this.
        """
        ready = self._router.ready()
        if shared.model is None:
            named = (i.model for _, i in ready if shared.model_name in (None, i.model_name))
            shared.model = next(named, None)
        workers = [(worker, info) for worker, info in ready if info.model == shared.model]
        if not workers:
            raise WorkerUnavailable(
                "no worker with the request's model is ready any more; try again", retry_seconds=1.0
            )
        return workers


def operation(input_kind: str) -> str:
    """What the GenAI semantic conventions call a generation with that input."""
    return "chat" if input_kind == "chat" else "text_completion"
