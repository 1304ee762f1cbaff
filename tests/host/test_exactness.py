"""The emitted distribution is the policy's, under every sampling parameter, gamma fixed or switching at every step.

Each test fails by chance once in 1 / FALSE_ALARM runs.
"""

from dataclasses import replace

import pytest
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

from tests.host.goodness import assert_exact, cells
from tests.host.oracle import Sampling
from tests.host.servers import BULK, self_quant, tokens

PROMPT = [17, 4, 88, 23, 61, 9]
SAMPLES = 1600
NEW_TOKENS = 10  # one more than the most that a cycle emits after the prefill's token

SETTINGS = {
    "T=0.5": Sampling(temperature=0.5),
    "T=1": Sampling(),
    "T=1.5": Sampling(temperature=1.5),
    "top_k": Sampling(top_k=5),
    "top_p": Sampling(top_p=0.7),
    "min_p": Sampling(min_p=0.2),
    "top_k+top_p+min_p": Sampling(temperature=1.3, top_k=20, top_p=0.85, min_p=0.02),
    "logit_bias": Sampling(logit_bias=((5, 3.0), (9, -4.0), (40, 1.5))),
}
PENALTIES = {
    "frequency": Sampling(temperature=0.6, frequency_penalty=1.2),
    "presence": Sampling(temperature=0.6, presence_penalty=1.5),
    "repetition": Sampling(temperature=0.6, repetition_penalty=1.4),
    "reward": Sampling(temperature=0.6, frequency_penalty=-1.5),  # the latest token is likely to come again
    "all": Sampling(top_p=0.9, frequency_penalty=0.5, presence_penalty=0.5, repetition_penalty=1.2),
}


@pytest.fixture(scope="module")
def longest(qwen3, folder):
    """gamma = 7 in every step, overlap scheduling on."""
    overlap, log = {"disable-overlap-schedule": False}, folder / "longest.log"
    with self_quant(qwen3, log, {"policy": {"mode": "always"}}, 7, overlap, plugins=[BULK]) as server:
        yield server


def sample(server, sampling, n=SAMPLES):
    return tokens(server.generate({"input_ids": [PROMPT] * n, "sampling_params": sampling.params(NEW_TOKENS)}))


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
def test_switching(switching, qwen3_oracle, sampling):
    before = switching.self_quant()["decisions"]
    assert_exact(cells(qwen3_oracle, PROMPT, sample(switching, sampling), sampling))
    after = switching.self_quant()["decisions"]
    used = {name for name in after if after[name] > before.get(name, 0)}
    assert len(used) >= 3, "gamma did not switch"


@pytest.mark.parametrize("name", ["T=1", "top_k+top_p+min_p", "logit_bias"])
def test_longest_draft(longest, qwen3_oracle, name):
    before = longest.self_quant()["cycles"]
    assert_exact(cells(qwen3_oracle, PROMPT, sample(longest, SETTINGS[name]), SETTINGS[name]))
    assert longest.self_quant()["cycles"] > before


@pytest.mark.parametrize("sampling", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize("fixture", ["switching", "longest"])
def test_penalties(request, fixture, qwen3_oracle, sampling):
    """With overlap scheduling, too, every token is penalised by all before it, also by those of its own cycle. SGLang's
    own penalties miss the latest one."""
    server = request.getfixturevalue(fixture)
    before = server.self_quant()
    assert_exact(cells(qwen3_oracle, PROMPT, sample(server, sampling), sampling))
    after = server.self_quant()
    assert after["drafted_tokens"] - before["drafted_tokens"] >= SAMPLES * NEW_TOKENS / 2


def test_riders(switching, qwen3_oracle):
    """Requests with a custom logit processor ride along: they take plain steps while the others are drafted for. They
    are penalised like others."""
    banned = [3, 5, 9, 23, 40, 61, 77, 88]
    riding = Sampling(temperature=0.8, frequency_penalty=-1.0)
    kinds = [Sampling(), replace(riding, logit_bias=tuple((token, -1e9) for token in banned))]
    plain = {"custom_params": {"token_ids": banned}, **riding.params(NEW_TOKENS)}
    processor = DisallowedTokensLogitsProcessor().to_str()
    before = switching.self_quant()
    answers = switching.generate(
        {
            "input_ids": [PROMPT] * (2 * SAMPLES),
            "sampling_params": [kinds[0].params(NEW_TOKENS), plain] * SAMPLES,
            "custom_logit_processor": [None, processor] * SAMPLES,
        }
    )
    after = switching.self_quant()
    outputs = tokens(answers)
    assert_exact(cells(qwen3_oracle, PROMPT, outputs[0::2], kinds[0]))
    assert_exact(cells(qwen3_oracle, PROMPT, outputs[1::2], kinds[1]))
    assert after["drafted_tokens"] > before["drafted_tokens"]
    assert after["riding_tokens"]["custom-logit-processor"] >= SAMPLES
    counted = [answer["meta_info"]["spec_num_proposed_drafts"] for answer in answers]
    assert all(counted[0::2]) and not any(counted[1::2])


def test_mixed_batch(switching, qwen3_oracle):
    """Greedy rows, and rows of two samplings, in one batch."""
    kinds = [Sampling(temperature=0.0), Sampling(), Sampling(temperature=0.7, top_k=8)]
    rows = [kinds[i % 3] for i in range(3 * SAMPLES // 2)]
    answers = switching.generate(
        {"input_ids": [PROMPT] * len(rows), "sampling_params": [row.params(NEW_TOKENS) for row in rows]}
    )
    outputs = tokens(answers)
    assert {tuple(output) for output in outputs[0::3]} == {tuple(qwen3_oracle.greedy(PROMPT, NEW_TOKENS))}
    assert_exact(cells(qwen3_oracle, PROMPT, outputs[1::3], kinds[1]))
    assert_exact(cells(qwen3_oracle, PROMPT, outputs[2::3], kinds[2]))
