"""The child process of `math_answers`: a JSON pair on stdin, a word of its verdict on stdout.

Its argument is the CPU time of one comparison in seconds; SIGPROF ends the process after it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import sys

from math_verify import parse, verify

#: Expressions can explode.
_ADDRESS_SPACE = 4 << 30
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
#: A numeral with its base: `40_9`, `1A_{12}`.
_BASED = re.compile(r"0*(\d[0-9A-Z]*)\s*_\s*\{?\s*(\d+)")


def equal(reference: str, answer: str) -> bool:
    """Compare by math-verify, each side as the content of a box.

    A reference `\\text{east}` is compared as words: read as LaTeX, the answer `seat` would be the
    same product of letters. The library reads a numeral without its base, so the numerals of the
    reference that have one, other than ten, must be in the answer too.
    """
    words = _TEXT.fullmatch(reference.strip())
    if words and words[1].replace(" ", "").isalpha():
        written = _TEXT.fullmatch(answer.strip())
        return _plain(words[1]) == _plain(written[1] if written else answer)
    if not _based(reference) <= _based(answer):
        return False
    parsed = [parse(f"\\boxed{{{side}}}", parsing_timeout=None) for side in (reference, answer)]
    return bool(verify(*parsed, timeout_seconds=None))


def _based(side: str) -> set[tuple[str, str]]:
    """Numerals with their bases, as they are written."""
    return {(digits, base) for digits, base in _BASED.findall(side) if base != "10"}


def _plain(words: str) -> str:
    return " ".join(words.casefold().strip(" .").split())


def main(seconds: float) -> None:
    """Serve until stdin ends, or until a comparison has used up its CPU time."""
    logging.disable(logging.WARNING)  # that the library's own time limits are off
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing the libraries print is taken for a reply
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    equal("1", "1")  # builds the parser, which takes a second
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal stops C code too
        try:
            verdict = "equal" if equal(*json.loads(line)) else "different"
        except Exception:  # of a library that parses whatever a model writes
            logging.exception("math-verify failed on %s", line.strip()[:500])
            verdict = "failure"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(verdict, file=replies, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
