"""One tokenizer in each process: SGLang's scheduler loads it twice, at up to a second each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_loaded: dict[str, Any] = {}


def load_once(load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND `get_tokenizer`: one object for the same arguments.

    What the fork server has loaded, its children find here.
    """
    key = repr((args, sorted(kwargs.items())))
    if key not in _loaded:
        _loaded[key] = load(*args, **kwargs)
    return _loaded[key]
