"""The draft's attention: what a float32 reference computes, whatever the lengths, and the same bits every time."""

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)
pytest.importorskip("sglang", reason="needs SGLang's compiler of kernels")

from er_sglang.drafting import attention, early

CUDA = torch.device("cuda")
ERROR = {torch.bfloat16: 4e-3, torch.float16: 1e-3}  # of the norm; weights and result are rounded


class Case:
    """Requests of given lengths whose KV slots, and rows of the request table, are in no order; slot 0 is poison."""

    def __init__(self, lengths, heads_q, heads_k, head_dim, dtype=torch.bfloat16):
        generator = torch.Generator(CUDA).manual_seed(len(lengths))
        slots, batch = sum(lengths) + 1, len(lengths)

        def random(*shape):
            return torch.randn(*shape, device=CUDA, generator=generator).to(dtype)

        self.q, self.k, self.v = random(batch, heads_q, head_dim), *random(2, slots, heads_k, head_dim)
        self.k[0] = self.v[0] = torch.nan
        self.rows = torch.randperm(batch + 3, device=CUDA, generator=generator)[:batch]
        self.lengths = torch.tensor(lengths, device=CUDA)
        self.req_to_token = torch.zeros(batch + 3, max(lengths) + 5, dtype=torch.int32, device=CUDA)
        order = 1 + torch.randperm(slots - 1, device=CUDA, generator=generator).int()
        for row, of_request in zip(self.rows.tolist(), order.split(lengths)):
            self.req_to_token[row, : len(of_request)] = of_request
        self.parts, self.arrivals = attention.scratch(batch, heads_k, head_dim, CUDA)
        self.parts.fill_(torch.nan)
        self.scale = head_dim**-0.5

    def attend(self) -> torch.Tensor:
        table = (self.req_to_token, self.rows, self.lengths)
        return attention.attend(self.q, self.k, self.v, *table, self.parts, self.arrivals, self.scale)

    def expected(self) -> torch.Tensor:
        out, group = torch.empty_like(self.q, dtype=torch.float32), self.q.shape[1] // self.k.shape[1]
        for b, (row, length) in enumerate(zip(self.rows.tolist(), self.lengths.tolist())):
            slots = self.req_to_token[row, :length].long()
            k, v = (cache[slots].float().repeat_interleave(group, dim=1) for cache in (self.k, self.v))
            weights = torch.softmax(self.scale * torch.einsum("hd,thd->ht", self.q[b].float(), k), dim=1)
            out[b] = torch.einsum("ht,thd->hd", weights, v)
        return out


def lengths_up_to(longest: int, batch: int) -> list[int]:
    return [longest, *torch.randint(1, longest + 1, (batch - 1,), generator=torch.Generator().manual_seed(1)).tolist()]


HEADS = [(40, 8, 128), (28, 4, 128), (14, 2, 64), (8, 8, 128), (64, 8, 128)]
LENGTHS = [
    (1, 1),
    (1, 17),
    (1, 5000),
    (3, 200),
    (16, 1336),
    (33, 700),
    (128, 400),
    (300, 60),
    (attention.MAX_REQUESTS, 3),
]


@pytest.mark.parametrize("dtype", attention.DTYPES)
@pytest.mark.parametrize("heads_q, heads_k, head_dim", HEADS)
@pytest.mark.parametrize("batch, longest", LENGTHS)
def test_attends_to_the_slots_of_the_table(dtype, heads_q, heads_k, head_dim, batch, longest):
    case = Case(lengths_up_to(longest, batch), heads_q, heads_k, head_dim, dtype)
    actual, expected = case.attend(), case.expected()
    errors = (actual.float() - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
    assert errors.max() < 2 * ERROR[dtype]
    assert errors.mean() < ERROR[dtype]
    for _ in range(3):
        assert torch.equal(case.attend(), actual)
    assert not case.arrivals.any()


@pytest.mark.parametrize("batch, length", [(1, 1336), (8, 320), (64, 576)])
def test_waits_for_the_token_that_the_kernel_before_writes(batch, length):
    """Rotation, store and attention in one graph, the last token's slots poisoned before each replay."""
    heads_q, heads_k, head_dim, layers = 40, 8, 128, 4
    cases = [Case([length] * batch, heads_q, heads_k, head_dim) for _ in range(layers)]
    qkv = torch.randn(batch, heads_q + 2 * heads_k, head_dim, device=CUDA).bfloat16()
    q, k, v = qkv.split([heads_q, heads_k, heads_k], dim=1)
    table, positions = torch.randn(length + 1, head_dim, device=CUDA), torch.full((batch,), length, device=CUDA)
    slots = [case.req_to_token[case.rows, length - 1].long() for case in cases]

    def run(after_each=lambda: None) -> list[torch.Tensor]:
        out = []
        for case, last in zip(cases, slots):
            case.q = early.rope_store_(q, k, v, case.k, case.v, table, positions, last)
            after_each()
            out.append(case.attend())
            after_each()
        return out

    expected = run(torch.cuda.synchronize)
    for each, case in zip(expected, cases):
        error = (each.float() - case.expected()).norm() / case.expected().norm()
        assert error < ERROR[torch.bfloat16]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = run()
    for _ in range(50):
        for case, last in zip(cases, slots):
            case.k[last] = case.v[last] = torch.nan
        graph.replay()
        for a, e in zip(actual, expected):
            assert torch.equal(a, e)
