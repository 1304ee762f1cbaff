"""What a draft attends to, so that the drafts of the next cycle read that alone (see window.py).

Drafts leave the queries of a few layers behind. Once it is known which drafts are accepted, the last query of an accepted
token scores all tokens of the context, by the mean of its attention weights, and those with the highest scores are one
list for all layers and heads. SparseSpec (arXiv 2512.01278) takes its list from the verify forward, which here stays
SGLang's own.
"""

from __future__ import annotations

import copy

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.model_runner import ModelRunner

from er_sglang.config import FIRST_TOKENS, LAST_TOKENS
from er_sglang.cycle.step import Step
from er_sglang.cycle.window import whole_pages
from er_sglang.drafting.attention import is_plain
from er_sglang.drafting.attention_scores import asked, attention_scores
from er_sglang.drafting.choice import choose
from er_sglang.errors import ConfigError


class Attended:
    """Of each request the ``most`` tokens with the highest scores, best first, after its latest cycle.

    tokens: int64 [requests, most]. until: int64 [requests], before which position these were chosen, 0 if they were not yet.
    On tensor-parallel ranks each goes by its own heads.
    """

    def __init__(
        self,
        runner: ModelRunner,
        most: int,
        gamma_max: int,
        max_batch: int,
        req_to_token: torch.Tensor,
        requests: int,
        page_size: int,
    ) -> None:
        """For the first ``requests`` rows of ``req_to_token``, int32 [rows, context]."""
        if not is_plain(runner.token_to_kv_pool, runner.token_to_kv_pool.store_dtype):
            raise ConfigError('drafter.window_by "attention" needs an ordinary KV cache: set it to "recency".')
        self._pool = runner.token_to_kv_pool
        self._req_to_token = req_to_token
        self._page_size = page_size
        self.first = whole_pages(FIRST_TOKENS, page_size)
        layers = [module for module in runner.model.modules() if isinstance(module, RadixAttention)]
        self._asked = {layer.layer_id: index for index, layer in enumerate(asked(layers))}
        self._scaling = layers[0].scaling
        device = req_to_token.device
        shape = (gamma_max, max_batch, len(self._asked), layers[0].tp_q_head_num, layers[0].head_dim)
        self._queries_GBLHD = torch.zeros(shape, dtype=runner.dtype, device=device)
        self.tokens = torch.zeros((requests, most), dtype=torch.int64, device=device)
        self.until = torch.zeros(requests, dtype=torch.int64, device=device)

    def listening(self, backend: AttentionBackend, i: int) -> AttentionBackend:
        """The same backend, whose decodes leave their queries here, as those of a chain's step i."""
        listening = copy.copy(backend)
        decode = listening.forward_decode

        def forward_decode(q, k, v, layer, *args, **more):
            if (index := self._asked.get(layer.layer_id)) is not None:
                queries_BHD = self._queries_GBLHD[i, :, index]
                queries_BHD[: len(q)] = q.view(-1, *queries_BHD.shape[1:])
            return decode(q, k, v, layer, *args, **more)

        listening.forward_decode = forward_decode
        return listening

    def forget(self, req_pool_indices_B: torch.Tensor) -> None:
        self.until.index_fill_(0, req_pool_indices_B, 0)  # `[...] = 0` would wait for the GPU

    def update(self, step: Step, accept_lens_B: torch.Tensor, gamma: int) -> None:
        """Choose, whole pages, after a cycle of ``step`` of which each request has kept so many tokens, int32 [B]."""
        lengths_B = step.seq_lens_B + accept_lens_B
        scores_BC = attention_scores(
            self._queries_GBLHD[:gamma],
            accept_lens_B,  # the last one kept follows the draft of this step, or is the policy's own
            [self._pool.get_key_buffer(layer) for layer in self._asked],
            self._req_to_token,
            step.req_pool_indices_B,
            lengths_B,
            min(int(step.seq_lens_cpu_B.max()) + gamma + 1, self._req_to_token.shape[1]),
            self._scaling,
        )
        choose(
            scores_BC,
            lengths_B,
            step.req_pool_indices_B,
            self.first,
            LAST_TOKENS,
            self._page_size,
            self.tokens,
            self.until,
        )
