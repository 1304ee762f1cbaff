"""Does a 4-bit copy follow small updates? Of a policy before and after eight steps of AdamW: 1 - TV of its own samples' tokens (what a
first draft is accepted with) between it and copies of itself, and of the other one.

    PYTHONPATH=. python launch/results/2026-11-26-acceptance/follows.py CHECKPOINT

Supervised on right solutions of launch/grpo's task, learning rate 1e-5, two a step, in float32. Linear layers only; embedding and head are shared.
"""

import copy
import random
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.grpo import arithmetic

STEPS, LEARNING_RATE, GROUP, NEW_TOKENS, PROMPTS = 8, 1e-5, 128, 96, 12


def trained(policy, tokenizer):
    policy, rng = copy.deepcopy(policy).train(), random.Random(1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(STEPS):
        for prompt in arithmetic.prompts(2, rng):
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            answer = [*tokenizer(arithmetic.solution(prompt[-1]["content"]))["input_ids"], tokenizer.eos_token_id]
            tokens = torch.tensor([ids + answer])
            labels = tokens.clone()
            labels[:, : len(ids)] = -100
            (policy(input_ids=tokens, labels=labels, use_cache=False).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return policy.eval()


def quantized(policy, how):
    policy, generator = copy.deepcopy(policy), torch.Generator().manual_seed(1)
    for name, weight in policy.named_parameters():
        if weight.dim() != 2 or "embed" in name or "lm_head" in name:
            continue
        if how == "fp8":
            scale = weight.data.abs().amax(-1, keepdim=True) / 448
            weight.data = (weight.data / scale).to(torch.float8_e4m3fn).float() * scale
            continue
        groups = weight.data.view(weight.shape[0], -1, GROUP)
        scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-9)
        steps = groups / scale
        if how == "int4, rounded stochastically":
            steps = steps + torch.rand(steps.shape, generator=generator) - 0.5
        groups.copy_(steps.round().clamp(-8, 7) * scale)
    return policy


@torch.no_grad()
def sample(policy, tokenizer):
    """Prompt and response, and the prompt's length."""
    prompts = arithmetic.prompts(PROMPTS, random.Random(7))
    ids = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False) for prompt in prompts]
    width = max(map(len, ids))
    out = policy.generate(
        input_ids=torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in ids]),
        attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    texts = []
    for row, tokens in zip(ids, out[:, width:].tolist()):
        end = tokens.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in tokens else len(tokens)
        texts.append((torch.tensor([row + tokens[:end]]), len(row)))
    return texts


@torch.no_grad()
def probabilities(policy, texts):
    return torch.cat([policy(input_ids=tokens).logits[0, first - 1 : -1].softmax(-1) for tokens, first in texts])


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    before = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    after = trained(before, tokenizer)
    torch.manual_seed(0)
    for name, policy, other in (("before", before, after), ("after", after, before)):
        texts = sample(policy, tokenizer)
        policy_NV = probabilities(policy, texts)
        print(f"the policy {name} training, {len(policy_NV)} tokens of its own")
        for what, draft in {
            "its int4 copy": lambda: quantized(policy, "int4"),
            "its int4 copy, rounded stochastically": lambda: quantized(policy, "int4, rounded stochastically"),
            "its fp8 copy": lambda: quantized(policy, "fp8"),
            "the other policy": lambda: other,
            "the other policy's int4 copy": lambda: quantized(other, "int4"),
        }.items():
            overlap_N = torch.minimum(policy_NV, probabilities(draft(), texts)).sum(-1)
            error = overlap_N.std() / len(overlap_N) ** 0.5
            print(f"    {what:40} {overlap_N.mean():.4f} +- {error:.4f}", flush=True)


if __name__ == "__main__":
    main()
