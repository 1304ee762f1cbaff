"""The policy's forward over [last token, d1..dgamma] of every request: causal, all logits, a CUDA graph per batch size
and gamma.

A verify runner is a view of the target's ModelRunner: the same model, KV pool and request table, but its own
attention backend, its own graphs and its own width. The target itself stays a plain decoder, so that a step without
drafting is SGLang's own decode step, graph included.
"""

from __future__ import annotations

import copy

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.runner import DecodeCudaGraphRunner
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.dflash_utils import resolve_dflash_verify_mask_policy

from er_sglang.cycle.step import Step
from er_sglang.errors import ConfigError
from er_sglang.host.releases import adapter

_forward, _settings = adapter("forward"), adapter("settings")


def chain_input(tokens: torch.Tensor | None, positions: torch.Tensor | None, width: int) -> DFlashVerifyInput:
    """SGLang's causal block verify: ``width`` tokens per request, no mask, logits of every token."""
    return DFlashVerifyInput(
        draft_token=tokens,
        positions=positions,
        draft_token_num=width,
        custom_mask=None,
        capture_hidden_mode=CaptureHiddenMode.NULL,
    )


class VerifyGraphRunner(DecodeCudaGraphRunner):
    """SGLang's decode graphs in TARGET_VERIFY mode, for a chain (the base class builds EAGLE's tree mask)."""

    def get_spec_info(self, num_tokens: int) -> DFlashVerifyInput:
        return chain_input(None, None, self.speculative_num_draft_tokens)


# These read a block's own keys and values from the KV cache, as a decode step does. Others, triton among them, take
# them before they are rounded to the cache's dtype: with an fp8 cache, a verify would not be the policy's decode.
_ROUNDS_FIRST = ("FlashAttentionBackend", "FlashInferAttnBackend", "TorchNativeAttnBackend")


def check_attention_backend(runner: ModelRunner) -> None:
    """Raise ConfigError unless the attention backend verifies a causal block without a mask, and as it decodes."""
    name, needs_mask = resolve_dflash_verify_mask_policy(runner.attn_backend)
    if runner.device != "cpu" and needs_mask:
        raise ConfigError(f"SELF_QUANT does not support the attention backend {name}: use fa3, flashinfer or triton.")
    if runner.kv_cache_dtype != runner.dtype and name not in _ROUNDS_FIRST:
        raise ConfigError(
            f"The KV cache is {runner.kv_cache_dtype}, and {name} attends to the tokens of a forward before they are "
            "rounded to it: use --attention-backend fa3 or flashinfer, or leave --kv-cache-dtype at auto."
        )


class Verifier:
    """Verify runners for each gamma > 0 that a step can take."""

    def __init__(self, target: ModelRunner, algorithm, gammas: tuple[int, ...], graph_batches: list[int]) -> None:
        """algorithm: SELF_QUANT's registry entry. graph_batches: batch sizes to capture, none: run eagerly."""
        self._runners: dict[int, ModelRunner] = {}
        for gamma in sorted(gammas, reverse=True):  # the widest first: the others share its logits buffer
            self._runners[gamma] = _verify_view(target, algorithm, gamma, graph_batches)

    def prepare(self, batch, step: Step, gamma: int) -> ForwardBatch:
        """Lay out the forward of a cycle: everything but the drafted tokens, which come later."""
        runner, width = self._runners[gamma], gamma + 1
        batch.forward_mode = ForwardMode.TARGET_VERIFY
        batch.input_ids = torch.empty(step.batch_size * width, dtype=torch.int64, device=step.seq_lens_B.device)
        batch.out_cache_loc = step.slots_NB[:width].t().reshape(-1)
        batch.seq_lens_cpu = step.seq_lens_cpu_B
        batch.seq_lens_sum = int(step.seq_lens_cpu_B.sum())
        batch.spec_info = chain_input(batch.input_ids, step.positions_NB[:width].t().reshape(-1), width)
        forward_batch = _forward.forward_batch(batch, runner)
        if runner.decode_cuda_graph_runner.can_run_graph(forward_batch):
            runner.decode_cuda_graph_runner.load_batch(forward_batch)
            forward_batch.mark_forward_metadata_ready()
        elif runner.device == "cpu":
            _describe_as_extend(forward_batch, width)
        return forward_batch

    def forward(self, forward_batch: ForwardBatch, tokens_NB: torch.Tensor) -> tuple[LogitsProcessorOutput, bool]:
        """Run the prepared forward on [last, d1..dgamma]; its logits [B * N, V] are float32, request-major.

        Returns the output and whether a graph ran. The logits buffer belongs to all graphs of the process.
        """
        forward_batch.input_ids.view(-1, tokens_NB.shape[0]).copy_(tokens_NB.t())
        out = self._runners[tokens_NB.shape[0] - 1].forward(forward_batch)
        return out.logits_output, out.can_run_graph


def _verify_view(target: ModelRunner, algorithm, gamma: int, graph_batches: list[int]) -> ModelRunner:
    view = copy.copy(target)
    view.spec_algorithm = algorithm
    graphs = copy.deepcopy(_settings.published().cuda_graph_config)
    if graph_batches:
        graphs.decode.bs = graph_batches
    with _settings.overridden(
        view, speculative_num_steps=gamma, speculative_num_draft_tokens=gamma + 1, cuda_graph_config=graphs
    ):
        view.attn_backend = view._get_attention_backend()
        view.eager_runner = copy.copy(target.eager_runner)
        view.eager_runner.model_runner = view
        view.decode_cuda_graph_runner = view.eager_runner
        if graph_batches:
            view.graph_shared_output = GraphSharedOutput.create_for_model_runner(view)
            view.decode_cuda_graph_runner = VerifyGraphRunner(
                view,
                attn_backend=view.attn_backend,
                speculative_num_steps=gamma,
                speculative_num_draft_tokens=gamma + 1,
            )
    return view


def _describe_as_extend(forward_batch: ForwardBatch, width: int) -> None:
    """torch_native, the CPU backend, knows a causal block only as an extend: new tokens after a prefix."""
    prefix_lens = forward_batch.seq_lens
    forward_batch.extend_prefix_lens = prefix_lens
    forward_batch.extend_seq_lens = torch.full_like(prefix_lens, width)
    forward_batch.seq_lens = prefix_lens + width
    forward_batch.seq_lens_cpu = forward_batch.seq_lens_cpu + width
