"""The one model that is served, as an external model package of SGLang.

SGLang imports all of its 250 model files in every process, 5 s of a core each. With a package in
`SGLANG_EXTERNAL_MODEL_PACKAGE` it looks there first, and imports the rest only for an architecture
that the package lacks. This one holds SGLang's own file for the model's architecture.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

_PACKAGE = "SGLANG_EXTERNAL_MODEL_PACKAGE"
#: Name of the file in `sglang.srt.models`, without its ending.
MODEL_FILE = "VASE_MODEL_FILE"


def environment_for(model_path: str) -> dict[str, str]:
    """Variables with which a process imports the model's own file alone.

    Empty where that is not found beyond doubt, or the environment names a package already: then
    SGLang does as it always does.
    """
    name = _file_of(_architecture(Path(model_path).expanduser() / "config.json"))
    if name is None or os.environ.get(_PACKAGE):
        return {}
    return {_PACKAGE: __name__, MODEL_FILE: name}


def _architecture(config: Path) -> str | None:
    """The model's only architecture; None if there are several, or no such file."""
    try:
        match json.loads(config.read_text(encoding="utf-8")).get("architectures"):
            case [str(architecture)]:
                return architecture
    except (OSError, ValueError, AttributeError):
        pass  # a name on a hub, or SGLang says what is wrong with it
    return None


def _file_of(architecture: str | None) -> str | None:
    """The only file that defines the architecture and offers it as `EntryClass`."""
    spec = importlib.util.find_spec("sglang")  # SGLang itself is not imported
    if architecture is None or spec is None or spec.origin is None:
        return None
    defined = re.compile(rf"^class {re.escape(architecture)}\b", re.MULTILINE)
    offered = re.compile(rf"^EntryClass = [^=]*\b{re.escape(architecture)}\b", re.MULTILINE)
    found = [
        path.stem
        for path in (Path(spec.origin).parent / "srt" / "models").glob("*.py")
        if defined.search(text := path.read_text(encoding="utf-8")) and offered.search(text)
    ]
    return found[0] if len(found) == 1 else None
