"""The calls by which slime and AReaL drive a server, in their order: rollouts, and policy updates by every transport.

``Trainer`` is a client of our own that sends what theirs send (slime of August 2026, AReaL 1.0.4). Their own code is not
run here, and neither are the parts that need GPUs: CUDA IPC, NCCL, and memory that is really given back.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from time import sleep

import pytest
import torch
from sglang.srt.utils import MultiprocessingSerializer, init_custom_process_group
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket
from transformers import AutoModelForCausalLM

from er_sglang import logprobs
from er_sglang.bench.serving import free_port
from er_sglang.sampling import Verdict
from tests.host.oracle import Oracle
from tests.host.policies import make_policy
from tests.host.servers import greedy, self_quant, tokens

GAMMAS = [3, 0, 2]
PROMPTS = [[5, 6, 7], [12] * 9, [90, 8, 71, 15, 33], [64, 2]]
NEW_TOKENS = 24
BUCKET = 5  # tensors: the q, k and v of a layer straddle buckets


@pytest.fixture(scope="module")
def policies(folder):
    return {name: make_policy(folder, "qwen2", seed=seed) for name, seed in (("A", 21), ("B", 22), ("C", 23))}


@pytest.fixture(scope="module")
def oracles(policies):
    return {name: Oracle(path) for name, path in policies.items()}


@pytest.fixture(scope="module")
def server(policies, folder):
    config = {"policy": {"mode": "cycle", "cycle": GAMMAS}}
    args = {"skip-tokenizer-init": False, "enable-metrics": True}
    with self_quant(policies["A"], folder / "trainers.log", config, max(GAMMAS), args) as server:
        yield server


@pytest.fixture(scope="module")
def trainer(server):
    trainer = Trainer(server)
    yield trainer
    trainer.leave()


class Trainer:
    """A trainer's side of the protocol; ``group`` is its end of the process group that weights are sent through."""

    def __init__(self, server) -> None:
        self.server = server
        self.group = None
        self._pool = ThreadPoolExecutor()

    def rollout(self, prompts, **sampling) -> list[dict]:
        return self.server.generate({"input_ids": prompts, "sampling_params": sampling, "return_logprob": True})

    def rollout_meanwhile(self, prompts, **sampling):
        """A rollout that goes on in the background; returns its future once it is under way."""
        before = self.server.self_quant()["emitted_tokens"]
        rollout = self._pool.submit(self.rollout, prompts, **sampling)
        while self.server.self_quant()["emitted_tokens"] == before and not rollout.done():
            sleep(0.05)
        return rollout

    @contextmanager
    def paused(self):
        self.server.post("/pause_generation", {})
        try:
            yield
        finally:
            self.server.post("/continue_generation", {})

    def join(self) -> None:
        port = free_port()
        request = {"master_address": "127.0.0.1", "rank_offset": 1, "world_size": 2, "group_name": "policy", "backend": "gloo"}
        answer = self._pool.submit(self.server.post, "/init_weights_update_group", {**request, "master_port": str(port)})
        self.group = init_custom_process_group(
            backend="gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=0, group_name="policy"
        )
        assert answer.result()["success"]

    def leave(self) -> None:
        if self.group is not None:
            torch.distributed.destroy_process_group(self.group)
        self._pool.shutdown()

    def broadcast(self, named, **more) -> None:
        """One bucket by way of the process group."""
        request = {
            "names": [name for name, _ in named],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in named],
            "shapes": [list(tensor.shape) for _, tensor in named],
            "group_name": "policy",
        }
        answer = self._pool.submit(self.server.post, "/update_weights_from_distributed", {**request, **more})
        for _, tensor in named:
            torch.distributed.broadcast(tensor.contiguous(), 0, group=self.group)
        assert answer.result()["success"]

    def hand_over(self, named, **more) -> None:
        """One flattened bucket as a handle to shared memory."""
        torch.multiprocessing.set_sharing_strategy("file_system")
        bucket = FlattenedTensorBucket(named_tensors=named)
        handle = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
        serialized = MultiprocessingSerializer.serialize(handle, output_str=True)
        request = {"serialized_named_tensors": [serialized], "load_format": "flattened_bucket", "flush_cache": False}
        assert self.server.post("/update_weights_from_tensor", {**request, **more})["success"]


def buckets(path):
    named = list(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict().items())
    return [named[start : start + BUCKET] for start in range(0, len(named), BUCKET)]


def counters(server, before=None):
    info = server.self_quant()
    names = ("update_calls", "updates", "failed_updates", "refreshes", "drafted_tokens", "accepted_tokens", "decode_steps", "cycles")
    return {name: info[name] - (before[name] if before else 0) for name in names} | {"dirty": info["dirty"]}


def check_rollout(trainer, oracle):
    """Greedy outputs are the policy's, logprobs come along, and drafts are accepted: the drafter is this policy's."""
    before = counters(trainer.server)
    answers = trainer.rollout(PROMPTS, **greedy(NEW_TOKENS))
    assert tokens(answers) == [oracle.greedy(prompt, NEW_TOKENS) for prompt in PROMPTS]
    for answer in answers:
        logprobs = answer["meta_info"]["output_token_logprobs"]
        assert [token for _, token, _ in logprobs] == answer["output_ids"]
    after = counters(trainer.server, before)
    assert after["accepted_tokens"] > 0.2 * after["drafted_tokens"] > 0, "a stale drafter is right once in a hundred tokens"


