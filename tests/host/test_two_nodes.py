"""One engine over two nodes (here two process groups), seeded differently, as slime seeds them: both draw the same
tokens.

They measure step times together, and follow changes of the policy and updates of the weights together.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from er_sglang.tools.serving import free_port
from tests.host.goodness import assert_exact, cells
from tests.host.oracle import Oracle, Sampling
from tests.host.policies import make_policy
from tests.host.servers import TWO_RANKS, greedy, self_quant, tokens
from tests.host.test_exactness import PROMPT, sample
from tests.host.trainer_client import TrainerClient

PROMPTS = [[5, 6, 7], [12] * 20, [90, 8, 71, 15, 33, 4]]


@pytest.fixture(scope="module")
def server(qwen3, folder):
    args = {"tp-size": 2, "nnodes": 2, "dist-init-addr": f"127.0.0.1:{free_port()}"}
    config = {"calibration_s": 1}
    nodes = [
        self_quant(
            qwen3, folder / f"node-{rank}.log", config, 3, {**args, "node-rank": rank, "random-seed": rank}, TWO_RANKS
        )
        for rank in range(2)
    ]
    with ExitStack() as stack, ThreadPoolExecutor() as pool:  # neither is up before the other
        list(pool.map(stack.enter_context, nodes))
        assert nodes[0].self_quant()["mode"] == "auto"
        nodes[0].change_self_quant({"mode": "cycle", "cycle": [3, 0, 1, 2]})
        yield nodes[0]


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
