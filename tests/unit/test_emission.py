"""What becomes of the tokens of a step does not depend on how many there are."""

from array import array
from types import SimpleNamespace

import pytest
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from er_sglang.host import emission
from tests.byte_tokenizer import make_byte_tokenizer

TOKENIZER = make_byte_tokenizer()
TOKENIZER.additional_stop_token_ids = None


def request(stream=False, **sampling) -> Req:
    params = SamplingParams(**sampling)
    params.normalize(TOKENIZER)
    req = Req("r", "", array("q", [2, 3]), params, stream=stream, vocab_size=len(TOKENIZER))
    req.tokenizer = TOKENIZER
    return req


@pytest.mark.parametrize("new_tokens", [0, 1])
def test_no_log_probability_of_no_token(new_tokens):
    req = request(max_new_tokens=new_tokens)
    req.logprob = SimpleNamespace(output_token_logprobs_val=[-0.5], output_token_logprobs_idx=[7])
    emission._score_prompts_only(None, None, 0, req)
    assert len(req.logprob.output_token_logprobs_val) == len(req.logprob.output_token_logprobs_idx) == new_tokens
