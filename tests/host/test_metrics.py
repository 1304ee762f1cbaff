"""Counters that add up, in /server_info and Prometheus; and what must not be drafted for falls back with its reason."""

import json
import re

import pytest

from tests.host.servers import greedy, self_quant

GAMMA = 3
REQUESTS = 16
NEW_TOKENS = 40


@pytest.fixture(scope="module")
def server(qwen3, folder):
    args = {
        "skip-tokenizer-init": False,
        "grammar-backend": "outlines",  # xgrammar refuses the CPU, llguidance this tokenizer
        "enable-metrics": True,
        "enable-return-hidden-states": True,
    }
    with self_quant(
        qwen3, folder / "metrics.log", {"policy": {"mode": "cycle", "cycle": [3, 0, 2]}}, GAMMA, args
    ) as server:
        yield server


def generate(server, **more):
    sampling = more.pop("sampling", {})
    if isinstance(sampling, dict):
        sampling = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, **sampling}
    prompts = [[5, 6, 7 + i] for i in range(REQUESTS)]
    answers = server.generate({"input_ids": prompts, "sampling_params": sampling, **more})
    return answers, server.self_quant()


def test_counters_add_up(server):
    before = server.self_quant()
    _, after = generate(server)
    # Every token but the first of a request, which is the prefill's.
    assert after["emitted_tokens"] - before["emitted_tokens"] >= REQUESTS * (NEW_TOKENS - 1)
    assert 0 < after["accepted_tokens"] < after["drafted_tokens"]
    assert after["cycles"] + after["decode_steps"] == sum(after["decisions"].values())
    by_gamma = {gamma: after["decisions"][f"gamma={gamma}:cycle"] for gamma in (0, 2, 3)}
    assert by_gamma[0] == after["decode_steps"] and by_gamma[2] + by_gamma[3] == after["cycles"]
    assert max(by_gamma.values()) - min(by_gamma.values()) <= 1
    assert 1 < after["accept_length"] < 1 + GAMMA
    assert len(after["acceptance_per_position"]) == GAMMA
    assert all(0 < acceptance < 1 for acceptance in after["acceptance_per_position"])
    assert after["gamma_max"] == GAMMA and after["weights"] == "int4" and after["drafter_bytes"] > 0
    assert (after["updates"], after["failed_updates"], after["dirty"]) == (0, 0, False)


def test_acceptance_per_position_explains_what_was_accepted(saboteur):
    """At a fixed gamma: mean accepted = a1 + a1 a2 + a1 a2 a3, for conditional acceptances a."""
    generate(saboteur.server)
    info = saboteur.server.self_quant()
    reached, mean_accepted = 1.0, 0.0
    for acceptance in info["acceptance_per_position"]:
        reached *= acceptance
        mean_accepted += reached
    assert info["accept_length"] == pytest.approx(1 + mean_accepted, rel=1e-6)
    assert info["drafted_tokens"] % GAMMA == 0
    assert info["accepted_tokens"] / (info["drafted_tokens"] / GAMMA) == pytest.approx(mean_accepted, rel=1e-6)


def prometheus(server):
    """Values of our metrics, summed over labels, by name and gamma."""
    line = re.compile(r"^(sglang:self_quant_\w+?)(?:_total)?\{(.*)\} (\S+)$", re.MULTILINE)
    found = {}
    for name, labels, value in line.findall(server.metrics()):
        key = (name, *re.findall(r'gamma="(\d+)"', labels))
        found[key] = found.get(key, 0.0) + float(value)
    return found


def test_prometheus(server):
    _, info = generate(server)
    found = prometheus(server)
    assert found["sglang:self_quant_drafted_tokens",] == info["drafted_tokens"]
    assert found["sglang:self_quant_accepted_tokens",] == info["accepted_tokens"]
    assert found["sglang:self_quant_gamma",] == info["gamma"]
    for gamma in "023":
        expected = sum(count for decision, count in info["decisions"].items() if decision.startswith(f"gamma={gamma}:"))
        assert found["sglang:self_quant_decisions", gamma] == expected


def fell_back(before, after, reason):
    assert after["drafted_tokens"] == before["drafted_tokens"]
    key = f"gamma=0:{reason}"
    assert after["decisions"][key] > before["decisions"].get(key, 0)


def test_grammar(server):
    """A JSON schema is obeyed; such requests decode plainly, alone or while others are drafted for."""
    properties = {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}}
    schema = json.dumps({"type": "object", "properties": properties, "required": ["a", "b"]})
    before = server.self_quant()
    sampling = {"json_schema": schema, "ignore_eos": False, "max_new_tokens": 200}
    answers, after = generate(server, sampling=sampling)
    assert_obeyed(answers)
    fell_back(before, after, "grammar")
    assert after["refused_tokens"]["grammar"] >= REQUESTS
    free = {"max_new_tokens": 200, "ignore_eos": True}
    answers, mixed = generate(server, sampling=[sampling, free] * (REQUESTS // 2))
    assert_obeyed(answers[0::2])
    assert all(answer["meta_info"]["completion_tokens"] == 200 for answer in answers[1::2])
    assert mixed["drafted_tokens"] > after["drafted_tokens"] and mixed["riding_tokens"]["grammar"] >= REQUESTS


def assert_obeyed(answers):
    complete = [answer["text"] for answer in answers if answer["meta_info"]["finish_reason"]["type"] == "stop"]
    assert complete
    for text in complete:
        value = json.loads(text)
        assert value["a"] in ("x", "y") and isinstance(value["b"], bool)


def test_hidden_states(server):
    before = server.self_quant()
    answers, after = generate(server, return_hidden_states=True)
    assert all(answer["meta_info"]["hidden_states"] for answer in answers)
    fell_back(before, after, "hidden-states")


def test_stop_strings(server):
    """The text ends where it would end without speculation, wherever in a cycle that is."""
    full, _ = generate(server, sampling=greedy(NEW_TOKENS))
    text = full[0]["text"]
    stops = sorted({text[i : i + 2] for i in range(len(text) - 2)})
    sampling = [greedy(NEW_TOKENS, stop=stop) for stop in stops]
    answers = server.generate({"input_ids": [[5, 6, 7]] * len(stops), "sampling_params": sampling})
    for stop, answer in zip(stops, answers):
        assert answer["text"] == text[: text.index(stop)]
        assert answer["meta_info"]["finish_reason"]["matched"] == stop


def test_openai_endpoints(server, qwen3_oracle):
    body = {"model": "policy", "temperature": 0, "max_tokens": 20, "logprobs": 1, "ignore_eos": True}
    answer = server.post("/v1/completions", {**body, "prompt": [5, 6, 7]})
    native = server.generate({"input_ids": [5, 6, 7], "sampling_params": greedy(20)})
    assert native["output_ids"] == qwen3_oracle.greedy([5, 6, 7], 20)
    assert answer["choices"][0]["text"] == native["text"]
    assert answer["usage"]["completion_tokens"] == 20
    chat = {**body, "logprobs": True, "messages": [{"role": "user", "content": "abc"}]}
    message = server.post("/v1/chat/completions", chat)["choices"][0]["message"]["content"]
    assert message == server.generate({"text": "abc", "sampling_params": greedy(20)})["text"]
