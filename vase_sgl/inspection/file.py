"""The file: one compressed .npz per request and tensor-parallel rank."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = 1
#: Rounds that fit the table's cells.
MAX_ROUNDS = 2**16 - 1

_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_ARRAYS = {"evicted_in_round": (np.uint16, 3), "token_ids": (np.int32, 1)}
_ARRAYS |= {"round_lengths": (np.int32, 1), "heads": (np.int32, 1)}

#: What numpy, zipfile and json raise for what is no such file. RuntimeError: damage may look like
#: encryption or a newer zip format.
_DAMAGE = (TypeError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class InspectionError(Exception):
    """There is no such file, or it cannot be used. The text says what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Inspection:
    """What one request kept.

    evicted_in_round: uint16 [layers, kv_heads, tokens]. The round, from 1, that evicted the
        token's entry; 0: none of the recorded rounds did.
    token_ids: int32 [tokens], prompt and output.
    round_lengths: int32 [rounds]. Tokens that had a KV entry when each round ran.
    heads: int32 [kv_heads], ascending: the model's KV heads that `evicted_in_round` is about.
    recorded_rounds: the first so many rounds are recorded. Fewer than all: memory was short.
    params: eviction parameters but for the seed.
    """

    request_id: str
    model: str
    params: Mapping[str, Any]
    prompt_tokens: int
    total_heads: int
    recorded_rounds: int
    token_ids: npt.NDArray[np.int32]
    round_lengths: npt.NDArray[np.int32]
    heads: npt.NDArray[np.int32]
    evicted_in_round: npt.NDArray[np.uint16]

    @property
    def rounds(self) -> int:
        """Rounds of the request, recorded or not."""
        return len(self.round_lengths)

    @property
    def missing_heads(self) -> list[int]:
        """KV heads of the model that no file had."""
        return sorted(set(range(self.total_heads)) - set(self.heads.tolist()))

    def kept(self, round: int) -> npt.NDArray[np.bool_]:
        """[layers, kv_heads, length] right after a recorded round: who keeps which position.

        length: tokens that had a KV entry by then.
        """
        if not 1 <= round <= self.recorded_rounds:
            raise ValueError(f"round {round} is not one of the {self.recorded_rounds} recorded")
        evicted = self.evicted_in_round[:, :, : self.round_lengths[round - 1]]
        kept: npt.NDArray[np.bool_] = (evicted == 0) | (evicted > round)
        return kept

    def save(self, path: Path) -> None:
        """Write atomically, readable by the owner alone. Raises `OSError`."""
        facts = {field: getattr(self, field) for field in _facts()} | {"format": FORMAT}
        text = json.dumps(facts, default=dict).encode()
        # mkstemp makes the file with mode 0600.
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                arrays = {name: getattr(self, name) for name in _ARRAYS}
                np.savez_compressed(file, facts=np.frombuffer(text, np.uint8), **arrays)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: Path) -> Inspection:
        """Read one file. Raises `InspectionError`."""
        try:
            with np.load(path, allow_pickle=False) as file:
                facts = json.loads(bytes(file["facts"]))
                # First: another format may have other arrays.
                if not isinstance(facts, dict) or facts.pop("format", None) != FORMAT:
                    raise InspectionError(
                        f"{path} was written by another version of vase_sgl; run the one that the "
                        "worker runs"
                    )
                arrays = {name: file[name] for name in _ARRAYS}
        except OSError as error:
            raise InspectionError(f"cannot read {path}: {error.strerror or error}") from error
        except _DAMAGE as error:
            raise InspectionError(f"{path} is not a file of `inspect`, or is damaged") from error
        if set(facts) != set(_facts()) or not _fit(arrays):
            raise InspectionError(f"{path} is damaged: its parts do not fit together")
        return cls(**facts, **arrays)


def _facts() -> list[str]:
    """The fields that are not arrays."""
    return [field.name for field in dataclasses.fields(Inspection) if field.name not in _ARRAYS]


def _fit(arrays: Mapping[str, npt.NDArray[Any]]) -> bool:
    kinds = [(array.dtype, array.ndim) for array in arrays.values()]
    if kinds != [(np.dtype(dtype), dimensions) for dtype, dimensions in _ARRAYS.values()]:
        return False
    _, heads, tokens = arrays["evicted_in_round"].shape
    return (heads, tokens) == (len(arrays["heads"]), len(arrays["token_ids"]))


def is_file_name(request_id: str) -> bool:
    """Whether a request id may be the name of a file: letters, digits, `_` and `-`."""
    return _REQUEST_ID.fullmatch(request_id) is not None


def file_name(request_id: str, rank: int = 0) -> str:
    """The name of a rank's file. Raises `ValueError` for an id that is no file name."""
    if not is_file_name(request_id):
        raise ValueError(f"{request_id!r} is no file name")
    return f"{request_id}.npz" if rank == 0 else f"{request_id}.tp{rank}.npz"


def load_request(folder: Path, request_id: str) -> Inspection:
    """The request's files of all ranks, put together. Raises `InspectionError`."""
    if not is_file_name(request_id):
        raise InspectionError(
            f"{request_id!r} is no request id; one has letters, digits, `_` and `-` alone"
        )
    if not folder.is_dir():
        raise InspectionError(f"there is no folder {folder}; name the worker's --vase-inspect-dir")
    paths = [folder / file_name(request_id), *folder.glob(f"{request_id}.tp*.npz")]
    parts = [Inspection.load(path) for path in paths if path.exists()]
    if not parts:
        raise InspectionError(
            f"{folder} has no file of request {request_id}; it is written right after the "
            "answer, if the request was run with `inspect` and was not aborted"
        )
    return _merged(parts)


def _merged(parts: Sequence[Inspection]) -> Inspection:
    """One inspection of all heads that the parts have."""
    first = parts[0]
    for part in parts[1:]:
        if (
            not np.array_equal(part.token_ids, first.token_ids)
            or not np.array_equal(part.round_lengths, first.round_lengths)
            or part.evicted_in_round.shape[0] != first.evicted_in_round.shape[0]
        ):
            raise InspectionError(
                f"the files of request {first.request_id} are of different requests; remove them "
                "and run it again"
            )
    recorded = min(part.recorded_rounds for part in parts)
    # With more ranks than heads, some have the same one.
    heads, index = np.unique(np.concatenate([part.heads for part in parts]), return_index=True)
    evicted = np.concatenate([part.evicted_in_round for part in parts], axis=1)[:, index]
    return dataclasses.replace(
        first,
        recorded_rounds=recorded,
        heads=heads,
        evicted_in_round=np.where(evicted > recorded, np.uint16(0), evicted),
    )
