"""SGLang's log-probabilities of the tokens that a speculative step emits."""

from sglang.srt.layers.logprob_processor import compute_spec_logprobs

SEAMS = """
layers.logprob_processor:compute_spec_logprobs batch logits_output predict
"""


def attach(batch, output, tokens, index, accept_lens, gamma: int) -> None:
    """Into ``output``. tokens: emitted, padded to gamma + 1 a request. index: their positions, -1 for padding."""
    compute_spec_logprobs(batch, output, tokens, accept_index=index)


def returns_kept_tokens(batch) -> bool:
    return False
