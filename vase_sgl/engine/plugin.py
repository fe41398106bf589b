"""The SGLang plugin (entry point group `sglang.srt.plugins`): every hook, with its reason.

SGLang only logs a hook that cannot be applied. So each target's signature is compared with the
one the hook was written for, and a mismatch ends the process.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import pkgutil
import secrets
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from sglang.srt.layers.attention.attention_registry import (
    ATTENTION_BACKENDS,
    register_attention_backend,
)
from sglang.srt.mem_cache.allocation import ALLOC_FOR_DECODE_FUNCS
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from vase_sgl.engine import (
    SGLANG_VERSION,
    activation_cpu,
    admission,
    attention_cpu,
    detokenizing,
    fingerprint,
    fork_server,
    inspector,
    integrity,
    lifecycle,
    limits,
    linear_cpu,
    logged_request,
    output,
    penalties,
    platform_cpu,
    positions,
    prometheus,
    request_checks,
    rope,
    sampling_cpu,
    server_info,
    sizing,
    stop_strings,
    thinking,
    tokenizer_cache,
    tokenizing,
)
from vase_sgl.engine.config import WORKER_TOKEN, engine_config
from vase_sgl.engine.pool import BudgetPool
from vase_sgl.engine.query_ring import recording_backend
from vase_sgl.engine.source_digest import source_digest

logger = logging.getLogger(__name__)

#: Backends whose decode is plain full attention over the flat pool.
_BACKENDS = ("torch_native", "flashinfer", "fa3", "triton")


@dataclasses.dataclass(frozen=True)
class Hook:
    """One hook: upstream target below `sglang.srt.`, its parameters as of SGLANG_VERSION, why."""

    target: str
    parameters: tuple[str, ...]
    kind: HookType
    function: Callable[..., Any]
    reason: str

    @property
    def path(self) -> str:
        return f"sglang.srt.{self.target}"


def _check_start(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `Scheduler.__init__`: refuse what would corrupt, or hooks that are missing."""
    runner = scheduler.tp_worker.model_runner
    limits.refuse_unsupported_pool(runner)
    limits.refuse_unsupported_model(runner, _BACKENDS)
    limits.refuse_scaled_kv(runner.model)
    if server_info.answers_for_worker():
        fingerprint.begin_to_read_weights(scheduler.server_args)
        source_digest()  # now: the files may be others by the time it is asked for
        thinking.warn_of_whole_text(scheduler)
    verify_applied()
    if platform_cpu.is_active():
        linear_cpu.warn_of_slow_products(runner.dtype)
    prometheus.start_metrics(scheduler)


