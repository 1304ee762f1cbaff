"""Small policies made on the spot, saved as ordinary Hugging Face checkpoints.

    make_toy_policy(path)     a policy trained for about a minute on CPU: something to serve
    make_random_policy(path)  random weights, any supported family: something to test with

The toy task is a countdown, the simplest task we know with the traits of a rollout:

    prompt "041:"    response "039,038,034,033,...,002,000" and the end-of-sequence token

Each step subtracts 1 to 5, drawn from STEP_PROBABILITY, never below zero. Some tokens are certain
(separators, the copied high digits), some are a real choice (where to step), so at temperature 1 a
drafter is right often but not always; the number in the prompt decides the response's length, so
long-tailed prompts give long-tailed responses; and `valid_steps` tells whether a response is right.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from er_sglang.tools.workload import draw_lengths

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MAX_COUNT = 999
STEP_PROBABILITY = {1: 0.4, 2: 0.25, 3: 0.15, 4: 0.12, 5: 0.08}

TOY_STEPS = 350
PEAK_RATE = 4e-3
WARM_UP_STEPS = 20
CHANNEL_SPREAD = 0.75

PAD, EOS = "<pad>", "<eos>"
PRINTABLE = [chr(code) for code in range(32, 127)]
SMALLEST_VOCAB = 2 + len(PRINTABLE)
IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyShape:
    """Dimensions of a small policy. Inputs of every linear layer are multiples of 128."""

    hidden: int = 128
    intermediate: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    vocab: int = 128
    max_positions: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool | None = None
    """None: the family's own habit (Qwen2 has q/k/v biases and cannot do without)."""


TOY_SHAPE = PolicyShape(hidden=128, intermediate=256, layers=2, heads=4, kv_heads=2, head_dim=64)


# ---------------------------------------------------------------- the task


def prompt(count: int) -> str:
    """The prompt that asks for a countdown from `count`."""
    return f"{count:03d}:"


def prompts(n: int, *, seed: int) -> list[str]:
    """`n` prompts whose counts, hence response lengths, are log-normal."""
    return [prompt(count) for count in draw_lengths("lognormal:20:0.9:250", n, seed)]


def respond(count: int, rng: random.Random) -> str:
    """One response drawn from the task's own distribution."""
    numbers = []
    while count > 0:
        step = rng.choices(list(STEP_PROBABILITY), STEP_PROBABILITY.values())[0]
        count = max(0, count - step)
        numbers.append(f"{count:03d}")
    return ",".join(numbers)


def valid_steps(prompt_text: str, response: str) -> float:
    """Share of the response's steps that the task allows; 1.0 for a perfect countdown to zero."""
    numbers = [int(digits) for digits in re.findall(r"\d{3}", response)]
    path = [int(prompt_text[:3]), *numbers]
    legal = sum(0 < before - after <= max(STEP_PROBABILITY) for before, after in zip(path, path[1:]))
    reaches_zero = path[-1] == 0
    return (legal + reaches_zero) / (len(numbers) + 1)


