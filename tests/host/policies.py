"""The policies served by these tests: tiny, random, float32, made once per session."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from er_sglang.bench.toy import PolicyShape, make_random_policy, spread_channels

VOCAB = 100  # few enough tokens that samples fill the cells of a chi-square test
EOS = 1


def make_policy(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    tied: bool = False,
    max_positions: int = 2048,
    spread: float = 0.0,
    layers: int = 2,
) -> Path:
    """``spread``: width of the hidden channels' scales; the wider, the less an int4 drafter resembles its policy."""
    shape = PolicyShape(vocab=VOCAB, tie_word_embeddings=tied, max_positions=max_positions, layers=layers)
    # A tied head likes to repeat the token it has just read; the less, the smaller the embeddings.
    logit_std = 0.5 if tied else 2.5
    path = make_random_policy(folder / f"{family}-{seed}", family, shape=shape, seed=seed, logit_std=logit_std)
    if spread:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        spread_channels(model, spread, seed)
        model.save_pretrained(path)
    return path
