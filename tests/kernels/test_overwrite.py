"""Moves and whole rounds: what stays, where it lies, what is never touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vase_kernels.reference import SCORERS, evict, evict_reference, move_plan

from tests.kernels import oracle
from tests.kernels.one_layer import layer_victims


def random_head(g: torch.Generator, candidates: int, surplus: int):
    """Positions in any order, victims in order of position."""
    positions = torch.randperm(2 * candidates, generator=g)[:candidates]
    columns = torch.randperm(candidates, generator=g)[:surplus]
    return positions, columns[positions[columns].argsort()]


@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(1, 6),
    older=st.integers(1, 12),
    extra=st.integers(0, 30),
    seed=st.integers(0, 2**31),
)
def test_kept_and_recent_rows_fill_the_budget(window, older, extra, seed):
    g = torch.Generator().manual_seed(seed)
    budget, num_columns = older + window, older + 2 * window + extra
    heads = [random_head(g, num_columns - window, num_columns - budget) for _ in range(3)]
    positions = torch.stack([p for p, _ in heads])
    victims = torch.stack([v for _, v in heads])
    dst, src = move_plan(victims, positions, num_columns, window, budget)
    assert dst.shape == src.shape == (3, min(num_columns - budget, budget))
    if extra == 0:
        assert torch.equal(dst, victims)

    for head in range(3):
        place = positions[head].tolist()
        gone = victims[head].tolist()
        pairs = [
            (d, s) for d, s in zip(dst[head].tolist(), src[head].tolist(), strict=True) if d != s
        ]
        late = [c for c in range(budget, num_columns - window) if c not in gone]
        sources = sorted(late, key=place.__getitem__) + list(
            range(num_columns - window, num_columns)
        )
        assert pairs == list(zip([c for c in gone if c < budget], sources, strict=True))

        rows = list(range(num_columns))  # a row is named by the column it came from
        for d, s in pairs:
            rows[d] = rows[s]
        kept = [c for c in range(num_columns) if c not in gone]
        assert sorted(rows[:budget]) == kept
        assert rows[budget:] == list(range(budget, num_columns))


def test_steady_state_moves_exactly_the_window():
    victims = torch.tensor([[2, 0, 5], [1, 4, 3]])
    dst, src = move_plan(victims, torch.arange(8).expand(2, -1), 11, 3, 8)
    assert torch.equal(dst, victims)
    assert src.tolist() == [[8, 9, 10]] * 2


def test_heads_with_few_holes_are_padded_with_self_moves():
    # budget 4, window 2, 9 columns: 5 victims of 7 candidates.
    victims = torch.tensor([[0, 1, 2, 3, 4], [1, 3, 4, 5, 6]])
    dst, src = move_plan(victims, torch.arange(7).expand(2, -1), 9, 2, 4)
    assert dst.tolist() == [[0, 1, 2, 3], [1, 3, 8, 8]]
    assert src.tolist() == [[5, 6, 7, 8], [7, 8, 8, 8]]


def test_wrong_number_of_victims_or_columns_is_refused():
    positions = torch.arange(8)
    with pytest.raises(ValueError, match="got 2"):
        move_plan(torch.tensor([0, 1]), positions, 11, 3, 8)
    with pytest.raises(ValueError, match="10 columns shrink to budget 8 \\+ window 3 by 2"):
        move_plan(torch.tensor([0, 1]), positions, 10, 3, 8)


# ---- evict_reference ---------------------------------------------------------------------------

LAYERS, HEADS, GROUP, DIM, NUM_SLOTS = 2, 3, 2, 16, 160
BUDGET, WINDOW = 12, 4
FIRST_HEAD = 6
POLICIES = list(SCORERS)


def make_pool(num_requests: int, num_columns: int, dtype=torch.bfloat16) -> dict[str, Any]:
    g = torch.Generator().manual_seed(num_columns)
    shape = (NUM_SLOTS, HEADS, DIM)
    return {
        "k_buffers": [torch.randn(shape, generator=g).to(dtype) for _ in range(LAYERS)],
        "v_buffers": [torch.randn(shape, generator=g).to(dtype) for _ in range(LAYERS)],
        "token_positions": torch.full((LAYERS, NUM_SLOTS, HEADS), -1, dtype=torch.int32),
        "slots": torch.randperm(NUM_SLOTS, generator=g)[: num_requests * num_columns].view(
            num_requests, num_columns
        ),
        "queries": torch.randn(num_requests, LAYERS, HEADS * GROUP, WINDOW, DIM, generator=g).to(
            dtype
        ),
        "budget": BUDGET,
        "window": WINDOW,
        "seeds": torch.arange(num_requests) + 100,
        "rounds": torch.ones(num_requests, dtype=torch.int64),
        "logical_lengths": torch.full((num_requests,), num_columns),
        "first_head": FIRST_HEAD,
        "num_sinks": 2,
    }


def copy_of(pool: dict[str, Any]) -> dict[str, Any]:
    out = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in pool.items()}
    for name in ("k_buffers", "v_buffers"):
        out[name] = [buffer.clone() for buffer in pool[name]]
    return out


def naive_evict(policy: str, pool: dict[str, Any]) -> list[int]:
    """Sums of victims' hashes. One head at a time, rows listed in Python."""
    sums = []
    num_columns = pool["slots"].shape[1]
    pinned = pool.get("pinned", 0)
    end = pinned + BUDGET
    for n, slots in enumerate(pool["slots"].tolist()):
        total = 0
        for layer in range(LAYERS):
            for head in range(HEADS):
                store = pool["token_positions"][layer]
                k, v = (pool[name][layer] for name in ("k_buffers", "v_buffers"))
                first, length = int(pool["rounds"][n]) == 1, int(pool["logical_lengths"][n])
                place = [
                    int(store[slot, head])
                    if pinned <= c < end and not first
                    else length - num_columns + c
                    for c, slot in enumerate(slots)
                ]
                old = slots[pinned:-WINDOW]
                victims = layer_victims(
                    policy,
                    k[old, head][None],
                    v[old, head][None],
                    pool["queries"][n, layer, head * GROUP : (head + 1) * GROUP],
                    torch.tensor(place[pinned:-WINDOW])[None],
                    num_columns - end,
                    budget=BUDGET,
                    seed=int(pool["seeds"][n]),
                    layer=layer,
                    first_head=FIRST_HEAD + head,
                    round=int(pool["rounds"][n]),
                    num_sinks=pool["num_sinks"],
                )[0].tolist()
                victims = [pinned + c for c in victims]
                gone = [place[c] for c in victims]
                round = int(pool["rounds"][n])
                total += sum(oracle.token_hash(layer, FIRST_HEAD + head, round, p) for p in gone)
                late = [c for c in range(end, num_columns) if c not in victims]
                late.sort(key=place.__getitem__)
                for d, s in zip([c for c in victims if c < end], late, strict=True):
                    k[slots[d], head] = k[slots[s], head]
                    v[slots[d], head] = v[slots[s], head]
                    place[d] = place[s]
                for c in range(pinned, end):
                    store[slots[c], head] = place[c]
        sums.append(total % 2**64)
    return sums


