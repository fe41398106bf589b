"""How many very long answers run at once in the same memory, and the tokens per second of all.

    python -m benchmarks.saturation          # a GPU: 256 answers of 32,768 tokens, Qwen3-14B shape

`benchmarks.serving` with other defaults: the KV pool is what is left of the device's memory, by the
same share in every arm, so what the plugin needs beside the pool is paid for. Takes its options.
"""

from __future__ import annotations

import sys

from benchmarks import serving

#: Answers of 32k tokens take many minutes; a window is cut from them, for all arms the same.
DEFAULTS = (
    *("--name", "saturation", "--cells", "256x32768", "--kv-slots", "0", "--cut"),
    *("--prompt-tokens", "256", "--seconds", "150", "--arms", "stock", "budget"),
)


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if "-h" in given or "--help" in given:
        print(__doc__)
    return serving.main([*DEFAULTS, *given])


if __name__ == "__main__":
    sys.exit(main())
