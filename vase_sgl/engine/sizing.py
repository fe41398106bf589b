"""How much device memory the budget's own buffers take, before SGLang sizes its KV pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel

from vase_sgl.engine.config import EngineConfig, engine_config
from vase_sgl.engine.limits import UnsupportedConfiguration
from vase_sgl.engine.rounds import chosen_kernels, scratch_bytes

#: Budget that concurrency is estimated with where neither the operator nor a default says more.
REFERENCE_BUDGET = 2048
_POSITION_BYTES = 4
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class BufferSizes:
    """Bytes of one rank's buffers, by what they grow with.

    slot_kv_bytes: K and V of one slot in all layers.
    slot_position_bytes: token positions of one slot in all layers and heads.
    ring_row_bytes: query ring of one request.
    requests: requests that own a ring at once; None derives it from the pool.
    reference_slots: slots of one request, for that.
    scratch_bytes: of the Triton rounds.
    """

    slot_kv_bytes: int
    slot_position_bytes: int
    ring_row_bytes: int
    requests: int | None
    reference_slots: int
    scratch_bytes: int

    @classmethod
    def of(
        cls,
        model_config: Any,
        config: EngineConfig,
        *,
        kv_dtype: torch.dtype,
        query_dtype: torch.dtype,
        max_running_requests: int | None,
        device_type: str,
    ) -> BufferSizes:
        tp_size = get_parallel().attn_tp_size
        layers = model_config.num_hidden_layers
        kv_heads = model_config.get_num_kv_heads(tp_size)
        query_heads = model_config.num_attention_heads // tp_size
        head_dims = model_config.head_dim + model_config.v_head_dim
        budget = (config.default or {}).get("budget", REFERENCE_BUDGET)
        window = config.limits.max_window
        scratch = 0
        if chosen_kernels(config, device_type) == "triton":
            scratch = scratch_bytes(
                layers=layers,
                kv_heads=kv_heads,
                group=query_heads // kv_heads,
                context_length=model_config.context_len,
                max_budget=config.limits.max_budget,
                window=window,
            )
        return cls(
            slot_kv_bytes=layers * kv_heads * head_dims * kv_dtype.itemsize,
            slot_position_bytes=layers * kv_heads * _POSITION_BYTES,
            ring_row_bytes=layers
            * window
            * query_heads
            * model_config.head_dim
            * query_dtype.itemsize,
            requests=config.max_requests or max_running_requests,
            reference_slots=min(budget, config.limits.max_budget) + window,
            scratch_bytes=scratch,
        )

    @property
    def ring_row_slots(self) -> float:
        """How many slots of K and V are as large as one request's query ring."""
        return self.ring_row_bytes / self.slot_kv_bytes

    def ring_requests(self, slots: int) -> int:
        """Requests that own a row of the query ring beside a pool of `slots`."""
        return self.requests or max(1, slots // self.reference_slots)

    def kv_bytes(self, available: int) -> int:
        """Of `available` bytes, those left for K and V when the buffers have theirs."""
        fixed = self.scratch_bytes + (1 + (self.requests or 0)) * self.ring_row_bytes
        slot_bytes = float(self.slot_kv_bytes + self.slot_position_bytes)
        if self.requests is None:
            slot_bytes += self.ring_row_bytes / self.reference_slots
        return max(0, int((available - fixed) * self.slot_kv_bytes / slot_bytes))


def leave_room_for_buffers(
    original: Callable[..., Any],
    configurator: Any,
    budget_bytes: int,
    *,
    cap_tokens: int | None = None,
) -> Any:
    """AROUND `KVCacheConfigurator.config_from_budget`: the pool gets what our buffers leave.

    Raises `UnsupportedConfiguration` if that is nothing: SGLang would blame the weights.
    """
    if cap_tokens is not None:
        # SGLANG_ENABLE_POST_CAPTURE_KV_SIZING: the pool, so far an address range, gets its memory
        # after the graphs. Our buffers are there already, for `cap_tokens`, and not in the budget.
        return original(configurator, budget_bytes, cap_tokens=cap_tokens)
    sizes = BufferSizes.of(
        configurator.model_config,
        engine_config(),
        kv_dtype=configurator.kv_cache_dtype,
        query_dtype=configurator.model_dtype,
        max_running_requests=configurator.server_args.max_running_requests,
        device_type=configurator.device,
    )
    left = sizes.kv_bytes(budget_bytes)
    if not left:
        rings = (1 + (sizes.requests or 0)) * sizes.ring_row_bytes
        raise UnsupportedConfiguration(
            f"a static KV budget's buffers leave no memory for KV entries: of "
            f"{budget_bytes / _GIB:.2f} GiB, query rings would take {rings / _GIB:.2f} and the "
            f"kernels' scratch {sizes.scratch_bytes / _GIB:.2f}; lower --vase-max-requests (by "
            "default --max-running-requests), --vase-max-window or --context-length, or raise "
            "--mem-fraction-static"
        )
    return original(configurator, left)
