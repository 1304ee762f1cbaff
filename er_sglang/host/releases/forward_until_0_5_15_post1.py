"""A forward of SGLang, laid out of a batch of its scheduler."""

from sglang.srt.model_executor.forward_batch_info import ForwardBatch

SEAMS = """
model_executor.forward_batch_info:ForwardBatch.init_new cls batch model_runner
"""


def forward_batch(batch, runner) -> ForwardBatch:
    return ForwardBatch.init_new(batch, runner)
