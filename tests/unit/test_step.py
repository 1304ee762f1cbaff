"""What a step reads of a batch."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="reads SGLang's flags")
from er_sglang.cycle import slots
from er_sglang.cycle import step as module
from er_sglang.cycle.step import Step


@pytest.mark.parametrize(
    "backend, min_p_in_batch, sequential",
    [("flashinfer", False, False), ("flashinfer", True, True), ("pytorch", False, False), ("pytorch", True, False)],
)
def test_filters_apply_in_the_order_of_sglangs_sampler(monkeypatch, backend, min_p_in_batch, sequential):
    """Its CUDA sampler filters in sequence while the batch says that min-p is needed, whoever needs it; the other jointly."""
    monkeypatch.setattr(module._settings, "sampling_backend", lambda: backend)
    ones = torch.ones(2, dtype=torch.int64)
    info = SimpleNamespace(
        temperatures=torch.ones(2, 1),
        top_ks=torch.full((2,), 20, dtype=torch.int32),
        top_ps=torch.ones(2),
        min_ps=torch.zeros(2),
        need_min_p_sampling=min_p_in_batch,
        logit_bias=None,
    )
    batch = SimpleNamespace(
        seq_lens=ones,
        seq_lens_cpu=ones,
        sampling_info=info,
        reqs=[None, None],
        req_pool_indices=ones,
        spec_info=SimpleNamespace(bonus_tokens=ones),
    )
    step = Step.of_batch(batch, torch.zeros(2, 8, dtype=torch.int64), width=3, host_slack_tokens=0)
    assert step.params.sequential_B.tolist() == [sequential] * 2


@pytest.mark.parametrize("kernel", [False, True], ids=["reference", "kernel"])
@pytest.mark.parametrize("width", [1, 6])
def test_slots_of_the_next_positions(kernel, width):
    next_slots = slots.next_slots_reference
    if kernel:
        fused = pytest.importorskip("er_sglang.cycle.slots_fused", reason="the kernel is written in Triton")
        next_slots = fused.next_slots_fused
    table = torch.randperm(9 * 40, generator=torch.Generator().manual_seed(0)).view(9, 40).int()
    rows_B, lengths_B = torch.tensor([7, 0, 3]), torch.tensor([1, 34, 12])
    positions_NB, slots_NB = next_slots(table, rows_B, lengths_B, width)
    for b, (row, length) in enumerate(zip(rows_B.tolist(), lengths_B.tolist())):
        assert positions_NB[:, b].tolist() == [*range(length, length + width)]
        assert slots_NB[:, b].tolist() == table[row, length : length + width].tolist()
    assert positions_NB.t().is_contiguous() and slots_NB.t().is_contiguous()
    assert positions_NB.dtype == slots_NB.dtype == torch.int64
