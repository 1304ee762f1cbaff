"""Every way in which a trainer changes the policy reaches the drafter, whole, in place and once; what fails does not.

One server with overlap scheduling and gamma = 3 in every step, its radix cache off, as AReaL runs it. The expected
weights of the drafter are computed here, from the checkpoint, by the reference quantizer.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from er_sglang.quantize import create_format
from tests.host.goodness import assert_exact, cells
from tests.host.oracle import Oracle, Sampling
from tests.host.policies import VOCAB, make_policy
from tests.host.servers import REQUEST_TIMEOUT_S, TRAINER, greedy, self_quant, tokens
from tests.host.trainer_client import AREAL, SLIME, VERL, TrainerClient, buckets_of, die_in_the_middle
from tests.host.trainer_plugin.er_trainer import digest

PROMPTS = [[5, 6, 7], [12] * 9, [90, 8, 71, 15, 33], [64, 2]]
NEW_TOKENS = 24
SAMPLES = 300
PADDED_VOCAB = 128  # SGLang's lm_head, in multiples of 64
FUSED = {
    "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attn.o_proj": ["self_attn.o_proj"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down_proj": ["mlp.down_proj"],
}


@dataclass(frozen=True)
class Policy:
    """A checkpoint, and what a server of it must show."""

    path: Path

    @cached_property
    def model(self):
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    @cached_property
    def oracle(self) -> Oracle:
        return Oracle(self.path)

    @cached_property
    def greedy(self) -> list[list[int]]:
        return [self.oracle.greedy(prompt, NEW_TOKENS) for prompt in PROMPTS]

    @cached_property
    def drafter(self) -> dict[str, str]:
        """Digests of the packed weights, by layer."""
        fmt = create_format("int4", group_size=128, device=torch.device("cpu"))
        weights = {"lm_head": F.pad(self.weights["lm_head.weight"], (0, 0, 0, PADDED_VOCAB - VOCAB))}
        for layer in range(self.model.config.num_hidden_layers):
            for fused, parts in FUSED.items():
                parts = [self.weights[f"model.layers.{layer}.{part}.weight"] for part in parts]
                weights[f"model.layers.{layer}.{fused}"] = torch.cat(parts)
        digests = {}
        for name, weight_NK in weights.items():
            packed = fmt.allocate(*weight_NK.shape, weight_NK.dtype, weight_NK.device)
            fmt.refresh_(packed, weight_NK)
            digests[name] = digest(packed)
        return digests


@pytest.fixture(scope="module")
def policies(folder):
    return {name: Policy(make_policy(folder, "qwen2", seed=seed)) for name, seed in (("A", 11), ("B", 12))}


@pytest.fixture(scope="module")
def rollouts(policies, folder):
    config, args = {"policy": {"mode": "always"}}, {"disable-overlap-schedule": False, "disable-radix-cache": True}
    log = folder / "transports.log"
    with self_quant(policies["A"].path, log, config, 3, args, plugins=[TRAINER]) as server:
        yield Rollouts(server, policies)


class Rollouts:
    """The server, the name of the policy it serves, and checks of both."""

    def __init__(self, server, policies) -> None:
        self.server = server
        self.trainer = TrainerClient(server)
        self.policies = policies
        self.current = "A"
        self._acceptance: dict[str, tuple[int, int]] = {}
        self.addresses = self.state()["addresses"]
        self.follows(policies["A"])
        self._acceptance["A"] = self.serve()[1]

    def state(self) -> dict:
        return self.server.get_server_info()["internal_states"][0]

    def counters(self) -> dict:
        return self.state()["self_quant"]

    def serve(self):
        """Greedy outputs of PROMPTS, and (drafted, accepted) tokens on the way."""
        before = self.counters()
        outputs = tokens(self.server.generate({"input_ids": PROMPTS, "sampling_params": greedy(NEW_TOKENS)}))
        self.server.empty()
        after = self.counters()
        return outputs, tuple(after[name] - before[name] for name in ("drafted_tokens", "accepted_tokens"))

    def follows(self, policy: Policy) -> None:
        """Served: this policy, exactly, drafted for by its own copy, at the addresses of the start."""
        before = self.counters()
        outputs, acceptance = self.serve()
        assert outputs == policy.greedy
        prompt = PROMPTS[0]
        requests = {"input_ids": [prompt] * SAMPLES, "sampling_params": Sampling().params(6)}
        assert_exact(cells(policy.oracle, prompt, tokens(self.server.generate(requests)), Sampling()))
        state = self.state()
        assert state["drafter"] == policy.drafter
        assert state["addresses"] == self.addresses
        assert not state["self_quant"]["dirty"]
        assert state["self_quant"]["cycles"] > before["cycles"]
        for name, known in self.policies.items():
            if known is policy:
                assert acceptance == self._acceptance.setdefault(name, acceptance)
                assert acceptance[1] > 0.1 * acceptance[0], "another policy's drafter is right once in a hundred tokens"

    def refuses_to_draft(self, policy: Policy) -> None:
        """Served: this policy, exactly, by plain decoding, and it says so."""
        before = self.counters()["decisions"].get("gamma=0:update-failed", 0)
        outputs, (drafted, _) = self.serve()
        assert outputs == policy.greedy and drafted == 0
        after = self.counters()
        assert after["decisions"]["gamma=0:update-failed"] > before and after["dirty"]
        assert "serving plain decoding until an update succeeds" in self.server.log_path.read_text()

    @contextmanager
    def changes(self, **expected: int):
        """By how much the counters of updates rise in the block."""
        before = self.counters()
        yield
        after = self.counters()
        assert {name: after[name] - before[name] for name in expected} == expected

    def next_policy(self) -> Policy:
        self.current = "B" if self.current == "A" else "A"
        return self.policies[self.current]

    def mixture(self, sent: list[str], folder: Path) -> Policy:
        """The current policy with the named tensors of the next one."""
        old, new = (self.policies[name] for name in ("AB" if self.current == "A" else "BA"))
        model = AutoModelForCausalLM.from_pretrained(old.path, dtype=torch.float32)
        model.load_state_dict({name: new.weights[name] for name in sent}, strict=False)
        model.save_pretrained(folder)
        return Policy(folder)


# -- what arrives ----------------------------------------------------------------------------------------------


def slime_disk(trainer, policy, **version):
    with trainer.paused():
        trainer.send_disk(policy.path, **SLIME, **version)


def slime_tensors(trainer, policy, **version):
    with trainer.paused():
        trainer.send_tensors(buckets_of(policy.weights), **SLIME, **version)


def slime_flattened(trainer, policy, **version):
    with trainer.paused():
        trainer.send_tensors(buckets_of(policy.weights), flattened=True, **SLIME, **version)


def tensors_for_the_policy_alone(trainer, policy, **version):
    with trainer.paused():
        trainer.send_tensors(buckets_of(policy.weights), disable_draft_model=True, **SLIME, **version)


def slime_distributed(trainer, policy, **version):
    with trainer.group("slime-pp_0") as group, trainer.paused():
        for bucket in buckets_of(policy.weights):
            group.send(bucket, **SLIME, **version)


def distributed_flattened(trainer, policy, **version):
    with trainer.group("slime-pp_0") as group, trainer.paused():
        for bucket in filter(None, buckets_of(policy.weights)):
            group.send_flattened(bucket, **SLIME, **version)


def ipc(trainer, policy, **version):
    with trainer.paused():
        trainer.send_ipc(policy.path, **SLIME, **version)


def slime_colocated(trainer, policy, **version):
    trainer.server.empty()
    trainer.release()
    trainer.reclaim("weights")
    slime_flattened(trainer, policy, **version)  # continues while KV cache and graphs are away
    trainer.reclaim("kv_cache", "cuda_graph")


def weights_come_back_last(trainer, policy, **version):
    trainer.release("kv_cache")
    trainer.release("weights", "cuda_graph")
    trainer.reclaim("cuda_graph")
    trainer.reclaim("kv_cache")
    trainer.resume()  # nothing may be touched yet
    trainer.reclaim("weights")
    trainer.pause()
    trainer.send_disk(policy.path, **version)
    trainer.resume()


VERSIONED = [
    slime_disk, slime_tensors, slime_flattened, tensors_for_the_policy_alone, slime_distributed, distributed_flattened,
    ipc, slime_colocated, weights_come_back_last,
]  # fmt: skip


@pytest.mark.parametrize("deliver", VERSIONED, ids=lambda deliver: deliver.__name__)
def test_with_a_version(rollouts, deliver):
    policy, version = rollouts.next_policy(), deliver.__name__
    with rollouts.changes(refreshes=1, failed_updates=0):
        deliver(rollouts.trainer, policy, weight_version=version)
        assert not rollouts.counters()["dirty"], "refreshed when generation continued, not when it drafted"
        rollouts.follows(policy)
    answer = rollouts.server.generate({"input_ids": [1], "sampling_params": greedy(4)})
    assert answer["meta_info"]["weight_version"] == version


def areal_distributed(trainer, policy):
    with trainer.group("update_weight_group") as group:
        trainer.pause()
        for bucket in buckets_of(policy.weights):
            group.send(bucket, **AREAL)
        trainer.resume()


def areal_disk(trainer, policy):
    trainer.pause()
    trainer.send_disk(policy.path, **AREAL)
    trainer.resume()


def awex(trainer, policy):
    trainer.pause()
    trainer.write_directly(policy.path)
    trainer.resume()


def slime_post_processed(trainer, policy):
    with trainer.paused():
        trainer.post_process()
        trainer.send_tensors(buckets_of(policy.weights), **SLIME)
        trainer.post_process()


def nobody_pauses(trainer, policy):
    trainer.send_tensors(buckets_of(policy.weights))


def verl_colocated(trainer, policy):
    """veRL's checkpoint engine "naive"."""
    trainer.release("kv_cache", "weights")
    trainer.reclaim("weights")
    trainer.send_tensors(buckets_of(policy.weights), **VERL)
    trainer.server.empty()
    trainer.reclaim("kv_cache")


