"""What costs a 4-bit copy its acceptance: variants of it on one set of responses, paired with the copy that serves.

    python launch/results/2026-11-26-acceptance/variants.py CHECKPOINT > variants.txt

Each line: mean probability that a first draft is accepted, 1 - TV(p, q); its difference to round-to-nearest int4 in
groups of 128 with the policy's head, and the standard error of that over responses. Temperature 1, bf16, on a CPU.
"""

import sys

import torch
import torch.nn.functional as F
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

from er_sglang.offline import texts
from er_sglang.offline.chain import DraftPass, PolicyPass, chained_attention
from er_sglang.offline.drafters import Policy, distribution
from er_sglang.quantize import rtn

NEW_TOKENS, USED_TOKENS = 128, 100


class Lab:
    def __init__(self, checkpoint: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
        self.policy = Policy(self.model, torch.bfloat16)
        self.head_VH = self.policy.head.weight.data
        self.weights = {
            f"{name}.weight": module.weight.data
            for name, module in self.policy.backbone.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        self.activation = lambda x: x  # what becomes of a draft's
        self.drafting = False
        for module in self.policy.backbone.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, args: (self.activation(args[0]),) if self.drafting else args)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        prompts = [texts.encode(tokenizer, prompt, False) for prompt in texts.BUILT_IN[:12]]
        responses = texts.respond(
            self.model, prompts, temperature=1.0, new_tokens=NEW_TOKENS, batch=16, seed=0, ignore_eos=False
        )
        self.texts = []
        with torch.inference_mode(), chained_attention(self.model):
            for response in responses:
                tokens, chain = torch.tensor([response.tokens[: response.first + USED_TOKENS]]), PolicyPass()
                hidden = self.policy.backbone(tokens[:, :-1], chain=chain, use_cache=False)
                p_TV = distribution(self.policy.head(hidden.last_hidden_state[0, response.first :]), 1.0)
                self.texts.append((tokens, response.first, chain, p_TV))
        self.base = None

    @torch.inference_mode()
    def hidden(self, weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Of first drafts, [T, H] a text."""
        found = []
        self.drafting = True
        with chained_attention(self.model):
            for tokens, first, chain, _ in self.texts:
                options = {"position_ids": torch.arange(first, tokens.shape[1] - 1)[None], "use_cache": False}
                draft = {**options, "chain": DraftPass(chain, first, 0)}
                output = functional_call(self.policy.backbone, weights, (tokens[:, first:-1],), draft)
                found.append(output.last_hidden_state[0])
        self.drafting = False
        return found

    @torch.inference_mode()
    def show(self, name: str, hidden: list[torch.Tensor], logits=None) -> None:
        """logits: of a draft's hidden states; by default the policy's head's."""
        logits = logits or (lambda h: F.linear(h, self.head_VH))
        found = [torch.minimum(p_TV, distribution(logits(h), 1.0)).sum(-1) for h, (*_, p_TV) in zip(hidden, self.texts)]
        self.base = self.base or found
        lengths = torch.tensor([float(len(each)) for each in found])
        gains = torch.tensor([float((a - b).mean()) for a, b in zip(found, self.base)])
        gain = (gains * lengths).sum() / lengths.sum()
        error = ((lengths * (gains - gain)) ** 2).sum().sqrt() / lengths.sum()
        print(f"{name:58} {torch.cat(found).mean():.4f}  {gain:+.4f} +- {error:.4f}", flush=True)


def int4(weight, group=128, symmetric=True):
    return rtn.dequantize_int4(*rtn.quantize_int4(weight, group_size=group, symmetric=symmetric)).to(weight.dtype)


def fp8(weight):
    return rtn.dequantize_fp8(*rtn.quantize_fp8(weight), weight.dtype)


def searched(weight, factors, signs, group=128):
    """Of the candidate scales, the one of least squared error for each group."""
    x = weight.float().unflatten(1, (-1, group))
    high, low = x.amax(2), x.amin(2)
    extreme = torch.where(high > -low, high, low)
    best, chosen = torch.full_like(high, torch.inf), x
    for scale in (extreme * sign * factor for sign in signs for factor in factors):
        scale = scale.to(weight.dtype).float()[..., None]
        rounded = torch.where(scale == 0, 0, (x / scale).round().clamp(-8, 7) * scale)
        error = ((rounded - x) ** 2).sum(2)
        chosen = torch.where((error < best)[..., None], rounded, chosen)
        best = torch.minimum(error, best)
    return chosen.flatten(1).to(weight.dtype)


def rescored(lab: Lab, head_VH, most: int | None = None, margin: float | None = None):
    """Logits of ``head_VH``, of the leading ones those of the policy's."""

    def logits(h):
        z, exact = F.linear(h, head_VH).float(), F.linear(h, lab.head_VH).float()
        floor = z.topk(most, 1).values[:, -1:] if most else z.amax(1, keepdim=True) - margin
        return torch.where(z >= floor, exact, z)

    return logits


def int8(x, group=None):
    grouped = x.float().unflatten(-1, (-1, group or x.shape[-1]))
    scale = grouped.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale == 0, 0, (grouped / scale).round() * scale).flatten(-2).to(x.dtype)


def fp8_tokens(x):
    scale = x.float().abs().amax(-1, keepdim=True) / 448
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def main(checkpoint: str) -> None:
    lab = Lab(checkpoint)
    plain = {name: int4(weight) for name, weight in lab.weights.items()}
    drafted = lab.hidden(plain)
    lab.show("int4 in groups of 128, the policy's head", drafted)

    head4_VH = int4(lab.head_VH)
    lab.show("int4 head", drafted, lambda h: F.linear(h, head4_VH))
    for most in (4, 16, 64, 256):
        lab.show(f"int4 head, the first {most} scored again", drafted, rescored(lab, head4_VH, most=most))
    for margin in (2, 4, 6, 8):
        name = f"int4 head, those within {margin} of the first scored again"
        lab.show(name, drafted, rescored(lab, head4_VH, margin=margin))
    for factor in (0.95, 1.05):
        lab.show(f"drafts at {factor} of the temperature", drafted, lambda h: F.linear(h, lab.head_VH) / factor)

    steps = torch.linspace(0.7, 1.05, 8).tolist()
    for name, quantize in {
        "int4, groups of 64": lambda weight: int4(weight, 64),
        "int4_asym, groups of 128": lambda weight: int4(weight, 128, False),
        "int4_asym, groups of 64": lambda weight: int4(weight, 64, False),
        "fp8": fp8,
        "int4, the better of two scales (1, .9)": lambda weight: searched(weight, (1.0, 0.9), (-0.125,)),
        "int4, the best of 16 scales": lambda weight: searched(weight, steps, (-0.125, 1 / 7)),
    }.items():
        lab.show(name, lab.hidden({each: quantize(weight) for each, weight in lab.weights.items()}))

    total, layers = sum(map(torch.Tensor.numel, lab.weights.values())), lab.model.config.num_hidden_layers
    for name, chosen in {
        "k, v": lambda each: ".k_proj" in each or ".v_proj" in each,
        "o": lambda each: ".o_proj" in each,
        "down": lambda each: ".down_proj" in each,
        "gate, up": lambda each: ".gate_proj" in each or ".up_proj" in each,
        "the first two layers": lambda each: int(each.split(".")[1]) < 2,
        "the last two layers": lambda each: int(each.split(".")[1]) >= layers - 2,
    }.items():
        kept = {each: fp8(weight) for each, weight in lab.weights.items() if chosen(each)}
        more = sum(map(torch.Tensor.numel, kept.values())) * (8 - 4.125) / (total * 4.125)
        lab.show(f"int4, {name} in fp8 ({100 * more:.0f} % more bytes)", lab.hidden({**plain, **kept}))

    for name, activation in {
        "int8 a token and group of 128": lambda x: int8(x, 128),
        "int8 a token": int8,
        "e4m3 a token": fp8_tokens,
    }.items():
        lab.activation = activation
        lab.show(f"int4, activations {name}", lab.hidden(plain))


if __name__ == "__main__":
    main(sys.argv[1])
