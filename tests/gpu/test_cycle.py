"""The kernels around a cycle's forwards, against the reference."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from er_sglang.cycle.inputs import ChainInputs
from er_sglang.cycle.slots import next_slots, next_slots_reference
from er_sglang.cycle.window import show, show_reference
from er_sglang.drafting.choice import choose, choose_reference
from tests.chain_inputs_cases import BATCH, PADDED, buffers, loaded, sample_step
from tests.choice_cases import choice, chosen


@pytest.mark.parametrize("width", [1, 2, 6, 16])
@pytest.mark.parametrize("batch", [1, 8, 128])
def test_slots(batch, width):
    table = torch.randperm(200 * 3000, device="cuda").view(200, 3000).int()
    arguments = (
        table,
        torch.randperm(200, device="cuda")[:batch],
        torch.randint(1, 2900, (batch,), device="cuda"),
        width,
    )
    for found, expected in zip(next_slots(*arguments), next_slots_reference(*arguments)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("bs", [BATCH, PADDED])
@pytest.mark.parametrize("gamma", [1, 5])
def test_chain_inputs(gamma, bs, hides):
    step, rows_B, hidden_B = sample_step("cuda", width=6)
    arguments = (step, gamma, bs, rows_B, hidden_B if hides else None)
    expected, found = loaded(ChainInputs.load_reference, *arguments), loaded(ChainInputs.load, *arguments)
    for name, values in buffers(expected).items():
        assert torch.equal(values, buffers(found)[name]), name


@pytest.mark.parametrize("by_attention", [False, True])
@pytest.mark.parametrize(("size", "page_size"), [(128, 1), (1024, 1), (256, 16)])
def test_window(size, page_size, by_attention):
    torch.manual_seed(size)
    table = torch.randperm(80 * 4000, device="cuda").view(80, 4000).int()
    requests_B = torch.randperm(40, device="cuda")[:20]
    lengths_B = torch.randint(1, 3990, (20,), device="cuda")
    first, last = (page_size * -(-4 // page_size), 60) if by_attention else (64, size)
    before = first + by_attention * size
    chosen = None
    if by_attention:
        until = (lengths_B - 60).clamp(min=0) // page_size * page_size
        tokens = torch.randint(0, 4000, (40, 1024), device="cuda")
        chosen = torch.zeros(40, dtype=torch.int64, device="cuda").index_put((requests_B,), until), tokens
    most = before + last + page_size - 1
    columns = min(most + 5, 4000)

    def shown(show):
        copy = table.clone()
        hidden_B = show(copy, copy[40:60, :columns], requests_B, lengths_B, most, page_size, first, before, chosen)
        return copy, hidden_B

    for found, expected in zip(shown(show), shown(show_reference)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize(
    ("page_size", "most", "columns"),
    [(1, 256, 1100), (1, 1024, 9000), (1, 1024, 70_000), (1, 256, 100), (16, 512, 5000)],
)
def test_choice(page_size, most, columns, equal):
    arguments = choice("cuda", page_size, most, columns, equal)
    for found, expected in zip(chosen(choose, *arguments), chosen(choose_reference, *arguments)):
        assert torch.equal(found, expected)
