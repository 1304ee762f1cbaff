"""One scheduler step: prefill, plain decode (gamma = 0), or draft, verify, judge (gamma > 0)."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
from collections.abc import Mapping

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE, GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.distributed import get_tp_group
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.cuda_graph_config import Backend
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.model_executor.runner.base_cuda_graph_runner import get_batch_sizes_to_capture
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from er_sglang.calibration.measure import obtain_profile
from er_sglang.calibration.subject import Subject
from er_sglang.config import CONFIG_ENV, SIMULATE_ACCEPTANCE_ENV, load_config, simulated_acceptance
from er_sglang.cycle.chain import DraftChain
from er_sglang.cycle.logprobs import attach_logprobs
from er_sglang.cycle.shaping import penalise_plain_step, shape_logits
from er_sglang.cycle.step import Step
from er_sglang.cycle.verifier import Verifier, check_attention_backend
from er_sglang.cycle.window import with_window_rows
from er_sglang.drafting.drafter import Drafter
from er_sglang.drafting.updates import Freshness
from er_sglang.host.machine import needs_memory
from er_sglang.host.penalties import PenalisedRequests
from er_sglang.host.refusals import check_model_class, check_simulated_acceptance
from er_sglang.host.relay import SelfQuantDraftInput
from er_sglang.host.releases import adapter
from er_sglang.host.reservation import compile_reservation
from er_sglang.host.riders import batch_blocker, riders
from er_sglang.host.served import ServedWorker
from er_sglang.policy.profile import Rung
from er_sglang.quantize import create_format
from er_sglang.sampling import Draft, RandomState, create_sampler, create_shaper
from er_sglang.steering.agreement import check_settings
from er_sglang.steering.control import Control, replaced
from er_sglang.steering.metrics import named
from er_sglang.steering.steering import create_steering

logger = logging.getLogger(__name__)
_settings, _slots, _spec_worker = map(adapter, ("settings", "slots", "spec_worker"))

# Batch sizes with draft and verify graphs: padding a batch to the next one costs little where drafting pays.
GRAPH_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def _ignore(seq_lens) -> None:
    """Nobody waits for the new lengths."""


class SelfQuantWorker(ServedWorker):
    """SGLang's speculative worker for SELF_QUANT.

    The target worker's ModelRunner is turned into a plain decoder (``spec_algorithm`` NONE), so prefill and
    gamma = 0 are SGLang's own code and graphs; drafting and verifying run on views of it.
    """

    def __init__(self, server_args, target_worker, **ranks) -> None:
        super().__init__()
        self.server_args = server_args = _settings.published()
        self.config = load_config(server_args.speculative_adaptive_config, server_args.speculative_num_steps)
        self._simulated_acceptance = simulated = simulated_acceptance(self.config.drafter.windows)
        tp_group = get_tp_group()
        check_settings(
            {CONFIG_ENV: self.config, SIMULATE_ACCEPTANCE_ENV: simulated},
            tp_group.cpu_group if tp_group.world_size > 1 else None,
        )
        check_simulated_acceptance(simulated, server_args.load_format)
        check_model_class(type(target_worker.model_runner.model))
        self._dp_rank = dp_rank = _spec_worker.dp_rank(ranks)
        self._target_worker = target_worker
        self.runner = runner = target_worker.model_runner
        self._algorithm = runner.spec_algorithm
        runner.spec_algorithm = SpeculativeAlgorithm.NONE
        self.device = torch.device(runner.device)

        drafter = self.config.drafter
        formats = {
            name: create_format(name, group_size=drafter.group_size, device=self.device) for name in drafter.formats
        }
        with needs_memory("the policy's quantized copy", "serve on more GPUs (--tp)"):
            self._drafter = Drafter(
                runner.model,
                formats[drafter.weights],
                formats.get(drafter.head_format),
                drafter.head == "int4_rescored",
                runner.memory_saver_adapter.region(GPU_MEMORY_TYPE_WEIGHTS, enable_cpu_backup=False),
                progress=tp_group.rank_in_group == 0,
            )
        self.freshness = Freshness(
            self.config.updates,
            refresh=self._refresh_drafter,
            on_update=lambda: self.steering.policy_updated(),
            acceptance=lambda: self.steering.controller.first_acceptance,
            window=lambda: self.steering.controller.last_window,
        )
        if simulated is not None:
            logger.warning(
                "SIMULATED acceptance %s (by attention window): the output is NOT the policy's. For benchmarks only.",
                simulated,
            )
        self._sampler = create_sampler(self.device)
        if simulated is not None:  # step times are measured, and kernels compiled, as it will judge
            self._sampler.simulated_acceptance = max(simulated.values())
        self._penalised = PenalisedRequests(runner.model_config.vocab_size, self.device)
        # One seed on all nodes, unlike server_args'.
        self.random = RandomState.create(target_worker.random_seed, self.device, replica=dp_rank or 0)
        self._chain: DraftChain | None = None
        self._verifier: Verifier | None = None
        self._refused_change: str | None = None

    # -- what SGLang asks of a worker --------------------------------------------------------------------------

    @property
    def target_worker(self):
        """Its runner is the one whose last read of the request table SGLang waits for before it writes there
        (`last_shared_read_runner`, which we leave as it is). A cycle runs on views, so that event is set by plain
        decodes only, and otherwise the scheduler waits for the whole cycle; drafts on Hopper read the table to the end."""
        return self._target_worker

    def clear_cache_pool(self) -> None:
        """The drafter has no cache of its own; SGLang flushes only when no request is left."""
        self.idle()

    def alloc_memory_pool(
        self, memory_pool_config=None, req_to_token_pool=None, token_to_kv_pool_allocator=None
    ) -> None:
        self._max_batch = min(self.config.max_draft_batch, self.runner.max_running_requests)
        rows = len(req_to_token_pool.req_to_token)
        # Drafts with an attention window have rows of their own, below those that SGLang sees.
        with self.runner.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            self._draft_req_to_token = with_window_rows(req_to_token_pool.req_to_token, self._max_batch)
        req_to_token_pool.req_to_token = self._draft_req_to_token[:rows]
        self.req_to_token = req_to_token_pool.req_to_token
        # A request that has reached the context limit rides along one more step, and a cycle writes beyond it: until
        # all attention backends are made, the context is as long as a row, so that their page tables hold one.
        self._model_config = self.runner.model_config
        self.runner.model_config = copy.copy(self._model_config)
        self.runner.model_config.context_len = self.req_to_token.shape[1]

    def init_attention_backends(self) -> None:
        backend = self.runner.attn_backend
        check_attention_backend(self.runner)
        if type(backend).__name__ == "FlashAttentionBackend":
            # Lengths on the host cost a wait for the whole previous step. It reads them only to choose a split, for
            # which Step gives it an upper bound.
            backend.needs_cpu_seq_lens = False

    @needs_memory(
        "the graphs and logits of drafting", "lower --mem-fraction-static, --speculative-num-steps or max_draft_batch"
    )
    def init_cuda_graphs(self) -> None:
        """The last of the start: SGLang has allocated its KV cache and captured the policy's own graphs."""
        self.graph_batches, target_graph_batches = self._graph_batches()
        if self.graph_batches:
            # Above, drafts would be launched kernel by kernel, at a price that the profile does not know.
            if self._max_batch > (largest := self.graph_batches[-1]):
                logger.warning(
                    "Steps of more than %d requests draft nothing: CUDA graphs end there (--cuda-graph-max-bs-decode).",
                    largest,
                )
                self._max_batch = largest
        self._shaper = create_shaper(self.device, len(self.req_to_token))
        if gammas := self.config.policy.gammas:
            self._verifier = Verifier(self.runner, self._algorithm, gammas, self.graph_batches)
            self._chain = DraftChain(
                self.runner,
                self._drafter.model,
                self._sampler,
                self._shaper,
                self.random,
                gammas,
                self.graph_batches,
                max([self._max_batch, *self.graph_batches]),
                self.config.drafter.windows,
                self.config.drafter.window_by,
                self._draft_req_to_token,
            )
        self.runner.model_config = self._model_config
        profile, self._profile_path = None, None
        if self.config.policy.needs_profile or self.config.profile:
            profile, self._profile_path = obtain_profile(
                Subject(
                    decode=self.decode,
                    draft=self.draft,
                    verify=self.verify,
                    runner=self.runner,
                    server_args=self.server_args,
                    config=self.config,
                    req_to_token=self.req_to_token,
                    random=self.random,
                    graph_batches=self.graph_batches,
                    target_graph_batches=target_graph_batches,
                )
            )
        self.steering = create_steering(self.config, self._max_batch, profile, self.server_args, self._dp_rank)
        compile_reservation(self.req_to_token, self.runner.max_running_requests)
        # As SGLang's /freeze_gc: to go over all that a start leaves would take 0.1 s, now and then amid a rollout.
        gc.collect()
        gc.freeze()

    def post_process_weights(self, recv_req) -> tuple[bool, str]:
        # slime's patch of SGLang calls this once it has repacked the policy's weights, before or after their update.
        with self.freshness.receiving("post-processing") as report:
            report(True, "")
        return True, "the drafter follows the policy's weights in memory"

    def on_verify_complete_cpu(self, num_correct_drafts_per_req: list[int], batch_size: int = 0) -> None:
        self.steering.finished(num_correct_drafts_per_req)

    @property
    def busy(self) -> bool:
        return self.steering.busy

    def idle(self) -> None:
        self.steering.idle()
        self._penalised.forget()
        self._shaper.load(None, None)  # which holds on to the last ones

    # -- the step ----------------------------------------------------------------------------------------------

    def forward_batch_generation(self, batch, on_publish=_ignore, **_) -> GenerationBatchResult:
        """Run one step for ``batch``, a ScheduleBatch whose fields the scheduler restores afterwards.

        on_publish: called with the new sequence lengths as soon as they are known on the device.
        """
        if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
            return self._prefill(batch, on_publish)
        slack_tokens = self.steering.in_flight_tokens
        self.freshness.close_update()
        blocker = self.freshness.blocker or batch_blocker(batch)
        riding = riders(batch)
        launched = self.steering.launch([_slots.committed(req) for req in batch.reqs], blocker, riding)
        rung = launched.rung
        if rung.gamma > 0:
            self.freshness.ensure()
        step = Step.of_batch(
            batch,
            self.req_to_token,
            rung.gamma + 1,
            slack_tokens,
            riding if rung.gamma else (),
            self._penalised.of(batch.reqs),
        )
        if rung.gamma == 0:
            return self.decode(batch, step, on_publish)
        return self.cycle(batch, step, rung, on_publish)

    def _prefill(self, batch, on_publish) -> GenerationBatchResult:
        self.steering.interrupted()
        batch.capture_hidden_mode = CaptureHiddenMode.FULL if batch.return_hidden_states else CaptureHiddenMode.NULL
        self._penalised.admit(batch.reqs)
        if self._chain is not None:
            self._chain.forget(batch.req_pool_indices)
        if (penalties := self._penalised.of(batch.reqs)) is not None:
            penalise_plain_step(batch.sampling_info, penalties, self._shaper, batch.seq_lens - 1)
        result = self._target_worker.forward_batch_generation(batch)
        if penalties is not None:
            self._shaper.count(result.next_token_ids.view(-1, 1), torch.ones_like(result.next_token_ids))
        result.new_seq_lens = batch.seq_lens
        on_publish(result.new_seq_lens)
        result.next_draft_input = SelfQuantDraftInput(result.next_token_ids)
        return result

    def decode(self, batch, step: Step, on_publish=_ignore) -> GenerationBatchResult:
        """gamma = 0: the batch as a server without speculation would decode it, by the target worker itself."""
        new_seq_lens = step.seq_lens_B + 1
        on_publish(new_seq_lens)
        batch.input_ids = step.last_B
        batch.out_cache_loc = step.slots_NB[0]
        batch.seq_lens = new_seq_lens
        batch.orig_seq_lens = new_seq_lens
        batch.seq_lens_cpu = step.seq_lens_cpu_B + 1
        batch.seq_lens_sum = None
        batch.spec_info = None
        if step.penalties is not None:
            penalise_plain_step(batch.sampling_info, step.penalties, self._shaper, step.seq_lens_B)
        result = self._target_worker.forward_batch_generation(batch)
        if batch.return_logprob:  # Speculative results carry a list per request.
            output = result.logits_output
            output.next_token_logprobs = output.next_token_logprobs.view(-1, 1)
        # On the host, which need not copy it then, unless penalties are counted by it.
        device = "cpu" if step.penalties is None else self.device
        accept_lens = torch.ones(step.batch_size, dtype=torch.int32, device=device)
        return self._fill(step, result, result.next_token_ids, accept_lens, new_seq_lens, 0)

    def cycle(self, batch, step: Step, rung: Rung, on_publish=_ignore) -> GenerationBatchResult:
        """gamma > 0: draft, verify, judge."""
        if self._simulated_acceptance is not None:  # read by judge, which no graph contains
            self._sampler.simulated_acceptance = self._simulated_acceptance[rung.window]
        decodes = self._chain.prepare(step, rung)
        verify = self._verifier.prepare(batch, step, rung.gamma)
        draft = self._chain.draft(decodes, step.batch_size)
        return self._judge(batch, step, verify, draft, on_publish)

    def draft(self, step: Step, rung: Rung) -> Draft:
        """The first part of a cycle alone, for calibration."""
        return self._chain.draft(self._chain.prepare(step, rung), step.batch_size)

    def verify(self, batch, step: Step, draft: Draft) -> GenerationBatchResult:
        """The rest of a cycle alone, for calibration."""
        return self._judge(batch, step, self._verifier.prepare(batch, step, draft.gamma), draft, _ignore)

    def _judge(self, batch, step: Step, verify, draft: Draft, on_publish) -> GenerationBatchResult:
        gamma = draft.gamma
        output, graphs_ran = self._verifier.forward(verify, draft.tokens_NB)

        logits_BNV = output.next_token_logits.view(step.batch_size, gamma + 1, -1)
        shape_logits(batch, step, self._shaper, logits_BNV, draft.tokens_NB[1:])
        verdict = self._sampler.judge(logits_BNV, draft, step.params, self.random, step.rides_B)
        new_seq_lens = step.seq_lens_B + verdict.accept_lens_B
        on_publish(new_seq_lens)
        self._chain.judged(step, verdict.accept_lens_B, gamma)
        if batch.return_logprob:
            attach_logprobs(batch, output, verdict, self._sampler)
        result = GenerationBatchResult(
            logits_output=output,
            next_token_ids=verdict.emitted_BN.view(-1),
            can_run_cuda_graph=graphs_ran,
            extra_keep_alive_refs=[verify],
        )
        return self._fill(step, result, verdict.last_B, verdict.accept_lens_B, new_seq_lens, gamma)

    def _fill(self, step: Step, result, last_B, accept_lens_B, new_seq_lens_B, gamma: int) -> GenerationBatchResult:
        """What the scheduler needs of every speculative step, and the penalties of the next one."""
        if step.penalties is not None:
            self._shaper.count(result.next_token_ids.view(-1, gamma + 1), accept_lens_B)
        result.speculative_num_draft_tokens = gamma + 1
        result.accept_lens = accept_lens_B
        result.new_seq_lens = new_seq_lens_B
        result.next_draft_input = SelfQuantDraftInput(last_B)
        return result

    # -- the rest ----------------------------------------------------------------------------------------------

    def change_settings(self, server_args: Mapping[str, object]) -> bool:
        controller = self.steering.controller
        now = Control(policy=controller.config, simulated_acceptance=self._simulated_acceptance)
        measured = controller.profile.gammas if controller.profile else ()
        try:
            control = replaced(now, server_args, prepared=self.config.policy.gammas, measured=measured)
        except ValueError as error:
            self._refused_change = str(error)
            logger.error("Refused to change settings: %s", error)
            return False
        self.steering.change_settings(control.policy)
        self._simulated_acceptance = control.simulated_acceptance
        self._refused_change = None
        logger.info("Settings are changed to %s.", control)
        return True

    def snapshot(self) -> dict:
        """State for /server_info, under ``internal_states[i]["self_quant"]``; acceptance is by attention window.

        policy: the settings in force; settings_version: how often they were replaced; refused_change: why the last
        request to change was refused. gammas: those with graphs, of which a policy may choose.
        """
        controller = self.steering.controller
        return {
            **self.steering.snapshot(),
            "mode": controller.config.mode,
            "policy": dataclasses.asdict(controller.config),
            "simulated_acceptance": self._simulated_acceptance and named(self._simulated_acceptance),
            "settings_version": self.steering.settings_version,
            "refused_change": self._refused_change,
            "gammas": list(self.config.policy.gammas),
            "gamma_max": self.config.gamma_max,
            "acceptance": named({window: each.snapshot() for window, each in controller.acceptance.items()}),
            "profile": str(self._profile_path) if self._profile_path else None,
            "weights": self.config.drafter.weights,
            "head": self.config.drafter.head,
            "drafter_bytes": self._drafter.nbytes,
            **self.freshness.snapshot(),
        }

    def synchronize(self) -> None:
        torch.get_device_module(self.device).synchronize()

    def _refresh_drafter(self) -> None:
        self.synchronize()  # A cycle in flight ends on the drafter it began with.
        self._drafter.refresh_()
        self.synchronize()
        self.steering.held_up()

    def _graph_batches(self) -> tuple[list[int], list[int]]:
        """Batch sizes with graphs: of drafts and verifies, and of the policy's plain decoding."""
        if self.device.type != "cuda" or self.server_args.cuda_graph_config.decode.backend == Backend.DISABLED:
            return [], []
        captured, _ = get_batch_sizes_to_capture(self.runner, 1)
        limit = min(max(captured), self.config.max_draft_batch)
        return sorted({*(size for size in GRAPH_BATCHES if size < limit), limit}), captured
