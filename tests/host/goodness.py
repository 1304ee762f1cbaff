"""Does a sample come from the distribution it should? Chi-square tests of tokens, each given its own prefix."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from scipy.stats import chi2, chi2_contingency, norm

from tests.host.oracle import Oracle, Sampling

FALSE_ALARM = 1e-4  # of one call of assert_exact: how often it fails although everything is exact
FREQUENT = 100  # a prefix that so many samples share is tested by itself
SMALLEST_EXPECTED = 10.0  # rarer tokens are counted together, so that the chi-square limit holds far into its tail


@dataclass(frozen=True, slots=True)
class Cell:
    """One test: a group of samples at one position. ``p_value``: probability of a misfit as large by chance."""

    what: str
    samples: int
    p_value: float


def chi_square(p_NV: torch.Tensor, tokens_N: torch.Tensor) -> float | None:
    """p-value of N independent tokens, token n drawn from ``p_NV[n]``; None if that leaves nothing to test.

    Observed minus expected counts have covariance sum(diag(p) - p p'); their squared length in that metric is
    chi-square with as many degrees of freedom as there are directions (Pearson's test if all rows are equal).
    """
    expected_V = p_NV.sum(0)
    often_V = expected_V >= SMALLEST_EXPECTED
    merged_NC = torch.cat([p_NV[:, often_V], p_NV[:, ~often_V].sum(1, keepdim=True)], dim=1)
    counts_V = torch.bincount(tokens_N, minlength=p_NV.shape[1]).double()
    counts_C = torch.cat([counts_V[often_V], counts_V[~often_V].sum(0, keepdim=True)])
    excess_C = counts_C - merged_NC.sum(0)
    covariance_CC = merged_NC.sum(0).diag() - merged_NC.t() @ merged_NC
    variance_C, direction_CC = torch.linalg.eigh(covariance_CC)
    usable_C = variance_C >= SMALLEST_EXPECTED / 2
    if not usable_C.any():
        return None
    statistic = ((direction_CC.t() @ excess_C)[usable_C] ** 2 / variance_C[usable_C]).sum()
    return float(chi2.sf(statistic.item(), int(usable_C.sum())))


def cells(oracle: Oracle, prompt: list[int], outputs: list[list[int]], sampling: Sampling) -> list[Cell]:
    """Every test of the sampled ``outputs`` (of one length) of one prompt. Raises AssertionError for a token outside
    the support."""
    outputs_NT = torch.tensor(outputs)
    sequences_NT = torch.cat([torch.tensor([prompt]).expand(len(outputs), -1), outputs_NT], dim=1)
    unique_UT, index_N = sequences_NT.unique(dim=0, return_inverse=True)
    logits_UTV = oracle.logits(unique_UT)[:, len(prompt) - 1 : -1]
    found, drawn = [], []
    for position in range(outputs_NT.shape[1]):
        p_UV, allowed_UV = sampling.distribution(logits_UTV[:, position], unique_UT[:, len(prompt) :][:, :position])
        p_NV, tokens_N = p_UV[index_N], outputs_NT[:, position]
        outside = ~allowed_UV[index_N, tokens_N]
        assert not outside.any(), f"{int(outside.sum())} tokens at position {position} are outside the support"
        groups = defaultdict(list)
        for row, prefix in enumerate(outputs_NT[:, :position].tolist()):
            groups[tuple(prefix)].append(row)
        frequent = {prefix: rows for prefix, rows in groups.items() if len(rows) >= FREQUENT}
        rest = [row for prefix, rows in groups.items() if prefix not in frequent for row in rows]
        for what, rows in [*((f"after {list(p)}", r) for p, r in frequent.items()), ("after any other prefix", rest)]:
            if rows and (p_value := chi_square(p_NV[rows], tokens_N[rows])) is not None:
                found.append(Cell(f"token {position} {what}", len(rows), p_value))
        drawn.append((p_NV, tokens_N))
    found.append(Cell("surprise at all tokens", outputs_NT.numel(), surprise(*map(torch.cat, zip(*drawn)))))
    return found


def cells_of_two(outputs: list[list[int]], others: list[list[int]]) -> list[Cell]:
    """Do two samples of one prompt come from one distribution? Every test, at each position and after its frequent
    prefixes."""
    found = []
    for position in range(len(outputs[0])):
        groups = defaultdict(lambda: ([], []))
        for sample, rows in enumerate((outputs, others)):
            for row in rows:
                for prefix in {(), tuple(row[:position])}:
                    groups[prefix][sample].append(row[position])
        for prefix, samples in groups.items():
            if min(map(len, samples)) >= FREQUENT and (p_value := homogeneity(*samples)) is not None:
                found.append(Cell(f"token {position} after {list(prefix) or 'anything'}", len(samples[0]), p_value))
    return found


def homogeneity(tokens: list[int], others: list[int]) -> float | None:
    """p-value of two samples of tokens, of one distribution; None if that leaves nothing to test."""
    counts_2V = torch.stack(
        [torch.bincount(torch.tensor(s), minlength=max(*tokens, *others) + 1) for s in (tokens, others)]
    )
    expected_2V = counts_2V.sum(0) * counts_2V.sum(1, keepdim=True) / counts_2V.sum()
    often_V = expected_2V.amin(0) >= SMALLEST_EXPECTED
    merged_2C = torch.cat([counts_2V[:, often_V], counts_2V[:, ~often_V].sum(1, keepdim=True)], dim=1)
    merged_2C = merged_2C[:, merged_2C.sum(0) > 0]
    if merged_2C.shape[1] < 2:
        return None
    return float(chi2_contingency(merged_2C.numpy(), correction=False).pvalue)


def surprise(p_NV: torch.Tensor, tokens_N: torch.Tensor) -> float:
    """p-value of the mean of -log p of the tokens drawn, which should be the entropy.

    Deviations that differ from prefix to prefix cancel in ``chi_square``, but not here: a distribution that is not
    the policy's tends to draw the policy's likeliest tokens too rarely, or too often.
    """
    surprise_NV = -p_NV.clamp_min(1e-12).log()
    entropy_N = (p_NV * surprise_NV).sum(1)
    variance_N = (p_NV * surprise_NV**2).sum(1) - entropy_N**2
    excess = (surprise_NV.gather(1, tokens_N.view(-1, 1)).view(-1) - entropy_N).sum()
    return float(2 * norm.sf(abs(excess / variance_N.sum().sqrt())))


def is_exact(tests: list[Cell]) -> bool:
    """No test fails at the Bonferroni level of FALSE_ALARM."""
    return min(test.p_value for test in tests) * len(tests) >= FALSE_ALARM


def assert_exact(tests: list[Cell]) -> None:
    worst = min(tests, key=lambda test: test.p_value)
    assert is_exact(tests), f"{worst} is the worst of {len(tests)} tests at a false-alarm rate of {FALSE_ALARM} in all"
