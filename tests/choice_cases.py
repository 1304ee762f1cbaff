"""Scores to choose by, on any device."""

import torch

ROWS = 12


def choice(device: str, page_size: int, most: int, columns: int, equal: bool = False) -> tuple:
    """Arguments of `choose` but for what it writes, of requests of all lengths; equal: many scores are."""
    generator = torch.Generator().manual_seed(columns)
    lengths_B = torch.tensor([1, columns // 3 + 1, 2 * columns // 3 + 1, columns - 1 or 1, columns])
    scores_BC = torch.rand(len(lengths_B), columns, generator=generator)
    scores_BC = scores_BC.mul(8).floor().div(8) if equal else scores_BC / columns
    rows_B = torch.randperm(ROWS, generator=generator)[: len(lengths_B)]
    first = -(-4 // page_size) * page_size
    return scores_BC.to(device), lengths_B.to(device), rows_B.to(device), first, 20, page_size, most


def chosen(choose, *arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """``tokens`` and ``until``, -1 where nothing is written."""
    *arguments, most = arguments
    device = arguments[0].device
    tokens = torch.full((ROWS, most), -1, dtype=torch.int64, device=device)
    until = torch.full((ROWS,), -1, dtype=torch.int64, device=device)
    choose(*arguments, tokens, until)
    return tokens, until
