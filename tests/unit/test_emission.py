"""What becomes of the tokens of a step does not depend on how many there are."""

import json
import re
from array import array
from types import SimpleNamespace

import pytest
from sglang.srt.entrypoints.openai.protocol import Function, Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.managers.scheduler_components.output_streamer import _GenerationStreamAccumulator
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from er_sglang.host import emission
from er_sglang.host.releases import streams_until_0_5_21 as streams
from tests.byte_tokenizer import make_byte_tokenizer

TOKENIZER = make_byte_tokenizer()
TOKENIZER.additional_stop_token_ids = None
EOS = TOKENIZER.eos_token_id


def request(stream=False, **sampling) -> Req:
    params = SamplingParams(**sampling)
    params.normalize(TOKENIZER)
    req = Req("r", "", array("q", [2, 3]), params, stream=stream, vocab_size=len(TOKENIZER))
    req.tokenizer = TOKENIZER
    return req


def finish(tokens: list[int], width: int, **sampling):
    """Emit ``tokens``, ``width`` at each step, until the request ends: why, with what, and how many thoughts (all
    of it: no token ends them)."""
    req = request(**sampling)
    for start in range(0, len(tokens), width):
        step = tokens[start : start + width]
        req.output_ids.extend(step)
        req.update_reasoning_tokens(step, think_end_id=len(TOKENIZER))
        emission._finish_token_by_token(Req.update_finish_state, req, len(step))
        if req.finished():
            break
    reason = req.finished_reason and req.finished_reason.to_json()
    return reason, list(req.output_ids_through_stop), req.reasoning_tokens


@pytest.mark.parametrize(
    ("text", "sampling"),
    [
        pytest.param("ab<eos>stop", {"stop": "stop"}, id="end of sequence, then stop string"),
        pytest.param("ab later, sooner", {"stop": ["sooner", "late"]}, id="two stop strings"),
        pytest.param("a12b", {"stop_regex": r"\d+$"}, id="stop regex that later tokens undo"),
        pytest.param("abc<eos>d", {"max_new_tokens": 5}, id="end of sequence, then length limit"),
        pytest.param("abcstop", {"max_new_tokens": 4, "stop": "stop"}, id="length limit, then stop string"),
        pytest.param("abcdefgh", {"max_new_tokens": 6}, id="length limit"),
        pytest.param("ab<eos>c", {"ignore_eos": True}, id="no end"),
    ],
)
def test_ends_where_it_would_end_token_by_token(text, sampling):
    tokens = [EOS if piece is None else piece for piece in pieces(text)]
    expected = finish(tokens, width=1, **sampling)
    for width in range(2, len(tokens) + 1):
        assert finish(tokens, width, **sampling) == expected


@pytest.mark.parametrize("limit", [3, 20])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_an_aborted_request_ends_with_the_next_token(width, limit):
    req = request(max_new_tokens=limit)
    req.output_ids.extend([7, 8])
    req.to_finish = FINISH_ABORT("Aborted")
    req.output_ids.extend([9, EOS, 9, 9][:width])
    emission._finish_token_by_token(Req.update_finish_state, req, width)
    assert req.finished_reason.to_json()["type"] == "abort" and list(req.output_ids_through_stop) == [7, 8, 9]


def pieces(text):
    for i, part in enumerate(text.split("<eos>")):
        if i:
            yield None
        yield from TOKENIZER.encode(part)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("interval", [1, 5, 8])
def test_a_stream_keeps_its_interval(width, interval):
    req = request(stream=True, max_new_tokens=200, stream_interval=interval)
    accumulator = _GenerationStreamAccumulator(
        return_logprob=False,
        return_hidden_states=False,
        return_routed_experts=False,
        return_indexer_topk=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
        disaggregation_mode=None,
        default_stream_interval=1,
        default_force_stream_interval=50,
        get_cached_tokens_details=lambda req: None,
    )
    for _ in range(1 + 96 // width):
        req.output_ids.extend([5] * (width if req.output_ids else 1))
        streams._send_at_intervals(_GenerationStreamAccumulator.accept, accumulator, req=req)
    first, *others = map(len, accumulator.output_ids)
    assert first == 1 and req.sampling_params.stream_interval == interval
    assert len(others) > 1 and all(interval <= count < interval + width for count in others)


@pytest.mark.parametrize("new_tokens", [0, 1])
def test_no_log_probability_of_no_token(new_tokens):
    req = request(max_new_tokens=new_tokens)
    req.logprob = SimpleNamespace(output_token_logprobs_val=[-0.5], output_token_logprobs_idx=[7])
    emission._score_prompts_only(None, None, 0, req)
    assert len(req.logprob.output_token_logprobs_val) == len(req.logprob.output_token_logprobs_idx) == new_tokens


CALLS = [
    {"name": "weather", "arguments": {"city": "Paris", "days": 3}},
    {"name": "time", "arguments": {"city": "Rome"}},
]
MARKED = "Let me look. " + "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in CALLS)
FUNCTIONS = "\n".join(
    f"<tool_call>\n<function={call['name']}>\n"
    + "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in call["arguments"].items())
    + "</function>\n</tool_call>"
    for call in CALLS
)
PYTHON = "Let me look. [weather(city='Paris', days=3), time(city='Rome')]"
TOOLS = [
    Tool(type="function", function=Function(name=call["name"], parameters={"type": "object", "properties": {}}))
    for call in CALLS
]


@pytest.mark.parametrize(
    ("parser", "text"),
    [("qwen25", MARKED), ("hermes", MARKED), ("qwen3_coder", FUNCTIONS), ("pythonic", PYTHON)],
)
def test_tool_calls_do_not_depend_on_the_chunks(parser, text):
    """A token is a word here, or a mark of the parser."""
    tokens = re.findall(r"</?\w+>|\s?\w+|\W", text)
    assert "".join(tokens) == text

    def read(width):
        whole = FunctionCallParser(TOOLS, parser)
        plain, calls = "", {}
        for start in range(0, len(tokens), width):
            chunk = "".join(tokens[start : start + width])
            new_text, new_calls = emission._parse_in_pieces(FunctionCallParser.parse_stream_chunk, whole, chunk)
            plain += new_text
            for call in new_calls:
                name, arguments = calls.get(call.tool_index, ("", ""))
                calls[call.tool_index] = name + (call.name or ""), arguments + call.parameters
        return plain.strip(), [(name, json.loads(arguments)) for name, arguments in calls.values()]

    expected = read(width=1)
    assert [name for name, _ in expected[1]] == [call["name"] for call in CALLS]
    for width in range(2, len(tokens) + 1):
        assert read(width) == expected
