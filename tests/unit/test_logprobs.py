"""Log-probabilities of emitted tokens: SGLang's, from the verdict's log-sum-exps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="compares with SGLang's own function")
from sglang.srt.environ import envs

from er_sglang.cycle import logprobs
from er_sglang.sampling import Draft, RandomState
from er_sglang.sampling.reference import ReferenceSampler
from tests.sampling_cases import make_logits, make_params

REQUESTS, GAMMA, VOCAB = 5, 3, 500
TEMPERATURES = [1.0, 0.6, 1.7, 1.0, 0.6]
TOP_K = [1 << 30, 40, 1 << 30, 1, 1]


def judged(all_greedy: bool = False):
    """A batch, the policy's logits and a verdict; requests differ in temperature, filters and greed."""
    params = make_params(REQUESTS, "cpu", top_p=0.8)
    params.temperature_B[:] = torch.tensor(TEMPERATURES)
    params.top_k_B[:] = 1 if all_greedy else torch.tensor(TOP_K, dtype=torch.int32)
    q_GBV, p_BNV = make_logits(1, GAMMA, REQUESTS, VOCAB), make_logits(2, REQUESTS, GAMMA + 1, VOCAB)
    p_BNV[:, :GAMMA] = q_GBV.transpose(0, 1) + 0.2 * p_BNV[:, :GAMMA]
    p_BNV[:, :, 7] = -torch.inf  # as a mask or a bias leaves it
    sampler, random = ReferenceSampler(), RandomState.create(1, torch.device("cpu"))
    draft = Draft(
        torch.zeros((GAMMA + 1, REQUESTS), dtype=torch.int64),
        q_GBV,
        torch.empty(GAMMA, REQUESTS),
        torch.empty(GAMMA, REQUESTS),
    )
    for i in range(GAMMA):
        sampler.draw(q_GBV[i], params, random, i, draft.tokens_NB[i + 1], draft.floor_GB[i], draft.lse_GB[i])
    verdict = sampler.judge(p_BNV, draft, params, random)
    batch = SimpleNamespace(
        seq_lens=torch.zeros(REQUESTS),
        sampling_info=SimpleNamespace(temperatures=params.temperature_B.view(-1, 1), is_all_greedy=all_greedy),
        top_logprobs_nums=[0] * REQUESTS,
        token_ids_logprobs=[None] * REQUESTS,
    )
    return batch, SimpleNamespace(next_token_logits=p_BNV.view(-1, VOCAB)), verdict, sampler


def sglangs(batch, output, verdict) -> SimpleNamespace:
    rows = torch.arange(REQUESTS * (GAMMA + 1)).view(REQUESTS, -1)
    index = torch.where(torch.arange(GAMMA + 1) < verdict.accept_lens_B.view(-1, 1), rows, -1)
    theirs = SimpleNamespace(next_token_logits=output.next_token_logits)
    logprobs._logprobs.attach(batch, theirs, verdict.emitted_BN.view(-1), index, verdict.accept_lens_B, GAMMA)
    return theirs


@pytest.mark.parametrize("original", [False, True], ids=["scaled", "original"])
@pytest.mark.parametrize("all_greedy", [False, True], ids=["mixed", "greedy"])
def test_they_are_sglangs_without_its_passes(monkeypatch, original, all_greedy):
    batch, output, verdict, sampler = judged(all_greedy)
    assert verdict.accept_lens_B.unique().numel() > 1
    with envs.SGLANG_RETURN_ORIGINAL_LOGPROB.override(original):
        expected = sglangs(batch, output, verdict).next_token_logprobs
        monkeypatch.setattr(logprobs._logprobs, "attach", lambda *_: pytest.fail("SGLang's passes"))
        logprobs.attach_logprobs(batch, output, verdict, sampler)
    emitted = torch.arange(GAMMA + 1) < verdict.accept_lens_B.view(-1, 1)
    assert output.next_token_logprobs.shape == expected.shape
    torch.testing.assert_close(output.next_token_logprobs[emitted], expected[emitted], rtol=1e-5, atol=1e-5)
    assert output.next_token_logprobs.isfinite().all()


def test_alternatives_and_chosen_tokens_are_sglangs():
    batch, output, verdict, sampler = judged()
    batch.top_logprobs_nums[1], batch.token_ids_logprobs[2] = 3, [5, 9]
    expected = sglangs(batch, output, verdict)
    logprobs.attach_logprobs(batch, output, verdict, sampler)
    assert torch.equal(output.next_token_logprobs, expected.next_token_logprobs)
    for mine, theirs in (
        (output.next_token_top_logprobs_val, expected.next_token_top_logprobs_val),
        (output.next_token_token_ids_logprobs_val, expected.next_token_token_ids_logprobs_val),
    ):
        assert [list(row) for row in mine] == [list(row) for row in theirs]


@pytest.mark.parametrize("returns_kept_tokens", [False, True])
def test_slimes_kept_tokens_take_its_function(monkeypatch, returns_kept_tokens):
    """Its top-p patch inserts an argument, and normalizes over the kept tokens where they are asked for."""
    batch, output, verdict, sampler = judged()
    batch.sampling_info.need_return_top_p_token_ids = returns_kept_tokens
    received = []

    def patched(batch, logits_output, predict, accept_index, accept_lens, speculative_num_steps):
        received.append((predict, accept_index, accept_lens, speculative_num_steps))

    if not hasattr(logprobs._logprobs, "compute_spec_v2_logprobs"):
        pytest.skip("slime patches SGLang 0.5.15.post1")
    monkeypatch.setattr(logprobs._logprobs, "compute_spec_v2_logprobs", patched)
    logprobs.attach_logprobs(batch, output, verdict, sampler)
    assert len(received) == returns_kept_tokens
    for predict, index, lens, gamma in received:
        assert torch.equal(predict, verdict.emitted_BN.view(-1)) and lens is verdict.accept_lens_B and gamma == GAMMA
        assert ((index >= 0).sum(1) == lens).all()
