"""SGLang's real scheduler in this process, stepped by hand: real pools, real forward, no sockets.

Only the two ends are replaced: requests are handed in directly, outputs land in a list.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import deque
from pathlib import Path
from typing import Any

import torch
from sglang.srt.managers.io_struct import (
    AbortReq,
    TokenizedGenerateReqInput,
    unwrap_from_pickle,
)
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs, ServerArgs


@dataclasses.dataclass
class Answer:
    """What has come out for one request so far."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    statistics: dict[str, Any] | None = None
    cached_tokens: int = 0
    finish: dict[str, Any] | None = None
    stamp: str | None = None


class _Collector:
    """Stands where the detokenizer's socket was."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}

    def send_output(self, output: Any, *_: Any) -> None:
        if isinstance(output, AbortReq):
            # Without a reason: aborted while it waited.
            finish = output.finished_reason or {"type": "abort"}
            self.answers.setdefault(output.rid, Answer()).finish = finish
        if not hasattr(output, "output_ids"):
            return
        info = unwrap_from_pickle(output.customized_info) if output.customized_info else {}
        for index, rid in enumerate(output.rids):
            answer = self.answers.setdefault(rid, Answer())
            answer.tokens += list(output.output_ids[index] or [])
            answer.finish = output.finished_reasons[index] or answer.finish
            answer.cached_tokens = output.cached_tokens[index]
            if "vase" in info and info["vase"][index] is not None:
                answer.statistics = info["vase"][index]
            answer.stamp = info.get("vase_fingerprint", [None] * len(output.rids))[index]


class SteppedScheduler:
    """A scheduler with a pool of `slots`, advanced one batch at a time."""

    def __init__(self, model: Path, *, slots: int, max_running: int = 8, **flags: Any) -> None:
        arguments: dict[str, Any] = {
            "model_path": str(model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "device": "cpu",
            "dtype": "float32",
            "attention_backend": "torch_native",
            "sampling_backend": "pytorch",
            "grammar_backend": "none",
            "disable_cuda_graph": True,
            "max_total_tokens": slots,
            "max_running_requests": max_running,
            "mem_fraction_static": 0.3,
            "chunked_prefill_size": 256,
            "random_seed": 0,
            "log_level": "error",
        }
        server_args = ServerArgs(**(arguments | flags))
        server_args.resolve_once()
        publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=0, gpu_id=0))
        self.scheduler = Scheduler(server_args, PortArgs.init_new(server_args))
        self._collector = _Collector()
        self.scheduler.output_streamer.send_to_detokenizer = self._collector
        self.scheduler.ipc_channels = dataclasses.replace(
            self.scheduler.ipc_channels, send_to_tokenizer=self._collector
        )
        self._randomise_weights()
        self.steps = 0
        self.configure()

    def configure(self, *, overlap: bool = False, prefix_cache: bool = False) -> None:
        """Turn the overlap loop and the radix cache on or off; nothing may be running."""
        scheduler = self.scheduler
        assert self.idle
        assert scheduler.flush_cache(empty_cache=False)  # on a CPU it collects all garbage
        scheduler.enable_overlap = scheduler.enable_skip_finishing_decode = overlap
        scheduler.tree_cache.disable = not prefix_cache
        scheduler.result_queue = deque()
        scheduler.last_batch = None
        self.overlap = overlap

    def _randomise_weights(self) -> None:
        """Weights of ordinary size; with upstream's dummy weights the KV cache hardly matters."""
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.scheduler.tp_worker.model_runner.model.named_parameters():
            if "norm" in name:
                parameter.data.fill_(1.0)
            else:
                scale = 1.0 if "embed" in name else 2.0 / parameter.shape[-1] ** 0.5
                parameter.data.normal_(0.0, scale, generator=generator)

    @property
    def answers(self) -> dict[str, Answer]:
        return self._collector.answers

    @property
    def free_slots(self) -> int:
        """Slots a request could have: nobody's, or only the prefix tree's."""
        return self.unowned_slots + int(self.scheduler.tree_cache.evictable_size())

    @property
    def unowned_slots(self) -> int:
        return int(self.scheduler.token_to_kv_pool_allocator.available_size())

    @property
    def running(self) -> list[Any]:
        return list(self.scheduler.running_batch.reqs)

    @property
    def idle(self) -> bool:
        return bool(self.scheduler.is_fully_idle())

    def submit(
        self,
        rid: str,
        prompt: list[int],
        *,
        max_new_tokens: int | None,
        vase: dict[str, Any] | None = None,
        fields: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> None:
        """`fields`: of the request beside its sampling parameters."""
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=sampling.pop("temperature", 0.0),
            ignore_eos=sampling.pop("ignore_eos", True),
            custom_params={"vase": vase} if vase is not None else None,
            **sampling,
        )
        params.normalize(None)
        request = TokenizedGenerateReqInput(
            rid=rid,
            input_text=None,
            input_ids=array("q", prompt),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=params,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=True,
        )
        for name, value in (fields or {}).items():
            setattr(request, name, value)
        self.scheduler.process_input_requests([request])

    def abort(self, rid: str) -> None:
        self.scheduler.process_input_requests([AbortReq(rid=rid)])

    def step(self) -> None:
        """One turn of upstream's event loop, with upstream's own checks on."""
        scheduler = self.scheduler
        plan = scheduler.get_next_batch_to_run(
            running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
        )
        scheduler.running_batch = plan.running_batch
        batch = plan.batch_to_run
        turn = self._overlapped_turn if self.overlap else self._normal_turn
        turn(batch)
        scheduler.last_batch = batch
        scheduler.invariant_checker.self_check_during_busy()
        self.steps += 1

    def _normal_turn(self, batch: Any) -> None:
        """The middle of `Scheduler.event_loop_normal`."""
        if batch:
            self.scheduler.process_batch_result(batch, self.scheduler.run_batch(batch))
        else:
            self.scheduler.on_idle()

    def _overlapped_turn(self, batch: Any) -> None:
        """The middle of `Scheduler.event_loop_overlap`: results are one step behind."""
        scheduler = self.scheduler
        at_once = scheduler.is_disable_overlap_for_batch(batch, last_batch=scheduler.last_batch)
        if at_once:
            scheduler.process_batch_result(*scheduler.result_queue.popleft())
        result = None
        if batch:
            result = scheduler.run_batch(batch)
            scheduler.result_queue.append((batch.copy(), result))
        if scheduler.last_batch:
            if not at_once:
                scheduler.process_batch_result(*scheduler.result_queue.popleft())
        elif batch is None:
            scheduler.on_idle()
        scheduler.launch_batch_sample_if_needed(result, batch)

    def run(self, limit: int = 3000) -> None:
        """Step until nothing is left, then once more for the idle checks."""
        for _ in range(limit):
            if self.idle:
                break
            self.step()
        else:
            raise AssertionError(f"not idle after {limit} steps")
        self.step()
