"""What SGLang's logs say of a request: its own text, in what a hung scheduler logs, quotes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def without_content(original: Callable[..., str], req: Req) -> str:
    """AROUND `Req.__repr__`, which is not called: no prompt, answer or sampling parameters."""
    prompt, output = len(req.origin_input_ids), len(req.output_ids)
    return f"Req(rid={req.rid}, {prompt} prompt and {output} output tokens)"
