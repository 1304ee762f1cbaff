"""Streams: SGLang sends chunks at numbers of tokens that steps of several tokens jump over, and gives all tokens of a
chunk the alternatives of its first."""

from sglang.srt.plugins.hook_registry import HookType

from er_sglang.host.releases.streams_until_0_5_21 import SCHEDULER_HOOKS
from er_sglang.host.seams import asks_for_us

__all__ = ["FRONT_END_HOOKS", "SCHEDULER_HOOKS"]

SEAMS = """
entrypoints.openai.serving_chat:OpenAIServingChat._process_logprobs_tokens self logprobs use_token_index
"""


def _alternatives_of_each_token(original, chat, logprobs, use_token_index=False):
    use_token_index = use_token_index or asks_for_us(chat.tokenizer_manager.server_args)
    return original(chat, logprobs, use_token_index=use_token_index)


FRONT_END_HOOKS = {
    "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._process_logprobs_tokens": (
        HookType.AROUND,
        _alternatives_of_each_token,
    ),
}
