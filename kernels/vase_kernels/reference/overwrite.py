"""Where rows move so that the kept tokens and the window fill the first `budget` columns."""

from __future__ import annotations

import torch
from torch import Tensor


def move_plan(
    victims: Tensor, positions: Tensor, num_columns: int, window: int, budget: int
) -> tuple[Tensor, Tensor]:
    """Pairs of columns (dst, src): the row of `src` overwrites the row of `dst`.

    A request holds `num_columns` rows: candidates first, then the `window` recent ones. The
    victims in columns below `budget` are holes. In order of token position, the i-th hole takes
    the i-th of: the kept candidates in columns from `budget` on, by token position, then the
    recent columns. So a kept row's column depends on the request's history only.

    In steady state (num_columns = budget + window) that is one pair per recent column. In a first
    round that shrinks a long prompt, heads have different numbers of holes: short ones are padded
    with (num_columns - 1, num_columns - 1), a row that moves onto itself and is then given up.
    dst and src never overlap otherwise, so all pairs may be applied in place and in any order.

    Parameters
    ----------
    victims : int64 Tensor [..., num_columns - budget]
        Columns, in order of token position.
    positions : int64 Tensor [..., num_columns - window]
        Token positions of the candidates.

    Returns
    -------
    dst, src : int64 Tensor [..., min(num_columns - budget, budget)]
    """
    surplus = num_columns - budget
    if surplus < window or victims.shape[-1] != surplus:
        raise ValueError(
            f"{num_columns} columns shrink to budget {budget} + window {window} by "
            f"{surplus} victims, got {victims.shape[-1]}"
        )
    columns = torch.arange(budget, num_columns, device=victims.device)
    if surplus == window:
        return victims, columns.expand_as(victims)

    pairs = min(surplus, budget)
    last = num_columns - 1
    hole_first = (victims >= budget).to(torch.int8).argsort(dim=-1, stable=True)[..., :pairs]
    holes = victims.gather(-1, hole_first)

    gone = torch.zeros((*victims.shape[:-1], num_columns), dtype=torch.bool, device=victims.device)
    gone.scatter_(-1, victims, True)
    never = torch.iinfo(torch.int64).max
    recent = never - num_columns + columns[surplus - window :]
    rank = torch.cat(
        (positions[..., budget:], recent.expand(*victims.shape[:-1], window)), dim=-1
    ).masked_fill(gone[..., budget:], never)
    sources = columns[rank.argsort(dim=-1, stable=True)[..., :pairs]]

    padding = holes >= budget
    return holes.masked_fill(padding, last), sources.masked_fill(padding, last)
