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

from er_sglang.offline import texts
from er_sglang.quantize import rtn
from launch.grpo import arithmetic

STEPS, LEARNING_RATE, GROUP, NEW_TOKENS, PROMPTS = 8, 1e-5, 128, 96, 12


def trained(policy, tokenizer):
    policy, rng = copy.deepcopy(policy).train(), random.Random(1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(STEPS):
        for prompt in arithmetic.prompts(2, rng):
            ids = texts.encode(tokenizer, prompt, False)
            answer = tokenizer(arithmetic.solution(prompt[-1]["content"]))["input_ids"]
            answer.append(policy.generation_config.eos_token_id)
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
            weight.data = rtn.dequantize_fp8(*rtn.quantize_fp8(weight.data), weight.dtype)
            continue
        int4 = rtn.quantize_int4(weight.data, group_size=GROUP, symmetric=True)
        if how == "int4, rounded stochastically":
            noise = torch.rand(weight.shape, generator=generator) - 0.5
            dithered = weight.data + noise * int4.scales_NG.repeat_interleave(GROUP, 1)
            int4 = rtn.quantize_int4(dithered, group_size=GROUP, symmetric=True)
        weight.data = rtn.dequantize_int4(*int4)
    return policy


def sample(policy, tokenizer):
    """Prompt and response, and the prompt's length."""
    prompts = [texts.encode(tokenizer, prompt, False) for prompt in arithmetic.prompts(PROMPTS, random.Random(7))]
    responses = texts.respond(
        policy, prompts, temperature=1.0, new_tokens=NEW_TOKENS, batch=PROMPTS, seed=0, ignore_eos=False
    )
    return [(torch.tensor([response.tokens]), response.first) for response in responses]


@torch.no_grad()
def probabilities(policy, samples):
    return torch.cat([policy(input_ids=tokens).logits[0, first - 1 : -1].softmax(-1) for tokens, first in samples])


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    before = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    after = trained(before, tokenizer)
    for name, policy, other in (("before", before, after), ("after", after, before)):
        samples = sample(policy, tokenizer)
        policy_NV = probabilities(policy, samples)
        print(f"the policy {name} training, {len(policy_NV)} tokens of its own")
        for what, draft in {
            "its int4 copy": lambda: quantized(policy, "int4"),
            "its int4 copy, rounded stochastically": lambda: quantized(policy, "int4, rounded stochastically"),
            "its fp8 copy": lambda: quantized(policy, "fp8"),
            "the other policy": lambda: other,
            "the other policy's int4 copy": lambda: quantized(other, "int4"),
        }.items():
            overlap_N = torch.minimum(policy_NV, probabilities(draft(), samples)).sum(-1)
            error = overlap_N.std() / len(overlap_N) ** 0.5
            print(f"    {what:40} {overlap_N.mean():.4f} +- {error:.4f}", flush=True)


if __name__ == "__main__":
    main()
