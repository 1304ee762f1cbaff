"""Nothing that the drafter wrote into the KV cache, and nothing rejected, is ever read by the policy or reused.

What must not be read is overwritten by NaN, which would spread into every logit computed from it.
"""

import pytest

from tests.host.servers import greedy, tokens

PROMPTS = [[7, 30, 30, 2, 51], [64, 65, 66], [12] * 20, [90, 8, 71, 15, 33, 4, 25, 99, 41]]
NEXT_TURN = [33, 44, 55]
NEW_TOKENS = 32


def turns(saboteur, rule):
    """Greedy outputs of two turns, the second after the KV cache of the first, and how much of that it reused."""
    sampling = greedy(NEW_TOKENS)
    saboteur.server.empty()
    saboteur.obey(rule)
    try:
        first = tokens(saboteur.server.generate({"input_ids": PROMPTS, "sampling_params": sampling}))
        grown = [prompt + output + NEXT_TURN for prompt, output in zip(PROMPTS, first)]
        answers = saboteur.server.generate({"input_ids": grown, "sampling_params": sampling})
    finally:
        saboteur.obey("none")
    return first, grown, tokens(answers), [answer["meta_info"]["cached_tokens"] for answer in answers]


@pytest.mark.parametrize("rule", ["none", "poison-drafted", "poison-rejected"])
def test_unread(saboteur, qwen3_oracle, rule):
    first, grown, second, cached = turns(saboteur, rule)
    assert first == [qwen3_oracle.greedy(prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert second == [qwen3_oracle.greedy(prompt, NEW_TOKENS) for prompt in grown]
    # All of the first turn; of its last token only if it was a drafted one, since else nobody needed its KV yet.
    for prompt, reused in zip(PROMPTS, cached):
        assert len(prompt) + NEW_TOKENS - 1 <= reused <= len(prompt) + NEW_TOKENS


def test_poison_would_be_seen(saboteur, qwen3_oracle):
    first, *_ = turns(saboteur, "poison-accepted")
    saboteur.server.empty()
    assert first != [qwen3_oracle.greedy(prompt, NEW_TOKENS) for prompt in PROMPTS]
