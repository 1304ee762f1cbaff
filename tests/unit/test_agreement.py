"""Ranks that saw the same agree; ranks that drifted apart fail, all of them, and none hangs."""

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from er_sglang.config import DrafterConfig
from er_sglang.errors import ConfigError
from er_sglang.steering.agreement import CHECK_EVERY_STEPS, Agreement, RanksDisagree, check_settings


def run(rank: int, file: str, drifted_at: int | None, outcomes) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    agreement = Agreement(dist.group.WORLD)
    outcome = "agreed"
    try:
        for step in range(3 * CHECK_EVERY_STEPS):
            agreement.add((step, rank if step == drifted_at else 0))
            agreement.check()
    except RanksDisagree as error:
        outcome = str(error)
    outcomes[rank] = outcome
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("drifted_at", "expected"), [(None, "agreed"), (CHECK_EVERY_STEPS + 1, f"step {2 * CHECK_EVERY_STEPS}")]
)
def test_two_ranks(tmp_path, drifted_at, expected):
    with mp.get_context("spawn").Manager() as manager:
        outcomes = manager.dict()
        mp.spawn(run, (str(tmp_path / "store"), drifted_at, outcomes), nprocs=2)
        assert len(outcomes) == 2 and all(expected in outcome for outcome in outcomes.values())


def read(rank: int, file: str, windows: tuple[int, int], outcomes) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        check_settings(DrafterConfig(attention_window=windows[rank]), dist.group.WORLD)
        outcomes[rank] = "agreed"
    except ConfigError as error:
        outcomes[rank] = str(error)
    dist.destroy_process_group()


@pytest.mark.parametrize("windows", [(8, 8), (0, 8)])
def test_settings_of_two_nodes(tmp_path, windows):
    with mp.get_context("spawn").Manager() as manager:
        outcomes = manager.dict()
        mp.spawn(read, (str(tmp_path / "store"), windows, outcomes), nprocs=2)
        expected = ["agreed"] * 2 if windows == (8, 8) else [f"attention_window={window}," for window in windows]
        assert len(outcomes) == 2 and all(expected[rank] in outcome for rank, outcome in outcomes.items())
