"""What a step hands to the next one, per request: the last emitted token and the new sequence length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sglang.srt.managers.overlap_utils import FutureMap
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.speculative.spec_info import SpecInput, SpecInputType


@dataclass
class SelfQuantDraftInput(SpecInput):
    """State of the requests of a batch between steps (``EagleDraftInput`` without a draft model's part).

    bonus_tokens: int64 [B], the last emitted token, whose KV is not written yet.
    future_indices: int64 [B], request-pool rows that will hold it; set by the scheduler under overlap.
    """

    bonus_tokens: torch.Tensor
    future_indices: torch.Tensor | None = None
    capture_hidden_mode: CaptureHiddenMode = CaptureHiddenMode.NULL

    # RelayPayload.from_draft_input reads these, and the scheduler sets the last one.
    topk_p = None
    topk_index = None
    hidden_states = None
    draft_probs = None
    dsa_topk_indices = None
    future_dsa_topk_indices_available = False

    def __post_init__(self) -> None:
        super().__init__(SpecInputType.EAGLE_DRAFT)

    def get_spec_adjust_token_coefficient(self) -> tuple[int, int]:
        return 1, 1

    def filter_batch(self, new_indices: torch.Tensor, *_, **__) -> None:
        if self.future_indices is not None:
            self.future_indices = self.future_indices[new_indices]
        else:
            self.bonus_tokens = self.bonus_tokens[new_indices]

    def merge_batch(self, other: SelfQuantDraftInput) -> None:
        if self.future_indices is not None:
            self.future_indices = torch.cat([self.future_indices, other.future_indices])
        else:
            self.bonus_tokens = torch.cat([self.bonus_tokens, other.bonus_tokens])


class SelfQuantFutureMap(FutureMap):
    """SGLang's relay between overlapped steps, for the last emitted token only, on any device."""

    def _resolve_spec_extras(self, batch) -> None:
        draft_input = batch.spec_info
        if draft_input is not None and draft_input.future_indices.shape[0] > 0:
            draft_input.bonus_tokens = self.output_tokens_buf[draft_input.future_indices]