def verl_disaggregated(trainer, policy):
    """veRL's other checkpoint engines, which pass the buckets on to a process beside the server."""
    trainer.pause()
    trainer.release("kv_cache")
    trainer.send_tensors(buckets_of(policy.weights), **VERL)
    trainer.server.empty()
    trainer.reclaim("kv_cache")
    trainer.server.empty()
    trainer.resume()


UNVERSIONED = [
    areal_distributed, areal_disk, awex, slime_post_processed, nobody_pauses, verl_colocated, verl_disaggregated,
]  # fmt: skip


@pytest.mark.parametrize("deliver", UNVERSIONED, ids=lambda deliver: deliver.__name__)
def test_without_a_version(rollouts, deliver):
    policy = rollouts.next_policy()
    with rollouts.changes(refreshes=1, failed_updates=0, updates=1):
        deliver(rollouts.trainer, policy)
        rollouts.follows(policy)


def test_sleep_without_an_update(rollouts):
    """The policy comes back from its backup; the drafter, which has none, is made anew."""
    policy = rollouts.policies[rollouts.current]
    with rollouts.changes(refreshes=1, updates=0):
        rollouts.trainer.release()
        rollouts.trainer.reclaim()
        assert rollouts.state()["drafter"] != policy.drafter, "the plugin should have lost it"
        rollouts.trainer.write_directly(policy.path)
        rollouts.follows(policy)


