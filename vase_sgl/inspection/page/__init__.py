"""The page: one HTML file that needs nothing else, neither network nor server."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from vase_sgl.inspection.file import Inspection

#: Id of the element that holds the data, as JSON.
DATA_ID = "inspection"


def build_page(inspection: Inspection, texts: Sequence[str | None] | None) -> str:
    """The page as HTML.

    texts: what each token adds to the text, as `token_texts` gives it. None: ids are shown.
    """
    css, js = _part("page.css"), _part("page.js")
    # `<` is the one character that can end a script element.
    data = json.dumps(_data(inspection, texts), separators=(",", ":")).replace("<", "\\u003c")
    # Whatever the text holds: only this very script and style are run, and nothing is fetched.
    policy = (
        f"default-src 'none'; script-src '{_digest(js)}'; style-src '{_digest(css)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    values = {
        "POLICY": html.escape(policy),
        "TITLE": html.escape(f"Request {inspection.request_id}"),
        "STYLE": css,
        "DATA_ID": DATA_ID,
        "DATA": data,
        "SCRIPT": js,
    }
    # In one pass: the data may hold any text.
    return re.sub("@([A-Z_]+)@", lambda found: values[found[1]], _part("page.html"))


def _data(inspection: Inspection, texts: Sequence[str | None] | None) -> dict[str, Any]:
    # Little-endian, as browsers' typed arrays are.
    table = inspection.evicted_in_round.astype("<u2").tobytes()
    return {
        "requestId": inspection.request_id,
        "model": inspection.model,
        "params": dict(inspection.params),
        "promptTokens": inspection.prompt_tokens,
        "rounds": inspection.rounds,
        "recordedRounds": inspection.recorded_rounds,
        "roundLengths": inspection.round_lengths.tolist(),
        "layers": inspection.evicted_in_round.shape[0],
        "heads": inspection.heads.tolist(),
        "missingHeads": inspection.missing_heads,
        "tokenIds": inspection.token_ids.tolist(),
        "texts": None if texts is None else list(texts),
        # uint16 [layers][heads][tokens], C order, gzip, base64.
        "evictedInRound": base64.b64encode(gzip.compress(table, mtime=0)).decode(),
    }


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    """As a content security policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
