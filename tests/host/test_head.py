"""The drafter's lm_head: quantized for drafting alone, tied to the embedding or not, and as fresh as the policy's."""

from __future__ import annotations

import random

import pytest

from er_sglang.config import HEADS
from tests.host.oracle import Oracle
from tests.host.policies import VOCAB, make_policy
from tests.host.reference_drafter import ReferenceDrafter
from tests.host.servers import greedy, self_quant, tokens
from tests.host.trainer_client import TrainerClient

SERVED = [("int4", True), ("int4", False), ("int4_rescored", True), ("policy", True)]


@pytest.fixture(scope="module", params=SERVED, ids=["tied", "untied", "rescored", "policy"])
def served(request, folder):
    """A server, its lm_head setting, and two policies: the one it starts with and the one it is given."""
    head, tied = request.param
    name = f"head-{head}-{'tied' if tied else 'untied'}"
    policies = [make_policy(folder / name, "qwen3", seed=seed, tied=tied, spread=0.7) for seed in (31, 32)]
    config = {"policy": {"mode": "always"}, "drafter": {"head": head}}
    with self_quant(policies[0], folder / f"{name}.log", config, 1) as server:
        yield server, head, policies


def test_drafts_are_those_of_the_quantized_head(served):
    """The first draft of many greedy requests is accepted or not as a reference in transformers says; then again after
    an update, which the head follows."""
    server, head, policies = served
    assert server.self_quant()["head"] == head
    assert "of the policy's own layers" not in server.log_path.read_text()
    for policy in policies:
        if policy is not policies[0]:
            trainer = TrainerClient(server)
            with trainer.paused():
                trainer.send_disk(policy)
        rng, oracle = random.Random(6), Oracle(policy)
        prompts = [[rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 30))] for _ in range(200)]
        outputs = [oracle.greedy(prompt, 2) for prompt in prompts]
        accepted = {h: first_drafts(ReferenceDrafter(policy, h), prompts, outputs) for h in HEADS}
        assert accepted["int4"] != accepted["policy"] == accepted["int4_rescored"], "any head would do"
        answers = server.generate({"input_ids": prompts, "sampling_params": greedy(2)})
        assert tokens(answers) == outputs
        assert [answer["meta_info"]["spec_num_correct_drafts"] for answer in answers] == accepted[head]
        assert any(accepted[head])


def first_drafts(drafter: ReferenceDrafter, prompts: list[list[int]], outputs: list[list[int]]) -> list[bool]:
    """Whether the draft after the first token of each output is its second."""
    found = []
    for prompt, (first, second) in zip(prompts, outputs):
        length = len(prompt)
        drafts, _ = drafter.drafts(first, length, drafter.cache(prompt), [*range(length)])
        found.append(drafts == [second])
    return found