# -- what runs meanwhile ---------------------------------------------------------------------------------------

LONG = 800  # many times what it takes to interfere, on a busy machine too; within the context


@contextmanager
def in_flight(rollouts, **more):
    """Long greedy answers to PROMPTS on their way, each of eight tokens at least; yields a future of them all."""
    running = threading.Event()

    def ask() -> list[list[int]]:
        outputs = {}
        for chunk in rollouts.server.stream({"input_ids": PROMPTS, "sampling_params": greedy(LONG), **more}):
            outputs[chunk["index"]] = chunk["output_ids"]
            if len(outputs) == len(PROMPTS) and min(map(len, outputs.values())) >= 8:
                running.set()
        return [outputs[i] for i in range(len(PROMPTS))]

    with ThreadPoolExecutor(1) as client:
        answers = client.submit(ask)
        assert running.wait(REQUEST_TIMEOUT_S)
        yield answers


def continued(
    old: Policy, new: Policy, prompt: list[int], first: list[int], kept_kv: bool, new_tokens: int
) -> list[int]:
    """Greedy continuation by ``new`` after ``first`` by ``old``, whose KV is kept or not."""
    if not kept_kv:
        return new.oracle.greedy([*prompt, *first], new_tokens)
    with torch.inference_mode():
        cache = old.model(torch.tensor([[*prompt, *first[:-1]]]), use_cache=True).past_key_values
        token, output = first[-1], []
        while len(output) < new_tokens:
            step = new.model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            token, cache = int(step.logits[0, -1].argmax()), step.past_key_values
            output.append(token)
    return output


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_an_update_in_mid_sequence(rollouts, mode):
    """Tokens of the old policy, then of the new one, with no step between that is neither."""
    old, new = rollouts.policies[rollouts.current], rollouts.next_policy()
    with rollouts.changes(refreshes=1), in_flight(rollouts) as answers:
        rollouts.trainer.pause(mode)
        rollouts.trainer.send_tensors(buckets_of(new.weights), **SLIME)
        rollouts.trainer.resume()
        outputs = answers.result()
    for prompt, output in zip(PROMPTS, outputs):
        old_would = old.oracle.logits(torch.tensor([prompt + output]))[0, len(prompt) - 1 : -1].argmax(1)
        agree = next(i for i in range(LONG) if output[i] != old_would[i])
        # The new policy may have agreed with the old one for a token or two.
        assert any(
            output[first : agree + 24]
            == continued(old, new, prompt, output[:first], mode == "in_place", agree + 24 - first)
            for first in range(agree, max(0, agree - 4), -1)
        )
    rollouts.follows(new)


