"""launch/grpo without its server: tasks and rewards, the training step, and runs put together from files."""

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from er_sglang.bench.real import group_size
from er_sglang.bench.toy import PolicyShape, make_random_policy
from launch.grpo import arithmetic, countdown, report
from launch.grpo.__main__ import CHAT, TOY, parse_args
from launch.grpo.loop import Settings, StepRecord
from launch.grpo.place import CPU, Place
from launch.grpo.rollouts import ARMS, DraftCounters, Rollout, RolloutServer, buckets
from launch.grpo.training import MICROBATCH_TOKENS, Trainer, log_ratios, make_batch, policy_loss

SUM = [*arithmetic.EXAMPLES, {"role": "user", "content": "Start with 57. Then: +8, -23."}]


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("57 + 8 = 65\n65 - 23 = 42\nAnswer: 42", 1),
        ("57 + 8 = 65\n65 - 23 = 42\nAnswer: 42\n", 1),
        ("57 + 8 = 65\n65 - 23 = 52\nAnswer: 52", 2.5 / 3),
        ("57 + 8 = 66\n66 - 23 = 43\nAnswer: 43", 2.5 / 3),  # right, had the first line been
        ("57 + 8 = 65\n57 - 23 = 34\nAnswer: 34", 1 / 3),  # not the form: it must go on from 65
        ("57 + 8 = 65\n65 - 23 = 42\nAnswer: 41", 2 / 3),
        ("57 + 8 = 65\n65 - 23 = 42", 2 / 3),
        ("57 + 8 = 65\n65 - 23 = 42\nAnswer: 42\nIs there more?", 3 / 4),
        ("57 + 8 = 65 or so", 0),
        ("Sure! 57 + 8 = 65", 0),
        ("", 0),
    ],
)
def test_a_sum_is_judged_line_by_line(response, reward):
    assert arithmetic.reward(SUM, response, ended=True) == pytest.approx(reward)


def test_sums_are_repeatable_solvable_and_long_tailed():
    prompts = arithmetic.prompts(400, random.Random(3))
    assert prompts == arithmetic.prompts(400, random.Random(3))
    solutions = [arithmetic.solution(prompt[-1]["content"]) for prompt in prompts]
    for prompt, response in zip(prompts, solutions):
        assert arithmetic.reward(prompt, response, ended=True) == 1
        assert all(0 <= int(line.split()[-1]) <= arithmetic.LARGEST_TOTAL for line in response.splitlines())
    links = sorted(response.count("=") for response in solutions)
    assert links[0] >= 2 and links[-1] == arithmetic.MOST_LINKS
    assert links[360] > 2 * links[200]  # the 90th percentile and the median


def test_countdown_wants_a_legal_chain_that_ends():
    prompt = [{"role": "user", "content": "017:"}]
    assert countdown.reward(prompt, "013,012,008,003,000", ended=True) == 1
    assert countdown.reward(prompt, "013,012,008,003,000", ended=False) == 0
    assert countdown.reward(prompt, "013,012,018,003,000", ended=True) == 0


# ---------------------------------------------------------------- training


def rollouts_of(lengths: list[tuple[int, int]]) -> list[Rollout]:
    """With prompts and responses so long."""
    rng = random.Random(0)
    tokens = [
        ([rng.randrange(2, 100) for _ in range(p)], [rng.randrange(2, 100) for _ in range(r)]) for p, r in lengths
    ]
    return [Rollout(prompt=p, response=r, logprobs=[-rng.random() for _ in r], ended=True) for p, r in tokens]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_random_policy(tmp_path_factory.mktemp("policy") / "qwen3", shape=PolicyShape(vocab=100))


def test_microbatches_bound_tokens_and_change_no_gradient(checkpoint, monkeypatch):
    rollouts = rollouts_of([(3, 40), (5, 2), (4, 9), (2, 41), (3, 7), (30, 1)])
    batch = make_batch(rollouts, torch.tensor([1.0, 0, 0, 1, 0, 1]), group=2, device=CPU.device)
    model = Trainer(checkpoint, CPU, 1e-3)._model
    policy_loss(log_ratios(model, batch), batch).backward()
    whole = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()

    assert MICROBATCH_TOKENS >= 4096
    monkeypatch.setattr("launch.grpo.training.MICROBATCH_TOKENS", 90)
    parts = list(batch.microbatches())
    assert [len(part.tokens_RT) for part in parts] == [2, 2, 2]
    assert all(part.tokens_RT.numel() <= 90 for part in parts)
    for part in parts:
        policy_loss(log_ratios(model, part), part).backward()
    for weight, expected in zip(model.parameters(), whole):
        torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-5)


