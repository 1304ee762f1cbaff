"""What block verification accepts beside the rule that judges token after token, on a policy's own answers.

    python block.py CHECKPOINT

Acceptance given the text is a ratio of probabilities (er_sglang/offline/estimate.py), so both rules are read off the
same texts. All starts of a chain weigh the same here.
"""

import sys

import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

from er_sglang.offline.chain import DraftPass, PolicyPass, Recent, chained_attention
from er_sglang.offline.drafters import Policy, Weights
from er_sglang.offline.texts import BUILT_IN, encode, respond

GAMMA = 8
# Of a drafted token and of a verify, in plain steps: 14B, H100, 1, 32 and 96 requests.
TIMES = ((0.31, 1.08), (0.38, 1.2), (0.44, 1.3))


@torch.inference_mode()
def logs(model, tokenizer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each answer, log p of its tokens [T] and log q [GAMMA, T], of the chain that drafts a token at each depth; int4 in groups of 128, head
    int4_rescored, full attention, temperature 1."""
    prompts = [encode(tokenizer, prompt, False) for prompt in BUILT_IN]
    texts = respond(model, prompts, temperature=1.0, new_tokens=256, batch=len(prompts), seed=1, ignore_eos=False)
    policy = Policy(model, torch.bfloat16)
    copy, head = policy.quantize(Weights(format="int4", group_size=128)), policy.quantize_head(128)
    found = []
    with chained_attention(model):
        for text in texts:
            tokens, first = torch.tensor([text.tokens]), text.first - 1
            target = PolicyPass()
            hidden_TH = policy.backbone(tokens[:, :-1], chain=target, use_cache=False).last_hidden_state[0, first:]
            next_T1 = tokens[0, first + 1 :, None]
            chain = DraftPass(target, first, Recent(0))
            options = {
                "position_ids": torch.arange(first, tokens.shape[1] - 1)[None],
                "use_cache": False,
                "chain": chain,
            }
            q_GT = []
            for _ in range(GAMMA):
                h_TH = functional_call(
                    policy.backbone, copy.weights, (tokens[:, first:-1],), options
                ).last_hidden_state[0]
                q_GT.append(policy._logits(h_TH, "int4_rescored", head).log_softmax(-1).gather(1, next_T1)[:, 0])
            found.append((policy.head(hidden_TH).log_softmax(-1).gather(1, next_T1)[:, 0], torch.stack(q_GT)))
    return found


def reached(p_T: torch.Tensor, q_GT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the starts of a chain of the probability that at least i drafts are accepted, [GAMMA + 1]: token by token, and as a block."""
    count = len(p_T) - GAMMA - 1
    alone, joint, ratio = torch.ones(3, count, dtype=torch.float64)
    sums = [(alone.sum(), alone.sum())]
    for depth in range(GAMMA):
        at = slice(1 + depth, 1 + depth + count)
        r = (p_T[at].double() - q_GT[depth, at].double()).exp()
        alone, ratio, joint = alone * (1 / r).clamp(max=1), ratio * r, (joint * r).clamp(max=1)
        sums.append((alone.sum(), (joint / ratio).sum()))
    return torch.tensor(sums).double().T


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    token, block = sum(
        torch.stack(list(reached(*each))) for each in logs(model, AutoTokenizer.from_pretrained(sys.argv[1]))
    )
    print(f"{int(token[0])} starts")
    token, block = token / token[0], block / block[0]
    print("alpha by position, token by token", [round(a, 4) for a in (token[1:] / token[:-1]).tolist()])
    print("alpha by position, block", [round(a, 4) for a in (block[1:] / block[:-1]).tolist()])
    for gamma in range(1, GAMMA + 1):
        a, b = token[: gamma + 1].sum().item(), block[: gamma + 1].sum().item()
        print(f"gamma {gamma}: tokens a cycle {a:.3f}, {b:.3f} ({b / a - 1:+.1%})")
    for drafted, verify in TIMES:
        best = []
        for kept in (token, block):
            gains = [kept[: gamma + 1].sum().item() / (gamma * drafted + verify) for gamma in range(1, GAMMA + 1)]
            best.append((max(gains), 1 + gains.index(max(gains))))
        (a, at_a), (b, at_b) = best
        print(
            f"drafted token {drafted}, verify {verify} of a step: {a:.3f} x (gamma {at_a}), {b:.3f} x (gamma {at_b}), {b / a - 1:+.1%}"
        )


if __name__ == "__main__":
    main()
