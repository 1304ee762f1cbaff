"""Streams: SGLang sends chunks at numbers of tokens that steps of several tokens jump over."""

from sglang.srt.plugins.hook_registry import HookType

SEAMS = """
managers.scheduler_components.output_streamer:_GenerationStreamAccumulator.accept self req
"""


def _send_at_intervals(original, accumulator, *, req):
    """SGLang sends a stream's next chunk when the number of its tokens is a multiple of the interval, plus one. Steps of
    several tokens jump over most such numbers."""
    if not req.stream or req.finished():
        return original(accumulator, req=req)
    params = req.sampling_params
    interval = params.stream_interval or accumulator.default_stream_interval
    if interval == 1:
        return original(accumulator, req=req)
    if 0 < req.send_token_offset and len(req.output_ids) < req.send_token_offset + interval:
        return None
    given, params.stream_interval = params.stream_interval, 1
    try:
        return original(accumulator, req=req)
    finally:
        params.stream_interval = given


SCHEDULER_HOOKS = {
    "sglang.srt.managers.scheduler_components.output_streamer._GenerationStreamAccumulator.accept": (
        HookType.AROUND,
        _send_at_intervals,
    ),
}
FRONT_END_HOOKS = {}
