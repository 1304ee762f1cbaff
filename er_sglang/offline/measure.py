"""A measurement: the drafters to compare, and what the policy accepts of each over its responses, in rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import product

import torch
from tqdm import tqdm

from er_sglang.offline import estimate
from er_sglang.offline.drafters import Drafter, Policy, Weights
from er_sglang.offline.texts import Response


def plan(
    formats: Sequence[str],
    group_sizes: Sequence[int],
    heads: Sequence[str],
    windows: Sequence[int],
    rules: Sequence[str] = ("recency",),
) -> list[Drafter]:
    """The drafters of a run: every format, group size and head with the first window, and the first with every other
    window by every rule."""
    weights = dict.fromkeys(
        Weights(format=name, group_size=group_sizes[0] if name == "fp8" else size)
        for name, size in product(formats, group_sizes)
    )
    first, *others = windows
    drafters = [
        Drafter(weights=each, head=head, attention_window=first, window_by=rules[0] if first else "recency")
        for each, head in product(weights, heads)
    ]
    others = dict.fromkeys((size, rule if size else "recency") for size, rule in product(others, rules))
    return drafters + [
        Drafter(weights=drafters[0].weights, head=heads[0], attention_window=size, window_by=rule)
        for size, rule in others
    ]


def measure(
    policy: Policy,
    responses: Sequence[Response],
    prompts: int,
    drafters: Sequence[Drafter],
    temperature: float,
    gamma: int,
    edges: Sequence[int],
) -> list[dict]:
    """A row per drafter for all contexts together, then one per class of context lengths if there are several.

    prompts: their number; responses may be several rounds over them. edges: of the classes, in tokens.
    """
    tallies = defaultdict(lambda: torch.zeros(prompts, len(edges) - 1, gamma + 1, dtype=torch.float64))
    copies = list(dict.fromkeys(drafter.weights for drafter in drafters))
    sizes = {}
    with tqdm(total=len(copies) * len(responses), desc=f"drafting, T={temperature:g}", unit="text") as bar:
        for weights in copies:
            chosen = [drafter for drafter in drafters if drafter.weights == weights]
            copy, head = policy.quantize(weights), None
            if any(drafter.head != "policy" for drafter in chosen):
                head = policy.quantize_head(weights.group_size)
            for drafter in chosen:
                head_bytes = 0 if drafter.head == "policy" else head.nbytes
                sizes[drafter] = (copy.nbytes + head_bytes, sorted(copy.kept))
            for response in responses:
                found = policy.outcomes(response.tokens, response.first, temperature, gamma, copy, head, chosen)
                for drafter, outcome in found.items():
                    tallies[drafter][response.prompt % prompts] += estimate.tally(outcome, response.first, edges)
                bar.update()

    buckets = [i for i in range(len(edges) - 1) if tallies[drafters[0]][:, i, 0].sum()]
    cells = [(None, slice(None)), *(((edges[i], edges[i + 1]), slice(i, i + 1)) for i in buckets if len(buckets) > 1)]
    rows = []
    for context, cell in cells:
        reference = None
        for drafter in drafters:
            kept_P = tallies[drafter][:, cell].sum(1)
            samples = estimate.resampled(kept_P)
            length, lengths = estimate.accept_length(kept_P.sum(0)).item(), estimate.accept_length(samples)
            reference = reference or (length, lengths)
            nbytes, unconverted = sizes[drafter]
            rows.append(
                {
                    "weights": drafter.weights.format,
                    "group_size": drafter.weights.group_size,
                    "head": drafter.head,
                    "attention_window": drafter.attention_window,
                    "window_by": drafter.window_by,
                    "temperature": temperature,
                    "context_tokens": context,
                    "copy_bytes": nbytes,
                    "unconverted_layers": len(unconverted),
                    "cycles": kept_P[:, 0].sum().item(),
                    "prompts": int((kept_P[:, 0] > 0).sum()),
                    "alphas": estimate.alphas(kept_P.sum(0)).tolist(),
                    "alpha_intervals": [estimate.interval(alpha) for alpha in estimate.alphas(samples).T],
                    "accept_length": length,
                    "accept_length_interval": estimate.interval(lengths),
                    "against_first": length - reference[0],
                    "against_first_interval": estimate.interval(lengths - reference[1]),
                }
            )
    return rows
