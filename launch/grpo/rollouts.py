"""Rollouts from a live SGLang server, and policy updates to it, by the calls that slime and other trainers send.

    with RolloutServer(checkpoint, ARMS["auto"], CPU, max_rollouts=128, max_new_tokens=96, log_path=log_path) as server:
        rollouts = server.sample(prompts, max_new_tokens=96)
        server.sleep()
        ...  # train
        server.update_policy(weights)

SELF_QUANT needs one server flag and nothing of the trainer: the calls are those to a plain server, and the drafter
follows the policy by itself.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

from er_sglang.bench.real import group_size
from er_sglang.config import CONFIG_ENV
from er_sglang.tools.serving import Server
from launch.grpo.place import Place

MAX_PROMPT_TOKENS = 512
SEED = 0  # of the server, for all arms
FLUSH_S = 60  # at most, until the last step's result is in

NamedTensors = Sequence[tuple[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """self_quant: SELF_QUANT's settings as they stand in its JSON file; None serves plainly. stale: its drafter skips
    updates, and so stays in memory while the server sleeps; others lose their weights then, drafter included."""

    self_quant: Mapping | None
    stale: bool = False


ALWAYS = {"policy": {"mode": "always", "fixed_gamma": 3}}
ARMS = {
    "plain": Arm(self_quant=None),
    "auto": Arm(self_quant={}),
    "auto-refresh-4": Arm(self_quant={"updates": {"refresh_interval": 4}}, stale=True),
    "always": Arm(self_quant=ALWAYS),
    # The drafter of the base policy, for ever: what a server does that misses policy updates.
    "frozen": Arm(self_quant={**ALWAYS, "updates": {"refresh_interval": 1_000_000}}, stale=True),
}


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
    """SELF_QUANT's counts since the server started, or between two such moments; shares are None where nothing is to be
    shared."""

    cycles: int = 0
    decode_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    emitted_tokens: int = 0
    refreshes: int = 0
    refresh_s: float = 0.0
    """No count: of the latest refresh."""

    def since(self, earlier: "DraftCounters") -> "DraftCounters":
        counts = {name: getattr(self, name) - getattr(earlier, name) for name in self.__slots__}
        return DraftCounters(**{**counts, "refresh_s": self.refresh_s})

    @property
    def accepted(self) -> float | None:
        """Share of the drafted tokens."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None

    @property
    def accept_length(self) -> float | None:
        """Tokens per request and decode step, with or without drafts: a request's step emits one token that no draft
        brought."""
        return self.emitted_tokens / (self.emitted_tokens - self.accepted_tokens) if self.emitted_tokens else None

    @property
    def drafting(self) -> float | None:
        """Share of the decode steps that drafted."""
        steps = self.cycles + self.decode_steps
        return self.cycles / steps if steps else None


class RolloutServer(Server):
    """SGLang at `place`, for one arm."""

    def __init__(
        self,
        checkpoint: Path,
        arm: Arm,
        place: Place,
        *,
        max_rollouts: int,
        max_new_tokens: int,
        log_path: Path,
        extra_words: Sequence[str] = (),
    ):
        args = {
            **place.server_args,
            "skip-tokenizer-init": True,
            "random-seed": SEED,
            "max-running-requests": max_rollouts,
            "max-total-tokens": max_rollouts * (MAX_PROMPT_TOKENS + max_new_tokens),
        }
        env = dict(place.server_env)
        self.drafts = arm.self_quant is not None
        if self.drafts:
            args["speculative-algorithm"] = "SELF_QUANT"
            drafter = {"group_size": group_size(checkpoint)}
            env[CONFIG_ENV] = json.dumps({"max_draft_batch": max_rollouts, "drafter": drafter, **arm.self_quant})
        self._place = place
        self._sleeps = ("kv_cache", "cuda_graph") if arm.stale else ("kv_cache", "cuda_graph", "weights")
        self._asleep: tuple[str, ...] = ()
        super().__init__(checkpoint, args, env=env, log_path=log_path, extra_words=extra_words)

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

    def sleep(self, *, forget: bool = False) -> None:
        """Give the card to the trainer, until `update_policy`. With `forget` a stale arm loses its drafter, too, and
        starts anew from the next policy. On a CPU nothing is given back, but the calls are the same."""
        self.flush()
        self._asleep = ("kv_cache", "cuda_graph", "weights") if forget else self._sleeps
        self._request("/release_memory_occupation", {"tags": self._asleep})

    def update_policy(self, weights: NamedTensors) -> None:
        """Wake up and serve `weights`, by their names in a transformers model of the served architecture.

        The order is slime's: the KV cache returns last, when the trainer holds least. Every bucket marks the drafter
        stale; it is re-quantized once, when generation continues.
        """
        # By files, tensors on a CPU reach any process; by descriptors, only those that multiprocessing has started.
        # Tensors on a GPU travel as CUDA IPC handles.
        torch.multiprocessing.set_sharing_strategy("file_system")
        self._place.clear()
        if "weights" in self._asleep:
            self._wake("weights")
        self._request("/pause_generation", {})
        self.flush()
        for bucket in buckets(weights, self._place.max_bucket_bytes):
            flat = FlattenedTensorBucket(named_tensors=bucket)
            payload = {"flattened_tensor": flat.get_flattened_tensor(), "metadata": flat.get_metadata()}
            serialized = MultiprocessingSerializer.serialize(payload, output_str=True)
            self._request(
                "/update_weights_from_tensor",
                {"serialized_named_tensors": [serialized], "load_format": "flattened_bucket", "flush_cache": False},
            )
        del flat, payload
        self._place.clear()
        self._request("/continue_generation", {})
        self._wake(*self._asleep)

    def flush(self) -> None:
        """Empty the radix cache, as soon as the server is idle."""
        self._request(f"/flush_cache?timeout={FLUSH_S}", {})

    def draft_counters(self) -> DraftCounters:
        """All zero for a plain server."""
        if not self.drafts:
            return DraftCounters()
        info = self.self_quant()
        return DraftCounters(**{name: info[name] for name in DraftCounters.__slots__})

    def _wake(self, *tags: str) -> None:
        if tags:
            self._request("/resume_memory_occupation", {"tags": tags})
            self._asleep = tuple(tag for tag in self._asleep if tag not in tags)


def buckets(named: NamedTensors, max_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """`named` in pieces of at most `max_bytes`, or of one tensor if that is larger."""
    bucket, size_bytes = [], 0
    for name, tensor in named:
        if bucket and size_bytes + tensor.nbytes > max_bytes:
            yield bucket
            bucket, size_bytes = [], 0
        bucket.append((name, tensor.detach()))
        size_bytes += tensor.nbytes
    yield bucket
