"""Attention on a CPU: right, and the same bits for a request in any batch, cut anywhere."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from vase_sgl.engine.attention_cpu import BatchInvariantBackend, padded_shape

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

    def attend(
        self, members: list[int], kind: type[TorchNativeAttnBackend], window: int | None = None
    ) -> torch.Tensor:
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
            sliding_window_size=window,
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
    found = scene.attend(EVERYONE, BatchInvariantBackend)
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
    together = scene.attend(EVERYONE, BatchInvariantBackend)
    for batch in (EVERYONE[::-1], EVERYONE[3:9], [8, 7], [7, 8, 6, 12]):
        assert torch.equal(scene.attend(batch, BatchInvariantBackend), together[batch])
    for one in EVERYONE:
        assert torch.equal(scene.attend([one], BatchInvariantBackend)[0], together[one])
    assert torch.equal(
        Scene(kv_heads, group, head_dim, dtype, seed=1).attend(EVERYONE, BatchInvariantBackend),
        together,
    ), "slot numbers"
    monkeypatch.setattr("vase_sgl.engine.attention_cpu._SCRATCH_BYTES", 1)
    assert torch.equal(scene.attend(EVERYONE, BatchInvariantBackend), together), "one at a time"


def test_scratch_of_an_earlier_batch_does_not_matter() -> None:
    scene = Scene(2, 2, 64, torch.float32)
    backend = BatchInvariantBackend(_RUNNER)
    first = scene.attend([12], BatchInvariantBackend)

    def used_before(runner: object) -> BatchInvariantBackend:
        return backend

    for members in ([12], [0], [11, 12], [12]):
        again = scene.attend(members, used_before)  # type: ignore[arg-type]
    assert torch.equal(again, first)
    backend._k_rows.fill_(255)  # NaN
    assert torch.equal(scene.attend([12], used_before), first)  # type: ignore[arg-type]


class Prefill:
    """One prompt whose KV is written piece by piece into a pool of NaN; shorter neighbours."""

    tokens = 700

    def __init__(
        self, kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, *, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        self.k, self.v = torch.randn(2, self.tokens, kv_heads, head_dim, generator=generator).to(
            dtype
        )
        self.query = torch.randn(self.tokens, kv_heads * group, head_dim, generator=generator)
        self.query = self.query.to(dtype)
        pool = (2, 2 * self.tokens, kv_heads, head_dim)
        self.k_cache, self.v_cache = torch.full(pool, float("nan"), dtype=dtype)
        order = torch.Generator().manual_seed(seed)
        self.req_to_token = torch.zeros(3, 1024, dtype=torch.int32)
        slots = torch.randperm(2 * self.tokens, generator=order)
        self.req_to_token[1, : self.tokens] = slots[: self.tokens]
        self.req_to_token[2, : self.tokens] = slots[self.tokens :]

    def extend(
        self,
        *pieces: tuple[int, int, int],
        kind: type[TorchNativeAttnBackend] = BatchInvariantBackend,
        window: int | None = None,
    ) -> torch.Tensor:
        """One batch of (row of req_to_token, start, end); both rows hold the same prompt."""
        for row, start, end in pieces:
            slots = self.req_to_token[row, start:end].long()
            self.k_cache[slots], self.v_cache[slots] = self.k[start:end], self.v[start:end]
        backend = kind(_RUNNER)
        backend.init_forward_metadata(SimpleNamespace(out_cache_loc=None))
        query = torch.cat([self.query[start:end] for _, start, end in pieces])
        rows, starts, ends = torch.tensor(pieces).T
        return backend._run_sdpa_forward_extend(
            query,
            torch.full_like(query, float("nan")),
            self.k_cache,
            self.v_cache,
            self.req_to_token,
            rows,
            ends,
            starts,
            ends - starts,
            scaling=0.1,
            enable_gqa=query.shape[1] != self.k.shape[1],
            causal=True,
            sliding_window_size=window,
        )

    def in_pieces(self, *cuts: int) -> torch.Tensor:
        """The prompt's outputs, each piece with a neighbour of another length in its batch."""
        outputs = []
        for start, end in itertools.pairwise([0, *cuts, self.tokens]):
            batch = self.extend((2, 0, 1 + start % 5), (1, start, end), (2, 0, 90))
            outputs.append(batch[1 + start % 5 :][: end - start])
        return torch.cat(outputs)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Of KV heads, group, head_dim; threads; dtype: every pair of values at least once.
PREFILLS = [
    (shape, threads, DTYPES[(i + j) % 3])
    for i, shape in enumerate([(1, 1, 64), (3, 3, 64), (2, 2, 16), (2, 7, 80), (2, 2, 128)])
    for j, threads in enumerate([1, 2, 3, 5])
]


@pytest.mark.parametrize(("heads", "threads", "dtype"), PREFILLS, indirect=["threads"])
def test_a_prompts_bits_do_not_depend_on_its_cuts(
    heads: tuple[int, int, int], threads: int, dtype: torch.dtype
) -> None:
    group, shape = heads[1], (*heads, dtype)
    whole = Prefill(*shape).extend((1, 0, Prefill.tokens))
    for cuts in ([150], [256, 512], [699], [1, 64, 65, 127, 300, 511, 513], range(50, 700, 50)):
        assert torch.equal(Prefill(*shape, seed=len(cuts)).in_pieces(*cuts), whole), cuts
    scene = Prefill(*shape)
    k, v = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (scene.k, scene.v))
    exact = torch.nn.functional.scaled_dot_product_attention(
        scene.query.double().transpose(0, 1), k, v, is_causal=True, scale=0.1
    ).transpose(0, 1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(whole.double(), exact, rtol=tolerance, atol=tolerance)


def test_a_sliding_window_takes_upstreams_loop() -> None:
    scene, prompt = Scene(2, 1, 64, torch.float32), Prefill(2, 1, 64, torch.float32)

    def answers(kind: type[TorchNativeAttnBackend], window: int | None) -> list[torch.Tensor]:
        return [
            scene.attend([2], kind, window),
            prompt.extend((1, 0, 60), kind=kind, window=window),
        ]

    slides, upstream = answers(BatchInvariantBackend, 4), answers(TorchNativeAttnBackend, 4)
    assert all(map(torch.equal, slides, upstream))
    assert not any(map(torch.allclose, slides, answers(BatchInvariantBackend, None)))


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
