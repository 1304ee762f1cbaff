"""A byte-level tokenizer whose characters are often split over tokens."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
SPLIT = "日本語文字漢今見年 😀🙂🚀éü"  # whole, and cut in two wherever their bytes allow it
ASCII = "abcdefghijklmnopqrstuvwxyz .,:012\n"
JOINED = ("今".encode() + "日".encode()[:1], "本".encode()[2:] + b"a", b" " + "字".encode()[:2])


def _as_characters(piece: bytes) -> str:
    """A piece as byte-level tokenizers write it: one printable character for each byte."""
    alphabet = {}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return "".join(alphabet[byte] for byte in piece)


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """100 tokens: <pad>, <eos>, characters, and parts of characters."""
    pieces = [character.encode() for character in ASCII + SPLIT]
    for character in map(str.encode, SPLIT):
        pieces += [part for cut in range(1, len(character)) for part in (character[:cut], character[cut:])]
    names = dict.fromkeys([PAD, EOS, *map(_as_characters, [*pieces, *JOINED])])
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast
