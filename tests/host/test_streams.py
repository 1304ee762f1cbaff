"""A stream says what the whole answer says, though several tokens arrive at once and characters are split over them."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.byte_tokenizer import make_byte_tokenizer
from tests.host.policies import VOCAB, make_policy
from tests.host.servers import greedy, self_quant

TOKENIZER = make_byte_tokenizer()
NEW_TOKENS = 40
STREAMS = 40
TOP = 3
BODY = {"model": "policy", "temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
SERVERS = {
    "no overlap": {},
    "overlap, two tokenizer workers": {"disable-overlap-schedule": False, "tokenizer-worker-num": 2},
}


@pytest.fixture(scope="module")
def policy(folder):
    assert len(TOKENIZER) == VOCAB
    path = make_policy(folder, "qwen2", seed=21)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=SERVERS)
def server(request, policy, folder):
    args = {"skip-tokenizer-init": False, **SERVERS[request.param]}
    log = folder / f"streams-{request.param}.log"
    with self_quant(policy, log, {"policy": {"mode": "always"}}, 3, args) as server:
        yield server
        assert server.process.poll() is None


def at_once(ask, arguments) -> list:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, arguments))


def test_native(server):
    """/generate sends the text so far: each chunk adds to it."""

    def ask(seed):
        sampling = {"temperature": 1.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        return list(server.stream({"input_ids": [2 + seed, 3 + seed], "sampling_params": sampling}))

    for chunks in at_once(ask, range(STREAMS)):
        text = TOKENIZER.decode(chunks[-1]["output_ids"], skip_special_tokens=True)
        assert chunks[-1]["text"] == text
        assert all(text.startswith(chunk["text"]) for chunk in chunks)


def test_completions(server):
    prompts = [[2 + i, 3 + i] for i in range(STREAMS)]
    whole = server.post("/v1/completions", {**BODY, "prompt": prompts, "logprobs": TOP})["choices"]

    def ask(prompt):
        body = {**BODY, "prompt": prompt, "logprobs": TOP, "stream": True}
        return [choice for chunk in server.stream(body, "/v1/completions") for choice in chunk["choices"]]

    for answer, chunks in zip(whole, at_once(ask, prompts)):
        assert "".join(chunk["text"] for chunk in chunks) == answer["text"]
        parts = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
        assert [token for part in parts for token in part["tokens"]] == answer["logprobs"]["tokens"]
        tops = [top for part in parts for top in part["top_logprobs"]]
        for found, expected in zip(tops, answer["logprobs"]["top_logprobs"], strict=True):
            assert found == pytest.approx(expected, abs=1e-4)


def test_chat(server):
    def ask(stream):
        def ask(letters):
            messages = [{"role": "user", "content": letters}]
            body = {**BODY, "messages": messages, "logprobs": True, "top_logprobs": TOP}
            if not stream:
                return server.post("/v1/chat/completions", body)["choices"][0]
            chunks = server.stream({**body, "stream": True}, "/v1/chat/completions")
            return [choice for chunk in chunks for choice in chunk["choices"]]

        return ask

    prompts = [chr(ord("a") + i % 26) * (1 + i // 26) for i in range(STREAMS)]
    for answer, chunks in zip(at_once(ask(False), prompts), at_once(ask(True), prompts)):
        text = "".join(chunk["delta"].get("content") or "" for chunk in chunks)
        assert text == answer["message"]["content"]
        found = [entry for chunk in chunks if chunk["logprobs"] for entry in chunk["logprobs"]["content"]]
        for entry, expected in zip(found, answer["logprobs"]["content"], strict=True):
            assert entry["token"] == expected["token"]
            alternatives, others = entry["top_logprobs"], expected["top_logprobs"]
            assert [top["token"] for top in alternatives] == [top["token"] for top in others]
            assert [top["logprob"] for top in alternatives] == pytest.approx([o["logprob"] for o in others], abs=1e-4)


def test_counts_of_all_tokenizer_workers(server):
    """Each worker reports what was drafted, by our own count."""

    def ask(_):
        return server.generate({"input_ids": [5, 6], "sampling_params": greedy(NEW_TOKENS)})["meta_info"]

    for meta in at_once(ask, range(16)):
        assert meta["spec_draft_token_num"] >= meta["spec_accept_token_num"] > 0
