"""SGLang streams the whole output or what is new; the gateway understands both."""

from __future__ import annotations

from typing import Any

import pytest

from vase_sgl.gateway.errors import WorkerUnavailable
from vase_sgl.gateway.worker_http import _Output


def _event(text: str, token_ids: list[int], total: int, reason: str | None = None) -> Any:
    finish = None if reason is None else {"type": reason}
    meta = {"completion_tokens": total, "finish_reason": finish}
    return {"text": text, "output_ids": token_ids, "meta_info": meta}


@pytest.mark.parametrize(
    "events",
    [
        [_event("a", [1], 1), _event("abc", [1, 2, 3], 3), _event("abcd", [1, 2, 3, 4], 4, "stop")],
        [_event("a", [1], 1), _event("bc", [2, 3], 3), _event("d", [4], 4, "stop")],
        [_event("", [], 0), _event("abc", [1, 2, 3], 3), _event("d", [4], 4, "stop")],
    ],
    ids=["cumulative", "incremental", "incremental after an empty event"],
)
def test_both_add_up_to_the_same(events: list[Any]) -> None:
    output = _Output()
    chunks = [output.add(event) for event in events]
    assert (chunks[-2].text, chunks[-2].token_ids) == ("abc", (1, 2, 3))
    assert (chunks[-1].text, chunks[-1].token_ids) == ("abcd", (1, 2, 3, 4))
    assert chunks[-1].finish is not None


def test_lost_output_is_an_error() -> None:
    output = _Output()
    output.add(_event("a", [1], 1))
    with pytest.raises(WorkerUnavailable, match="lost output"):
        output.add(_event("d", [4], 4))
