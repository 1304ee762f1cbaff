"""Greedy serving with SELF_QUANT equals plain decoding token by token, whatever else goes on in the server.

Expected outputs come from transformers in float32. Every family is served with another set of features on.
"""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch

from tests.host.oracle import Oracle
from tests.host.policies import EOS, VOCAB, make_policy
from tests.host.servers import REQUEST_TIMEOUT_S, greedy, plain, self_quant, tokens

CONTEXT_TOKENS = 512
SERVERS = {
    "llama": {"page-size": 4, "chunked-prefill-size": 16},
    # So small that requests are retracted, and that one that fills the context fills it.
    "mistral": {"max-total-tokens": CONTEXT_TOKENS, "schedule-conservativeness": 0.01},
    "qwen2": {"disable-overlap-schedule": False, "chunked-prefill-size": 16},
    "qwen3": {
        "disable-overlap-schedule": False,
        "max-total-tokens": CONTEXT_TOKENS,
        "schedule-conservativeness": 0.01,
    },
}
LOGPROB_TOLERANCE = 1e-4


class Case:
    """A family's server and what it must answer."""

    def __init__(self, family, policy, server):
        self.family, self.policy, self.server = family, policy, server
        self.oracle = Oracle(policy)
        self._greedy = cache(lambda prompt, new_tokens: self.oracle.greedy(list(prompt), new_tokens))

    def greedy(self, prompt, new_tokens):
        return self._greedy(tuple(prompt), new_tokens)


@pytest.fixture(scope="module", params=SERVERS)
def case(request, folder):
    family = request.param
    policy = make_policy(folder, family, seed=1, tied=family == "qwen3", max_positions=CONTEXT_TOKENS)
    config = {"policy": {"mode": "cycle", "cycle": [3, 0, 1, 2, 3]}}
    with self_quant(policy, folder / f"{family}.log", config, 3, SERVERS[family]) as server:
        yield Case(family, policy, server)
        server.empty()  # an idle SGLang checks that no KV slot has leaked
        assert server.process.poll() is None
        assert server.self_quant()["accepted_tokens"] > 0


def make_prompts(n, seed, longest=60):
    rng = random.Random(seed)
    # Not the last token: SGLang reports the log-probability of it in a prompt as one of token 0.
    return [[rng.randrange(2, VOCAB - 1) for _ in range(rng.randint(1, longest))] for _ in range(n)]


def test_log_probabilities(case):
    ids = [3, 50, 77]
    prompts = make_prompts(6, seed=1)
    for sampling in (greedy(24), {**greedy(24), "temperature": 0.7}):
        answers = case.server.generate(
            {
                "input_ids": prompts,
                "sampling_params": sampling,
                "return_logprob": True,
                "logprob_start_len": 0,
                "top_logprobs_num": 4,
                "token_ids_logprob": [ids] * len(prompts),
            }
        )
        for prompt, answer in zip(prompts, answers):
            output, meta = answer["output_ids"], answer["meta_info"]
            if sampling["temperature"] == 0:
                assert output == case.greedy(prompt, 24)
            logits_TV = case.oracle.logits(torch.tensor([prompt + output]))[0, :-1]
            before, after = len(prompt) - 1, len(prompt) - 1 + len(output)
            for kind, expected_TV, chosen, start in (
                ("input", logits_TV[:before].log_softmax(-1), prompt[1:], 1),
                ("output", (logits_TV[before:after] / (sampling["temperature"] or 1.0)).log_softmax(-1), output, 0),
            ):
                assert [entry[1] for entry in meta[f"{kind}_token_logprobs"][start:]] == chosen
                close(values(meta[f"{kind}_token_logprobs"][start:]), expected_TV[range(len(chosen)), chosen])
                close([values(top) for top in meta[f"{kind}_top_logprobs"][start:]], expected_TV.topk(4).values)
                close([values(row) for row in meta[f"{kind}_token_ids_logprobs"][start:]], expected_TV[:, ids])


def test_scoring(case):
    """A request for no new tokens gives the prompt's log-probabilities and none of a token, whatever it is batched with."""
    ids = [3, 50, 77]
    prompts = [[2 + i, 9, 30 + i, 44, 5] for i in range(6)]
    answers = case.server.generate(
        {
            "input_ids": prompts,
            "sampling_params": [greedy(2 * (i % 2)) for i in range(len(prompts))],
            "return_logprob": True,
            "logprob_start_len": 0,
            "token_ids_logprob": [ids] * len(prompts),
        }
    )
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        meta = answer["meta_info"]
        assert answer["output_ids"] == case.greedy(prompt, 2)[: 2 * (i % 2)]
        assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
        expected_TV = case.oracle.logits(torch.tensor([prompt]))[0].log_softmax(-1)
        close(values(meta["input_token_logprobs"][1:]), expected_TV[range(len(prompt) - 1), prompt[1:]])
        close(values(meta["output_token_ids_logprobs"][0]), expected_TV[-1, ids])


def values(entries):
    return [entry[0] for entry in entries]


def close(found, expected):
    torch.testing.assert_close(torch.tensor(found).view(expected.shape), expected, atol=LOGPROB_TOLERANCE, rtol=0)


def test_many_concurrent_requests(case):
    """More than the batch: ragged lengths, chunked prefills between decodes, and retraction where memory is short."""
    rng = random.Random(2)
    prompts = make_prompts(30, seed=3, longest=40)
    prompts[::3] = [prompts[1] + prompt for prompt in prompts[::3]]  # a prefix that the radix cache shares
    lengths = [rng.randint(60, 120) for _ in prompts]
    short_of_memory = "max-total-tokens" in SERVERS[case.family]
    for _ in range(6):  # how requests arrive decides whether any must be retracted
        answers = case.server.generate({"input_ids": prompts, "sampling_params": [greedy(n) for n in lengths]})
        for prompt, length, answer in zip(prompts, lengths, answers):
            assert answer["output_ids"] == case.greedy(prompt, length)
        if not short_of_memory or "Retract requests" in case.server.log_path.read_text():
            return
        case.server.empty()
    pytest.fail("no request was retracted")


def test_turns_reuse_the_cache(case):
    """Later turns read from the radix cache the KV of tokens emitted while speculating."""
    case.server.empty()
    histories = make_prompts(4, seed=4, longest=20)
    page = SERVERS[case.family].get("page-size", 1)
    for turn in range(3):
        answers = case.server.generate({"input_ids": histories, "sampling_params": greedy(20)})
        for i, answer in enumerate(answers):
            assert answer["output_ids"] == case.greedy(histories[i], 20)
            if turn:
                known = len(histories[i]) - 3
                # A last token that was drafted has its KV too; plain decoding never computes that.
                assert (known - 1) // page * page <= answer["meta_info"]["cached_tokens"] <= known
            histories[i] = histories[i] + answer["output_ids"] + [40 + turn, 50 + i, 60]


def first_occurrences(case):
    """Prompts, and greedy outputs that end where their last token first appears (before any end-of-sequence)."""
    prompts, outputs = [], []
    for prompt in make_prompts(6, seed=7):
        output = case.greedy(prompt, 40)
        until_eos = output[: output.index(EOS)] if EOS in output else output
        ends = sorted({until_eos.index(token) + 1 for token in until_eos})
        prompts += [prompt] * len(ends)
        outputs += [output[:end] for end in ends]
    assert len(outputs) > 20
    return prompts, outputs


def stop_at_last_tokens(case, prompts, outputs, spare_tokens):
    """Ask for each output by its last token as stop token; ``spare_tokens``: how many more were allowed."""
    sampling = [
        {"temperature": 0, "max_new_tokens": len(output) + spare_tokens, "stop_token_ids": [output[-1]]}
        for output in outputs
    ]
    answers = case.server.generate({"input_ids": prompts, "sampling_params": sampling})
    assert tokens(answers) == outputs
    for output, answer in zip(outputs, answers):
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": output[-1]}


def test_stop_token_inside_a_cycle(case):
    stop_at_last_tokens(case, *first_occurrences(case), spare_tokens=20)


@pytest.mark.parametrize("spare_tokens", [1, 2])
def test_stop_token_in_the_cycle_of_the_length_limit(case, spare_tokens):
    """One cycle emits the stop token and reaches the limit: the stop token comes first."""
    stop_at_last_tokens(case, *first_occurrences(case), spare_tokens=spare_tokens)


def test_length_limit(case):
    """Every length limit is met exactly, wherever in a cycle it falls."""
    prompt = [8, 9]
    lengths = range(1, 14)
    answers = case.server.generate(
        {"input_ids": [prompt] * len(lengths), "sampling_params": [greedy(n) for n in lengths]}
    )
    assert tokens(answers) == [case.greedy(prompt, n) for n in lengths]
    # The cycles went further. A later prompt that goes there finds nothing wrong in the radix cache.
    longer = [prompt + case.greedy(prompt, n + 4) for n in lengths]
    answers = case.server.generate({"input_ids": longer, "sampling_params": greedy(4)})
    assert tokens(answers) == [case.greedy(prompt, n + 8)[-4:] for n in lengths]


