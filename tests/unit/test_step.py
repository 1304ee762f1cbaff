"""What a step reads of a batch."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="reads SGLang's flags")
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
