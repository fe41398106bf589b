"""vase_kernels: score, select, overwrite and digest KV rows. Knows tensors only."""