def _check_flags(scheduler: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE `Scheduler.__init__`."""
    limits.refuse_unsupported_flags(server_args)


def _check_launch(engine: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE `Engine._launch_subprocesses`: in schedulers of Ray there are no hooks."""
    limits.refuse_unsupported_flags(server_args)


_INIT_NEW = (
    "cls",
    "batch",
    "model_runner",
    "capture_hidden_mode",
    "return_hidden_states_before_norm",
    "extend_position_info",
    "spec_mrope_positions",
    "kv_loc_plan",
    "write_cols",
)

_LAUNCH = (
    "cls",
    "server_args",
    "init_tokenizer_manager_func",
    "run_scheduler_process_func",
    "run_detokenizer_process_func",
    "port_args",
    "placement_group",
)

_TOKENIZED = (
    "self",
    "obj",
    "input_text",
    "input_ids",
    "input_embeds",
    "mm_inputs",
    "token_type_ids",
)

_WEIGHT_UPDATER = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"

HOOKS: tuple[Hook, ...] = (
    Hook(
        "managers.scheduler.Scheduler._create_generation_req",
        ("self", "recv_req", "args", "kwargs"),
        HookType.AROUND,
        admission.create_request,
        "attach the budget to a request, or refuse it with a 400",
    ),
    Hook(
        "managers.scheduler.Scheduler.init_req_max_new_tokens",
        ("self", "req"),
        HookType.AROUND,
        admission.bound_max_new_tokens,
        "a budgeted request may grow past the pool; one that can never run is refused",
    ),
    Hook(
        "managers.schedule_batch.Req.set_finish_with_abort",
        ("self", "error_msg", "status_code", "err_type"),
        HookType.AFTER,
        admission.forget_refused,
        "a refused request reserves nothing, so its answer waits for nobody",
    ),
    Hook(
        "managers.schedule_batch.Req.__repr__",
        ("self",),
        HookType.AROUND,
        logged_request.without_content,
        "the watchdog's last words hold no prompts, answers or seeds",
    ),
    Hook(
        "managers.scheduler.Scheduler.get_prefill_adder_class",
        ("self",),
        HookType.AFTER,
        admission.reserving_adder,
        "admission reserves the static slots and counts nothing more",
    ),
    Hook(
        "mem_cache.kv_cache_configurator.KVCacheConfigurator.config_from_budget",
        ("self", "budget_bytes", "cap_tokens"),
        HookType.AROUND,
        sizing.leave_room_for_buffers,
        "the budget's own buffers are counted before the KV pool is sized",
    ),
    Hook(
        "managers.schedule_batch.ScheduleBatch.new_tokens_required_next_decode",
        ("self", "selected_indices"),
        HookType.AROUND,
        admission.decode_slots_needed,
        "a saturated request takes no slot, so a full pool is no reason to retract",
    ),
    Hook(
        "managers.schedule_batch.ScheduleBatch.retract_decode",
        ("self",),
        HookType.BEFORE,
        admission.free_orphans_of_beams,
        "slots that beams have left are free before anybody is retracted for them",
    ),
    Hook(
        "managers.schedule_batch.beam_retraction_order",
        ("sorted_indices", "reqs"),
        HookType.AFTER,
        admission.retraction_order,
        "requests without a budget are retracted first, beams too",
    ),
    Hook(
        "managers.schedule_batch.release_req",
        (
            "req",
            "remaing_req_count",
            "req_to_token_pool",
            "token_to_kv_pool_allocator",
            "tree_cache",
            "hisparse_coordinator",
            "offload_kv",
        ),
        HookType.AROUND,
        admission.release_for_retraction,
        "a compacted cache cannot be rebuilt by a prefill: end with 503 instead",
    ),
    Hook(
        "managers.schedule_batch.ScheduleBatch.cumulate_penalty_output_tokens",
        ("self",),
        HookType.AROUND,
        penalties.count_last_but_one,
        "penalties that do not depend on neighbours or on the overlap loop",
    ),
    Hook(
        "mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint_into_tree",
        ("self", "req", "up_to", "kwargs"),
        HookType.AROUND,
        lifecycle.keep_decoded_out,
        "where replays are promised, KV of decode steps never enters the prefix tree",
    ),
    Hook(
        "model_executor.forward_batch_info.ForwardBatch.init_new",
        _INIT_NEW,
        HookType.AFTER,
        positions.prepare_forward,
        "logical positions; due rounds run before the forward",
    ),
    Hook(
        "model_executor.model_runner.ModelRunner.load_model",
        ("self",),
        HookType.AFTER,
        rope.choose_long_rope,
        "LongRoPE: a token's rotation does not depend on its company",
    ),
    Hook(
        f"{_WEIGHT_UPDATER}._observe_weight_load",
        ("self", "source"),
        HookType.BEFORE,
        fingerprint.note_updated_weights,
        "answers of updated weights are not taken for those of the model's files",
    ),
    Hook(
        f"{_WEIGHT_UPDATER}.begin_weight_update",
        ("self", "recv_req"),
        HookType.BEFORE,
        fingerprint.note_updated_weights,
        "until the end of such an update others may write into the weights",
    ),
    Hook(
        f"{_WEIGHT_UPDATER}.end_weight_update",
        ("self", "recv_req"),
        HookType.BEFORE,
        fingerprint.note_updated_weights,
        "what was answered meanwhile is not taken for answers of the new weights",
    ),
    Hook(
        f"{_WEIGHT_UPDATER}.check_weights",
        ("self", "recv_req"),
        HookType.BEFORE,
        fingerprint.note_reset_weights,
        "a check may overwrite the weights",
    ),
    Hook(
        f"{_WEIGHT_UPDATER}.resume_memory_occupation",
        ("self", "recv_req"),
        HookType.BEFORE,
        fingerprint.note_resumed_weights,
        "memory that was given back without a backup holds other weights",
    ),
    Hook(
        "managers.tokenizer_manager.TokenizerManager.pause_generation",
        ("self", "obj"),
        HookType.BEFORE,
        admission.refuse_retracting_pause,
        "a pause must not rebuild caches that eviction has changed",
    ),
    Hook(
        "managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        _TOKENIZED,
        HookType.AFTER,
        request_checks.refuse_fatal,
        "a 400 for what would end the scheduler",
    ),
    Hook(
        "managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        _TOKENIZED,
        HookType.AFTER,
        stop_strings.search_far_enough,
        "a stop string written in unusual tokens is found",
    ),
    Hook(
        "managers.schedule_batch.Req._check_str_based_finish",
        ("self", "new_accepted_len"),
        HookType.AROUND,
        stop_strings.end_at_the_first,
        "an answer's text has no stop string, whatever their order",
    ),
    Hook(
        "managers.schedule_batch.Req.tail_str",
        ("self", "new_accepted_len"),
        HookType.AROUND,
        stop_strings.from_a_character_on,
        "a stop string behind half a character is found",
    ),
    Hook(
        "managers.schedule_batch.Req.check_match_stop_str_prefix",
        ("self",),
        HookType.REPLACE,
        stop_strings.may_have_begun,
        "half a stop string is not sent, wherever in a character it ends",
    ),
    Hook(
        "managers.scheduler_components.output_streamer._GenerationStreamAccumulator.accept",
        ("self", "req"),
        HookType.AROUND,
        stop_strings.hold_back,
        "half a stop string does not stay in an answer that is not streamed",
    ),
    Hook(
        "managers.detokenizer_manager.find_printable_text",
        ("text",),
        HookType.REPLACE,
        detokenizing.complete,
        "no text is sent twice, however many tokens come at once",
    ),
    Hook(
        "entrypoints.openai.serving_tokenize.OpenAIServingTokenize._handle_non_streaming_request",
        ("self", "adapted_request", "request", "raw_request"),
        HookType.AROUND,
        tokenizing.tokenize_in_thread,
        "a long prompt holds up neither the answers of others nor the health check",
    ),
    Hook(
        "managers.scheduler.Scheduler.get_output_streamer_class",
        ("self",),
        HookType.AFTER,
        output.budget_streamer,
        "statistics travel with every output",
    ),
    Hook(
        "managers.tokenizer_manager.TokenizerManager.update_request_meta_info",
        ("self", "meta_info", "state", "customized_info", "index", "finish_reason"),
        HookType.AROUND,
        output.place_statistics,
        "statistics become meta_info['vase']",
    ),
    Hook(
        "managers.scheduler_components.internal_state."
        "SchedulerInternalStateController.get_internal_state",
        ("self", "recv_req"),
        HookType.AFTER,
        server_info.report_state,
        "slots, rounds and fingerprint in /server_info",
    ),
    Hook(
        "managers.scheduler.Scheduler.process_batch_result",
        ("self", "batch", "result"),
        HookType.AFTER,
        prometheus.refresh_metrics,
        "slots and rounds on /metrics",
    ),
    Hook(
        "managers.scheduler.Scheduler.process_batch_result",
        ("self", "batch", "result"),
        HookType.AFTER,
        inspector.collect,
        "requests with `inspect`: what they kept is written when they end, on every rank",
    ),
    Hook(
        "managers.scheduler.Scheduler.on_idle",
        ("self",),
        HookType.AFTER,
        prometheus.refresh_metrics,
        "gauges fall back when nothing runs",
    ),
    Hook(
        "entrypoints.engine.Engine._launch_subprocesses",
        _LAUNCH,
        HookType.BEFORE,
        _check_launch,
        "refuse flags for which schedulers load no plugins",
    ),
    Hook(
        "managers.scheduler.Scheduler.__init__",
        ("self", "server_args", "port_args"),
        HookType.BEFORE,
        _check_flags,
        "refuse unsupported flags by name",
    ),
    Hook(
        "managers.scheduler.Scheduler.__init__",
        ("self", "server_args", "port_args"),
        HookType.AFTER,
        _check_start,
        "refuse unsupported models; prove that every hook is in place",
    ),
)

_INTEGRITY_HOOK = Hook(
    "managers.scheduler_components.invariant_checker."
    "SchedulerInvariantChecker.self_check_during_busy",
    ("self",),
    HookType.AROUND,
    integrity.after_step,
    "VASE_CHECK_INTEGRITY: prove the invariants after every step",
)

_CPU_HOOKS: tuple[Hook, ...] = (
    Hook(
        "layers.quantization.unquant.UnquantizedLinearMethod.apply",
        ("self", "layer", "x", "bias"),
        HookType.AROUND,
        linear_cpu.tiled_linear_apply,
        "batch-invariant linear layers",
    ),
    Hook(
        "layers.activation.SiluAndMul.forward_native",
        ("self", "x"),
        HookType.AROUND,
        activation_cpu.gated,
        "batch-invariant activations",
    ),
    Hook(
        "layers.activation.GeluAndMul.forward_native",
        ("self", "x"),
        HookType.AROUND,
        activation_cpu.gated,
        "batch-invariant activations",
    ),
    Hook(
        "layers.activation.get_act_fn",
        ("act_fn_name", "quant_config", "intermediate_size", "input_is_parallel", "params_dtype"),
        HookType.AFTER,
        activation_cpu.ungated,
        "batch-invariant activations",
    ),
    Hook(
        "layers.logits_processor.LogitsProcessor._compute_lm_head",
        ("self", "hidden_states", "lm_head", "embedding_bias", "out"),
        HookType.AROUND,
        linear_cpu.tiled_lm_head,
        "batch-invariant logits",
    ),
    Hook(
        "model_executor.forward_batch_info.ForwardBatch.init_new",
        _INIT_NEW,
        HookType.AFTER,
        linear_cpu.note_forward_mode,
        "decode and prefill use different tiles",
    ),
    Hook(
        "sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch",
        ("cls", "batch", "vocab_size"),
        HookType.AFTER,
        sampling_cpu.carry_seeds,
        "sampling seeds without --enable-deterministic-inference",
    ),
    Hook(
        "layers.sampler.Sampler._sample_from_probs",
        ("self", "probs", "sampling_info", "positions", "simple_sampling_case"),
        HookType.AROUND,
        sampling_cpu.sample_with_seeds,
        "sampling seeds without --enable-deterministic-inference",
    ),
    Hook(
        "utils.hf_transformers.tokenizer.get_tokenizer",
        (
            "tokenizer_name",
            "args",
            "tokenizer_mode",
            "trust_remote_code",
            "tokenizer_revision",
            "tokenizer_backend",
            "kwargs",
        ),
        HookType.AROUND,
        tokenizer_cache.load_once,
        "start-up: a process loads the tokenizer once",
    ),
)


_ADDER = "sglang.srt.managers.schedule_policy.PrefillAdder"

#: What is extended without a hook, by a subclass or in a registry: path, parameters, why.
_OVERRIDDEN: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        f"{_ADDER}._get_running_request_total_token_offset",
        ("self", "req"),
        "running requests keep the static slots that were reserved",
    ),
    (
        f"{_ADDER}.add_one_req",
        ("self", "req", "has_chunked_req", "truncation_align_size"),
        "a request is charged its static slots and one query ring",
    ),
    (f"{_ADDER}.add_chunked_req", ("self", "req"), "so is the next chunk of its prompt"),
    (
        "sglang.srt.managers.scheduler_components.output_streamer."
        "SchedulerOutputStreamer.build_additional_customized_info",
        ("self", "reqs"),
        "statistics travel with every output",
    ),
    (
        "sglang.srt.mem_cache.allocation.alloc_for_decode_default",
        ("batch", "token_per_req"),
        "its place in ALLOC_FOR_DECODE_FUNCS is taken: rounds give slots back, and take few",
    ),
    (
        "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.forward_decode",
        ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache", "kwargs"),
        "decode writes its queries into the query ring",
    ),
)
_CPU_OVERRIDDEN = (
    (
        "sglang.srt.platforms.interface.SRTPlatform.get_default_attention_backend",
        ("self",),
        "SGLang runs on a plain CPU",
    ),
    (
        "sglang.srt.platforms.cpu.CpuDeviceMixin.is_pin_memory_available",
        ("self", "device"),
        "SGLang runs on a plain CPU",
    ),
)

