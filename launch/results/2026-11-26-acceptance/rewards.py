"""The reward of checkpoints in launch/grpo's arithmetic, before any training: python rewards.py CHECKPOINT ..."""

import random
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from er_sglang.offline.texts import encode, respond
from launch.grpo import arithmetic

PROMPTS, LONGEST, NEW_TOKENS = 24, 16, 200


def main() -> None:
    prompts = arithmetic.prompts(80, random.Random(0))
    prompts = [prompt for prompt in prompts if len(arithmetic._numbers(prompt[-1]["content"])) <= LONGEST][:PROMPTS]
    for path in sys.argv[1:]:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        ids = [encode(tokenizer, prompt, False) for prompt in prompts]
        responses = respond(model, ids, temperature=1.0, new_tokens=NEW_TOKENS, batch=PROMPTS, seed=0, ignore_eos=False)
        rewards = []
        for response in responses:
            text = tokenizer.decode(response.tokens[response.first :], skip_special_tokens=True)
            rewards.append(arithmetic.reward(prompts[response.prompt], text, True))
        rewards = torch.tensor(rewards)
        print(path, f"{rewards.mean():.3f} +- {rewards.std() / len(rewards) ** 0.5:.3f}")


if __name__ == "__main__":
    main()