def test_streaming(case):
    prompt = [11, 12, 13, 14]
    output = case.greedy(prompt, 300)
    chunks = list(case.server.stream({"input_ids": prompt, "sampling_params": greedy(300)}))
    assert len(chunks) > 2  # of at least 75; SGLang joins those that come faster than it sends
    assert chunks[-1]["output_ids"] == output
    assert all(chunk["output_ids"] == output[: len(chunk["output_ids"])] for chunk in chunks)


def test_parallel_samples(case):
    answers = case.server.generate({"input_ids": [15, 16], "sampling_params": greedy(12, n=3)})
    assert tokens(answers) == [case.greedy([15, 16], 12)] * 3
    sampled = case.server.generate({"input_ids": [15, 16], "sampling_params": {**greedy(12, n=4), "temperature": 1.5}})
    assert len({tuple(output) for output in tokens(sampled)}) == 4


def test_context_limit(case):
    prompt = make_prompts(1, seed=5, longest=CONTEXT_TOKENS // 4)[0]
    answer = case.server.generate({"input_ids": prompt, "sampling_params": greedy(CONTEXT_TOKENS - len(prompt))})
    output = answer["output_ids"]
    assert output == case.greedy(prompt, len(output))
    assert answer["meta_info"]["finish_reason"]["type"] == "length"
    assert len(prompt) + len(output) == CONTEXT_TOKENS - 2  # see test_plain_server


@pytest.mark.parametrize("spare_tokens", [0, 3, 8])
def test_a_lone_request_fills_the_memory(case, spare_tokens):
    """A request is answered if it fits, although the last cycles before its limit do not."""
    new_tokens = CONTEXT_TOKENS - 4 - spare_tokens
    (output,) = tokens([case.server.generate({"input_ids": [7, 6], "sampling_params": greedy(new_tokens)})])
    assert output == case.greedy([7, 6], CONTEXT_TOKENS - 4)[:new_tokens]


def test_abort(case):
    """An aborted request gives up its slots at once; the others do not notice."""
    prompts = {"victim-0": [3, 4, 5], "victim-1": [3, 4, 5]}
    prompts |= {f"other-{i}": prompt for i, prompt in enumerate(make_prompts(3, seed=6, longest=10))}
    lengths = {rid: 120 if "victim" in rid else 50 for rid in prompts}  # all fit into the memory of any of the servers

    def abort_victims() -> dict[str, dict]:
        all_run = threading.Barrier(len(prompts) + 1, timeout=REQUEST_TIMEOUT_S)

        def ask(rid):
            params = greedy(lengths[rid])
            chunks = case.server.stream({"rid": rid, "input_ids": prompts[rid], "sampling_params": params})
            first = next(chunks)
            all_run.wait()
            return [first, *chunks][-1]

        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = {rid: pool.submit(ask, rid) for rid in prompts}
            all_run.wait()
            for rid in ("victim-0", "victim-1"):
                case.server.post("/abort_request", {"rid": rid})
        return {rid: answer.result() for rid, answer in answers.items()}

    for _ in range(30):  # on a busy machine a victim may end before it is aborted
        answers = abort_victims()
        reasons = {answers[rid]["meta_info"]["finish_reason"]["type"] for rid in ("victim-0", "victim-1")}
        if reasons == {"abort"}:
            break
    for rid, prompt in prompts.items():
        output = answers[rid]["output_ids"]
        assert output == case.greedy(prompt, lengths[rid])[: len(output)]
        if "victim" in rid:
            assert reasons == {"abort"} and 0 < len(output) < lengths[rid]
        else:
            assert len(output) == lengths[rid]


def test_plain_server(folder):
    """What the other tests assume of stock SGLang: reuse of the cache, and where the context ends."""
    policy = make_policy(folder, "qwen2", seed=1, max_positions=CONTEXT_TOKENS)
    with plain(policy, folder / "plain.log") as server:
        prompt = make_prompts(1, seed=5, longest=CONTEXT_TOKENS // 4)[0]
        answer = server.generate({"input_ids": prompt, "sampling_params": greedy(CONTEXT_TOKENS - len(prompt))})
        assert len(prompt) + len(answer["output_ids"]) == CONTEXT_TOKENS - 2
        first = server.generate({"input_ids": [9, 8, 7], "sampling_params": greedy(20)})
        grown = [9, 8, 7, *first["output_ids"], 5]
        second = server.generate({"input_ids": grown, "sampling_params": greedy(4)})
        assert second["meta_info"]["cached_tokens"] == len(grown) - 2
        with pytest.raises(KeyError):
            server.self_quant()
