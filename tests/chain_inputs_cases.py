"""A step for the buffers of a chain, on any device."""

import torch

from er_sglang.cycle.inputs import ChainInputs
from er_sglang.cycle.step import Step
from er_sglang.sampling import SamplingParams

GAMMA_MAX, MAX_BATCH = 5, 48
BATCH, PADDED = 35, 40  # more than a program of the kernel takes


def sample_step(device: str, width: int) -> tuple[Step, torch.Tensor, torch.Tensor]:
    """A step, and rows and what these hide of it."""
    generator = torch.Generator().manual_seed(width)

    def some(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(1, high, shape or (BATCH,), generator=generator).to(device)

    lengths_B = 100 + some(900)
    step = Step(
        req_pool_indices_B=some(200),
        seq_lens_B=lengths_B,
        seq_lens_cpu_B=lengths_B.cpu(),
        last_B=some(1000),
        positions_NB=(lengths_B[:, None] + torch.arange(width, device=device)).t(),
        slots_NB=some(10**6, BATCH, width).t(),
        params=SamplingParams(
            some(1000).float(), some(50).int(), some(1000) / 1000.0, some(1000) / 2000.0, some(3) > 1
        ),
    )
    return step, some(200), some(100)


def loaded(load, *arguments) -> ChainInputs:
    """Buffers that held something else before."""
    inputs = ChainInputs(GAMMA_MAX, MAX_BATCH, arguments[0].last_B.device)
    for values in buffers(inputs).values():
        values.fill_(77)
    load(inputs, *arguments)
    return inputs


def buffers(inputs: ChainInputs) -> dict[str, torch.Tensor]:
    return {**{name: values for name, values in vars(inputs).items() if name != "params"}, **inputs.params._asdict()}
