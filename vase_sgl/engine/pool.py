"""What the budget adds to SGLang's KV pool: token positions, the query ring, the round queue."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel

from vase_sgl.engine import limits
from vase_sgl.engine.compaction import Compaction
from vase_sgl.engine.config import EngineConfig, engine_config
from vase_sgl.engine.query_ring import QueryRing
from vase_sgl.engine.rounds import ReferenceRounds, Rounds, TritonRounds, chosen_kernels
from vase_sgl.engine.sizing import BufferSizes

logger = logging.getLogger(__name__)

_MIB = 2**20


class BudgetPool:
    """Side buffers of one KV pool, created once per model runner, before the first request.

    k_buffers, v_buffers: per layer [slots, kv_heads, head_dim], SGLang's own memory.
    token_positions: int32 [layers, slots, kv_heads]; valid for the first `budget` columns of a
        request that had a round. Before that, and for the recent window, a token's position
        follows from its column, so nothing is written per step.
    first_head: global index of this rank's first KV head; it keys the random draws.
    total_heads: KV heads of a layer, those of other ranks included.
    attention_scale: what the model multiplies q.k by.
    tp_rank: this rank among those that share the heads.
    ring_row_slots: size of one request's query ring, in slots of K and V.
    """

    def __init__(self, model_runner: Any, config: EngineConfig) -> None:
        kv = model_runner.token_to_kv_pool
        # SGLang holds float8 rows as bytes.
        self.k_buffers: list[torch.Tensor] = [x.view(kv.dtype) for x in kv.k_buffer]
        self.v_buffers: list[torch.Tensor] = [x.view(kv.dtype) for x in kv.v_buffer]
        slots, kv_heads, head_dim = self.k_buffers[0].shape
        layers = len(self.k_buffers)
        device = self.k_buffers[0].device
        rows = model_runner.req_to_token_pool.req_to_token.shape[0]
        model = model_runner.model_config
        self.attention_scale = limits.attention_scale(model_runner.model)
        parallel = get_parallel()
        total_heads = model.get_total_num_kv_heads()
        self.tp_rank = parallel.attn_tp_rank
        self.total_heads = total_heads
        self.first_head = self.tp_rank * total_heads // parallel.attn_tp_size
        self.token_positions = torch.zeros(
            layers, slots, kv_heads, dtype=torch.int32, device=device
        )
        sizes = BufferSizes.of(
            model,
            config,
            kv_dtype=kv.dtype,
            query_dtype=model_runner.dtype,
            max_running_requests=model_runner.server_args.max_running_requests,
            device_type=device.type,
        )
        self.ring_row_slots = sizes.ring_row_slots
        self.query_ring = QueryRing(
            layers=layers,
            requests=min(rows, sizes.ring_requests(slots)),
            request_rows=rows,
            window=config.limits.max_window,
            heads=model.num_attention_heads // parallel.attn_tp_size,
            head_dim=head_dim,
            dtype=model_runner.dtype,
            device=device,
        )
        self.kernels = chosen_kernels(config, device.type)
        rounds: Rounds = ReferenceRounds()
        refused: dict[str, str] = {}
        if self.kernels == "triton":
            rounds = triton = TritonRounds(
                self,
                context_length=model.context_len,
                max_budget=config.limits.max_budget,
                check=config.check_integrity,
            )
            if device.type == "cuda":  # the interpreter compiles nothing
                refused = triton.warm_up(self)
        #: Policies that cannot run here, with the reason.
        self.refused_policies = refused_anywhere(refused, parallel.attn_tp_group)
        limits.refuse_default(config, self.refused_policies)
        self.scratch_bytes = rounds.nbytes
        self.compaction = Compaction(rounds)
        logger.info(
            "vase_sgl buffers: query ring %.1f MiB (%d requests, window %d), "
            "token positions %.1f MiB (%d slots), scratch of %s kernels %.1f MiB",
            self.query_ring.nbytes / _MIB,
            self.query_ring.requests,
            config.limits.max_window,
            self.token_positions.nbytes / _MIB,
            slots,
            self.kernels,
            self.scratch_bytes / _MIB,
        )

    @classmethod
    def of_runner(cls, model_runner: Any) -> BudgetPool:
        """The pool of a model runner, created on first use, by all ranks at once.

        Raises `UnsupportedConfiguration` for a KV pool that the budget cannot work on, and for
        default parameters that it cannot run.
        """
        key = model_runner.req_to_token_pool
        if key not in _pools:
            limits.refuse_unsupported_pool(model_runner)
            _pools[key] = cls(model_runner, engine_config())
        return _pools[key]

    @classmethod
    def of(cls, req_to_token_pool: Any) -> BudgetPool:
        """The pool created for the model runner that owns `req_to_token_pool`."""
        return _pools[req_to_token_pool]


def refused_anywhere(refused: dict[str, str], ranks: Any) -> dict[str, str]:
    """The policies that any of `ranks` refuses, which all have to call this, and its reasons.

    Ranks that refused different requests would wait for each other's sums for ever.
    """
    of_ranks: list[dict[str, str]] = ranks.all_gather_object(refused)
    return {policy: reason for one in reversed(of_ranks) for policy, reason in one.items()}


_pools: weakref.WeakKeyDictionary[Any, BudgetPool] = weakref.WeakKeyDictionary()
