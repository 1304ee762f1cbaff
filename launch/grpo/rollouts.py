"""Rollouts from a live SGLang server, and policy updates to it, by the calls that slime and other trainers send.

    with RolloutServer(policy_path, {"policy": {"mode": "always"}}, seed=0, max_rollouts=128, log_path=log_path) as
    server:
        rollouts = server.sample(prompts, max_new_tokens=96)
        ...  # train
        server.update_policy(model)

SELF_QUANT needs two server flags and nothing of the trainer: the calls are those to a plain server, and the drafter
follows the policy by itself.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

from er_sglang.config import CONFIG_ENV
from er_sglang.tools.serving import CPU_ARGS, CPU_ENV, Server

GAMMA = 3
BUCKET_BYTES = (
    300 * 1024
)  # so small that even this policy travels in several, a layer's q in another one than its k and v

NamedTensors = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sampled response. `logprobs` are the policy's, of each response token, when it was sampled."""

    prompt: list[int]
    response: list[int]
    logprobs: list[float]
    ended: bool
    """By its end-of-sequence token, not by the length limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftCounters:
    """SELF_QUANT's counts since the server started, or between two such moments."""

    drafted_tokens: int
    accepted_tokens: int
    refreshes: int

    def since(self, earlier: "DraftCounters") -> "DraftCounters":
        return DraftCounters(**{name: getattr(self, name) - getattr(earlier, name) for name in self.__slots__})


class RolloutServer(Server):
    """SGLang on the CPU in float32, so that its log-probabilities are the trainer's but for rounding.

    `self_quant` holds SELF_QUANT's settings as they stand in its JSON file; None serves plainly.
    """

    def __init__(self, policy_path: Path, self_quant: Mapping | None, *, seed: int, max_rollouts: int, log_path: Path):
        args = {
            **CPU_ARGS,
            "skip-tokenizer-init": True,
            "random-seed": seed,
            "max-running-requests": max_rollouts,
            "max-total-tokens": 512 * max_rollouts,
            "sleep-on-idle": True,  # the trainer wants the cores
        }
        env = {**CPU_ENV, "CUDA_VISIBLE_DEVICES": ""}
        self.drafts = self_quant is not None
        if self.drafts:
            args |= {"speculative-algorithm": "SELF_QUANT", "speculative-num-steps": GAMMA}
            env |= {CONFIG_ENV: json.dumps({"max_draft_batch": max_rollouts, **self_quant})}
        super().__init__(policy_path, args, env=env, log_path=log_path)

    def sample(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[Rollout]:
        """One response to each prompt (token ids), at temperature 1."""
        answers = self.generate(
            {
                "input_ids": prompts,
                "sampling_params": {"temperature": 1.0, "max_new_tokens": max_new_tokens},
                "return_logprob": True,
            }
        )
        return [
            Rollout(
                prompt=prompt,
                response=answer["output_ids"],
                logprobs=[logprob for logprob, *_ in answer["meta_info"]["output_token_logprobs"]],
                ended=answer["meta_info"]["finish_reason"]["type"] == "stop",
            )
            for prompt, answer in zip(prompts, answers)
        ]

    def update_policy(self, model: torch.nn.Module) -> None:
        """Serve the weights of `model` (a transformers model of the served architecture) from now on.

        The order is the trainers'. Every bucket marks the drafter stale; it is re-quantized once, when generation
        continues.
        """
        # By files, tensors reach any process; by descriptors, only those that multiprocessing has started.
        torch.multiprocessing.set_sharing_strategy("file_system")
        self._request("/pause_generation", {})
        self.flush_cache()
        for bucket in buckets(list(model.state_dict().items())):
            flat = FlattenedTensorBucket(named_tensors=bucket)
            payload = {"flattened_tensor": flat.get_flattened_tensor(), "metadata": flat.get_metadata()}
            serialized = MultiprocessingSerializer.serialize(payload, output_str=True)
            self._request(
                "/update_weights_from_tensor",
                {"serialized_named_tensors": [serialized], "load_format": "flattened_bucket", "flush_cache": False},
            )
        self._request("/continue_generation", {})

    def draft_counters(self) -> DraftCounters:
        """All zero for a plain server."""
        if not self.drafts:
            return DraftCounters(drafted_tokens=0, accepted_tokens=0, refreshes=0)
        info = self.self_quant()
        return DraftCounters(**{name: info[name] for name in DraftCounters.__slots__})


def buckets(named: NamedTensors) -> Iterator[NamedTensors]:
    """`named` in pieces of at most BUCKET_BYTES, or of one tensor if that is larger."""
    bucket, size_bytes = [], 0
    for name, tensor in named:
        if bucket and size_bytes + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size_bytes = [], 0
        bucket.append((name, tensor.detach()))
        size_bytes += tensor.nbytes
    yield bucket
