"""Sleep, wake and updates on a GPU, with graphs: the memory comes back, and what wakes serves and drafts as before.

Run with -s to see the memory of each state.
"""

from __future__ import annotations

import json

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

MIB = 2**20
PROMPT = [17, 4, 88, 23, 61, 9]
GREEDY = {"temperature": 0, "max_new_tokens": 48, "ignore_eos": True}
# What no tag covers: the server's CUDA context, loaded kernels, the libraries' workspaces.
LEFT_ASLEEP_MIB = 2048


def used_mib(server) -> float:
    """Of the GPU, by the server's processes: others come and go."""
    import psutil
    import pynvml

    root = psutil.Process(server.process.pid)
    pids = {process.pid for process in [root, *root.children(recursive=True)]}
    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    used = [
        process.usedGpuMemory for process in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu) if process.pid in pids
    ]
    assert used, "NVML shows none of the server's processes: it counts in another PID namespace"
    return sum(used) / MIB


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """A and B, 0.4 GB each."""
    from er_sglang.bench.toy import PolicyShape, make_random_policy

    shape = PolicyShape(hidden=1024, intermediate=4096, layers=8, heads=8, kv_heads=4, head_dim=128, vocab=32000)
    folder = tmp_path_factory.mktemp("policies")
    return [
        make_random_policy(folder / name, "qwen3", shape=shape, dtype=torch.bfloat16, seed=seed)
        for seed, name in enumerate("AB")
    ]


@pytest.fixture(scope="module")
def trainer(policies, tmp_path_factory):
    """The client of a server of A."""
    from er_sglang.config import CONFIG_ENV
    from tests.host.servers import HostServer
    from tests.host.trainer_client import TrainerClient

    args = {
        "skip-tokenizer-init": True,
        "dtype": "bfloat16",
        "cuda-graph-bs": [1, 2, 4],
        "cuda-graph-backend-prefill": "disabled",
        "max-running-requests": 4,
        "mem-fraction-static": 0.3,
        "enable-memory-saver": True,
        "speculative-algorithm": "SELF_QUANT",
        "speculative-num-steps": 3,
    }
    env = {CONFIG_ENV: json.dumps({"policy": {"mode": "always"}}), "SGLANG_MEMORY_SAVER_CUDA_GRAPH": "true"}
    with HostServer(policies[0], args, env=env, log_path=tmp_path_factory.mktemp("log") / "server.log") as server:
        yield TrainerClient(server)


def update(trainer, policy) -> None:
    with trainer.paused():
        trainer.send_disk(policy, flush_cache=False)


def answer(server) -> list[int]:
    before = server.self_quant()["cycles"]
    output = server.generate({"input_ids": PROMPT, "sampling_params": GREEDY})["output_ids"]
    assert server.self_quant()["cycles"] > before
    return output


def test_graphs_replay_across_updates(trainer, policies) -> None:
    """A -> B -> A under the graphs of the start: one refresh each, and A answers as it did."""
    server, (a, b) = trainer.server, policies
    first, refreshes = answer(server), server.self_quant()["refreshes"]
    update(trainer, b)
    assert answer(server) != first
    update(trainer, a)
    assert answer(server) == first
    assert server.self_quant()["refreshes"] == refreshes + 2


def test_sleep_and_wake(trainer, policies) -> None:
    """The order is slime's: everything goes; weights, update, continue; then KV cache and graphs."""
    server = trainer.server
    first, refreshes = answer(server), server.self_quant()["refreshes"]
    drafter_mib = server.self_quant()["drafter_bytes"] / MIB
    policy_mib = sum(file.stat().st_size for file in policies[0].glob("*.safetensors")) / MIB
    server.empty()
    used = {"awake": used_mib(server)}
    trainer.release("weights")
    used["without weights"] = used_mib(server)
    trainer.release("kv_cache", "cuda_graph")
    used["asleep"] = used_mib(server)
    trainer.reclaim("weights")
    update(trainer, policies[0])
    used["weights back, updated"] = used_mib(server)
    trainer.reclaim("kv_cache", "cuda_graph")
    assert answer(server) == first
    used["awake again"] = used_mib(server)
    print(f"\npolicy {policy_mib:.0f} MiB, drafter {drafter_mib:.0f} MiB")
    print("\n".join(f"{state:>22}: {mib:8.0f} MiB" for state, mib in used.items()))

    assert server.self_quant()["refreshes"] == refreshes + 1
    assert used["awake"] - used["without weights"] > 0.95 * (policy_mib + drafter_mib)
    assert used["asleep"] < LEFT_ASLEEP_MIB
    assert abs(used["awake again"] - used["awake"]) < 64
