"""What every shaper must do, against a loop over tokens in plain Python."""

from __future__ import annotations

import math
import random
from collections import Counter

import torch

from er_sglang.sampling import Shaper
from er_sglang.sampling.penalties import PenaltyTable, RequestPenalties

VOCAB = 37


def defined(logits: list[float], request: RequestPenalties | None, bias: list[float], length: int, drafted: list[int]):
    """Shaped logits of one request at one position; ``length`` includes ``drafted``."""
    shaped = list(logits)
    counts = Counter([*request.emitted, *drafted] if request else [])
    for token in range(len(logits)) if request else ():
        if counts[token]:
            shaped[token] -= request.frequency * counts[token] + request.presence
            shaped[token] *= request.repetition if shaped[token] < 0 else 1 / request.repetition
        if token in request.stop_tokens and length < request.least_tokens:
            shaped[token] = -math.inf
    return [x + b for x, b in zip(shaped, bias)]


def random_request(rng: random.Random, vocab: int) -> RequestPenalties:
    """Any penalty is in force or not. It may be about to be allowed to stop, and likes to repeat itself."""
    return RequestPenalties(
        frequency=rng.choice([0.0, 0.05, -0.3]),
        presence=rng.choice([0.0, 0.7]),
        repetition=rng.choice([1.0, 1.05, 1.6]),
        least_tokens=rng.choice([0, 22, 24]),
        stop_tokens={rng.randrange(vocab) for _ in range(3)} | {vocab, -1},
        emitted=[rng.randrange(vocab) ** 2 % vocab for _ in range(rng.choice([0, 1, 50]))],
    )


def check_cycle(shaper: Shaper, device, seed: int, *, vocab: int = VOCAB, batch: int = 6, gamma: int = 3) -> None:
    """Draft and verify positions of random requests, a third of them unpenalised, before and after they are counted."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    requests = {row: random_request(rng, vocab) for row in range(1, batch)}
    rows = [row if row % 3 else 0 for row in rng.sample(range(batch), batch)]
    table = PenaltyTable(vocab, torch.device(device))
    table.reset({1: random_request(rng, vocab)})  # another's, before
    table.reset(requests)
    lengths = [rng.choice([19, 20, 21]) for _ in rows]
    committed_B = torch.tensor(lengths, device=device) - 1
    bias_BV = torch.randn(batch, vocab, generator=generator) if seed % 2 else None
    biases = torch.zeros(batch, vocab).tolist() if bias_BV is None else bias_BV.tolist()
    for _ in range(2):
        drafted_GB = torch.randint(0, 5, (gamma, batch), generator=generator)
        logits_BNV = torch.randn(batch, gamma + 1, vocab, generator=generator) * 3
        expected_BNV = torch.tensor(
            [
                [
                    defined(logits_BNV[b, i].tolist(), requests.get(row), biases[b], lengths[b] + i, drafted)
                    for i in range(gamma + 1)
                    for drafted in [drafted_GB[:i, b].tolist()]
                ]
                for b, row in enumerate(rows)
            ]
        )
        shaper.load(table.of(rows), None if bias_BV is None else bias_BV.to(device))
        verified_BNV, on_device_GB = logits_BNV.clone().to(device), drafted_GB.to(device)
        shaper.shape(verified_BNV.view(-1, vocab), committed_B, on_device_GB)
        torch.testing.assert_close(verified_BNV.cpu(), expected_BNV, rtol=1e-5, atol=1e-5)
        for i in range(gamma):
            drawn_BV = logits_BNV[:, i].clone().to(device)
            shaper.shape(drawn_BV, committed_B, on_device_GB, i)
            torch.testing.assert_close(drawn_BV.cpu(), expected_BNV[:, i], rtol=1e-5, atol=1e-5)

        accept_lens = [rng.randint(1, gamma + 1) for _ in rows]
        emitted_BN = torch.randint(0, 5, (batch, gamma + 1), generator=generator)
        shaper.count(emitted_BN.to(device), torch.tensor(accept_lens, dtype=torch.int32, device=device))
        for b, row in enumerate(rows):
            lengths[b] += accept_lens[b]
            if row:
                requests[row].emitted.extend(emitted_BN[b, : accept_lens[b]].tolist())
        committed_B = torch.tensor(lengths, device=device) - 1
    shaper.load(None, None)
    untouched_BV = logits_BNV[:, 0].clone().to(device)
    shaper.shape(untouched_BV, committed_B, on_device_GB, 1)
    assert torch.equal(untouched_BV.cpu(), logits_BNV[:, 0])
