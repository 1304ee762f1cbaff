"""Penalties and bias against their definition, written as a loop over tokens: the reference and the kernel."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from er_sglang.host.penalties import PenalisedRequests, penalties_of
from er_sglang.sampling.penalties import ReferenceShaper
from tests.penalty_cases import VOCAB, check_cycle


def shapers(batch):
    yield ReferenceShaper()
    pytest.importorskip("triton", reason="the fused shaper is written in Triton")
    from er_sglang.sampling.penalties_fused import FusedShaper

    yield FusedShaper(batch, torch.device("cpu"))


@pytest.mark.parametrize("seed", range(8))
def test_every_position_of_a_cycle(seed):
    for shaper in shapers(8):
        check_cycle(shaper, "cpu", seed)


def request(*output_ids, **params) -> SimpleNamespace:
    defaults = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
    req = SimpleNamespace(
        sampling_params=SimpleNamespace(**{**defaults, "stop_token_ids": None, **params}),
        tokenizer=SimpleNamespace(eos_token_id=3, additional_stop_token_ids={4}),
        origin_input_ids=[9, 9],
        output_ids=list(output_ids),
        req_pool_idx=1,
    )
    return Hashable(req)


class Hashable:
    """A request, which is compared by identity."""

    def __init__(self, fields) -> None:
        self.__dict__ = vars(fields)
        self.done = False

    def finished(self) -> bool:
        return self.done


def test_only_penalised_requests_are_counted():
    assert penalties_of(request(5, stop_token_ids={8})) is None
    for name, value in {"frequency_penalty": 0.1, "presence_penalty": -1.0, "repetition_penalty": 1.1}.items():
        assert penalties_of(request(5, **{name: value})).stop_tokens == set()
    found = penalties_of(request(5, min_new_tokens=7, stop_token_ids={8}))
    assert (found.least_tokens, found.stop_tokens, found.emitted) == (9, {3, 4, 8}, [5])
    requests = PenalisedRequests(VOCAB, torch.device("cpu"))
    requests.admit([request(5), request(6)])
    assert requests.of([request(5)]) is None


def test_rows_follow_requests():
    """Through chunks, merges and retraction; a row of a request that has ended begins anew with another."""
    requests, shaper = PenalisedRequests(VOCAB, torch.device("cpu")), ReferenceShaper()
    free, first, second = request(), request(frequency_penalty=0.5), request(presence_penalty=0.5)
    requests.admit([free, first])
    requests.admit([second])

    def counts(*reqs) -> list[dict[int, int]]:
        penalties = requests.of(reqs)
        rows = penalties.words[penalties.rows, :VOCAB]
        return [{token: n for token, n in enumerate(row.tolist()) if n} for row in rows]

    def emit(*reqs, tokens, lens) -> None:
        shaper.load(requests.of(reqs), None)
        shaper.count(torch.tensor(tokens), torch.tensor(lens, dtype=torch.int32))

    emit(second, free, first, tokens=[[7, 7, 8], [1, 2, 3], [5, 0, 0]], lens=[3, 3, 1])
    assert counts(second, first) == [{7: 2, 8: 1}, {5: 1}]
    # Retracted; what was still in flight for it is not in its output.
    second.req_pool_idx, second.output_ids = None, [7]
    emit(second, tokens=[[9]], lens=[1])
    third = request(repetition_penalty=1.5)
    requests.admit([third])
    second.req_pool_idx = 4
    requests.admit([second])
    assert counts(third, second, first) == [{}, {7: 1}, {5: 1}]
    first.done = True
    fourth, fifth = request(frequency_penalty=0.1), request(frequency_penalty=0.1)
    requests.admit([fourth, fifth])
    emit(fifth, tokens=[[6]], lens=[1])
    assert counts(fourth, fifth, third, second) == [{}, {6: 1}, {}, {7: 1}]
    assert len(requests.of([second]).words) <= 8
    requests.forget()
    assert requests.of([second]) is None
