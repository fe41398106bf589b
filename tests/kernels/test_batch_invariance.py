"""A request's keys have the same bits alone, among others, per layer, per head and per rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vase_kernels.reference import SCORERS, Candidates, linear, measures, retention_keys

POLICIES = list(SCORERS)
# requests, layers, kv_heads, group, head_dim, candidates, window; small and odd on purpose:
# there BLAS changes its summation order most readily.
SHAPES = [
    (8, 3, 2, 3, 64, 128, 32),
    (8, 2, 3, 1, 20, 5, 1),
    (8, 2, 2, 2, 80, 37, 7),
    (8, 2, 2, 3, 64, 5, 1),
]


def make_batch(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    n, layers, heads, group, dim, candidates, window = shape
    g = torch.Generator().manual_seed(0)
    return {
        "keys": torch.randn(n, layers, heads, candidates, dim, generator=g),
        "values": torch.randn(n, layers, heads, candidates, dim, generator=g),
        "queries": torch.randn(n, layers, heads * group, window, dim, generator=g),
        "positions": torch.randint(0, 9, (n, layers, heads, 1), generator=g)
        + torch.arange(candidates),
        "seed": torch.arange(n) * 77,
        "round": torch.arange(n) + 1,
        "layers": torch.arange(layers) + 4,
        "heads": torch.arange(heads) + 6,
    }


def keys_of(policy: str, batch: dict[str, torch.Tensor], **fields: Any) -> torch.Tensor:
    rows = {name: batch[name].unbind(1) for name in ("keys", "values")}
    return retention_keys(policy, Candidates(**{**batch, **rows}), budget=16, **fields)


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", POLICIES)
def test_alone_or_among_others(policy, shape):
    batch = make_batch(shape)
    together = keys_of(policy, batch)
    by_request = ("keys", "values", "queries", "positions", "seed", "round")
    for n in range(shape[0]):
        alone = batch | {name: batch[name][n : n + 1].clone() for name in by_request}
        assert_same_bits(keys_of(policy, alone)[0], together[n])
    shuffle = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    moved = batch | {name: batch[name][shuffle] for name in by_request}
    assert_same_bits(keys_of(policy, moved), together[shuffle])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", POLICIES)
def test_one_layer_or_one_head_alone(policy, shape):
    batch, group = make_batch(shape), shape[3]
    together = keys_of(policy, batch)
    for i in range(shape[1]):
        part = {name: batch[name][:, i : i + 1] for name in ("keys", "values", "queries")}
        part |= {"positions": batch["positions"][:, i : i + 1], "layers": batch["layers"][i, None]}
        assert_same_bits(keys_of(policy, batch | part)[:, 0], together[:, i])
    for h in range(shape[2]):
        part = {name: batch[name][:, :, h, None] for name in ("keys", "values", "positions")}
        part["queries"] = batch["queries"][:, :, h * group : (h + 1) * group]
        part["heads"] = batch["heads"][h, None]
        assert_same_bits(keys_of(policy, batch | part)[:, :, 0], together[:, :, h])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", POLICIES)
def test_one_head_of_one_layer_of_one_request(policy, shape):
    """A batch of one is where a batched product turns into another BLAS routine."""
    batch, group = make_batch(shape), shape[3]
    together = keys_of(policy, batch)
    for n in range(shape[0]):
        i, h = n % shape[1], n % shape[2]
        part = {
            name: batch[name][n, i, h][None, None, None].clone()
            for name in ("keys", "values", "positions")
        }
        part["queries"] = batch["queries"][n, i, h * group : (h + 1) * group][None, None]
        part |= {"seed": batch["seed"][n, None], "round": batch["round"][n, None]}
        part |= {"layers": batch["layers"][i, None], "heads": batch["heads"][h, None]}
        assert_same_bits(keys_of(policy, part)[0, 0, 0], together[n, i, h])


@pytest.mark.parametrize("policy", POLICIES)
def test_scratch_size_and_threads_do_not_matter(policy, monkeypatch):
    batch = make_batch(SHAPES[0])
    together = keys_of(policy, batch)
    monkeypatch.setattr(measures, "_SCRATCH_FLOATS", 1)
    assert_same_bits(keys_of(policy, batch), together)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert_same_bits(keys_of(policy, batch), together)
    finally:
        torch.set_num_threads(threads)


def test_row_products_are_products():
    g = torch.Generator().manual_seed(1)
    for m, n, d in ((1, 1, 1), (5, 33, 20), (96, 128, 64)):
        a = torch.randn(7, 3, m, d, generator=g)
        b = torch.randn(7, 3, n, d, generator=g)
        torch.testing.assert_close(linear.row_products(a, b), a @ b.mT, rtol=1e-5, atol=1e-5)


def test_operands_begin_and_end_on_an_alignment():
    """Each row of each matrix of a batch lies alike, so each product has the bits of one alone."""
    for rows, depth, shape in ((1, 1, (32, 16)), (33, 20, (48, 32)), (48, 64, (48, 64))):
        padded = linear._padded(torch.ones(3, rows, depth))
        assert padded.shape == (3, *shape) and padded.is_contiguous()
        assert padded.sum() == 3 * rows * depth


@pytest.fixture
def untried():
    linear._trial.cache_clear()
    yield
    linear._trial.cache_clear()


@pytest.mark.parametrize("another_order", [False, True])
def test_matrices_share_a_call_only_where_the_bits_are_those_of_one(
    another_order, untried, monkeypatch
):
    """With this machine's BLAS as it is, and with one that sums a batch in another order."""
    calls = []

    def bmm(lefts, rights, *, out=None):
        calls.append(len(lefts))
        products = lefts.flip(-1) @ rights.flip(-2) if another_order else true_bmm(lefts, rights)
        return products if out is None else out.copy_(products)

    true_bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", bmm)
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(21, 48, 64, generator=g), torch.randn(21, 80, 64, generator=g)
    together = linear.row_products(a, b)
    trial, *shared = calls
    assert trial == linear._AT_ONCE
    alike = linear._trial(48, 64, 80, torch.get_num_threads())
    assert shared == [linear._AT_ONCE] * (21 // linear._AT_ONCE if alike else 0)
    assert not (alike and another_order)
    for i in range(21):
        assert_same_bits(linear.row_products(a[i : i + 1], b[i : i + 1])[0], together[i])


def test_fold_sum_sums():
    x = torch.randn(7, 13, 4, generator=torch.Generator().manual_seed(2))
    for dim in (0, 1, -1):
        torch.testing.assert_close(linear.fold_sum(x.clone(), dim), x.sum(dim))
