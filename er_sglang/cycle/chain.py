"""The draft of a cycle: gamma plain decodes of the drafter in a row, each sampling the next one's input.

Step i is an ordinary DECODE at length L + i + 1: through our own attention on Hopper (drafting/attention.py), elsewhere
through its own ordinary backend, so any backend that decodes can draft. The whole chain, sampling included, is one CUDA
graph per (batch size, gamma). What it writes into the KV cache, positions L to L + gamma - 1, is overwritten by the
verify forward before anything else reads it.
"""

from __future__ import annotations

import copy
import logging

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.distributed import get_tp_group
from sglang.srt.distributed.parallel_state import graph_capture
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.runner import ShapeKey, model_capture_mode
from sglang.srt.model_executor.runner.base_cuda_graph_runner import freeze_gc
from sglang.srt.model_executor.runner_backend.utils import resolve_decode_backend
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from torch import nn
from tqdm import tqdm

from er_sglang.config import SINK_TOKENS
from er_sglang.cycle.attended import Attended
from er_sglang.cycle.inputs import ChainInputs
from er_sglang.cycle.step import Step
from er_sglang.cycle.window import AttentionWindow, whole_pages
from er_sglang.drafting.attention import DraftAttention, can_attend
from er_sglang.host.releases import adapter
from er_sglang.policy.profile import Rung
from er_sglang.sampling import Draft, RandomState, Sampler, SamplingParams, Shaper

logger = logging.getLogger(__name__)
_settings = adapter("settings")


