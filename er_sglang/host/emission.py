"""What SGLang does with the token that a step emits, done for each of several."""

from __future__ import annotations

import time

from sglang.srt.plugins.hook_registry import HookType

from er_sglang.host.seams import ALGORITHM

_CHAT = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat."
_RESULTS = "sglang.srt.managers.scheduler_components."

# -- the scheduler ---------------------------------------------------------------------------------------------


def _score_prompts_only(result, processor, i, req, *_, **__):
    """A request for no new tokens gets a token nevertheless, whose log-probability is nobody's business. Without
    speculation SGLang does not compute it."""
    if req.sampling_params.max_new_tokens == 0:
        req.logprob.output_token_logprobs_val.clear()
        req.logprob.output_token_logprobs_idx.clear()


# -- the front end ---------------------------------------------------------------------------------------------


def _serves(openai) -> bool:
    return openai.tokenizer_manager.server_args.speculative_algorithm == ALGORITHM


def _alternatives_of_each_token(original, chat, logprobs, use_token_index=False):
    """SGLang gives all tokens of a streamed chunk the alternatives of its first."""
    return original(chat, logprobs, use_token_index=use_token_index or _serves(chat))


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
    if empty and choice_logprobs and _serves(chat):
        yield build_sse_content(
            chunk_id=content["meta_info"]["id"],
            created=int(time.time()),
            model=request.model,
            index=index,
            content="",
            logprobs=choice_logprobs,
        )


SCHEDULER_EMISSION_HOOKS = {
    f"{_RESULTS}logprob_result_processor.SchedulerLogprobResultProcessor.add_logprob_return_values": (
        HookType.AFTER,
        _score_prompts_only,
    ),
}
FRONT_END_EMISSION_HOOKS = {
    f"{_CHAT}_process_logprobs_tokens": (HookType.AROUND, _alternatives_of_each_token),
    f"{_CHAT}_generate_stream_content": (HookType.AROUND, _log_probabilities_without_text),
}
