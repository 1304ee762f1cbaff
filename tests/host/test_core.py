"""What must hold on every supported release of SGLang, on one server of it: `launch/test --release 0.5.23` runs this there.

The other modules ask more, of the release that is installed by default.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from er_sglang.cli import main
from tests.host.goodness import assert_exact, cells, is_exact
from tests.host.oracle import Oracle, Sampling
from tests.host.policies import make_policy
from tests.host.servers import ENV, SABOTAGE, START_TIMEOUT_S, TRAINER, greedy, self_quant, tokens
from tests.host.trainer_client import SLIME, TrainerClient, buckets_of

pytestmark = pytest.mark.core

GAMMA = 3
PROMPT = [17, 4, 88, 23, 61, 9]
PROMPTS = [[5, 6, 7], [12] * 9, [90, 8, 71, 15, 33], [64, 2]]
NEW_TOKENS = 24
SETTINGS = {
    "T=1": Sampling(),
    "top_k+top_p+min_p": Sampling(temperature=1.3, top_k=20, top_p=0.85, min_p=0.02),
    "logit_bias": Sampling(logit_bias=((5, 3.0), (9, -4.0), (40, 1.5))),
    "penalties": Sampling(temperature=0.8, frequency_penalty=0.5, presence_penalty=0.5, repetition_penalty=1.3),
}


class Core:
    """The server, the policy that it serves, and another one."""

    def __init__(self, server, rule_file: Path, policy: Path, other: Path) -> None:
        self.server = server
        self.trainer = TrainerClient(server)
        self.policy, self.other = policy, other
        self.rule_file = rule_file

    def sample(self, sampling, n=1200):
        return tokens(self.server.generate({"input_ids": [PROMPT] * n, "sampling_params": sampling.params(2 * GAMMA)}))

    def greedy(self):
        self.server.empty()
        return tokens(self.server.generate({"input_ids": PROMPTS, "sampling_params": greedy(NEW_TOKENS)}))

    def follows(self) -> None:
        """Served is the policy, drafted for by its own copy."""
        before = self.server.self_quant()
        assert self.greedy() == [Oracle(self.policy).greedy(prompt, NEW_TOKENS) for prompt in PROMPTS]
        after = self.server.self_quant()
        assert after["cycles"] > before["cycles"] and not after["dirty"]

    def swap(self) -> Path:
        self.policy, self.other = self.other, self.policy
        return self.policy


@pytest.fixture(scope="module")
def core(qwen3, folder):
    rule_file = folder / "core-sabotage.txt"
    rule_file.write_text("none")
    env = {"ER_SABOTAGE_FILE": str(rule_file)}
    args = {"disable-overlap-schedule": False, "enable-metrics": True}
    config = {"policy": {"mode": "cycle", "cycle": [GAMMA, 1, GAMMA, 0]}}
    with self_quant(qwen3, folder / "core.log", config, GAMMA, args, env, (SABOTAGE, TRAINER)) as server:
        yield Core(server, rule_file, qwen3, make_policy(folder, "qwen3", seed=3, spread=0.7))


def test_greedy_tokens_and_log_probabilities(core, qwen3_oracle):
    core.follows()
    (answer,) = core.server.generate(
        {"input_ids": [PROMPT], "sampling_params": greedy(NEW_TOKENS), "return_logprob": True}
    )
    output = answer["output_ids"]
    logits_TV = qwen3_oracle.logits(torch.tensor([PROMPT + output]))[0, len(PROMPT) - 1 : -1]
    expected = logits_TV.log_softmax(1).gather(1, torch.tensor(output).view(-1, 1)).view(-1).tolist()
    found = [value for value, _, _ in answer["meta_info"]["output_token_logprobs"]]
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
def test_exact(core, qwen3_oracle, sampling):
    assert_exact(cells(qwen3_oracle, PROMPT, core.sample(sampling), sampling))


@pytest.mark.parametrize("rule", ["accept-always", "q-of-another-step"])
def test_a_wrong_rule_fails(core, qwen3_oracle, rule):
    core.rule_file.write_text(rule)
    try:
        outputs = core.sample(Sampling())
    finally:
        core.rule_file.write_text("none")
    assert not is_exact(cells(qwen3_oracle, PROMPT, outputs, Sampling()))


def test_counters_and_prometheus(core):
    core.greedy()
    core.server.empty()  # the step after the last answer has come back, too
    info = core.server.self_quant()
    assert info["cycles"] + info["decode_steps"] == sum(info["decisions"].values())
    assert 0 < info["accepted_tokens"] < info["drafted_tokens"] and 1 < info["accept_length"] < 1 + GAMMA
    line = re.compile(r"^sglang:self_quant_drafted_tokens(?:_total)?\{.*\} (\S+)$", re.MULTILINE)
    assert sum(map(float, line.findall(core.server.metrics()))) == info["drafted_tokens"]


def test_a_request_counts_its_drafts(core):
    answers = core.server.generate({"input_ids": PROMPTS, "sampling_params": greedy(NEW_TOKENS)})
    for meta in (answer["meta_info"] for answer in answers):
        assert 0 <= meta["spec_num_correct_drafts"] <= meta["spec_num_proposed_drafts"] and meta["spec_verify_ct"] > 0
        assert meta["spec_num_proposed_drafts"] > 0


def test_control(core):
    core.server.change_self_quant({"mode": "off"})
    before = core.server.self_quant()
    core.greedy()
    assert core.server.self_quant()["drafted_tokens"] == before["drafted_tokens"]
    with pytest.raises(RuntimeError, match="mode is 'nonsense'"):
        core.server.change_self_quant({"mode": "nonsense"})
    core.server.change_self_quant({"mode": "cycle", "cycle": [GAMMA, 1, GAMMA, 0]})
    core.follows()


def by_disk(trainer, policy, weights):
    with trainer.paused():
        trainer.send_disk(policy, **SLIME)


def by_tensors(trainer, policy, weights):
    with trainer.paused(), trainer.marked():
        trainer.send_tensors(buckets_of(weights), **SLIME)


def by_flattened_tensors(trainer, policy, weights):
    with trainer.paused(), trainer.marked():
        trainer.send_tensors(buckets_of(weights), flattened=True, **SLIME)


def by_group(trainer, policy, weights):
    with trainer.group("core") as group, trainer.paused(), trainer.marked():
        for bucket in buckets_of(weights):
            group.send(bucket, **SLIME)


def by_ipc(trainer, policy, weights):
    with trainer.paused():
        trainer.send_ipc(policy, **SLIME)


@pytest.mark.parametrize("send", [by_disk, by_tensors, by_flattened_tensors, by_group, by_ipc])
def test_an_update(core, send):
    """Reaches policy and drafter, which is made anew once."""
    policy = core.swap()
    weights = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).state_dict()
    before = core.server.self_quant()
    send(core.trainer, policy, weights)
    core.follows()
    after = core.server.self_quant()
    changed = {name: after[name] - before[name] for name in ("updates", "failed_updates", "refreshes")}
    assert changed == {"updates": 1, "failed_updates": 0, "refreshes": 1}


def test_an_update_that_fails(core):
    """The server decodes plainly, as it did, until one succeeds."""
    with core.trainer.paused(), pytest.raises(RuntimeError, match="400"):
        core.trainer.send_disk(Path("/no/such/policy"), **SLIME)
    before = core.server.self_quant()
    assert core.greedy() == [Oracle(core.policy).greedy(prompt, NEW_TOKENS) for prompt in PROMPTS]
    after = core.server.self_quant()
    assert after["drafted_tokens"] == before["drafted_tokens"] and "gamma=0:update-failed" in after["decisions"]
    by_disk(core.trainer, core.policy, None)
    core.follows()


def test_sleep(core):
    """What is released is lost: weights, drafter and KV cache."""
    before = core.server.self_quant()["refreshes"]
    core.server.empty()
    core.trainer.release()
    core.trainer.reclaim()
    by_disk(core.trainer, core.swap(), None)
    core.follows()
    assert core.server.self_quant()["refreshes"] == before + 1


CONSTRUCT = """
import json, sys
from er_sglang import autoload
autoload.install()
from sglang.srt.server_args import ServerArgs
plain = dict(model_path=sys.argv[1], device="cpu", attention_backend="torch_native", skip_tokenizer_init=True)
answers = []
for more in ({}, {"speculative_eagle_topk": 4}, {"speculative_draft_model_path": sys.argv[1]}, {"pp_size": 2}):
    args = None
    try:
        args = ServerArgs(speculative_algorithm="SELF_QUANT", speculative_num_steps=3, **plain, **more)
        getattr(args, "resolve_once", bool)()
        answers.append("accepted")
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
print("ANSWERS" + json.dumps(answers))
"""


def test_server_args_with_autoload(qwen3):
    """SELF_QUANT is known where nobody has loaded plugins, and refuses what it cannot honour."""
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", CONSTRUCT, str(qwen3)],
        env={**os.environ, **ENV, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
    )
    assert "ANSWERS" in done.stdout, done.stderr[-3000:]
    accepted, topk, draft, stages = json.loads(done.stdout.split("ANSWERS")[1])
    assert accepted == "accepted"
    assert "drop --speculative-eagle-topk" in topk and "drop --speculative-draft-model-path" in draft
    assert "use --tp instead of --pp-size" in stages


def test_the_patch_fits(capsys):
    assert main(["patch", "verify"]) in (0, 1)
    assert "applied" in capsys.readouterr().out