def assert_same_pool(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert torch.equal(a["token_positions"], b["token_positions"])
    for name in ("k_buffers", "v_buffers"):
        for ours, theirs in zip(a[name], b[name], strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize(
    ("pinned", "num_columns"),
    [(0, BUDGET + WINDOW), (0, 37), (1, BUDGET + WINDOW + 1), (21, BUDGET + WINDOW + 21), (9, 37)],
)
@pytest.mark.parametrize("policy", POLICIES)
def test_rounds_equal_the_naive_implementation(policy, pinned, num_columns):
    ours = make_pool(3, num_columns) | {"pinned": pinned}
    end = pinned + BUDGET
    theirs = copy_of(ours)
    for round in range(1, 4):
        got = evict_reference(policy, **ours)
        assert [s % 2**64 for s in got.tolist()] == naive_evict(policy, theirs)
        assert_same_pool(ours, theirs)
        for pool in (ours, theirs):  # the next window arrives in the freed slots
            pool["slots"] = pool["slots"][:, : end + WINDOW]
            pool["rounds"] = pool["rounds"] + 1
            pool["logical_lengths"] = pool["logical_lengths"] + WINDOW
            g = torch.Generator().manual_seed(round)
            fresh = torch.randn(3, WINDOW, HEADS, DIM, generator=g).bfloat16()
            for buffer in (*pool["k_buffers"], *pool["v_buffers"]):
                buffer[pool["slots"][:, end:]] = fresh


def forget_pinned_rows(pool: dict[str, Any]) -> None:
    """Fill the pinned columns with what no score or position survives."""
    pinned = pool["slots"][:, : pool["pinned"]].flatten()
    for buffer in (*pool["k_buffers"], *pool["v_buffers"]):
        buffer[pinned] = torch.nan
    pool["token_positions"][:, pinned] = -99


@pytest.mark.parametrize("round", [1, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_pinned_columns_are_not_there(policy, round):
    """Their content does not matter, and the rest is a request of its own, with its positions."""
    pinned = 7
    whole = make_pool(2, pinned + BUDGET + WINDOW) | {"pinned": pinned}
    whole["rounds"] += round - 1
    whole["logical_lengths"] += 40 * (round - 1)
    g = torch.Generator().manual_seed(0)
    older = torch.randperm(pinned + BUDGET, generator=g)[:BUDGET].to(torch.int32) + pinned
    whole["token_positions"][:, whole["slots"][:, pinned : pinned + BUDGET]] = older[:, None]
    forget_pinned_rows(whole)
    suffix = copy_of(whole) | {"pinned": 0, "slots": whole["slots"][:, pinned:].clone()}
    got = evict_reference(policy, **whole)
    assert torch.equal(got, evict_reference(policy, **suffix))
    assert_same_pool(whole, suffix)


def test_a_kept_prompt_loses_no_token_however_long_the_answer():
    """Round after round on the plan of prompt mode `keep`: what is left was left before or is new,
    and none of it of the prompt; the rest is what the digest says has gone."""
    pinned = 11
    pool = make_pool(1, pinned + BUDGET + WINDOW) | {"pinned": pinned}
    prompt = [buffer[pool["slots"][0, :pinned]].clone() for buffer in pool["k_buffers"]]
    there = [set(range(pinned, pinned + BUDGET)) for _ in range(LAYERS * HEADS)]
    for round in range(1, 7):
        (total,) = evict_reference("vase-attnv", **pool).tolist()
        length = int(pool["logical_lengths"])
        kept = pool["token_positions"][:, pool["slots"][0, pinned : pinned + BUDGET]]
        for place, left in enumerate(kept.transpose(1, 2).flatten(0, 1).tolist()):
            before = there[place] | set(range(length - WINDOW, length))
            there[place] = set(left)
            assert there[place] < before and len(there[place]) == BUDGET
            layer, head = place // HEADS, FIRST_HEAD + place % HEADS
            for position in before - there[place]:
                total -= oracle.token_hash(layer, head, round, position)
        assert total % 2**64 == 0
        pool["rounds"] = pool["rounds"] + 1
        pool["logical_lengths"] = pool["logical_lengths"] + WINDOW
    for buffer, before in zip(pool["k_buffers"], prompt, strict=True):
        assert torch.equal(buffer[pool["slots"][0, :pinned]], before)


def test_requests_in_different_rounds_share_a_call():
    ours = make_pool(2, BUDGET + WINDOW)
    ours["token_positions"][:] = torch.randperm(NUM_SLOTS)[None, :, None]
    ours["rounds"], ours["logical_lengths"] = torch.tensor([1, 8]), torch.tensor([16, 500])
    theirs = copy_of(ours)
    got = evict_reference("vase-attnv", **ours)
    assert [s % 2**64 for s in got.tolist()] == naive_evict("vase-attnv", theirs)
    assert_same_pool(ours, theirs)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("pinned", "num_columns"), [(0, BUDGET + WINDOW), (0, 37), (21, BUDGET + WINDOW + 21), (9, 37)]
)
def test_only_columns_within_the_budget_change(policy, pinned, num_columns):
    pool = make_pool(2, num_columns) | {"pinned": pinned}
    before = copy_of(pool)
    evict_reference(policy, **pool)
    guard = torch.ones(NUM_SLOTS, dtype=torch.bool)
    guard[pool["slots"][:, pinned : pinned + BUDGET]] = False
    assert torch.equal(pool["token_positions"][:, guard], before["token_positions"][:, guard])
    assert bool((pool["token_positions"][:, ~guard] >= 0).all())
    for name in ("k_buffers", "v_buffers"):
        for after, old in zip(pool[name], before[name], strict=True):
            assert torch.equal(after[guard], old[guard])
            assert not torch.equal(after, old)


@pytest.mark.parametrize("policy", POLICIES)
def test_slot_ids_and_neighbours_do_not_matter(policy, monkeypatch):
    pool = make_pool(3, 30)
    whole = copy_of(pool)
    expected = evict_reference(policy, **whole)
    by_request = ("queries", "seeds", "rounds", "logical_lengths")

    for n in range(3):
        moved = copy_of(pool) | {name: pool[name][n : n + 1] for name in by_request}
        moved["slots"] = torch.randperm(NUM_SLOTS)[:30][None]
        for name in ("k_buffers", "v_buffers"):
            for target, origin in zip(moved[name], pool[name], strict=True):
                target[moved["slots"]] = origin[pool["slots"][n : n + 1]]
        monkeypatch.setattr(evict, "_GROUP_CANDIDATES", 1)
        got = evict_reference(policy, **moved)
        assert torch.equal(got[0], expected[n])
        for name in ("k_buffers", "v_buffers"):
            for ours, theirs in zip(moved[name], whole[name], strict=True):
                assert torch.equal(
                    ours[moved["slots"][0, :BUDGET]], theirs[whole["slots"][n, :BUDGET]]
                )


def test_float8_pools_evict():
    pool = make_pool(1, BUDGET + WINDOW, dtype=torch.float8_e4m3fn)
    theirs = copy_of(pool)
    evict_reference("vase-attnv", **pool)
    naive_evict("vase-attnv", theirs)
    assert_same_pool(pool, theirs)


def test_too_few_columns_are_refused_before_anything_is_written():
    pool = make_pool(1, BUDGET + WINDOW - 1)
    before = copy_of(pool)
    with pytest.raises(ValueError, match="budget 12, 15 rows beside 0 pinned"):
        evict_reference("random", **pool)
    with pytest.raises(ValueError, match="budget 12, 14 rows beside 1 pinned"):
        evict_reference("random", **pool, pinned=1)
    with pytest.raises(ValueError, match="pinned must not be negative, got -1"):
        evict_reference("random", **pool, pinned=-1)
    pool["budget"], pool["num_sinks"] = 8, 9
    with pytest.raises(ValueError, match="more than policy random may evict"):
        evict_reference("random", **pool)
    assert_same_pool(pool, before)
