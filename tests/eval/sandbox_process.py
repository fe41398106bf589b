"""Runs sandbox requests given as JSON on stdin, for a test that wants another user or Python.

{"layers": [...], "limits": {...}, "programs": {name: source}}  ->  {name: execution}
"""

from __future__ import annotations

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vase_sgl.eval.sandbox import Limits, run_program


def main() -> None:
    request = json.load(sys.stdin)

    def run(program: list[Any]) -> dict[str, object]:
        source, limits = program
        execution = run_program(source, Limits(**limits), layers=request["layers"])
        fields = dataclasses.asdict(execution)
        return {**fields, "isolation": sorted(execution.isolation)}

    with ThreadPoolExecutor(3) as pool:
        results = dict(
            zip(request["programs"], pool.map(run, request["programs"].values()), strict=True)
        )
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
