"""Start-up refusals: flag mixes under which a static budget would corrupt the cache."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from vase_sgl.engine.config import EngineConfig
from vase_sgl.eviction import EvictionParams

#: flag -> (value that is refused unless it equals this, what to do)
_REQUIRED: dict[str, tuple[object, str]] = {
    "speculative_algorithm": (None, "leave out --speculative-algorithm"),
    "enable_mixed_chunk": (False, "leave out --enable-mixed-chunk"),
    "enable_two_batch_overlap": (False, "leave out --enable-two-batch-overlap"),
    "enable_hierarchical_cache": (False, "leave out --enable-hierarchical-cache"),
    "enable_hisparse": (False, "leave out --enable-hisparse"),
    "enable_lmcache": (False, "leave out --enable-lmcache"),
    "enable_flexkv": (False, "leave out --enable-flexkv"),
    "enable_unified_cache_external_linker": (
        False,
        "leave out --enable-unified-cache-external-linker",
    ),
    "radix_cache_backend": (None, "leave out --radix-cache-backend"),
    "enable_dp_attention": (False, "leave out --enable-dp-attention"),
    "enable_pdmux": (False, "leave out --enable-pdmux"),
    "enable_nvidia_megakernel": (False, "leave out --enable-nvidia-megakernel"),
    "enable_amd_monokernel": (False, "leave out --enable-amd-monokernel"),
    "enable_lora": (False, "leave out --enable-lora"),
    "enable_unified_memory": (False, "leave out --enable-unified-memory"),
    "enable_session_radix_cache": (False, "leave out --enable-session-radix-cache"),
    "prefill_decode_interval": (0, "use --prefill-decode-interval 0"),
    "disaggregation_mode": ("null", "leave out --disaggregation-mode"),
    "dllm_algorithm": (None, "leave out --dllm-algorithm"),
    "kv_canary": ("none", "leave out --kv-canary"),
    "pp_size": (1, "use --pp-size 1"),
    "dcp_size": (1, "use --dcp-size 1"),
    "attn_dp_size": (1, "leave out --enable-dp-attention"),
    "tokenizer_worker_num": (1, "use --tokenizer-worker-num 1"),
    "allow_auto_truncate": (False, "leave out --allow-auto-truncate"),
    "use_ray": (False, "leave out --use-ray"),
    "smg_grpc_mode": (False, "leave out --smg-grpc-mode"),
}

#: flag -> (values that are refused, what to do)
_REFUSED: dict[str, tuple[Collection[object], str]] = {
    "schedule_policy": (("shortest-prefill-first",), "use another --schedule-policy"),
}

#: flag -> (the flag without which it is refused, what to do)
_ONLY_WITH: dict[str, tuple[str, str]] = {
    "enable_priority_scheduling": (
        "disable_priority_preemption",
        "use --enable-priority-scheduling with --disable-priority-preemption",
    ),
}

#: Types of devices for which steps take their slots from us (`ALLOC_FOR_DECODE_FUNCS`).
DEVICES = ("cuda", "cpu")


class UnsupportedConfiguration(RuntimeError):
    """SGLang was started in a way a static KV budget does not support."""


def refuse_unsupported_flags(server_args: Any) -> None:
    """Raise `UnsupportedConfiguration` naming every refused flag and its cure."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.environ import envs

    # Some flags turn on others, which SGLang notes beside what was given.
    resolved = resolving_view(server_args)
    cures = []
    for name, (required, cure) in _REQUIRED.items():
        value = getattr(resolved, name)
        if (value or None) != (required or None):
            cures.append(f"{cure} ({name} is {value!r})")
    for name, (refused, cure) in _REFUSED.items():
        value = getattr(resolved, name)
        if value in refused:
            cures.append(f"{cure} ({name} is {value!r})")
    for name, (other, cure) in _ONLY_WITH.items():
        if getattr(resolved, name) and not getattr(resolved, other):
            cures.append(f"{cure} ({other} is False)")
    if envs.SGLANG_RUST_SERVER.get():
        # Its HTTP server asks none of the hooks that check requests and report their statistics.
        cures.append("unset SGLANG_RUST_SERVER")
    if cures:
        raise UnsupportedConfiguration("a static KV budget needs: " + "; ".join(cures))


def refuse_scaled_kv(model: Any) -> None:
    """Raise `UnsupportedConfiguration` for a checkpoint that scales its float8 KV entries.

    Attention multiplies by the scale, so scores read from the cache without it would be others.
    """
    for name, module in model.named_modules():
        for scale in ("k_scale_float", "v_scale_float"):
            if getattr(module, scale, None) not in (None, 1.0):
                raise UnsupportedConfiguration(
                    f"a static KV budget needs float8 KV entries without scales, but {name} has "
                    f"{scale} {getattr(module, scale)}: leave out --kv-cache-dtype, or use a "
                    "checkpoint without KV scales"
                )


