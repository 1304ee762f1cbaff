"""Streamed text equals unstreamed text when several tokens arrive at once and characters are split over tokens."""

import random
from types import SimpleNamespace

import pytest
from sglang.srt.managers import detokenizer_manager
from sglang.srt.managers.detokenizer_manager import DetokenizerManager

from er_sglang.host.processes import printable
from tests.byte_tokenizer import make_byte_tokenizer

TOKENIZER = make_byte_tokenizer()
STREAMS, TOKENS = 100, 40


@pytest.fixture
def detokenizer(monkeypatch):
    monkeypatch.setattr(detokenizer_manager, "find_printable_text", printable)
    manager = object.__new__(DetokenizerManager)
    manager.tokenizer = TOKENIZER
    manager.decode_status = {}
    manager.disable_tokenizer_batch_decode = False
    manager.is_tool_call_parser_gpt_oss = False
    return manager


def arrival(new_tokens, finished):
    """What the scheduler sends of one request, as far as the text depends on it."""
    return SimpleNamespace(
        rids=["r"],
        decoded_texts=[""],
        decode_ids=[new_tokens],
        read_offsets=[0],
        finished_reasons=[{"type": "length"} if finished else None],
        no_stop_trim=[False],
        skip_special_tokens=[True],
        spaces_between_special_tokens=[True],
    )


@pytest.mark.parametrize("most", [1, 2, 4, 16])
def test_streamed_equals_unstreamed(detokenizer, most):
    rng = random.Random(most)
    for _ in range(STREAMS):
        tokens = [rng.randrange(2, len(TOKENIZER)) for _ in range(TOKENS)]
        sent, rest = "", tokens
        while rest:
            count = rng.randint(1, most)
            new, rest = rest[:count], rest[count:]
            (text,) = detokenizer._decode_batch_token_id_output(arrival(new, finished=not rest))
            sent += text
            assert TOKENIZER.decode(tokens).startswith(sent)
        assert sent == TOKENIZER.decode(tokens)
