"""Prompts, and the policy's own responses to them."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from er_sglang.errors import ConfigError

BUILT_IN = (
    "A train leaves at 9:40 and arrives at 13:05 after 246 km. What was its mean speed? Reason step by step.",
    "Natalia sold 48 clips in April and half as many in May. How many did she sell altogether? Reason step by step.",
    "Write a Python function that returns the longest increasing subsequence of a list, and explain why it is right.",
    "Write a Python class for a least-recently-used cache with tests.",
    "Prove that the square root of 2 is irrational.",
    "How many ways are there to tile a 2 x 10 board with dominoes? Reason step by step.",
    "Explain to a student how a hash table works, and when it is slow.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Compare merge sort and quicksort: running time, memory, stability.",
    "A bag holds 4 red, 5 blue and 6 green balls. Two are drawn. What is the probability that they differ in colour?",
    "Write a SQL query that lists, for each customer, the three largest orders, and explain it.",
    "Give three arguments for and three against a four-day working week.",
)
# Documents for long contexts: modules of the Python that runs this, which every machine has.
DOCUMENTS = (
    *("argparse", "calendar", "configparser", "csv", "dataclasses", "difflib"),
    *("fractions", "heapq", "shlex", "statistics", "tarfile", "textwrap"),
)
ABOUT_DOCUMENT = (
    "Here is a module:\n\n```python\n{document}\n```\n\nExplain what its parts do, and write tests for them."
)


@dataclass(frozen=True, slots=True)
class Response:
    """A prompt and what the policy said: `tokens[first:]` is the response. prompt: its number."""

    prompt: int
    tokens: tuple[int, ...]
    first: int


def read_prompts(path: Path) -> list[str | list[dict]]:
    """A JSON object a line: {"prompt": text or messages} or {"messages": [...]}. Raises ConfigError."""
    prompts = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            prompts.append(row["prompt"] if "prompt" in row else row["messages"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(f'{path}, line {number}: write {{"prompt": "..."}} or {{"messages": [...]}}.') from error
    if not prompts:
        raise ConfigError(f"{path} holds no prompt.")
    return prompts


def long_prompts(tokenizer: PreTrainedTokenizerBase, context_tokens: int) -> list[str]:
    """One prompt per built-in document, cut to that many tokens."""
    folder = Path(sysconfig.get_path("stdlib"))
    prompts = []
    for name in DOCUMENTS:
        ids = tokenizer((folder / f"{name}.py").read_text(), add_special_tokens=False)["input_ids"]
        prompts.append(ABOUT_DOCUMENT.format(document=tokenizer.decode(ids[:context_tokens])))
    return prompts


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], raw: bool) -> list[int]:
    """A prompt's tokens, by the chat template unless ``raw`` or there is none."""
    if raw or tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise ConfigError("messages need a tokenizer with a chat template.")
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class _Progress(StoppingCriteria):
    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        self._bar.update()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def respond(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    new_tokens: int,
    batch: int,
    seed: int,
    ignore_eos: bool,
) -> list[Response]:
    """A response of the policy to each prompt, of at most that many tokens, the end-of-sequence token included."""
    torch.manual_seed(seed)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) - {None}
    kept_defaults = model.generation_config
    # All other settings of the checkpoint's (a repetition penalty, say) would make it another policy.
    model.generation_config = GenerationConfig(
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        eos_token_id=None if ignore_eos else sorted(ends) or None,
        pad_token_id=0,
    )
    responses: list[Response] = []
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    device = model.device
    with tqdm(total=new_tokens * -(-len(order) // batch), desc=f"sampling, T={temperature:g}", unit="step") as bar:
        for begin in range(0, len(order), batch):
            rows = order[begin : begin + batch]
            width = max(len(prompts[i]) for i in rows)
            ids = torch.tensor([[0] * (width - len(prompts[i])) + list(prompts[i]) for i in rows], device=device)
            used = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows], device=device)
            done = begin // batch * new_tokens
            bar.n = done
            out = model.generate(ids, attention_mask=used, stopping_criteria=[_Progress(bar)])[:, width:].tolist()
            for i, tokens in zip(rows, out):
                stop = next((n + 1 for n, token in enumerate(tokens) if token in ends), len(tokens))
                stop = len(tokens) if ignore_eos else stop
                responses.append(Response(i, (*prompts[i], *tokens[:stop]), len(prompts[i])))
        bar.n = bar.total
    model.generation_config = kept_defaults
    return responses
