"""What must be equal for an answer to be replayable bit for bit."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import threading
from concurrent.futures import Future
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import torch
from sglang.srt.arg_groups.arg_utils import record_fields
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.constants import GPU_MEMORY_ALL_TYPES, GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.runtime_context import get_exec
from sglang.srt.sampling.watermarking.config import load_watermark_config
from sglang.srt.server_args import ServerArgs
from vase_kernels import REVISION

from vase_sgl import __version__
from vase_sgl.engine import linear_cpu, platform_cpu, rope
from vase_sgl.engine.config import WORKER_TOKEN, engine_config
from vase_sgl.engine.pool import BudgetPool
from vase_sgl.engine.source_digest import source_digest
from vase_sgl.engine.weights import WeightsNotFound, tokenizer_digest, weights_digest

logger = logging.getLogger(__name__)

#: SGLang's flags that change the numbers of a model whose weights are the same, or what is drawn by
#: them, beside those with an entry of their own.
_ARITHMETIC = (
    "model_impl",
    "model_config_parser",
    "decrypted_config_file",
    "json_model_override_args",
    "quantization",
    "rl_quant_profile",
    "modelopt_quant",
    "enable_fp32_lm_head",
    "enable_tf32_matmul",
    "enable_torch_compile",
    "torch_compile_max_bs",
    "custom_weight_loader",
    "forward_hooks",
    "enable_fused_qk_norm_rope",
    "sampling_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "triton_attention_num_kv_splits",
    "triton_attention_split_tile_size",
    "triton_attention_reduce_in_fp32",
    "fp8_gemm_runner_backend",
    "fp4_gemm_runner_backend",
    "bf16_gemm_backend",
    "moe_runner_backend",
    "moe_a2a_backend",
    "flashinfer_mxfp4_moe_precision",
    "disable_shared_experts_fusion",
    "enforce_shared_experts_fusion",
    "enable_fused_moe_sum_all_reduce",
    "ep_size",
    "ep_num_redundant_experts",
    "ep_dispatch_algorithm",
    "init_expert_location",
    "enable_eplb",
    "enable_waterfill",
    "deepep_mode",
    "deepep_dispatcher_output_dtype",
    "enable_attn_tp_input_scattered",
    "enable_shared_experts_attn_tp",
    "kt_weight_path",
    "kt_method",
    "kt_num_gpu_experts",
    "kt_max_deferred_experts_per_token",
    "moe_dp_size",
    "moe_dense_tp_size",
    "attn_cp_size",
    "enable_prefill_cp",
    "enable_cp_decode_attn_tp",
    "cp_strategy",
    "enable_layernorm_sp",
    "boundary_reduction",
    "disable_custom_all_reduce",
    "enable_mscclpp",
    "enable_nccl_nvls",
    "enable_symm_mem",
    "enable_torch_symm_mem",
    "enable_flashinfer_allreduce_fusion",
    "enforce_disable_flashinfer_allreduce_fusion",
    "flashinfer_allreduce_fusion_backend",
    "enable_quant_communications",
    "rl_on_policy_target",
    "preferred_sampling_params",
    "enable_watermark",
)
#: The same in the environment, where a variable is set. SGLang takes some from there alone.
_VARIABLES = (
    "SGLANG_BATCH_INVARIANT_OPS_ENABLE_MM_DEEPGEMM",
    "SGLANG_BATCH_INVARIANT_OPS_ENABLE_MM_FALLBACK_VARIANT",
    "SGLANG_DETERMINISTIC_NCCL_NCHANNELS",
    "SGLANG_ENABLE_FP8_GEMM_CONFIG_TUNE",
    "SGLANG_ENABLE_JIT_DEEPGEMM",
    "SGLANG_FLASHINFER_DECODE_SPLIT_TILE_SIZE",
    "SGLANG_FLASHINFER_PREFILL_SPLIT_TILE_SIZE",
    "SGLANG_FLASHINFER_USE_TENSOR_CORE",
    "SGLANG_FORCE_FP8_MARLIN",
    "SGLANG_FORCE_FUSED_OP_BACKEND",
    "SGLANG_FP8_IGNORED_LAYERS",
    "SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2",
    "SGLANG_OPT_USE_GUMBEL_SAMPLE",
    "SGLANG_ROPE_CACHE_FP32",
    "SGLANG_TRITON_DECODE_SPLIT_TILE_SIZE",
    "SGLANG_TRITON_DENSE_PREFILL_ATTN",
    "SGLANG_TRITON_FP8_PREFILL_ATTN",
    "SGLANG_USE_1STAGE_ALLREDUCE",
    "CUBLAS_WORKSPACE_CONFIG",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
)
_DEFAULTS = {field.name: field.default for field in record_fields(ServerArgs)}
_SGLANG, _TRANSFORMERS = version("sglang"), version("transformers")

_dummy: Future[str] = Future()
_dummy.set_result("dummy")
#: In place of the digest, after weights were updated while serving.
_updated: str | None = None
_updates = 0

#: The fingerprint that was told last. Of a process only its weights change.
_told: dict[str, str] | None = None

_CPU_INFO = Path("/proc/cpuinfo")
#: SGLang's modules of dense models whose activations are all those of `activation_cpu`.
_INVARIANT_ON_CPU = frozenset(
    f"sglang.srt.models.{name}"
    for name in (
        "exaone",
        "gemma",
        "granite",
        "internlm2",
        "llama",
        "mimo",
        "mistral",
        "olmo2",
        "qwen2",
        "qwen3",
    )
)
#: The `--bf16-gemm-backend` that multiplies single rows in another way than several.
_SINGLE_ROWS = "gemv"
#: What names a CPU there: x86's fields (virtual machines often hide the name), then Arm's.
_CPU_FACTS = ("model name", "cpu family", "model", "CPU implementer", "CPU part")

#: How long the scheduler may stand still for the digest, each time it is asked.
_PATIENCE_SECONDS = 0.5


class WeightsNotRead(Exception):
    """The digest of the weights is not there yet."""


def fingerprint(scheduler: Any) -> dict[str, str]:
    """Everything beside the request that decides its tokens. Keys and values are strings.

    Raises `WeightsNotRead` while the weights are being read, for large ones take minutes.
    """
    global _told
    args = resolving_view(scheduler.server_args)
    runner = scheduler.tp_worker.model_runner
    on_cpu = platform_cpu.is_active()
    of_platform = _of_cpu(runner.dtype) if on_cpu else _of_accelerators(scheduler, args)
    _told = {
        "model": Path(args.model_path).name,
        "weights_digest": _updated or _digest_of_weights(scheduler.server_args),
        "tokenizer_digest": _digest_of_tokenizer(scheduler.server_args),
        "vase_sgl": __version__,
        "engine": source_digest(),
        "sglang": _SGLANG,
        "kernels": f"{BudgetPool.of(scheduler.req_to_token_pool).kernels}-{REVISION}",
        "torch": torch.__version__,
        "transformers": _TRANSFORMERS,
        "dtype": str(runner.dtype).removeprefix("torch."),
        "kv_cache_dtype": str(runner.token_to_kv_pool.dtype).removeprefix("torch."),
        "attention_backend": type(runner.attn_backend).__name__,
        "deterministic": str(_is_deterministic(args, runner)).lower(),
        "device": _device_name(),
        "tp_size": str(args.tp_size),
        **of_platform,
        **rope.chosen_rope(runner.model),
        **_arithmetic(scheduler.server_args),
        **{name.lower(): os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    return _told


def stamp() -> str | None:
    """16 hex digits of this process's fingerprint as it is now; None if nobody has asked for one.

    On every finished answer, so that whoever read the fingerprint earlier sees that it changed.
    """
    if _told is None:
        return None
    now = {**_told, "weights_digest": _updated or _told["weights_digest"]}
    text = json.dumps(now, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _of_cpu(dtype: torch.dtype) -> dict[str, str]:
    return {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "linear_tiles": linear_cpu.arithmetic(dtype),
    }


def _of_accelerators(scheduler: Any, args: Any) -> dict[str, str]:
    """What decides rounding in accelerators' kernels: how prompts are cut and stored, and packages.

    SGLang pins these packages, but nothing holds an installation to that; Triton compiles for
    itself. Our CPU platform needs none of it: tests show the same bits for every layout.
    """
    return {
        "enable_deterministic_inference": str(args.enable_deterministic_inference),
        "chunked_prefill_size": str(scheduler.chunked_prefill_size),
        "page_size": str(scheduler.tree_cache.page_size),
        "prefix_cache": "off" if scheduler.tree_cache.disable else "on",
        **_versions_of_kernels(),
    }


@functools.cache
def _versions_of_kernels() -> dict[str, str]:
    found = {}
    for package in ("triton", "sglang-kernel", "flashinfer-python"):
        with contextlib.suppress(PackageNotFoundError):
            found[package.replace("-", "_")] = version(package)
    return found


def _arithmetic(given: Any) -> dict[str, str]:
    """Flags that choose how numbers are computed, where they are not SGLang's defaults.

    What SGLang makes of defaults follows from its version, the device and the model.
    """
    values = {name: getattr(given, name) for name in _ARITHMETIC}
    changed = {name: str(value) for name, value in values.items() if value != _DEFAULTS[name]}
    if given.watermark_config is not None:  # it holds keys
        config = msgspec.json.encode(load_watermark_config(given.watermark_config))
        changed["watermark_config"] = hashlib.sha256(config).hexdigest()[:32]
    return changed


def _digest_of_weights(server_args: Any) -> str:
    """Waits for a moment, which is enough for small models. Raises `WeightsNotRead`."""
    try:
        return begin_to_read_weights(server_args).result(timeout=_PATIENCE_SECONDS)
    except TimeoutError as error:
        raise WeightsNotRead("the weights are still being read for their digest") from error


@functools.cache
def _tokenizer(path: str, revision: str | None) -> str:
    try:
        return tokenizer_digest(path, revision=revision)
    except OSError as error:
        logger.warning("%s; replays of this process's answers will be INCOMPARABLE", error)
        return f"unknown-{_of_this_worker('tokenizer')}"


def _digest_of_tokenizer(server_args: Any) -> str:
    args = resolving_view(server_args)
    return _tokenizer(args.tokenizer_path or args.model_path, args.revision)


def _is_deterministic(args: Any, runner: Any) -> bool:
    """Whether an answer does not depend on its company.

    Not with quantised weights: some of their kernels add in any order, others have tiles chosen by
    the number of rows, and SGLang's flag leaves them alone, as it does the backend for single rows.
    Nor where an expert has replicas: the row decides which one computes, and ranks whose sums are
    added in another order may have them. Experts on the host (KTransformers) are quantised.

    On our CPU platform by its own layers and sampling; not with SGLang's attention, nor for models
    with other layers, such as mixtures of experts, whose products have as many rows as tokens chose
    the expert.
    """
    if runner.model_config.quantization is not None:
        return False
    if not platform_cpu.is_active():
        rows_alike = (
            args.bf16_gemm_backend != _SINGLE_ROWS
            and args.ep_dispatch_algorithm is None
            and not args.enable_eplb
            and not args.enable_waterfill
            and args.kt_weight_path is None
        )
        return bool(args.enable_deterministic_inference) and rows_alike
    by_module = type(runner.model).__module__ in _INVARIANT_ON_CPU
    return engine_config().cpu_decode == "batched" and by_module


@functools.cache
def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {_cpu_model()}"


def _cpu_model() -> str:
    """BLAS chooses its kernels by it: CPUs of one `cpu_capability` round bfloat16 differently."""
    try:
        lines = _CPU_INFO.read_text().split("\n\n")[0].splitlines()
    except OSError:  # not Linux
        return platform.processor()
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    return " ".join(facts[name].strip() for name in _CPU_FACTS if name in facts)


def begin_to_read_weights(server_args: Any) -> Future[str]:
    """The digest of the weights, once a thread has read them; the scheduler must not wait for it.

    Read once per process.
    """
    args = resolving_view(server_args)
    if args.load_format == "dummy":
        return _dummy
    if args.load_format == "remote_instance" or args.weight_cache_mode != "off":
        return _of_another_process()
    return _begin_to_read(args.model_path, args.revision, args.download_dir)


def note_updated_weights(*_: Any, **__: Any) -> None:
    """BEFORE every update of weights while serving: nobody knows these weights' files.

    Nor those of an update that failed, which may have got half-way.
    """
    global _updated, _updates
    _updates += 1
    _updated = f"updated-{_of_this_worker(f'update {_updates}')}"


def note_reset_weights(manager: Any, request: Any) -> None:
    """BEFORE `SchedulerWeightUpdaterManager.check_weights`; one of its actions overwrites them."""
    if request.action == "reset_tensors":
        note_updated_weights()


def note_resumed_weights(manager: Any, request: Any) -> None:
    """BEFORE `SchedulerWeightUpdaterManager.resume_memory_occupation`.

    Without a backup its memory holds nothing that the weights were; upstream leaves it to an update
    to fill it.
    """
    features = get_exec().features
    has_lost = features.enable_memory_saver and not features.enable_weights_cpu_backup
    if has_lost and GPU_MEMORY_TYPE_WEIGHTS in (request.tags or GPU_MEMORY_ALL_TYPES):
        note_updated_weights()


def _of_this_worker(what: str) -> str:
    """16 hex digits that no other worker has; its data-parallel schedulers all have them."""
    return hashlib.sha256(f"{os.environ[WORKER_TOKEN]} {what}".encode()).hexdigest()[:16]


@functools.cache
def _of_another_process() -> Future[str]:
    """In place of the digest of weights that another worker, or a weight cache's daemon, holds.

    Nobody here knows of what files they are.
    """
    future: Future[str] = Future()
    future.set_result(_unknown("its weights come from another process"))
    return future


@functools.cache
def _begin_to_read(model_path: str, revision: str | None, download_dir: str | None) -> Future[str]:
    future: Future[str] = Future()

    def read() -> None:
        future.set_result(_weights(model_path, revision, download_dir))

    # A daemon: the process may end while tens of gigabytes are being read.
    threading.Thread(target=read, name="vase-weights", daemon=True).start()
    return future


def _weights(model_path: str, revision: str | None, download_dir: str | None) -> str:
    """The weights' digest; where it cannot be had, what no other process reports."""
    try:
        return weights_digest(model_path, revision=revision, download_dir=download_dir)
    except (WeightsNotFound, OSError) as error:
        return _unknown(error)


def _unknown(why: object) -> str:
    logger.warning("%s; replays of this process's answers will be INCOMPARABLE", why)
    return f"unknown-{_of_this_worker('weights')}"