def test_small_steps_of_bfloat16_weights_add_up_in_their_masters(checkpoint):
    half = Place(
        device=CPU.device, dtype=torch.bfloat16, server_args={}, server_env={}, max_bucket_bytes=CPU.max_bucket_bytes
    )
    trainer = Trainer(checkpoint, half, learning_rate=1e-5)
    before = [weight.detach().clone() for weight in trainer._weights]
    rollouts = rollouts_of([(3, 8)] * 4)
    for _ in range(3):
        trainer.step(rollouts, torch.tensor([1.0, 0, 1, 0]), group=2)
    moved = [(master - weight.float()).abs().max() for master, weight in zip(trainer._masters, before)]
    assert min(moved) > 1e-6
    for master, weight in zip(trainer._masters, trainer._weights):
        assert torch.equal(master.bfloat16(), weight)


def test_a_gradient_step_makes_what_was_rewarded_likelier(checkpoint):
    trainer = Trainer(checkpoint, CPU, learning_rate=1e-3)
    rollouts = rollouts_of([(3, 8)] * 4)
    rewards_R = torch.tensor([1.0, 0, 1, 0])
    batch = make_batch(rollouts, rewards_R, group=2, device=CPU.device)
    per_token_R = lambda: log_ratios(trainer._model, batch).view(4, 8).mean(1)  # noqa: E731
    before_R = per_token_R()
    off_policy_N = trainer.step(rollouts, rewards_R, group=2)
    assert off_policy_N.shape == (16,)  # of the first of two minibatches
    change_R = per_token_R() - before_R
    assert (change_R[rewards_R == 1].mean() > change_R[rewards_R == 0].mean()).item()


def test_buckets_hold_all_and_no_more_than_they_may():
    named = [(str(size), torch.zeros(size)) for size in (4, 4, 100, 1, 3)]
    sizes = [[tensor.numel() for _, tensor in bucket] for bucket in buckets(named, max_bytes=32)]
    assert sizes == [[4, 4], [100], [1, 3]]


