"""Two replicas behind one server: each drafts, follows updates and reports for itself."""

import random

from tests.host.oracle import Oracle
from tests.host.policies import VOCAB, make_policy
from tests.host.servers import greedy, self_quant, tokens
from tests.host.trainer_client import TrainerClient


def test_replicas(qwen3, qwen3_oracle, folder):
    rng = random.Random(7)
    prompts = [[rng.randrange(2, VOCAB) for _ in range(12)] for _ in range(8)]
    other = make_policy(folder, "qwen3", seed=3)
    config = {"max_draft_batch": 4, "calibration_s": 1, "trace": f"{folder}/replicas/"}
    args = {
        "dp-size": 2,
        "enable-metrics": True,
        "page-size": 64,
        "context-length": 300,
    }  # the last page goes beyond the context
    with self_quant(qwen3, folder / "data-parallel.log", config, 3, args) as server:
        trainer = TrainerClient(server)

        def replicas() -> list[dict]:
            return [state["self_quant"] for state in server.get_server_info()["internal_states"]]

        assert server.post("/set_internal_state", {"server_args": {"self_quant": {"mode": "always"}}}) == [True, True]
        sampled = {"temperature": 1.0, "max_new_tokens": 32, "ignore_eos": True}
        first, second = tokens(server.generate({"input_ids": prompts[:1] * 2, "sampling_params": sampled}))
        assert first != second, "copies of one prompt on two replicas are one sample"
        for policy, oracle in ((qwen3, qwen3_oracle), (other, Oracle(other))):
            answers = server.generate({"input_ids": prompts, "sampling_params": greedy(16)})
            assert tokens(answers) == [oracle.greedy(prompt, 16) for prompt in prompts]
            if policy is qwen3:
                trainer.pause()
                trainer.send_disk(other)
                trainer.resume()
        assert [replica["cycles"] > 0 and replica["refreshes"] for replica in replicas()] == [1, 1]
        metrics = server.metrics()
        assert all(f'sglang:self_quant_gamma{{dp_rank="{rank}"' in metrics for rank in (0, 1))
    assert len(list((folder / "replicas").iterdir())) == 2
