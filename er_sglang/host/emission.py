"""What SGLang does with the token that a step emits, done for each of several."""

from __future__ import annotations

import re
import time

from sglang.srt.plugins.hook_registry import HookType

from er_sglang.host.releases import adapter
from er_sglang.host.seams import asks_for_us

_streams = adapter("streams")

_CHAT = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat."
_RESULTS = "sglang.srt.managers.scheduler_components."

# -- the scheduler ---------------------------------------------------------------------------------------------


def _finish_token_by_token(original, req, new_accepted_len=1):
    """SGLang looks at all tokens of a step at once, which is right for one token only: it looks at the length limit before
    it looks for stop tokens, for stop strings before end-of-sequence tokens, for the first stop string of the request
    before the first of the text, and for a stop regex at the end of the step. It ends an aborted request with all of
    them, though an end or the length limit is among them."""
    if new_accepted_len == 1 or _in_any_order(req):
        original(req, new_accepted_len)
    else:
        emitted = req.output_ids[-new_accepted_len:]
        del req.output_ids[-new_accepted_len:]
        for count, token in enumerate(emitted, start=1):
            req.output_ids.append(token)
            original(req, 1)
            if req.finished():
                if req.finished_len is None:
                    req.finished_len = len(req.output_ids)
                break
        req.output_ids.extend(emitted[count:])  # SGLang cuts them off at finished_len
    if req.finished():  # SGLang has counted the whole step
        req.reasoning_tokens = min(req.reasoning_tokens, len(req.output_ids_through_stop))


def _in_any_order(req) -> bool:
    """Whether it does not matter that SGLang looks at all tokens of a step at once."""
    params = req.sampling_params
    short = len(req.output_ids) < params.max_new_tokens
    return short and not (params.stop_strs or params.stop_regex_strs or req.to_finish)


def _score_prompts_only(result, processor, i, req, *_, **__):
    """A request for no new tokens gets a token nevertheless, whose log-probability is nobody's business. Without
    speculation SGLang does not compute it."""
    if req.sampling_params.max_new_tokens == 0:
        req.logprob.output_token_logprobs_val.clear()
        req.logprob.output_token_logprobs_idx.clear()


# -- the front end ---------------------------------------------------------------------------------------------


async def _log_probabilities_without_text(original, chat, *, content, index, request, choice_logprobs, **more):
    """SGLang drops the log-probabilities of a chunk without text: of the bytes of an incomplete character, or of a
    stop token."""
    from sglang.srt.entrypoints.openai.sse_utils import build_sse_content

    empty = True
    async for chunk in original(
        chat, content=content, index=index, request=request, choice_logprobs=choice_logprobs, **more
    ):
        empty = False
        yield chunk
    if empty and choice_logprobs and asks_for_us(chat.tokenizer_manager.server_args):
        yield build_sse_content(
            chunk_id=content["meta_info"]["id"],
            created=int(time.time()),
            model=request.model,
            index=index,
            content="",
            logprobs=choice_logprobs,
        )


def _parse_in_pieces(original, parser, chunk_text):
    """SGLang's parsers of tool calls (of Qwen and Hermes) lose the text around a mark that they do not find alone in a
    chunk. No token is smaller than the pieces by much, so nothing is parsed more often than token by token."""
    text, calls = "", []
    for piece in re.findall(r"\w+|\W", chunk_text) or [""]:
        normal_text, new_calls = original(parser, piece)
        text += normal_text
        calls += new_calls
    return text, calls


SCHEDULER_EMISSION_HOOKS = {
    "sglang.srt.managers.schedule_batch.Req.update_finish_state": (HookType.AROUND, _finish_token_by_token),
    **_streams.SCHEDULER_HOOKS,
    f"{_RESULTS}logprob_result_processor.SchedulerLogprobResultProcessor.add_logprob_return_values": (
        HookType.AFTER,
        _score_prompts_only,
    ),
}
FRONT_END_EMISSION_HOOKS = {
    **_streams.FRONT_END_HOOKS,
    f"{_CHAT}_generate_stream_content": (HookType.AROUND, _log_probabilities_without_text),
    "sglang.srt.function_call.function_call_parser.FunctionCallParser.parse_stream_chunk": (
        HookType.AROUND,
        _parse_in_pieces,
    ),
}