# ---------------------------------------------------------------- model and tokenizer


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, then `<97>`, `<98>`, ... up to `vocab` tokens."""
    if vocab < SMALLEST_VOCAB:
        raise ValueError(f"vocab must be at least {SMALLEST_VOCAB} (printable ASCII), got {vocab}")
    names = [PAD, EOS, *PRINTABLE, *(f"<{i}>" for i in range(SMALLEST_VOCAB, vocab))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token="?")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def make_model(family: str, shape: PolicyShape, seed: int):
    """A freshly initialised float32 transformers model of `family`."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    options = {}
    if shape.attention_bias is not None:
        if family == "mistral" and shape.attention_bias or family == "qwen2" and not shape.attention_bias:
            raise ValueError(f"{family} does not support attention_bias={shape.attention_bias}; leave it None")
        if family in ("llama", "qwen3"):
            options["attention_bias"] = shape.attention_bias
    if family == "mistral":
        options["sliding_window"] = None
    config = AutoConfig.for_model(
        family,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tie_word_embeddings,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **options,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def save_policy(model, path: Path, dtype: torch.dtype) -> None:
    """Write weights, config and tokenizer, so that AutoModel, AutoTokenizer and SGLang load `path` offline."""
    model.to(dtype).save_pretrained(path)
    make_tokenizer(model.config.vocab_size).save_pretrained(path)


def make_random_policy(
    path: str | Path,
    family: str = "qwen3",
    *,
    shape: PolicyShape = PolicyShape(),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    logit_std: float = 2.5,
) -> Path:
    """Save a policy with random weights whose next-token distribution is neither flat nor a point.

    Every matrix is scaled by its fan-in so that each block moves the residual stream as much as the
    embedding does; the head is scaled to logits of about `logit_std`; biases and norm weights are
    perturbed so that a forgotten one shows.
    """
    path = Path(path)
    model = make_model(family, shape, seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.7, 1.3)
            elif name.endswith(".bias"):
                weight.normal_(std=0.2)
            elif "embed_tokens" in name or "lm_head" in name:
                weight.normal_(std=logit_std * shape.hidden**-0.5)
            else:
                weight.normal_(std=weight.shape[1] ** -0.5)
    save_policy(model, path, dtype)
    return path


def spread_channels(model, sigma: float, seed: int) -> None:
    """Give `model` outlier channels without changing its function.

    Weights trained for a minute are so even that int4 hardly hurts them: a drafter would be accepted
    99 % of the time, unlike in any real model. Here every hidden channel gets a log-normal factor of
    width `sigma`, multiplied into the columns that read it and divided out of the norm (or the rows) that
    writes it. Groups of weights then span a wide range, as in trained LLMs, and round-to-nearest int4 errs.
    """
    generator = torch.Generator().manual_seed(seed)

    def factors(n: int) -> torch.Tensor:
        return torch.exp(sigma * torch.randn(n, generator=generator))

    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                factor_K = factors(norm.weight.numel())
                norm.weight /= factor_K
                for reader in readers:
                    reader.weight *= factor_K
            factor_K = factors(mlp.down_proj.in_features)
            mlp.up_proj.weight /= factor_K[:, None]
            mlp.down_proj.weight *= factor_K


def training_batch(tokenizer, rng: random.Random, rows: int, max_tokens: int):
    """A padded batch of countdowns: input ids, labels, position ids, each [rows, tokens] int64.

    Counts lean to small ones, so that most rows end. Rows start at random positions because responses
    in use are longer than `max_tokens`.
    """
    texts = []
    for _ in range(rows):
        count = int(MAX_COUNT ** rng.random())
        texts.append(prompt(count) + respond(count, rng) + EOS)
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    input_ids, used = encoded["input_ids"], encoded["attention_mask"].bool()
    labels = input_ids.masked_fill(~used, IGNORED_LABEL)
    labels[:, : len(prompt(0))] = IGNORED_LABEL
    starts = torch.tensor([[rng.randrange(1024)] for _ in range(rows)])
    return input_ids, labels, starts + torch.arange(input_ids.shape[1])


def make_toy_policy(
    path: str | Path,
    *,
    family: str = "qwen3",
    shape: PolicyShape = TOY_SHAPE,
    seed: int = 0,
    steps: int = TOY_STEPS,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Train a small policy on the countdown task for `steps` optimiser steps and save it.

    The default takes about a minute, on one core: more do not help matrices this small, and the result
    does not depend on how many there are. The learning rate falls linearly to zero.
    """
    path = Path(path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = make_model(family, shape, seed).train()
    tokenizer = make_tokenizer(shape.vocab)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    with tqdm(range(steps), desc="training the toy policy", mininterval=1.0) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (1.0 - step / steps)
            input_ids, labels, position_ids = training_batch(tokenizer, rng, rows=16, max_tokens=128)
            loss = model(input_ids=input_ids, labels=labels, position_ids=position_ids).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    torch.set_num_threads(threads)
    spread_channels(model, sigma=CHANNEL_SPREAD, seed=seed)
    save_policy(model, path, dtype)
    return path
