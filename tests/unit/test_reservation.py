"""KV slots that a decode step reserves, for requests far from their length limits and near them."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers import schedule_batch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.speculative import eagle_utils, spec_utils

from er_sglang.host import reservation
from er_sglang.host.cpu import _assign_slots

RESERVE = 8  # two cycles of gamma = 3
POOL = 64


@pytest.fixture(autouse=True)
def sglang(monkeypatch):
    for module in (schedule_batch, eagle_utils, reservation._slots):
        monkeypatch.setattr(module, "get_alloc_reserve_per_decode", lambda: RESERVE)
    monkeypatch.setattr(
        eagle_utils, "alloc_token_slots", lambda pool, count: torch.tensor([pool.pop() for _ in range(count)])
    )
    monkeypatch.setattr(spec_utils, "assign_req_to_token_pool_func", _assign_slots)


def request(committed: int, allocated: int, limit: int):
    return SimpleNamespace(
        kv_committed_len=committed,
        kv_allocated_len=allocated,
        origin_input_ids=[5] * 2,
        sampling_params=SimpleNamespace(max_new_tokens=limit - 2),
        decode_batch_idx=0,
    )


def batch_of(*reqs):
    table = torch.full((len(reqs), 48), 99)
    for row, req in enumerate(reqs):
        table[row, : req.kv_allocated_len] = 50
    return SimpleNamespace(
        reqs=reqs,
        device="cpu",
        batch_size=lambda: len(reqs),
        maybe_evict_swa=lambda: None,
        sampling_info=SimpleNamespace(penalizer_orchestrator=SimpleNamespace(is_required=False)),
        token_to_kv_pool_allocator=SimpleNamespace(page_size=1),
        tree_cache=list(range(POOL, 0, -1)),
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        req_pool_indices=torch.arange(len(reqs)),
    )


def needed(*reqs) -> int:
    count = ScheduleBatch._new_tokens_required_next_decode_spec_v2
    return reservation._count_needed(count, None, reqs, 1)


@pytest.mark.parametrize(
    ("committed", "allocated", "limit", "reserved"),
    [
        pytest.param(10, 16, 40, 18, id="far from the limit"),
        pytest.param(10, 16, 17, 17, id="near it"),
        pytest.param(10, 17, 17, 17, id="all of it reserved"),
        pytest.param(17, 17, 17, 17, id="the limit reached"),
        pytest.param(2, 2, 2, 2, id="no new tokens"),
    ],
)
def test_slots_end_at_the_limit(committed, allocated, limit, reserved):
    other = request(4, 9, 40)
    req = request(committed, allocated, limit)
    assert needed(req, other) == reserved - allocated + 3
    batch = batch_of(req, other)
    reservation._reserve(eagle_utils.eagle_prepare_for_decode, batch)
    assert (req.kv_committed_len, req.kv_allocated_len, other.kv_allocated_len) == (committed, reserved, 12)
    assert len(batch.tree_cache) == POOL - (reserved - allocated + 3)
    row = batch.req_to_token_pool.req_to_token[0].tolist()
    assert row[:allocated] == [50] * allocated and 50 not in row[allocated:]
    assert not {0, 50, 99} & set(row[allocated:reserved])
    # What two cycles could write beyond is slot 0, of nobody.
    assert set(row[reserved : committed + RESERVE]) <= {0}


def test_nothing_is_committed_without_a_slot():
    over, within = request(19, 17, 17), request(10, 18, 40)
    reservation._commit_what_has_slots(None, None, batch=SimpleNamespace(reqs=[over, within]))
    assert (over.kv_committed_len, within.kv_committed_len) == (17, 10)
