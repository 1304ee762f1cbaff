"""The answer to a request to change settings while serving."""

from sglang.srt.managers.io_struct import SetInternalStateReqOutput


def answer(updated: bool) -> SetInternalStateReqOutput:
    return SetInternalStateReqOutput(updated=updated)
