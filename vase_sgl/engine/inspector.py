"""`inspect`: what a request kept in each round, written to a file when it ends.

Positions are copied to the host after each round, without waiting for the device, and put into a
table once the step's tokens are there. Nothing of it is read by the engine, so tokens and digests
are those of a request without `inspect`.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from vase_sgl.engine.pool import BudgetPool
from vase_sgl.engine.request_cache import RequestCache, cache_of
from vase_sgl.engine.transfer import to_host
from vase_sgl.eviction import ParameterError
from vase_sgl.inspection import Inspection, file_name, is_file_name
from vase_sgl.inspection.file import MAX_ROUNDS

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

logger = logging.getLogger(__name__)

#: Host memory of the tables of all inspected requests of this process. One that grows or is written
#: is there twice for that time.
MAX_BYTES = 256 * 2**20

#: Requests that are recorded. Weak: SGLang decides when a request is gone.
_running: weakref.WeakSet[Req] = weakref.WeakSet()
#: Their recordings, and those that wait to be written.
_recordings: weakref.WeakSet[Recording] = weakref.WeakSet()
#: Compressing takes seconds for a long answer, and the scheduler must not wait for a disk.
_writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vase-inspect")


class Recording:
    """Which (layer, head) kept which token up to which round, of one request.

    folder: where its file goes.
    recorded_rounds: rounds in the table. It stays behind once memory is short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recorded_rounds = 0
        self._stopped = False
        self._unread: deque[tuple[int, torch.Tensor]] = deque()
        # uint16 [layers, kv_heads, capacity]: the last round after which the position was kept.
        self._last_kept: npt.NDArray[np.uint16] = np.zeros((0, 0, 0), np.uint16)
        _recordings.add(self)

    @property
    def nbytes(self) -> int:
        return self._last_kept.nbytes

    def note(self, round: int, logical_length: int, kept: torch.Tensor) -> None:
        """A round has been carried out, or will be once the device gets there.

        kept: int32 [layers, budget, kv_heads], token positions, on the device.
        """
        layers, _, heads = kept.shape
        self._stopped = (
            self._stopped or round > MAX_ROUNDS or not self._reaches(layers, heads, logical_length)
        )
        if not self._stopped:
            self._unread.append((round, to_host(kept)))

    def fold(self, rounds: int) -> None:
        """Put the first `rounds` rounds into the table; the device is done with them."""
        while self._unread and self._unread[0][0] <= rounds:
            number, kept = self._unread.popleft()
            positions = kept.transpose(1, 2).numpy().astype(np.int64)
            np.put_along_axis(self._last_kept, positions, np.uint16(number), axis=2)
            self.recorded_rounds = number

    def fill(self, table: npt.NDArray[np.uint16], start: int, end: int) -> None:
        """Positions [start, end) of a table of zeros, as `Inspection` has it.

        table: uint16 [layers, kv_heads, tokens]. start: tokens that are pinned. end: tokens with a
            KV entry in the last recorded round.
        """
        # Layer by layer: a table may have 256 MiB, and what is between needs memory too.
        for into, last in zip(
            table[:, :, start:end], self._last_kept[:, :, start:end], strict=True
        ):
            np.add(last, np.uint16(1), out=into, where=last != self.recorded_rounds)

    def _reaches(self, layers: int, heads: int, length: int) -> bool:
        """Make the table at least `length` positions long. False: memory is short."""
        capacity = self._last_kept.shape[2]
        if length <= capacity:
            return True
        others = sum(one.nbytes for one in _recordings) - self.nbytes
        room = (MAX_BYTES - others) // (layers * heads * self._last_kept.itemsize)
        if length > room:
            return False
        longer = np.zeros((layers, heads, min(room, max(length, 2 * capacity))), np.uint16)
        if capacity:
            longer[:, :, :capacity] = self._last_kept
        self._last_kept = longer
        return True


def folder_for(request_id: str, folder: Path | None) -> Path:
    """The folder for a request's file, None being none at all. Raises `ParameterError`.

    Every rank comes to the same decision: nothing is looked up on the disk.
    """
    if folder is None:
        raise ParameterError(
            "inspect: this worker has no folder for it; start it with --vase-inspect-dir DIR, or "
            "leave inspect out"
        )
    if not is_file_name(request_id):
        raise ParameterError(
            "inspect: the request id names a file; send a rid of 1 to 128 letters, digits, _ and -"
        )
    return folder


def start(req: Req, cache: RequestCache, folder: Path) -> None:
    """Record what `req` keeps from its first round on, for a file in `folder`."""
    cache.recording = Recording(folder)
    _running.add(req)


def forget(req: Req) -> None:
    """Record nothing of `req` any more; it leaves no file."""
    _running.discard(req)


def collect(result: Any, scheduler: Any, *args: Any) -> None:
    """AFTER `Scheduler.process_batch_result`: read finished rounds, write finished requests.

    A request that was aborted leaves no file.
    """
    if not _running:
        return
    for req in list(_running):
        cache = cache_of(req)
        if cache is None or cache.recording is None:
            raise RuntimeError(f"request {req.rid} is inspected but has no recording")
        length = len(req.origin_input_ids) + len(req.output_ids_through_stop)
        cache.recording.fold(cache.rounds_at(length))
        if req.finished():
            _running.discard(req)
            if not isinstance(req.finished_reason, FINISH_ABORT):
                pool = BudgetPool.of(scheduler.req_to_token_pool)
                model = Path(scheduler.server_args.model_path).name
                inspection = _without_table(req, cache, cache.recording, pool, model)
                _writer.submit(_write, cache.recording, inspection, cache.pinned, pool.tp_rank)
            cache.recording = None


def _without_table(
    req: Req, cache: RequestCache, recording: Recording, pool: BudgetPool, model: str
) -> Inspection:
    """The inspection of a finished request with nothing evicted yet."""
    layers, _, heads = pool.token_positions.shape
    token_ids = np.array([*req.origin_input_ids, *req.output_ids_through_stop], np.int32)
    rounds = range(1, cache.rounds_at(len(token_ids)) + 1)
    lengths = [cache.kept_length + cache.evicted_by(number) for number in rounds]
    hidden = ("seed", "inspect")
    return Inspection(
        request_id=req.rid,
        model=model,
        params={k: v for k, v in cache.params.to_mapping().items() if k not in hidden},
        prompt_tokens=cache.prompt_tokens,
        total_heads=pool.total_heads,
        recorded_rounds=recording.recorded_rounds,
        token_ids=token_ids,
        round_lengths=np.array(lengths, np.int32),
        heads=np.arange(pool.first_head, pool.first_head + heads, dtype=np.int32),
        evicted_in_round=np.zeros((layers, heads, len(token_ids)), np.uint16),
    )


def _write(recording: Recording, inspection: Inspection, pinned: int, rank: int) -> None:
    """Fill in the table and write the file. Failing is logged: the answer is not touched."""
    try:
        if recording.recorded_rounds:
            end = int(inspection.round_lengths[recording.recorded_rounds - 1])
            recording.fill(inspection.evicted_in_round, pinned, end)
        inspection.save(recording.folder / file_name(inspection.request_id, rank))
    except Exception:
        logger.exception("no file for inspected request %s", inspection.request_id)
