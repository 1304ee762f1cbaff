"""Philox 4x32-10 in torch: the reference of ``tl.philox``, bit for bit (Salmon et al., SC 2011)."""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF


def _mulhi(a: int, b: torch.Tensor) -> torch.Tensor:
    # 32 x 32 bits fit 64; the sign that int64 adds is shifted in above bit 31 and masked off.
    return ((a * b) >> 32) & _MASK


def philox(state: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: int) -> torch.Tensor:
    """Random uint32 (as int64) for counters (c0, c1, c2, cycle) under key ``seed``; c0 and c1 broadcast.

    state: int64 [2], (seed, cycle).
    """
    seed, cycle = state[0], state[1]
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = torch.broadcast_tensors(c0, c1)
    c2, c3 = torch.full_like(c0, c2), (cycle & _MASK).expand_as(c0)
    for _ in range(10):
        c0, c1, c2, c3 = (
            _mulhi(0xCD9E8D57, c2) ^ c1 ^ k0,
            (0xCD9E8D57 * c2) & _MASK,
            _mulhi(0xD2511F53, c0) ^ c3 ^ k1,
            (0xD2511F53 * c0) & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0


def uniform(bits: torch.Tensor) -> torch.Tensor:
    """float32 in (0, 1] from 32 random bits."""
    return (bits.to(torch.float32) + 0.5) * 2.0**-32


def exponential(bits: torch.Tensor) -> torch.Tensor:
    """Standard exponential, float32, exact in the small values that win a race (where log(1 - u) cancels)."""
    u = uniform(bits)
    return torch.where(u < 1e-3, u + 0.5 * u * u, -torch.log1p(-u))
