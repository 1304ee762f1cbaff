"""What a chain's graphs find of a step, and the kernel that puts it there, in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("sglang", reason="a step reads SGLang's flags")
from er_sglang.cycle.inputs import ChainInputs
from tests.chain_inputs_cases import BATCH, PADDED, buffers, loaded, sample_step


def test_each_decode_is_one_token_on():
    step, rows_B, hidden_B = sample_step("cpu", width=4)
    inputs = loaded(ChainInputs.load_reference, step, 3, PADDED, rows_B, hidden_B)
    assert torch.equal(inputs.tokens[0, :BATCH], step.last_B)
    assert torch.equal(inputs.rows[:BATCH], rows_B)
    for i in range(3):
        assert torch.equal(inputs.slots[i, :BATCH], step.slots_NB[i])
        assert torch.equal(inputs.positions[i, :BATCH], step.seq_lens_B + i)
        assert torch.equal(inputs.seq_lens[i, :BATCH], step.seq_lens_B + i + 1 - hidden_B)
    assert all(torch.equal(rows[:BATCH], values) for rows, values in zip(inputs.params, step.params))
    padding = slice(BATCH, PADDED)
    for zeros in (inputs.tokens[0], inputs.rows, inputs.slots[:3], inputs.positions[:3]):
        assert not zeros[..., padding].any()
    for ones in (inputs.seq_lens[:3], inputs.params.top_k_B):
        assert (ones[..., padding] == 1).all()


@pytest.mark.parametrize("bs", [BATCH, PADDED])
@pytest.mark.parametrize("hides", [False, True])
def test_the_kernel_agrees_with_the_reference(hides, bs):
    fused = pytest.importorskip("er_sglang.cycle.inputs_fused", reason="the kernel is written in Triton")
    step, rows_B, hidden_B = sample_step("cpu", width=4)
    arguments = (step, 3, bs, rows_B, hidden_B if hides else None)
    expected, found = loaded(ChainInputs.load_reference, *arguments), loaded(fused.load_fused, *arguments)
    for name, values in buffers(expected).items():
        assert torch.equal(values, buffers(found)[name]), name