#: Of a main process with a fork server.
FORK_HOOKS: tuple[Hook, ...] = (
    Hook(
        "entrypoints.engine.Engine._launch_scheduler_processes",
        ("cls", "server_args", "port_args", "run_scheduler_process_func", "placement_group"),
        HookType.BEFORE,
        fork_server.fork_schedulers,
        "children come from the fork server, with everything imported",
    ),
    Hook(
        "entrypoints.engine.Engine._launch_detokenizer_subprocesses",
        ("cls", "server_args", "port_args", "run_detokenizer_process_func"),
        HookType.BEFORE,
        fork_server.fork_detokenizers,
        "children come from the fork server, with everything imported",
    ),
)


def active_hooks() -> tuple[Hook, ...]:
    """The hooks of this process: the general ones, the CPU platform's, and those asked for."""
    hooks = HOOKS
    if platform_cpu.is_active():
        hooks += _CPU_HOOKS
    if engine_config().check_integrity:
        hooks += (_INTEGRITY_HOOK,)
    if fork_server.is_started():
        hooks += FORK_HOOKS
    return hooks


def overridden() -> tuple[tuple[str, tuple[str, ...], str], ...]:
    """What this process extends without a hook: path, parameters as of SGLANG_VERSION, why."""
    found = _OVERRIDDEN
    if platform_cpu.is_active():
        found += _CPU_OVERRIDDEN
    if _decodes_in_batches():
        reason = "attention in batch-invariant shapes"
        found += tuple((*method, reason) for method in attention_cpu.OVERRIDDEN)
    return found


