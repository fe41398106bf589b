"""Which candidates a round evicts: the smallest retention keys, exactly, ties by position."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from vase_kernels.reference.candidates import Candidates
from vase_kernels.reference.order import smallest
from vase_kernels.reference.scores import SCORERS, Scorer


def scorer(policy: str, fields: dict[str, Any]) -> Scorer:
    """The scorer registered under `policy`; `ValueError` if it or one of `fields` is unknown."""
    if policy not in SCORERS:
        raise ValueError(f"unknown policy {policy!r}; choose one of {', '.join(SCORERS)}")
    known = inspect.signature(SCORERS[policy].score).parameters.keys() - {"c", "budget"}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(
            f"unknown field {', '.join(unknown)} of policy {policy}; "
            f"it takes {', '.join(sorted(known))}"
        )
    return SCORERS[policy]


def retention_keys(policy: str, candidates: Candidates, *, budget: int, **fields: Any) -> Tensor:
    """float32 [N, L, H, C], larger = keep; +inf only for tokens that must stay, NaN as -inf.

    `fields` are the policy's own; left out, they take the policy's defaults.
    """
    chosen = scorer(policy, fields)
    for name, reads in (("keys", chosen.reads_keys), ("values", chosen.reads_values)):
        if reads and getattr(candidates, name) is None:
            raise ValueError(f"policy {policy} reads {name}; got None")
    if chosen.reads_queries and candidates.queries is None:
        raise ValueError(f"policy {policy} reads the window's queries; got None")
    if chosen.reads_queries and candidates.queries is not None:
        heads, query_heads = candidates.positions.shape[2], candidates.queries.shape[2]
        if query_heads % heads:
            raise ValueError(f"{query_heads} query heads do not group over {heads} KV heads")
    return chosen.score(candidates, budget=budget, **fields)


def select_victims(
    policy: str, candidates: Candidates, num_victims: int, *, budget: int, **fields: Any
) -> Tensor:
    """Columns to overwrite, of a batch of requests and layers.

    Bit-identical for a request, layer or head whatever else is in the batch.

    Parameters
    ----------
    policy : str
        A name in `SCORERS`.
    candidates : Candidates
        N requests that share candidate count, budget, policy and fields.
    num_victims : int
        The same for every head.
    budget : int
        Tokens kept per layer and KV head after the round, window included.
    **fields
        The policy's own fields; left out, they take the policy's defaults.

    Returns
    -------
    int64 Tensor [N, L, H, num_victims]
        In order of token position. Smallest retention keys; ties go to the lower position.

    Raises
    ------
    ValueError
        Unknown policy or field, missing input, or more victims than candidates that may go.
    """
    key = retention_keys(policy, candidates, budget=budget, **fields)
    num_candidates = key.shape[-1]
    if not 0 <= num_victims <= num_candidates:
        raise ValueError(f"num_victims {num_victims} is not in [0, {num_candidates}], candidates")
    victims = smallest(key, candidates.positions, num_victims)
    if bool((key.gather(-1, victims) == torch.inf).any()):
        evictable = int((key != torch.inf).sum(-1).min())
        raise ValueError(
            f"num_victims {num_victims} is more than policy {policy} may evict: {evictable} of "
            f"{num_candidates} candidates"
        )
    order = candidates.positions.gather(-1, victims).argsort(dim=-1)
    return victims.gather(-1, order)
