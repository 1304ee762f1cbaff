"""SGLang's log-probabilities of the tokens that a speculative step emits."""

import inspect
from collections.abc import Callable
from functools import cache

from sglang.srt.layers.logprob_processor import compute_spec_v2_logprobs

SEAMS = """
layers.logprob_processor:compute_spec_v2_logprobs batch logits_output predict accept_index
"""


def attach(batch, output, tokens, index, accept_lens, gamma: int) -> None:
    """Into ``output``. tokens: emitted, padded to gamma + 1 a request. index: their positions, -1 for padding."""
    arguments = [batch, output, tokens, index, gamma]
    if _takes_accept_lens(compute_spec_v2_logprobs):  # slime's top-p patch
        arguments.insert(4, accept_lens)
    compute_spec_v2_logprobs(*arguments)


def returns_kept_tokens(batch) -> bool:
    """Whether ``attach`` is to return the tokens that top-p kept, by slime's patch."""
    return _takes_accept_lens(compute_spec_v2_logprobs) and batch.sampling_info.need_return_top_p_token_ids


@cache
def _takes_accept_lens(function: Callable) -> bool:
    return "accept_lens" in inspect.signature(function).parameters
