"""`updates`: a drafter that follows every fourth update, or at once when it is accepted much less."""

import pytest
import torch

from tests.host.policies import make_policy
from tests.host.servers import TRAINER, greedy, self_quant, tokens
from tests.host.test_updates import Policy
from tests.host.trainer_client import TrainerClient

PROMPTS = [[5, 6, 7], [12] * 9, [90, 8, 71, 15, 33], [64, 2]]
NEW_TOKENS = 48
UPDATES = {"refresh_interval": 4, "refresh_on_acceptance_drop": 0.25}


def nudged(policy: Policy, folder, seed: int) -> Policy:
    """A policy one small step of training away."""
    model = Policy(policy.path).model
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=generator))
    path = folder / f"{policy.path.name}-nudged-{seed}"
    model.save_pretrained(path)
    return Policy(path)


@pytest.fixture(scope="module")
def policy(folder):
    return Policy(make_policy(folder, "qwen2", seed=11))


@pytest.fixture(scope="module")
def server(policy, folder):
    config = {"policy": {"mode": "always"}, "updates": UPDATES}
    with self_quant(policy.path, folder / "interval.log", config, 3, plugins=[TRAINER]) as server:
        yield server


def test_every_fourth_update_or_a_drop(server, policy, folder):
    trainer = TrainerClient(server)

    def update(new):
        trainer.pause()
        trainer.send_disk(new.path)
        trainer.resume()

    def serve(current):
        """Share of the drafts accepted while ``current`` is served, exactly."""
        before = server.self_quant()
        outputs = tokens(server.generate({"input_ids": PROMPTS, "sampling_params": greedy(NEW_TOKENS)}))
        assert outputs == [current.oracle.greedy(prompt, NEW_TOKENS) for prompt in PROMPTS]
        after = server.self_quant()
        drafted, accepted = (after[name] - before[name] for name in ("drafted_tokens", "accepted_tokens"))
        return accepted / drafted

    def drafter():
        state = server.get_server_info()["internal_states"][0]
        return state["drafter"], state["self_quant"]["refreshes"], state["self_quant"]["updates_behind"]

    fresh = serve(policy)
    near = nudged(policy, folder, 1)
    update(near)
    assert serve(near) > 0.5 * fresh
    assert drafter() == (policy.drafter, 0, 1), "stale, and whole"

    far = Policy(make_policy(folder, "qwen2", seed=12))
    update(far)
    assert drafter() == (policy.drafter, 0, 2)
    serve(far)
    assert drafter() == (far.drafter, 1, 0)
    assert "acceptance fell" in server.log_path.read_text()

    for behind in (1, 2, 3):
        near = nudged(far, folder, behind)
        update(near)
        assert drafter() == (far.drafter, 1, behind)
    serve(near)
    last = nudged(far, folder, 4)
    update(last)
    assert drafter() == (last.drafter, 2, 0)
