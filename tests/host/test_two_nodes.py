"""One engine over two nodes (here two process groups), seeded differently, as slime seeds them: both draw the same
tokens.

They measure step times together, and follow changes of the policy and updates of the weights together.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from er_sglang.config import CACHE_ENV, SIMULATE_ACCEPTANCE_ENV
from er_sglang.tools.serving import free_port
from tests.host.goodness import assert_exact, cells
from tests.host.oracle import Oracle, Sampling
from tests.host.policies import make_policy
from tests.host.servers import TWO_RANKS, greedy, self_quant, tokens
from tests.host.test_exactness import PROMPT, sample
from tests.host.trainer_client import TrainerClient

PROMPTS = [[5, 6, 7], [12] * 20, [90, 8, 71, 15, 33, 4]]


def make_nodes(policy, folder, name, config, *envs, **more) -> list:
    """Servers of one engine, one per environment; neither is up before the other."""
    args = {"tp-size": 2, "nnodes": 2, "dist-init-addr": f"127.0.0.1:{free_port()}", **more}
    return [
        self_quant(
            policy,
            folder / f"{name}-{rank}.log",
            config,
            3,
            {**args, "node-rank": rank, "random-seed": rank},
            {**TWO_RANKS, **env},
        )
        for rank, env in enumerate(envs)
    ]


@pytest.fixture(scope="module")
def server(qwen3, folder):
    nodes = make_nodes(qwen3, folder, "node", {"calibration_s": 1}, {CACHE_ENV: "/proc/full"}, {})
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        list(pool.map(stack.enter_context, nodes))
        assert nodes[0].self_quant()["mode"] == "auto"
        nodes[0].change_self_quant({"mode": "cycle", "cycle": [3, 0, 1, 2]})
        yield nodes[0]


def test_step_times_that_cannot_be_kept_do_not_end_a_start(server):
    assert "Step times cannot be kept in /proc/full/profiles/" in server.log_path.read_text(errors="replace")
    assert server.self_quant()["profile"] is None


def test_nodes_that_read_different_settings_do_not_start(qwen3, folder):
    """Both say so, and neither waits for the other."""
    envs = {SIMULATE_ACCEPTANCE_ENV: "0.9"}, {}
    nodes = make_nodes(qwen3, folder, "unlike", {}, *envs, **{"load-format": "dummy"})

    def start(node) -> str:
        with pytest.raises(RuntimeError, match="the server stopped with exit code"), node:
            pass
        return node.log_path.read_text(errors="replace")

    with ThreadPoolExecutor() as pool:
        for log, simulated in zip(pool.map(start, nodes), ("{0: 0.9", "None"), strict=True):
            assert "ConfigError: the nodes of this engine read different settings" in log
            assert f"'{SIMULATE_ACCEPTANCE_ENV}': {simulated}" in log


def test_sampled(server, qwen3_oracle):
    before = server.self_quant()["accepted_tokens"]
    assert_exact(cells(qwen3_oracle, PROMPT, sample(server, Sampling()), Sampling()))
    assert server.self_quant()["accepted_tokens"] > before


def test_updates(server, qwen3_oracle, folder):
    def assert_greedy(oracle):
        before = server.self_quant()["accepted_tokens"]
        outputs = tokens(server.generate({"input_ids": PROMPTS, "sampling_params": greedy(40)}))
        assert outputs == [oracle.greedy(prompt, 40) for prompt in PROMPTS]
        assert server.self_quant()["accepted_tokens"] > before

    assert_greedy(qwen3_oracle)
    other = make_policy(folder, "qwen3", seed=31)
    server.empty()
    TrainerClient(server).send_disk(other)
    assert_greedy(Oracle(other))
    assert server.self_quant()["refreshes"] == 1