def _decodes_in_batches() -> bool:
    return platform_cpu.is_active() and engine_config().cpu_decode == "batched"


def register() -> None:
    """Entry point: register every hook, or end the process (SGLang would only log a failure)."""
    try:
        _register()
    except Exception as error:
        raise SystemExit(f"vase_sgl cannot extend this SGLang: {error}") from error


def _register() -> None:
    # Set already in children, and by `vase-sgl worker`; not where `sglang serve` loads the plugin.
    os.environ.setdefault(WORKER_TOKEN, secrets.token_hex(8))
    installed = version("sglang")
    if installed != SGLANG_VERSION:
        raise RuntimeError(
            f"written for sglang {SGLANG_VERSION}, found {installed}; "
            f"run `pip install sglang=={SGLANG_VERSION}`, or leave vase_sgl out of this SGLang "
            "with SGLANG_PLUGINS=none in the environment"
        )
    if engine_config().check_integrity:
        integrity.ask_for_checks()
    for method in overridden():
        _check_parameters(*method)
    for hook in active_hooks():
        check_signature(hook)
        HookRegistry.register(hook.path, hook.function, hook.kind)
    for device in limits.DEVICES:
        ALLOC_FOR_DECODE_FUNCS[device] = lifecycle.alloc_for_decode
    factories = {name: ATTENTION_BACKENDS[name] for name in _BACKENDS}
    if _decodes_in_batches():
        factories["torch_native"] = attention_cpu.BatchInvariantBackend
    for name, create in factories.items():
        factory = recording_backend(create, lambda runner: BudgetPool.of_runner(runner).query_ring)
        register_attention_backend(name)(factory)


def check_signature(hook: Hook) -> None:
    """Raise RuntimeError unless the upstream target still has the parameters we rely on."""
    _check_parameters(hook.path, hook.parameters, hook.reason)


def _check_parameters(path: str, expected: tuple[str, ...], reason: str) -> None:
    owner_path, _, name = path.rpartition(".")
    try:
        target = inspect.getattr_static(pkgutil.resolve_name(owner_path), name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"{path} is gone (needed to: {reason}); see docs/upgrading-sglang.md"
        ) from error
    function = getattr(target, "__func__", target)
    found = tuple(inspect.signature(inspect.unwrap(function)).parameters)
    if found != expected:
        raise RuntimeError(
            f"{path} now takes {found}, expected {expected} "
            f"(needed to: {reason}); see docs/upgrading-sglang.md"
        )


def verify_applied() -> None:
    """Raise RuntimeError naming every hook that SGLang failed to apply."""
    missing = [hook.path for hook in active_hooks() if hook.path not in HookRegistry._patched]
    if missing:
        raise RuntimeError(f"SGLang did not apply the hooks on {', '.join(missing)}")
