"""Batched decode attention on a CPU: right, and the same bits for a request in any batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from vase_sgl.engine import plugin
from vase_sgl.engine.attention_cpu import OVERRIDDEN, BatchedDecodeBackend, padded_shape

LENGTHS = [1, 2, 62, 63, 65, 126, 129, 192, 192, 510, 511, 513, 700]


class Scene:
    """A KV pool whose free slots hold NaN, and one row of shuffled slots per request."""

    def __init__(
        self, kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, *, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(7)  # a request's data; `seed` places them
        self.rows = [
            torch.randn(2, length, kv_heads, head_dim, generator=generator) for length in LENGTHS
        ]
        self.query = torch.randn(len(LENGTHS), kv_heads * group, head_dim, generator=generator)
        self.query = self.query.to(dtype)
        slots = 1 + sum(LENGTHS) + 50
        self.k, self.v = torch.full((2, slots, kv_heads, head_dim), float("nan")).to(dtype)
        free = 1 + torch.randperm(slots - 1, generator=torch.Generator().manual_seed(seed))
        self.req_to_token = torch.zeros(len(LENGTHS) + 3, 1024, dtype=torch.int32)
        self.request_rows = torch.randperm(len(LENGTHS) + 3)[: len(LENGTHS)]
        for (k, v), row in zip(self.rows, self.request_rows, strict=True):
            mine, free = free[: len(k)], free[len(k) :]
            self.req_to_token[row, : len(k)] = mine.to(torch.int32)
            self.k[mine], self.v[mine] = k.to(dtype), v.to(dtype)

    def attend(self, members: list[int], kind: type[TorchNativeAttnBackend]) -> torch.Tensor:
        """The outputs of `members`, in that order, as one batch."""
        backend = kind(_RUNNER)
        backend.init_forward_metadata(SimpleNamespace(out_cache_loc=None))
        query = self.query[members]
        return backend._run_sdpa_forward_decode(
            query,
            torch.empty_like(query),
            self.k,
            self.v,
            self.req_to_token,
            self.request_rows[members],
            torch.tensor([LENGTHS[i] for i in members]),
            scaling=0.1,
            enable_gqa=query.shape[1] != self.k.shape[1],
        )


_RUNNER = SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None)
EVERYONE = list(range(len(LENGTHS)))


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"), [(1, 1, 64), (3, 3, 64), (2, 8, 128), (4, 1, 80)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_attention_in_float64(
    kv_heads: int, group: int, head_dim: int, dtype: torch.dtype
) -> None:
    scene = Scene(kv_heads, group, head_dim, dtype)
    found = scene.attend(EVERYONE, BatchedDecodeBackend)
    for (k, v), q, out in zip(scene.rows, scene.query, found, strict=True):
        k, v = (x.to(dtype).double().repeat_interleave(group, 1) for x in (k, v))
        weights = torch.softmax(torch.einsum("hd,chd->hc", q.double(), k) * 0.1, -1)
        expected = torch.einsum("hc,chd->hd", weights, v)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"),
    [(1, 1, 64), (3, 3, 64), (2, 5, 64), (3, 2, 128), (2, 6, 80), (1, 7, 72), (2, 3, 100)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_request_has_the_same_bits_in_any_batch(
    kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(kv_heads, group, head_dim, dtype)
    together = scene.attend(EVERYONE, BatchedDecodeBackend)
    for batch in (EVERYONE[::-1], EVERYONE[3:9], [8, 7], [7, 8, 6, 12]):
        assert torch.equal(scene.attend(batch, BatchedDecodeBackend), together[batch])
    for one in EVERYONE:
        assert torch.equal(scene.attend([one], BatchedDecodeBackend)[0], together[one])
    assert torch.equal(
        Scene(kv_heads, group, head_dim, dtype, seed=1).attend(EVERYONE, BatchedDecodeBackend),
        together,
    ), "slot numbers"
    monkeypatch.setattr("vase_sgl.engine.attention_cpu._SCRATCH_BYTES", 1)
    assert torch.equal(scene.attend(EVERYONE, BatchedDecodeBackend), together), "one at a time"


def test_scratch_of_an_earlier_batch_does_not_matter() -> None:
    scene = Scene(2, 2, 64, torch.float32)
    backend = BatchedDecodeBackend(_RUNNER)
    first = scene.attend([12], BatchedDecodeBackend)

    def used_before(runner: object) -> BatchedDecodeBackend:
        return backend

    for members in ([12], [0], [11, 12], [12]):
        again = scene.attend(members, used_before)  # type: ignore[arg-type]
    assert torch.equal(again, first)
    backend._k_rows.fill_(255)  # NaN
    assert torch.equal(scene.attend([12], used_before), first)  # type: ignore[arg-type]


def test_a_sliding_window_takes_upstreams_loop() -> None:
    scene = Scene(2, 1, 64, torch.float32)
    arguments = (scene.query[:1], torch.empty_like(scene.query[:1]), scene.k, scene.v)
    place = (scene.req_to_token, scene.request_rows[:1], torch.tensor([1]))
    outputs = [
        kind(_RUNNER)._run_sdpa_forward_decode(*arguments, *place, sliding_window_size=4).clone()
        for kind in (BatchedDecodeBackend, TorchNativeAttnBackend)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 100, 128, 256])
@pytest.mark.parametrize("queries", range(1, 17))
def test_padding_is_bounded_holds_the_row_and_aligns_scratch(queries: int, head_dim: int) -> None:
    for length in range(1, 40_000, 7):
        columns, padded = padded_shape(length, queries, head_dim)
        assert 0 <= columns - length < max(64, length / 8 + 1)
        assert queries <= padded < queries + 8
        assert padded * (min(columns, 512) + 2 + head_dim) % 16 == 0
        # 64 bytes of a type of two bytes: rows of every request's queries, keys and values.
        assert padded * head_dim % 32 == 0 and columns * head_dim % 32 == 0


def test_upstream_still_has_what_is_overridden() -> None:
    plugin._check_parameters(*OVERRIDDEN, "this test")
    with pytest.raises(RuntimeError, match=r"now takes .*upgrading-sglang"):
        plugin._check_parameters(OVERRIDDEN[0], ("self", "q"), "this test")
