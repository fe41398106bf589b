"""The eviction contract a second time: plain loops in float64, sharing no code with the package."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

MASK32 = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF
FloatArray = NDArray[np.float64]


def philox(seed: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    k0, k1 = seed & MASK32, seed >> 32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def uniform(word: int) -> float:
    return ((word >> 9) + 0.5) / 2**23


def gumbel(word: int) -> float:
    return -math.log(-math.log(uniform(word)))


def mix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def token_hash(layer: int, head: int, round: int, position: int) -> int:
    return mix64(mix64((layer << 32) | head) ^ ((round << 32) | position))


def to_float64(x: torch.Tensor) -> FloatArray:
    return x.to(torch.float64).numpy()


def attention_weight(q: FloatArray, k: FloatArray, pool_width: int, scale: float) -> FloatArray:
    """Weight of each candidate of one KV head; q [group, W, D], k [C, D]."""
    num_candidates = len(k)
    group_mean = np.zeros(num_candidates)
    for head in q:
        mean = np.zeros(num_candidates)
        for query in head:
            logits = k @ query * scale
            e = np.exp(logits - logits.max())
            mean += e / e.sum() / len(head)
        pooled = np.zeros(num_candidates)
        for column in range(num_candidates):
            for neighbour in range(column - pool_width // 2, column + pool_width // 2 + 1):
                if 0 <= neighbour < num_candidates:
                    pooled[column] += mean[neighbour] / pool_width
        group_mean += pooled / len(q)
    return group_mean


def gaussian(seed: int, layer: int, head: int, round: int, rows: int, columns: int) -> FloatArray:
    normals: list[float] = []
    call = 0
    while len(normals) < rows * columns:
        words = philox(seed, (layer, head, round, call))
        for radius_word, angle_word in (words[:2], words[2:]):
            radius = math.sqrt(-2 * math.log(uniform(radius_word)))
            angle = 2 * math.pi * uniform(angle_word)
            normals += [radius * math.cos(angle), radius * math.sin(angle)]
        call += 1
    return np.array(normals[: rows * columns]).reshape(rows, columns)


def redundancy(k: FloatArray) -> FloatArray:
    """R-KV's, of the candidates of one head; k [C, D]. Pair by pair, unlike the package."""
    mean = np.zeros(len(k))
    for i, left in enumerate(k):
        for j, right in enumerate(k):
            if i != j:
                norms = (np.linalg.norm(left) + 1e-8) * (np.linalg.norm(right) + 1e-8)
                mean[i] += left @ right / norms / len(k)
    e = np.exp(mean - mean.max())
    result: FloatArray = e / e.sum()
    return result


#: Sinks of each policy unless a request says otherwise.
SINKS = {"snapkv": 0, "rkv": 0, "knorm": 0, "evict-largest-values": 0}


def retention_keys(
    policy: str,
    keys: torch.Tensor,
    values: torch.Tensor,
    queries: torch.Tensor | None,
    positions: torch.Tensor,
    *,
    budget: int,
    seed: int,
    layer: int,
    first_head: int,
    round: int,
    num_sinks: int | None = None,
    protected_share: float = 0.25,
    pool_width: int = 5,
    projection_dim: int = 20,
    mix_lambda: float = 0.1,
    attention_scale: float | None = None,
) -> FloatArray:
    """[kv_heads, candidates]; arguments as `one_layer.layer_victims` takes them."""
    num_heads, num_candidates = positions.shape
    num_sinks = SINKS.get(policy, 4) if num_sinks is None else num_sinks
    scale = 1 / math.sqrt(keys.shape[-1]) if attention_scale is None else attention_scale
    out = np.empty((num_heads, num_candidates))
    for h in range(num_heads):
        head, place = first_head + h, positions[h].tolist()
        k, v = to_float64(keys[h]), to_float64(values[h])
        words = [philox(seed, (layer, head, round, p)) for p in place]
        if policy == "streaming":
            key = [float(p) for p in place]
        elif policy == "random":
            key = [uniform(w[0]) for w in words]
        elif policy in ("vase-dkv", "curdkv"):
            drawn = round if policy == "vase-dkv" else 0
            g = gaussian(seed, layer, head, drawn, k.shape[1], projection_dim)
            key = list(((k @ g) ** 2).sum(1) * ((v @ g) ** 2).sum(1))
        elif policy == "knorm":
            key = list(-(k**2).sum(1))
        elif policy == "evict-largest-values":
            key = list(v.min(1).astype(np.float32) - v.max(1).astype(np.float32))
        elif policy in ("snapkv", "rkv"):
            assert queries is not None
            group = queries.shape[0] // num_heads
            q = to_float64(queries[h * group : (h + 1) * group])
            key = list(attention_weight(q, k, pool_width, scale))
            if policy == "rkv":
                spread = redundancy(k)
                key = [
                    mix_lambda * a - (1 - mix_lambda) * r for a, r in zip(key, spread, strict=True)
                ]
        else:
            assert policy == "vase-attnv" and queries is not None
            group = queries.shape[0] // num_heads
            q = to_float64(queries[h * group : (h + 1) * group])
            weight = attention_weight(q, k, pool_width, scale)
            key = [math.log(w) + gumbel(x[0]) for w, x in zip(weight, words, strict=True)]
            value_range = v.max(1).astype(np.float32) - v.min(1).astype(np.float32)
            ranking = sorted(
                range(num_candidates),
                key=lambda c: (place[c] >= num_sinks, -value_range[c], place[c]),
            )
            for c in ranking[: int(budget * protected_share)]:
                key[c] = math.inf
        out[h] = [math.inf if p < num_sinks else x for x, p in zip(key, place, strict=True)]
    return out


def victims(key: FloatArray, positions: torch.Tensor, num_victims: int) -> list[list[int]]:
    """Columns by head, in order of token position."""
    out = []
    for head_key, place in zip(key, positions.tolist(), strict=True):
        order = sorted(range(len(place)), key=lambda c: (head_key[c], place[c]))
        out.append(sorted(order[:num_victims], key=lambda c: place[c]))
    return out
