"""fp8 policies and fp8 KV caches on a real server: exact with respect to what is served, drafted for by int4 copies made
of codes and scales, followed through updates.

A CPU has no products of fp8 weights; `fp8_plugin` stands in for those and for nothing else. tests/gpu has SGLang's own.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from er_sglang.bench.toy import PolicyShape, make_random_policy
from er_sglang.cycle.verifier import check_attention_backend
from er_sglang.errors import ConfigError
from tests.host.fp8 import make_dense_online_policy, make_dense_policy, make_fp8_policy
from tests.host.servers import greedy, self_quant, tokens
from tests.host.test_updates import Policy, Rollouts
from tests.host.trainer_client import SLIME

HOST = Path(__file__).parent
PLUGINS = {"PYTHONPATH": os.pathsep.join(str(HOST / name) for name in ("fp8_plugin", "trainer_plugin"))}
# Outputs of every projection are multiples of 128, as SGLang wants blocks of a fused layer.
SHAPE = PolicyShape(vocab=100, hidden=128, intermediate=256, layers=2, heads=4, kv_heads=2, head_dim=64)
PROMPTS = [[5, 6, 7], [12] * 9, [90, 8, 71, 15, 33], [64, 2]]
NEW_TOKENS = 48


# -- a checkpoint with scales of blocks ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(folder):
    """fp8 checkpoints A and B."""
    folder = folder / "fp8"
    folder.mkdir()
    found = {}
    for seed, name in enumerate("AB"):
        dense = make_random_policy(folder / f"{name}-bf16", "qwen3", shape=SHAPE, seed=seed, dtype=torch.bfloat16)
        found[name] = make_fp8_policy(dense, folder / name), dense
    return found


@pytest.fixture(scope="module")
def rollouts(checkpoints, folder):
    """A server of A. Its policies are what the checkpoints mean: codes times scales, in float32."""
    policies = {
        name: Policy(make_dense_policy(dense, fp8, folder / "fp8" / f"{name}-dense"))
        for name, (fp8, dense) in checkpoints.items()
    }
    log = folder / "fp8-blocks.log"
    with self_quant(checkpoints["A"][0], log, {"policy": {"mode": "always"}}, 3, env=PLUGINS) as server:
        yield Rollouts(server, policies)


def by_tensors(trainer, fp8: Path, flattened: bool = False) -> None:
    """Codes in one bucket, their scales in the next, then everything else."""
    tensors = load_file(fp8 / "model.safetensors")
    scales = [name for name in tensors if name.endswith("_scale_inv")]
    codes = [name.removesuffix("_scale_inv") for name in scales]
    rest = [name for name in tensors if name not in (*scales, *codes)]
    buckets = [[(name, tensors[name]) for name in names] for names in (codes, scales, rest)]
    trainer.send_tensors(buckets, flattened, **SLIME)


def by_flattened_buckets(trainer, fp8: Path) -> None:
    by_tensors(trainer, fp8, flattened=True)


def by_tensors_post_processed(trainer, fp8: Path) -> None:
    """As slime does where weights are repacked."""
    trainer.post_process()
    by_tensors(trainer, fp8)
    trainer.post_process()


def by_disk(trainer, fp8: Path) -> None:
    trainer.send_disk(fp8, **SLIME)


@pytest.mark.parametrize(
    "deliver", [by_tensors, by_disk, by_flattened_buckets, by_tensors_post_processed], ids=lambda each: each.__name__
)
def test_updates(rollouts, checkpoints, deliver):
    policy = rollouts.next_policy()
    with rollouts.changes(refreshes=1, failed_updates=0, updates=1):
        with rollouts.trainer.paused():
            deliver(rollouts.trainer, checkpoints[rollouts.current][0])
        rollouts.follows(policy)


# -- quantized while it is loaded, and an fp8 KV cache ---------------------------------------------------------


@pytest.fixture(scope="module")
def online(checkpoints, folder):
    """A server that quantizes A as it loads it, and what that means in float32."""
    bf16 = checkpoints["A"][1]
    args = {"quantization": "fp8", "kv-cache-dtype": "fp8_e4m3"}
    config = {"policy": {"mode": "cycle", "cycle": [3, 0, 1, 3]}}
    with self_quant(bf16, folder / "fp8-online.log", config, 3, args, PLUGINS) as server:
        yield server, Policy(make_dense_online_policy(bf16, folder / "fp8" / "A-online"))


def test_online_quantization(online):
    server, policy = online
    assert server.get_server_info()["internal_states"][0]["drafter"] == policy.drafter


def test_an_fp8_kv_cache_is_written_and_read_as_in_plain_decoding(online):
    """Greedy tokens of drafting are those of SGLang's own steps, and not those of an unrounded cache."""
    server, policy = online
    drafted = greedy_tokens(server)
    assert server.self_quant()["cycles"] > 0
    server.change_self_quant({"mode": "off"})
    plain = greedy_tokens(server)
    assert drafted == plain != [policy.oracle.greedy(prompt, NEW_TOKENS) for prompt in PROMPTS]


def greedy_tokens(server) -> list[list[int]]:
    server.empty()
    return tokens(server.generate({"input_ids": PROMPTS, "sampling_params": greedy(NEW_TOKENS)}))


@pytest.mark.parametrize("backend, fine", [("TritonAttnBackend", False), ("FlashInferAttnBackend", True)])
def test_an_fp8_kv_cache_needs_a_backend_that_verifies_as_it_decodes(backend, fine):
    runner = SimpleNamespace(
        attn_backend=type(backend, (), {})(), device="cuda", dtype=torch.bfloat16, kv_cache_dtype=torch.float8_e4m3fn
    )
    with nullcontext() if fine else pytest.raises(ConfigError, match="before they are rounded.*fa3 or flashinfer"):
        check_attention_backend(runner)
    check_attention_backend(SimpleNamespace(**{**vars(runner), "kv_cache_dtype": runner.dtype}))