class DraftChain:
    """Drafts up to ``gamma_max`` tokens for up to ``max_batch`` requests.

    float32 logits of all steps stay until the verdict: gamma_max * max_batch * vocabulary * 4 bytes.
    """

    def __init__(
        self,
        target: ModelRunner,
        drafter: nn.Module,
        sampler: Sampler,
        shaper: Shaper,
        random: RandomState,
        gammas: tuple[int, ...],
        graph_batches: list[int],
        max_batch: int,
        windows: tuple[int, ...],
        window_by: str,
        req_to_token: torch.Tensor,
    ) -> None:
        """graph_batches: ascending batch sizes to capture; empty runs the same code eagerly (CPU, or no graphs).
        windows, window_by: how many tokens of a context a draft can attend to, 0 for all, and which.
        req_to_token: the target's request table with rows for windows below, see window.py."""
        self._drafter = drafter
        self._sampler = sampler
        self._shaper = shaper
        self._random = random
        self._graph_batches = graph_batches
        gamma_max = max(gammas)
        first_row = len(target.req_to_token_pool.req_to_token)
        page_size = _settings.published().page_size
        # SGLang's graph backend asks its owner for model_runner and device_module.
        self.model_runner = view = _decode_view(target, req_to_token)
        self.device_module = torch.get_device_module(view.device)
        with _as_plain_decoder(view):
            if can_attend(view, max_batch):
                self._backends = [DraftAttention(view, max_batch)] * gamma_max
            else:
                self._backends = [view._get_attention_backend() for _ in range(gamma_max)]
        logger.info("Drafts attend by %s.", type(self._backends[0]).__name__)
        self._attended = None
        sizes = [size for size in windows if size]
        if sizes and window_by == "attention":
            most = whole_pages(max(sizes), page_size)
            self._attended = Attended(view, most, gamma_max, max_batch, req_to_token, first_row, page_size)
            self._backends = [self._attended.listening(backend, i) for i, backend in enumerate(self._backends)]
        self._windows = {
            size: AttentionWindow(size, gamma_max, req_to_token, first_row, page_size, self._attended) for size in sizes
        }
        # A context that all windows see as a whole needs no choice.
        self._chooses_above = min(sizes, default=0) + SINK_TOKENS

        self._window_rows = torch.arange(first_row, first_row + max_batch, device=view.device)
        self._inputs = ChainInputs(gamma_max, max_batch, view.device)
        # The one large buffer, and nothing in it outlives a cycle: a sleeping server gives it back with the KV cache.
        shape = (gamma_max, max_batch)
        with target.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            self._logits = torch.zeros((*shape, view.model_config.vocab_size), dtype=torch.float32, device=view.device)
        self._floor, self._lse = (torch.zeros(shape, dtype=torch.float32, device=view.device) for _ in range(2))
        if graph_batches:
            self._capture(gammas)

    def prepare(self, step: Step, rung: Rung) -> list[ForwardBatch]:
        """Load a step's inputs and plan its gamma decodes. Of attention backends, DraftAttention alone reads the shared
        request table later, too."""
        gamma, raw_bs = rung.gamma, step.batch_size
        bs = next((b for b in self._graph_batches if b >= raw_bs), raw_bs)
        rows_B, hidden_B, seq_lens_cpu_B = step.req_pool_indices_B, None, step.seq_lens_cpu_B
        if rung.window:
            window = self._windows[rung.window]
            rows_B, hidden_B = self._window_rows[:raw_bs], window.load(step)
            seq_lens_cpu_B = window.seen_on_host(seq_lens_cpu_B)
        self._inputs.load(step, gamma, bs, rows_B, hidden_B)
        self._shaper.load(step.penalties, step.bias_BV)

        seq_lens_cpu = torch.ones(bs, dtype=torch.int64)
        forward_batches = self._forward_batches(bs, gamma)
        for i, (backend, forward_batch) in enumerate(zip(self._backends, forward_batches)):
            seq_lens_cpu[:raw_bs] = seq_lens_cpu_B + (i + 1)
            forward_batch.seq_lens_cpu = seq_lens_cpu.clone()
            forward_batch.seq_lens_sum = int(seq_lens_cpu.sum())
            if bs in self._graph_batches:
                backend.init_forward_metadata_out_graph(forward_batch)
            else:
                backend.init_forward_metadata(forward_batch)
            forward_batch.mark_forward_metadata_ready()
        return forward_batches

    def draft(self, forward_batches: list[ForwardBatch], batch_size: int) -> Draft:
        """Run the prepared chain for the first ``batch_size`` rows."""
        gamma, bs = len(forward_batches), forward_batches[0].batch_size
        if bs in self._graph_batches:
            self._graphs.replay(_key(bs, gamma), forward_batches[0])
        else:
            self._run(forward_batches)
        return Draft(
            tokens_NB=self._inputs.tokens[: gamma + 1, :batch_size],
            logits_GBV=self._logits[:gamma, :batch_size],
            floor_GB=self._floor[:gamma, :batch_size],
            lse_GB=self._lse[:gamma, :batch_size],
        )

    def judged(self, step: Step, accept_lens_B: torch.Tensor, gamma: int) -> None:
        """Of the latest chain, drafted for ``step``, each request has kept so many tokens, the policy's own included."""
        if self._attended is not None and int(step.seq_lens_cpu_B.max()) + gamma + 1 > self._chooses_above:
            self._attended.update(step, accept_lens_B, gamma)

    def forget(self, req_pool_indices_B: torch.Tensor) -> None:
        """These rows of the request table begin anew."""
        if self._attended is not None:
            self._attended.forget(req_pool_indices_B)

    def _forward_batches(self, bs: int, gamma: int) -> list[ForwardBatch]:
        return [
            ForwardBatch(
                forward_mode=ForwardMode.DECODE,
                batch_size=bs,
                input_ids=self._inputs.tokens[i, :bs],
                req_pool_indices=self._inputs.rows[:bs],
                seq_lens=self._inputs.seq_lens[i, :bs],
                seq_lens_cpu=torch.ones(bs, dtype=torch.int64),
                orig_seq_lens=self._inputs.seq_lens[i, :bs],
                out_cache_loc=self._inputs.slots[i, :bs],
                seq_lens_sum=bs,
                positions=self._inputs.positions[i, :bs],
                next_token_logits_buffer=self._logits[i, :bs],
                spec_algorithm=self.model_runner.spec_algorithm,
                capture_hidden_mode=CaptureHiddenMode.NULL,
            )
            for i in range(gamma)
        ]

    def _run(self, forward_batches: list[ForwardBatch]) -> None:
        bs = forward_batches[0].batch_size
        params = SamplingParams(*(rows[:bs] for rows in self._inputs.params))
        self._random.advance()
        for i, (backend, forward_batch) in enumerate(zip(self._backends, forward_batches)):
            with forward_context(ForwardContext(attn_backend=backend)):
                backend.init_forward_metadata_in_graph(forward_batch)
                self._drafter(forward_batch.input_ids, forward_batch.positions, forward_batch)
            self._shaper.shape(self._logits[i, :bs], self._inputs.positions[0, :bs], self._inputs.tokens[1:, :bs], i)
            self._sampler.draw(
                self._logits[i, :bs],
                params,
                self._random,
                i,
                self._inputs.tokens[i + 1, :bs],
                self._floor[i, :bs],
                self._lse[i, :bs],
            )

    def _capture(self, gammas: tuple[int, ...]) -> None:
        """One graph per (batch size, gamma); the largest first, so that the smaller reuse its memory."""
        self._graphs = resolve_decode_backend(self)
        for backend in self._backends:
            backend.init_cuda_graph_state(max(self._graph_batches), max(self._graph_batches))
        sizes = tqdm(
            self._graph_batches[::-1], desc="Capturing draft chains", disable=get_tp_group().rank_in_group != 0
        )
        with (
            model_capture_mode(),
            freeze_gc(_settings.published().enable_cudagraph_gc),
            graph_capture() as capture,
            self._graphs.capture_session(capture.stream),
        ):
            for bs in sizes:
                decodes = self._forward_batches(bs, max(gammas))
                for backend, forward_batch in zip(self._backends, decodes):
                    # Bound once per size: the graphs of all gammas read the same metadata buffers.
                    backend.init_forward_metadata_out_graph(forward_batch, in_capture=True)
                    forward_batch.mark_forward_metadata_ready()
                for gamma in sorted(gammas, reverse=True):
                    warm_up = gamma == max(gammas)  # of SGLang's two before each capture; the longest chain's serve all

                    def run() -> None:
                        if warm_up or torch.cuda.is_current_stream_capturing():
                            self._run(decodes[:gamma])

                    self._graphs.capture_one(_key(bs, gamma), run)


def _key(bs: int, gamma: int) -> ShapeKey:
    return ShapeKey(size=bs, variant_label=str(gamma))


def _decode_view(target: ModelRunner, req_to_token: torch.Tensor) -> ModelRunner:
    """The target as a server without speculation would have it: its backends allocate for plain decode alone."""
    view = copy.copy(target)
    view.spec_algorithm = SpeculativeAlgorithm.NONE
    view.req_to_token_pool = copy.copy(target.req_to_token_pool)
    view.req_to_token_pool.req_to_token = req_to_token
    with _as_plain_decoder(view):
        view.attn_backend = view._get_attention_backend()
    return view


def _as_plain_decoder(view: ModelRunner):
    return _settings.overridden(
        view,
        speculative_algorithm=None,
        speculative_num_steps=None,
        speculative_num_draft_tokens=None,
        speculative_eagle_topk=None,
    )
