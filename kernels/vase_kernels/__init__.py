"""vase_kernels: score, select, overwrite and digest KV rows. Knows tensors only."""

#: Part of every worker's fingerprint. Raise it with each change that may make a round choose, keep
#: or hash otherwise for the same input, by a rounding even: replays of older records then say
#: INCOMPARABLE instead of DIVERGED. `tests/kernels/test_revision.py` holds what it stands for.
REVISION = 7
