"""Penalties in a server that drafts equal those of plain SGLang without overlap scheduling, which are not late.

Greedy outputs are compared token by token, of every kind of penalty in one batch with unpenalised requests: the two
servers schedule, batch and step differently. Distributions are in test_exactness.py.
"""

import pytest

from tests.byte_tokenizer import make_byte_tokenizer
from tests.host.policies import VOCAB, make_policy
from tests.host.servers import plain, self_quant, tokens

TOKENIZER = make_byte_tokenizer()
NEW_TOKENS = 100
STOPS = [5, 17, 42, 60, 88]  # common enough that most responses would end at once
KINDS = {
    "none": {},
    "repetition": {"repetition_penalty": 1.05},
    "frequency": {"frequency_penalty": 0.05},
    "strong frequency": {"frequency_penalty": 0.5},
    "presence": {"presence_penalty": 0.7},
    "reward": {"frequency_penalty": -0.2},
    "min_new_tokens": {"min_new_tokens": 30, "stop_token_ids": STOPS, "ignore_eos": False},
    "bias": {"logit_bias": {"7": 2.0, "30": -5.0}, "presence_penalty": 0.3},
}
PROMPTS = [[2 + 7 * i, 9, 30 + i] for i in range(5)]
BATCH = {
    "input_ids": [prompt for prompt in PROMPTS for _ in KINDS],
    "sampling_params": [
        {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True, **kind}
        for _ in PROMPTS
        for kind in KINDS.values()
    ],
}
SERVERS = {
    "no overlap": {},
    # So small that requests are retracted, and prefilled in chunks.
    "overlap": {
        "disable-overlap-schedule": False,
        "max-total-tokens": 800,
        "schedule-conservativeness": 0.01,
        "chunked-prefill-size": 16,
    },
}
CYCLE = {"policy": {"mode": "cycle", "cycle": [3, 0, 1, 2, 3]}}


@pytest.fixture(scope="module")
def policy(folder):
    path = make_policy(folder, "qwen3", seed=31, spread=0.7)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(policy, folder):
    with plain(policy, folder / "plain-penalties.log", {"skip-tokenizer-init": False}) as server:
        answers = server.generate({**BATCH, "return_logprob": True})
    outputs = tokens(answers)
    for kind, output in zip(list(KINDS) * len(PROMPTS), outputs):
        assert len(output) == NEW_TOKENS or kind == "min_new_tokens" and 30 < len(output) and output[-1] in STOPS
    by_kind = [outputs[i :: len(KINDS)] for i in range(len(KINDS))]
    assert all(penalised != by_kind[0] for penalised in by_kind[1:]), "a penalty without an effect shows nothing"
    return answers


@pytest.fixture(scope="module", params=SERVERS)
def server(request, policy, folder):
    args = {"skip-tokenizer-init": False, **SERVERS[request.param]}
    with self_quant(policy, folder / f"penalties-{request.param}.log", CYCLE, 3, args) as server:
        server.short_of_memory = "max-total-tokens" in args
        yield server
        server.empty()
        assert server.process.poll() is None


def test_greedy_equals_plain(server, expected):
    before = server.self_quant()
    for _ in range(6):  # how requests arrive decides whether any must be retracted
        chunks = list(server.stream(BATCH))
        found = {chunk["index"]: chunk["output_ids"] for chunk in chunks}
        assert [found[i] for i in range(len(expected))] == tokens(expected)
        if not server.short_of_memory or "Retract requests" in server.log_path.read_text():
            break
    else:
        pytest.fail("no request was retracted")
    after = server.self_quant()
    assert after["accepted_tokens"] > before["accepted_tokens"]
    assert not after["refused_tokens"]


def test_log_probabilities(server, expected):
    """They are those of the penalised distribution."""
    for answer, other in zip(server.generate({**BATCH, "return_logprob": True}), expected):
        found, wanted = (
            [value for value, *_ in each["meta_info"]["output_token_logprobs"]] for each in (answer, other)
        )
        assert found == pytest.approx(wanted, abs=1e-4)


def test_min_new_tokens_allows_a_stop_at_once_after_them(server):
    """Every length is met exactly, wherever in a cycle it falls: all tokens but one are stop tokens."""
    lengths = range(1, 14)
    stops = [token for token in range(VOCAB) if token != 9]
    sampling = [
        {"temperature": 1.0, "max_new_tokens": 40, "min_new_tokens": n, "stop_token_ids": stops} for n in lengths
    ]
    outputs = tokens(server.generate({"input_ids": [PROMPTS[0]] * len(lengths), "sampling_params": sampling}))
    for n, output in zip(lengths, outputs):
        assert set(output[:n]) == {9} and len(output) > n


def acceptance(server, **sampling) -> float:
    """Of about 10,000 drafted tokens: its standard deviation is below 0.01."""
    before = server.self_quant()
    params = {"temperature": 1.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True, **sampling}
    server.generate({"input_ids": PROMPTS * 12, "sampling_params": params})
    after = server.self_quant()
    return (after["accepted_tokens"] - before["accepted_tokens"]) / (after["drafted_tokens"] - before["drafted_tokens"])


def test_shaped_drafts_are_accepted_like_others(server):
    plain = acceptance(server)
    assert acceptance(server, frequency_penalty=0.05) > plain - 0.06
    assert acceptance(server, presence_penalty=1.5) > plain - 0.06
    assert acceptance(server, logit_bias={str(token): 6.0 for token in range(0, VOCAB, 9)}) > plain - 0.06
