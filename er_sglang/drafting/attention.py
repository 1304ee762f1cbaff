"""Attention of drafts on Hopper, an SGLang attention backend: loads and launches `decode_attention.cuh`."""

from __future__ import annotations

from pathlib import Path

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVCache, MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner import ModelRunner

from er_sglang.drafting.early import DTYPES, HEAD_DIMS
from er_sglang.host.releases import adapter
from er_sglang.quantize.hopper import is_hopper

_kernels = adapter("kernels")

MAX_GROUP = 8  # query heads that share a KV head
MAX_REQUESTS = 512
BLOCKS = 2  # of a multiprocessor
WARPS = 4  # of a block


class DraftAttention(AttentionBackend):
    """Decodes over the KV slots that a request's row of the request table lists.

    It plans nothing ahead, so one backend serves all steps of a chain, in and out of graphs, and shares out the work by
    the lengths it finds there. Deterministic.
    """

    needs_cpu_seq_lens = False

    def __init__(self, runner: ModelRunner, max_batch: int) -> None:
        """For up to ``max_batch`` requests of a runner that `can_attend` approves of."""
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token_pool = runner.req_to_token_pool
        layer = next(_layers(runner))
        self._scratch = scratch(max_batch, layer.tp_k_head_num, layer.head_dim, torch.device(runner.device))

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing is planned, in graphs neither."""

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs,
    ) -> torch.Tensor:
        """q [B, heads * head_dim]; the result is shaped alike."""
        pool = self.token_to_kv_pool
        if save_kv_cache:
            pool.set_kv_buffer(layer, forward_batch.out_cache_loc, k, v)
        q_BHD = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        out_BHD = attend(
            q_BHD,
            pool.get_key_buffer(layer.layer_id),
            pool.get_value_buffer(layer.layer_id),
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            *self._scratch,
            layer.scaling,
        )
        return out_BHD.flatten(1)


def can_attend(runner: ModelRunner, max_batch: int) -> bool:
    """Whether `DraftAttention` computes what every attention layer of ``runner``'s model does, on its KV cache."""
    layers = list(_layers(runner))
    return (
        is_hopper(torch.device(runner.device))
        and max_batch <= MAX_REQUESTS
        and is_plain(runner.token_to_kv_pool, runner.dtype)
        and runner.dtype in DTYPES
        and len({(layer.head_dim, layer.tp_k_head_num) for layer in layers}) == 1
        and all(map(_computes_plainly, layers))
    )


def is_plain(pool: KVCache, dtype: torch.dtype) -> bool:
    """Whether a KV cache is [slots, heads, head_dim] in ``dtype``, keys and values apart."""
    return type(pool) is MHATokenToKVPool and pool.kv_cache_layout == "nhd" and pool.store_dtype == dtype


def resident_blocks(device: torch.device) -> int:
    """Thread blocks that the chip runs at once."""
    return BLOCKS * torch.cuda.get_device_properties(device).multi_processor_count


def scratch(batch: int, heads_k: int, head_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """``parts`` and ``arrivals`` of `attend`, for up to ``batch`` requests."""
    shape = (resident_blocks(device), 2, WARPS, 4 + head_dim // 4 // WARPS, 32)
    parts = torch.empty(shape, dtype=torch.float32, device=device)
    return parts, torch.zeros(batch * heads_k, dtype=torch.int32, device=device)


def _layers(runner: ModelRunner):
    return (module for module in runner.model.modules() if isinstance(module, RadixAttention))


def _computes_plainly(layer: RadixAttention) -> bool:
    return (
        type(layer) is RadixAttention
        and layer.head_dim == layer.v_head_dim
        and layer.head_dim in HEAD_DIMS
        and layer.tp_q_head_num <= MAX_GROUP * layer.tp_k_head_num
        and layer.attn_type == AttentionType.DECODER
        and not layer.is_cross_attention
        and not layer.logit_cap
        and layer.sliding_window_size == -1
        and layer.xai_temperature_len == -1
    )


@_kernels.cache_once
def load(dtype: torch.dtype):
    """The kernel for activations of ``dtype``, compiled at the first call."""
    args = _kernels.make_cpp_args(dtype)
    return _kernels.load_jit(
        "er_sglang_decode_attention",
        *args,
        cuda_files=[str(Path(__file__).with_name("decode_attention.cuh"))],
        cuda_wrappers=[("decode_attention", f"er_sglang::DecodeAttention<{args}>::run")],
    )


def attend(
    q_BHD: torch.Tensor,
    k_cache_SHD: torch.Tensor,
    v_cache_SHD: torch.Tensor,
    req_to_token: torch.Tensor,
    rows_B: torch.Tensor,
    lengths_B: torch.Tensor,
    parts: torch.Tensor,
    arrivals: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """softmax(scale * q k^T) v over the first ``lengths`` slots of ``rows`` of ``req_to_token``, computed in float32.

    req_to_token int32 [rows, context]; rows and lengths (at least 1) int64. The last token's key and value may be
    written by the kernel before; all else was there when the chain's token began.
    parts float32 [blocks, 2, warps, numbers, 32] and arrivals int32 [B * heads of k, or more], zeros, are scratch.
    """
    out_BHD = torch.empty_like(q_BHD)
    load(q_BHD.dtype).decode_attention(
        q_BHD, k_cache_SHD, v_cache_SHD, req_to_token, rows_B, lengths_B, out_BHD, parts, arrivals, scale
    )
    return out_BHD