def refuse_unsupported_model(model_runner: Any, backends: Collection[str]) -> None:
    """Raise `UnsupportedConfiguration` for a model or backend that reads the cache in another way.

    A round moves rows to other columns, so what goes by columns must not mean positions: neither a
    sliding window over them, nor a temperature by their number, nor multimodal positions, nor
    encoder entries before them. Policies score with plain logits, q.k by one scale, which must be
    the model's own. And the queries of decode steps must be seen, which only `backends` are made to
    show.
    """
    if model_runner.device not in DEVICES:
        raise UnsupportedConfiguration(
            f"a static KV budget needs a GPU of NVIDIA or AMD, or a CPU, not {model_runner.device}"
        )
    config = model_runner.model_config
    layers = _attention_layers(model_runner.model)
    # Some models have windows that SGLang knows of in their layers alone.
    has_windows = any(layer.sliding_window_size > -1 for layer in layers)
    unsupported = {
        "attention that transformers' code calls (--model-impl transformers)": not layers,
        "attention over a sliding window": (
            model_runner.sliding_window_size is not None or has_windows
        ),
        "a temperature of attention that grows with the position": any(
            (layer.xai_temperature_len or -1) > 0 for layer in layers
        ),
        "scales of attention that differ by layer": len({layer.scaling for layer in layers}) > 1,
        "a cap on attention's logits": any((layer.logit_cap or 0) > 0 for layer in layers),
        "multimodal rotary positions": config.model_is_mrope,
        "an encoder": config.is_encoder_decoder,
    }
    for what, has in unsupported.items():
        if has:
            raise UnsupportedConfiguration(
                f"a static KV budget needs a decoder with full attention; this model has {what}"
            )
    backend = model_runner.decode_attention_backend_str
    if backend not in backends:
        raise UnsupportedConfiguration(
            f"a static KV budget needs another attention backend for decoding than {backend}: use "
            f"--attention-backend {' or '.join(backends)}"
        )


def refuse_default(config: EngineConfig, refused_policies: Mapping[str, str]) -> None:
    """Raise `UnsupportedConfiguration` if requests without a budget would all be refused."""
    if config.default is None:
        return
    policy = EvictionParams.parse(config.default, config.limits).policy.name
    if policy in refused_policies:
        raise UnsupportedConfiguration(
            f"requests without a budget get one with policy {policy}, which cannot run here: its "
            f"kernels do not compile ({refused_policies[policy]}); choose another with "
            "--vase-default, or start with another --kv-cache-dtype or with VASE_KERNELS=reference"
        )


def attention_scale(model: torch.nn.Module) -> float:
    """What the model multiplies q.k by: 1/sqrt(head_dim), or its own (Granite)."""
    return float(_attention_layers(model)[0].scaling)


def _attention_layers(model: torch.nn.Module) -> list[Any]:
    from sglang.srt.layers.radix_attention import RadixAttention

    return [part for part in model.modules() if isinstance(part, RadixAttention)]


def refuse_unsupported_pool(model_runner: Any) -> None:
    """Raise `UnsupportedConfiguration` for models whose cache is not plain full attention."""
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    pool, allocator = model_runner.token_to_kv_pool, model_runner.token_to_kv_pool_allocator
    if type(pool) is not MHATokenToKVPool:
        raise UnsupportedConfiguration(
            f"a static KV budget needs plain multi-head or grouped-query attention; this model's "
            f"KV pool is {type(pool).__name__} (MLA, sliding window, Mamba and hybrids are not "
            "supported)"
        )
    if pool.is_quantized_kv_cache or pool.kv_cache_layout != "nhd":
        raise UnsupportedConfiguration(
            "a static KV budget needs a KV entry to be one row of its slot, not "
            f"{pool.quant_method.name} in layout {pool.kv_cache_layout}: use --kv-cache-dtype "
            "auto, fp8_e4m3 or fp8_e5m2, and leave SGLANG_USE_HND_KVCACHE unset"
        )
    if type(allocator) not in (TokenToKVPoolAllocator, PagedTokenToKVPoolAllocator):
        raise UnsupportedConfiguration(
            f"a static KV budget needs SGLang's plain slot or page allocator, not "
            f"{type(allocator).__name__}: use an attention backend of flashinfer, fa3, triton or "
            "torch_native"
        )