@pytest.mark.parametrize(
    "arm, released", [("auto", ["kv_cache", "cuda_graph", "weights"]), ("frozen", ["kv_cache", "cuda_graph"])]
)
def test_the_order_of_calls_is_slimes(checkpoint, tmp_path, monkeypatch, arm, released):
    calls = []

    def request(self, path: str, payload: dict) -> None:
        calls.append((path.strip("/").partition("?")[0], *payload.get("tags", ())))

    monkeypatch.setattr(RolloutServer, "_request", request)
    sizes = {"max_rollouts": 4, "max_new_tokens": 8}
    server = RolloutServer(checkpoint, ARMS[arm], CPU, **sizes, log_path=tmp_path / "log")
    named = [(str(number), torch.zeros(CPU.max_bucket_bytes // 4)) for number in range(2)]
    update = [
        ("pause_generation",),
        ("flush_cache",),
        ("update_weights_from_tensor",),
        ("update_weights_from_tensor",),
        ("continue_generation",),
    ]
    server.update_policy(named)
    assert calls == update
    for forget in (False, True):
        calls.clear()
        server.sleep(forget=forget)
        server.update_policy(named)
        tags = ["kv_cache", "cuda_graph", "weights"] if forget else released
        weights_back = [("resume_memory_occupation", "weights")] if "weights" in tags else []
        assert calls == [
            ("flush_cache",),
            ("release_memory_occupation", *tags),
            *weights_back,
            *update,
            ("resume_memory_occupation", "kv_cache", "cuda_graph"),
        ]


def test_group_size_of_a_checkpoint(tmp_path):
    for hidden, expected in ((128, 128), (192, 64), (160, 32)):
        path = make_random_policy(tmp_path / str(hidden), shape=replace(PolicyShape(), hidden=hidden))
        assert group_size(path) == expected


# ---------------------------------------------------------------- runs and their report


def test_counters_between_two_moments():
    before = DraftCounters(
        cycles=2, decode_steps=8, drafted_tokens=10, accepted_tokens=5, emitted_tokens=25, refreshes=1
    )
    after = DraftCounters(
        cycles=5, decode_steps=9, drafted_tokens=22, accepted_tokens=14, emitted_tokens=46, refreshes=2, refresh_s=0.5
    )
    counted = after.since(before)
    assert counted.accepted == 9 / 12
    assert counted.drafting == 3 / 4
    assert counted.accept_length == 21 / 12  # 12 tokens that no draft brought
    assert counted.refresh_s == 0.5
    nothing = DraftCounters().since(DraftCounters())
    assert nothing.accepted is nothing.drafting is nothing.accept_length is None


ABOUT = {
    "policy": "toy",
    "settings": asdict(Settings(steps=4, prompts=2, group=2, max_new_tokens=9, learning_rate=1e-3)),
    "place": "cpu",
    "environment": {"command": "run --arms plain", "hardware": {"cpu": "abacus", "cpu_cores": 2, "gpu": "card"}},
}


def record(reward: float, rollout_s: float, accepted: float | None) -> StepRecord:
    drafts = accepted is not None
    return StepRecord(
        reward=reward,
        rollout_s=rollout_s,
        sleep_s=0.25,
        train_s=1.0,
        update_s=0.75,
        refresh_ms=3.0 if drafts else None,
        refreshes=int(drafts),
        accepted=accepted,
        accept_length=1 + 2 * accepted if drafts else None,
        drafting=0.5 if drafts else None,
        response_tokens=10.0,
        response_tokens_p90=20,
        response_tokens_max=30,
        tokens_per_s=60 / rollout_s,
        max_log_ratio=1e-5,
        mean_log_ratio=1e-6,
        server_gb=None,
        sleeping_server_gb=None,
        trainer_gb=None,
    )


def write_run(
    folder: Path, arm: str, seed: int, rollout_s: float, accepted: float | None, steps: int = 4, place: str = "cpu"
) -> None:
    records = [record(0.1 * step + 0.01 * seed, rollout_s, accepted) for step in range(steps)]
    report.write_run(folder, arm, seed, {**ABOUT, "place": place}, records)


@pytest.mark.parametrize(
    ("place", "times"),
    [
        ("cuda", ["2.00 +- 0.00", "30 +- 0", "2.000 +- 0.000", "4.00 +- 0.00", "1.500 +- 0.000"]),
        ("cpu", ["2.00 +- 0.00", "30 +- 0", "4.00 +- 0.00"]),  # no speed-ups
    ],
)
def test_runs_of_several_calls_are_compared(tmp_path, place, times):
    for seed in (0, 1):
        write_run(tmp_path, "plain", seed, 4.0, None, place=place)
        write_run(tmp_path, "auto-refresh-4", seed, 2.0, 0.75, place=place)
    write_run(tmp_path, "auto-refresh-4", 2, 2.0, 0.75, steps=3, place=place)
    text = report.write(tmp_path)
    assert (tmp_path / "table.md").read_text() == text + "\n"
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert ("card:" in text) == (place == "cuda") == (report.ON_CPU not in text)
    assert "auto-refresh-4, seed 2 (3)" in text
    learning, timing = [
        [cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines() if "auto-refresh-4 |" in line
    ]
    assert learning[:5] == ["2", "0.055 to 0.255", "0.750 to 0.750", "2.500 to 2.500", "0.500 to 0.500"]
    assert timing[: len(times) + 1] == [*times, "1"]  # then the training step's second
    assert "auto-refresh-4, 2 seeds: +0.000 +- 0.000 (sign-flip p = 1.00)" in text


def test_a_folder_takes_runs_of_one_kind(tmp_path):
    write_run(tmp_path, "plain", 0, 4.0, None)
    runs = report.read_runs(tmp_path)
    assert [report.finished(run) for run in runs] == [True]
    report.check_alike(runs, ABOUT)
    with pytest.raises(ValueError, match="plain, seed 0, has settings .* choose another --out"):
        report.check_alike(runs, {**ABOUT, "settings": {**ABOUT["settings"], "group": 4}})


def test_nothing_finished(tmp_path):
    write_run(tmp_path, "plain", 0, 4.0, None, steps=1)
    assert report.write(tmp_path) == "No run is finished: plain, seed 0 (1)."
    assert json.loads((tmp_path / "plain-0.json").read_text())["records"]["reward"] == [0.0]


def test_sign_flips():
    assert report.sign_flip_p([0.1, 0.2, 0.3]) == 2 / 8  # these signs and their opposites, of eight
    assert report.sign_flip_p([0.1, -0.1]) == 1


def test_defaults_are_the_policys(capsys):
    assert parse_args([]).settings == TOY and parse_args([]).arms == ["plain", "always", "frozen"]
    args = parse_args(["--policy", "smollm2", "--steps", "3"])
    assert args.settings == replace(CHAT, steps=3) and args.arms == ["plain", "auto", "auto-refresh-4"]
    with pytest.raises(SystemExit):
        parse_args(["--group", "1"])
    assert "judges a rollout against the others" in capsys.readouterr().err
