"""The tokens of a context with the highest scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def choose(
    scores_BC: torch.Tensor,
    lengths_B: torch.Tensor,
    rows_B: torch.Tensor,
    first: int,
    last: int,
    page_size: int,
    tokens: torch.Tensor,
    until: torch.Tensor,
) -> None:
    """Choose, of each request, the pages with the highest scores between its ``first`` tokens and its ``last`` ones.

    Into its row of ``tokens``, int64 [requests, whole pages], go theirs: of the page with the highest score first, of equal
    ones the first. Where there are fewer pages, anything follows. Into ``until``, int64 [requests]: before which position
    they are.

    scores_BC: float32, at least 0. lengths_B, rows_B: int64. first: whole pages.
    """
    if scores_BC.is_cuda:
        from er_sglang.drafting.choice_fused import choose_fused

        choose_fused(scores_BC, lengths_B, rows_B, first, last, page_size, tokens, until)
    else:
        choose_reference(scores_BC, lengths_B, rows_B, first, last, page_size, tokens, until)


def choose_reference(scores_BC, lengths_B, rows_B, first, last, page_size, tokens, until) -> None:
    until_B = (lengths_B - last).clamp_(min=0)
    until_B -= until_B % page_size
    columns = scores_BC.shape[1]
    position_C = torch.arange(columns, device=scores_BC.device)
    scores_BC = scores_BC.masked_fill((position_C < first) | (position_C >= until_B[:, None]), -1.0)
    pages_BP = F.pad(scores_BC, (0, -columns % page_size), value=-1.0).unflatten(1, (-1, page_size)).amax(2)
    best_BP = pages_BP.argsort(dim=1, descending=True, stable=True)[:, : tokens.shape[1] // page_size]
    tokens_BK = (best_BP[..., None] * page_size + torch.arange(page_size, device=best_BP.device)).flatten(1)
    tokens[rows_B, : tokens_BK.shape[1]] = tokens_BK
    until[rows_B] = until_B