def test_interruptible_generation(rollouts):
    """AReaL's: abort, update, and the client asks for the rest."""
    old, new = rollouts.policies[rollouts.current], rollouts.next_policy()
    with in_flight(rollouts) as answers:
        rollouts.trainer.pause()
        partial = answers.result()
    rollouts.trainer.send_disk(new.path, **AREAL)
    rollouts.trainer.resume()
    longer = [[*prompt, *first] for prompt, first in zip(PROMPTS, partial)]
    rest = tokens(rollouts.server.generate({"input_ids": longer, "sampling_params": greedy(NEW_TOKENS)}))
    for prompt, first, more in zip(PROMPTS, partial, rest):
        assert 0 < len(first) < LONG and first == old.oracle.greedy(prompt, len(first))
        assert more == new.oracle.greedy([*prompt, *first], NEW_TOKENS)
    rollouts.follows(new)


def test_an_update_that_aborts(rollouts):
    """It follows the last answer so fast that the step after that answer is still in flight."""
    new = rollouts.next_policy()
    names = [f"linger-{i}" for i in range(len(PROMPTS))]
    with rollouts.changes(refreshes=1), in_flight(rollouts, rid=names) as answers:
        rollouts.trainer.send_disk(new.path, **AREAL)
        assert all(len(output) < LONG for output in answers.result())
        rollouts.follows(new)


# -- what fails ------------------------------------------------------------------------------------------------


BAD_SHAPE = ("model.norm.weight", torch.zeros(3))


def test_a_missing_bucket(rollouts, folder):
    """The server cannot know. The policy is then a mixture; its drafter is that mixture's, to the last bit."""
    first, *_ = buckets_of(rollouts.policies["B" if rollouts.current == "A" else "A"].weights)
    mixture = rollouts.mixture([name for name, _ in first], folder / "missing-bucket")
    with rollouts.changes(refreshes=1, failed_updates=0):
        with rollouts.trainer.paused():
            rollouts.trainer.send_tensors([first], **SLIME)
        rollouts.follows(mixture)
    recover(rollouts)


def test_an_unknown_name(rollouts):
    """SGLang only logs it; the rest of the bucket arrives."""
    policy = rollouts.next_policy()
    stray = [("model.layers.0.mlp.no_such_proj.weight", torch.zeros(3, 3))]
    with rollouts.changes(refreshes=1, failed_updates=0):
        with rollouts.trainer.paused():
            rollouts.trainer.send_tensors([*buckets_of(policy.weights), stray], **SLIME)
        rollouts.follows(policy)


def test_a_bad_shape(rollouts, folder):
    """In the second of three buckets: the update has failed, whatever comes behind it.

    (Sent by `update_weights_from_tensor` it would end the server: SGLang's own way, here as without us.)
    """
    target = rollouts.policies["B" if rollouts.current == "A" else "A"]
    first, second, _, last = buckets_of(target.weights)
    mixture = rollouts.mixture([name for bucket in (first, second, last) for name, _ in bucket], folder / "bad-shape")
    with rollouts.changes(refreshes=0, failed_updates=1), rollouts.trainer.group("bad-shape") as group:
        with rollouts.trainer.paused():
            group.send(first, **SLIME)
            with pytest.raises(RuntimeError, match="400"):
                group.send([*second, BAD_SHAPE], **SLIME)
            group.send(last, **SLIME)
        rollouts.refuses_to_draft(mixture)
    recover(rollouts)


def test_a_killed_trainer(rollouts):
    """SGLang loads a bucket once it has all of it: of one that breaks off, nothing."""
    target = rollouts.policies["B" if rollouts.current == "A" else "A"]
    with rollouts.changes(refreshes=0, failed_updates=1):
        rollouts.trainer.pause()
        with pytest.raises(RuntimeError, match="400"):
            die_in_the_middle(rollouts.server, "killed", buckets_of(target.weights)[0])
        rollouts.trainer.resume()
        rollouts.refuses_to_draft(rollouts.policies[rollouts.current])
    recover(rollouts)


@pytest.mark.parametrize("send", [TrainerClient.send_disk, TrainerClient.send_ipc], ids=["disk", "ipc"])
def test_no_such_policy(rollouts, send):
    with rollouts.changes(refreshes=0, failed_updates=1):
        rollouts.trainer.pause()
        with pytest.raises(RuntimeError, match="400"):
            send(rollouts.trainer, Path("/no/such/policy"))
        rollouts.trainer.resume()
        rollouts.refuses_to_draft(rollouts.policies[rollouts.current])
    recover(rollouts)


def recover(rollouts):
    """The next good update is drafted for."""
    policy = rollouts.next_policy()
    with rollouts.changes(refreshes=1, failed_updates=0):
        slime_tensors(rollouts.trainer, policy)
        rollouts.follows(policy)
