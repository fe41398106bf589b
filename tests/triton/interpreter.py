"""Triton's interpreter without three things that take most of its time and change no result.

Before every call of a device function it looks through the whole of `triton.language` to replace
what the launch replaced already. For every operation it builds a table of types anew. And every
sum and product of integers is computed once more in 64 bits, for an assertion that only a
debugging builder makes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def spare_repeated_work() -> None:
    """For the rest of the process. Has no effect where nothing is interpreted."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    type_of = interpreter._get_np_dtype
    replaced: set[frozenset[int]] = set()  # in the launch under way
    types: dict[str, np.dtype[Any]] = {}

    def patch_once(function: Callable[..., Any]) -> Any:
        seen = frozenset(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)
        if seen in replaced:
            return interpreter._LangPatchScope()
        replaced.add(seen)
        return patch(function)

    def launch_anew(executor: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()  # the launch before put everything back
        launch(executor, *args, **kwargs)

    def known_type(kind: tl.dtype) -> np.dtype[Any]:
        if kind.name not in types:
            types[kind.name] = type_of(kind)
        return types[kind.name]

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew
    interpreter._get_np_dtype = known_type