def test_counts_of_a_request(trainer, server):
    """What a request reports of its drafts adds up to what the server counts, though gamma changes at every step."""
    before = counters(server)
    sampling = [{"temperature": 1, "max_new_tokens": n, "ignore_eos": True} for n in (9, 17, 30, 31)]
    answers = server.generate({"input_ids": PROMPTS, "sampling_params": sampling, "return_logprob": True})
    after = counters(server, before)
    infos = [answer["meta_info"] for answer in answers]
    assert sum(info["spec_num_proposed_drafts"] for info in infos) == after["drafted_tokens"]
    assert sum(info["spec_num_correct_drafts"] for info in infos) == after["accepted_tokens"]
    assert max(info["spec_verify_ct"] for info in infos) == after["decode_steps"] + after["cycles"]
    for info in infos:
        assert info["spec_accept_rate"] == info["spec_num_correct_drafts"] / info["spec_num_proposed_drafts"]
        assert info["spec_accept_length"] == info["completion_tokens"] / info["spec_verify_ct"]
        assert sum(info["spec_correct_drafts_histogram"]) == info["spec_verify_ct"]
        # Names that SGLang has dropped and slime still reads.
        assert info["spec_draft_token_num"] == info["spec_num_proposed_drafts"]
        assert info["spec_accept_token_num"] == info["spec_num_correct_drafts"]


def test_counts_of_single_steps(trainer):
    """Each gamma once, one step per request. Without drafts there is no rate, rather than a rate of zero."""
    infos = [trainer.rollout(PROMPTS[:1], max_new_tokens=2, ignore_eos=True)[0]["meta_info"] for _ in GAMMAS]
    assert sorted(info["spec_num_proposed_drafts"] for info in infos) == sorted(GAMMAS)
    for info in infos:
        assert ("spec_accept_rate" in info) == (info["spec_num_proposed_drafts"] > 0)


def test_logprobs_by_slimes_signature(monkeypatch):
    """slime's top-p patch inserts an argument into a function that we call."""
    received = {}

    def patched(batch, logits_output, predict, accept_index, accept_lens, speculative_num_steps):
        received.update(predict=predict, index=accept_index, lens=accept_lens, gamma=speculative_num_steps)

    monkeypatch.setattr(logprobs, "compute_spec_v2_logprobs", patched)
    lens = torch.tensor([3, 1], dtype=torch.int32)
    logprobs.attach_logprobs(None, None, Verdict(torch.tensor([[7, 8, 9], [4, 0, 0]]), lens, torch.tensor([9, 4])), gamma=2)
    assert received["predict"].tolist() == [7, 8, 9, 4, 0, 0]
    assert received["index"].tolist() == [[0, 1, 2], [3, -1, -1]]
    assert received["lens"] is lens and received["gamma"] == 2


def test_slime_without_colocation(trainer, server, policies, oracles):
    """pause, flush, buckets by broadcast, continue; what was running comes back aborted."""
    check_rollout(trainer, oracles["A"])
    trainer.join()
    running = trainer.rollout_meanwhile(PROMPTS[:1], **greedy(1500))
    before = counters(server)
    parts = buckets(policies["B"])
    with trainer.paused():
        partial = running.result()[0]
        server._request("/flush_cache")
        for part in parts:
            trainer.broadcast(part, flush_cache=False, weight_version="1")
        assert counters(server)["dirty"]
    assert partial["meta_info"]["finish_reason"]["type"] == "abort"
    assert partial["output_ids"][:NEW_TOKENS] == oracles["A"].greedy(PROMPTS[0], NEW_TOKENS)[: len(partial["output_ids"])]
    after = counters(server, before)
    assert (after["update_calls"], after["updates"], after["refreshes"]) == (len(parts), 1, 1)
    assert (after["failed_updates"], after["dirty"]) == (0, False)
    check_rollout(trainer, oracles["B"])


def test_slime_colocated(trainer, server, policies, oracles):
    """Sleep, wake the weights, pause, flush, flattened buckets, continue while the KV cache sleeps; then wake it."""
    before = counters(server)
    server._request("/flush_cache")
    server.post("/release_memory_occupation", {})
    server.post("/resume_memory_occupation", {"tags": ["weights"]})
    dirty = counters(server)["dirty"]
    parts = buckets(policies["C"])
    with trainer.paused():
        server._request("/flush_cache")
        for part in parts:
            trainer.hand_over(part, weight_version="2")
    after = counters(server, before)
    assert dirty, "what the drafter's memory holds after waking up is garbage"
    assert (after["update_calls"], after["updates"], after["refreshes"]) == (len(parts), 1, 1)
    assert (after["failed_updates"], after["dirty"]) == (0, False)
    server.post("/resume_memory_occupation", {"tags": ["kv_cache", "cuda_graph"]})
    check_rollout(trainer, oracles["C"])


@pytest.mark.parametrize("transport", ["disk", "distributed"])
def test_areal(trainer, server, policies, oracles, transport):
    """An update interrupts a generation; the client sends prompt and partial answer again, for the new policy."""
    running = trainer.rollout_meanwhile(PROMPTS[:1], **greedy(1500))
    before = counters(server)
    policy = {"disk": "A", "distributed": "B"}[transport]
    with trainer.paused():
        if transport == "disk":
            server.post("/update_weights_from_disk", {"model_path": str(policies[policy]), "abort_all_requests": True})
        else:
            for part in buckets(policies[policy]):
                trainer.broadcast(part, abort_all_requests=True)
        partial = running.result()[0]["output_ids"]
    after = counters(server, before)
    assert (after["refreshes"], after["failed_updates"], after["dirty"]) == (1, 0, False)
    again = PROMPTS[0] + partial
    assert tokens(trainer.rollout([again], **greedy(NEW_TOKENS))) == [oracles[policy].greedy(again, NEW_TOKENS)]
    check_rollout(trainer, oracles[policy])
