"""A drafter with an attention window: what it sees is what the window says, and what is emitted is still the
policy's."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from er_sglang.cycle.window import SINK_TOKENS
from er_sglang.drafting.rescoring import rescore_reference_
from er_sglang.quantize import rtn
from tests.host.goodness import assert_exact, cells
from tests.host.oracle import Sampling
from tests.host.policies import VOCAB
from tests.host.servers import BULK, greedy, self_quant, tokens

RECENT = 24
PROMPT = [random.Random(5).randrange(2, VOCAB) for _ in range(150)]


@pytest.fixture(scope="module")
def server(qwen3, folder):
    config = {"policy": {"mode": "cycle", "cycle": [3, 1, 0, 2]}, "drafter": {"attention_window": RECENT}}
    args, log = {"disable-overlap-schedule": False}, folder / "window.log"
    with self_quant(qwen3, log, config, 3, args, plugins=[BULK]) as server:
        yield server


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.6, top_p=0.9)], ids=["T=1", "top_p"])
def test_distribution(server, qwen3_oracle, sampling):
    before = server.self_quant()
    answers = server.generate({"input_ids": [PROMPT] * 1200, "sampling_params": sampling.params(8)})
    assert_exact(cells(qwen3_oracle, PROMPT, tokens(answers), sampling))
    assert server.self_quant()["accepted_tokens"] > before["accepted_tokens"]


def test_drafts_are_those_of_the_window(server, qwen3, qwen3_oracle):
    """The first draft of many greedy requests, within the window and beyond, is accepted or not as a reference in
    transformers says: the int4 weights on the policy's KV cache, cut to the window."""
    rng = random.Random(6)
    prompts = [[rng.randrange(2, VOCAB) for _ in range(SINK_TOKENS - 20 + i)] for i in range(120)]
    outputs = [qwen3_oracle.greedy(prompt, 2) for prompt in prompts]
    accepted = {
        recent: [draft == second for draft, (_, second) in zip(drafts(qwen3, prompts, outputs, recent), outputs)]
        for recent in (RECENT, RECENT // 2, 10**6)
    }
    assert len(set(map(tuple, accepted.values()))) == 3, "a window of another size would do as well"
    server.change_self_quant({"mode": "always", "fixed_gamma": 1})
    answers = server.generate({"input_ids": prompts, "sampling_params": greedy(2)})
    assert tokens(answers) == outputs
    assert [answer["meta_info"]["spec_num_correct_drafts"] for answer in answers] == accepted[RECENT]


@torch.inference_mode()
def drafts(
    policy, prompts: list[list[int]], outputs: list[list[int]], recent: int = 10**6, head: str = "int4"
) -> list[int]:
    """What a drafter proposes, greedily, after each prompt and the first token of its output.

    recent: its window, by default all. head: its lm_head, "int4", "int4_rescored" or the "policy"'s.
    """
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    caches = [model(torch.tensor([prompt]), use_cache=True).past_key_values for prompt in prompts]
    policy_head_VH = model.lm_head.weight.data
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and (name != "lm_head" or head != "policy"):
            packed = rtn.quantize_int4(linear.weight.data, group_size=128, symmetric=True)
            linear.weight = torch.nn.Parameter(
                rtn.dequantize_int4(*packed).float()
            )  # a tied embedding keeps the old one
    found = []
    for prompt, (first, _), cache in zip(prompts, outputs, caches):
        length = len(prompt)
        seen = sorted({*range(min(SINK_TOKENS, length)), *range(max(length - recent, 0), length)})
        cut = DynamicCache()
        for index, layer in enumerate(cache.layers):
            cut.update(layer.keys[:, :, seen], layer.values[:, :, seen], index)
        position = torch.tensor([[length]])
        hidden_1H = model.model(torch.tensor([[first]]), past_key_values=cut, position_ids=position)[0][0]
        logits_1V = model.lm_head(hidden_1H)
        if head == "int4_rescored":
            rescore_reference_(logits_1V, hidden_1H, policy_head_VH)
        found.append(int(logits_1V.argmax()))
    return found
