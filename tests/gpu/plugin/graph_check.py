"""SGLang plugin for tests: when SELF_QUANT's graphs are captured, run each against the same code run eagerly, and the
drafter against one with the policy's own norms, activations, rotation and attention. Some requests are penalised, all
are biased.

Prints one line per comparison; raises, and so stops the server, unless every result is equal bit for bit, or close to
that of other kernels. Contexts are short, so that attention takes one split in both (the number of splits is fixed at capture), and longer than an
attention window of a few tokens sees.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from types import SimpleNamespace

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import nn

from er_sglang.cycle.step import Step
from er_sglang.drafting.drafter import Drafter
from er_sglang.drafting.linear import DraftLinearMethod
from er_sglang.drafting.shadow import shadow
from er_sglang.policy.profile import Rung
from er_sglang.quantize.blocks import FUSED_ROWS
from er_sglang.sampling import SamplingParams
from er_sglang.sampling.penalties import PenaltyTable, RequestPenalties

CONTEXT_TOKENS = 75
CLOSE = 0.02  # of the norm; two bf16 computations of the toy model differ by some 0.005


def activate() -> None:
    HookRegistry.register("er_sglang.worker.SelfQuantWorker.init_cuda_graphs", _compare_all, HookType.AFTER)


def _compare_all(result, worker) -> None:
    chain = worker._chain
    _fill_kv(worker.runner.token_to_kv_pool, worker.device)
    other = shadow(worker.runner.model, functools.partial(_plain_linear, worker._drafter))
    other.lm_head = worker._drafter.model.lm_head
    for size in chain._graph_batches or (1, FUSED_ROWS + 1):  # without graphs, on CPU: eager against eager
        for gamma in worker.config.policy.gammas:
            step = _make_step(worker, size)
            _same(
                f"draft of {gamma} at batch {size}",
                _draft(worker, step, gamma, True),
                _draft(worker, step, gamma, False),
            )
            _same(
                f"verify of {gamma} at batch {size}",
                _verify(worker, step, gamma, True),
                _verify(worker, step, gamma, False),
            )

        ours = _first_draft(worker, step)
        drafter, backends, chain._drafter = chain._drafter, chain._backends, other
        chain._backends = [chain.model_runner._get_attention_backend() for _ in backends]
        _close(f"draft at batch {size}", ours, _first_draft(worker, step))
        chain._drafter, chain._backends = drafter, backends


def _plain_linear(drafter: Drafter, module: nn.Module) -> nn.Module | None:
    """A Linear's twin that does this Linear's product alone, and leaves the activation to the policy's own."""
    twin = drafter._linear_twin(module)
    if twin is not None:
        twin.quant_method = copy.copy(twin.quant_method)
        twin.quant_method.__class__, twin.quant_method.passes_rows = DraftLinearMethod, 0
    return twin


def _close(what: str, ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        if not error < CLOSE:
            raise AssertionError(f"{what}: {error:.3e} from that of SGLang's own kernels")
        print(f"TWIN_CHECK {what}: {error:.3e}", flush=True)


def _same(what: str, graph: list[torch.Tensor], eager: list[torch.Tensor]) -> None:
    for a, b in zip(graph, eager, strict=True):
        if not torch.equal(a, b):
            raise AssertionError(
                f"{what}: graph and eager differ, at most {(a.double() - b.double()).abs().max().item():.3e}"
            )
        if not a.double().isfinite().all():
            raise AssertionError(f"{what}: not finite")
    print(f"GRAPH_CHECK {what}: equal bit for bit", flush=True)


def _fill_kv(pool, device: torch.device) -> None:
    generator = torch.Generator(device=device).manual_seed(1)
    for layer in range(pool.layer_num):
        for buffer in (pool.get_key_buffer(layer), pool.get_value_buffer(layer)):
            buffer[: 256 * (CONTEXT_TOKENS + 16)].normal_(generator=generator)


def _make_step(worker, size: int) -> Step:
    device, width = worker.device, worker.config.gamma_max + 1
    rows = torch.arange(size, device=device)
    slots = 1 + torch.arange(size * (CONTEXT_TOKENS + width), device=device).view(size, -1)
    worker.req_to_token[:size, : CONTEXT_TOKENS + width] = slots.to(worker.req_to_token.dtype)
    vocab_size = worker.runner.model_config.vocab_size
    table = PenaltyTable(vocab_size, device)
    table.reset({1: RequestPenalties(0.5, 0.5, 1.2, 0, (), [5, 6, 7] * 9)})
    return Step(
        req_pool_indices_B=rows,
        seq_lens_B=torch.full((size,), CONTEXT_TOKENS, device=device),
        seq_lens_cpu_B=torch.full((size,), CONTEXT_TOKENS),
        last_B=7 + rows,
        positions_NB=(CONTEXT_TOKENS + torch.arange(width, device=device)).view(-1, 1).expand(-1, size),
        slots_NB=slots[:, CONTEXT_TOKENS:].t().contiguous(),
        params=SamplingParams(
            torch.full((size,), 0.9, device=device),
            torch.where(rows % 3 == 0, 1, 1 << 30).to(torch.int32),
            torch.where(rows % 3 == 1, 0.8, 1.0),
            torch.zeros(size, device=device),
            torch.zeros(size, dtype=torch.bool, device=device),
        ),
        penalties=table.of([row % 3 // 2 for row in range(size)]),
        bias_BV=torch.linspace(-1, 1, size * vocab_size, device=device).view(size, -1),
    )


def _draft(worker, step: Step, gamma: int, graph: bool, times: int = 2) -> list[torch.Tensor]:
    """times: the second time drafts read what those of the first attended to, if the window goes by that."""
    chain = worker._chain
    batches, chain._graph_batches = chain._graph_batches, chain._graph_batches if graph else []
    rung = Rung(gamma, worker.config.drafter.windows[0])
    chain.forget(step.req_pool_indices_B)
    for _ in range(times):
        worker.random.state[1] = 5
        draft = chain.draft(chain.prepare(step, rung), step.batch_size)
        chain.judged(step, 1 + torch.arange(step.batch_size, device=worker.device).int() % (gamma + 1), gamma)
    chain._graph_batches = batches
    return [t.clone() for t in (draft.tokens_NB, draft.logits_GBV, draft.lse_GB)]


def _first_draft(worker, step: Step) -> list[torch.Tensor]:
    """Logits of the first drafted token, and what it left in the KV cache."""
    pool = worker.runner.token_to_kv_pool
    for layer in range(pool.layer_num):
        for buffer in (pool.get_key_buffer(layer), pool.get_value_buffer(layer)):
            buffer[step.slots_NB[0]] = torch.nan
    _, logits, _ = _draft(worker, step, 1, False, times=1)
    keys = [pool.get_key_buffer(layer)[step.slots_NB[0]] for layer in range(pool.layer_num)]
    values = [pool.get_value_buffer(layer)[step.slots_NB[0]] for layer in range(pool.layer_num)]
    return [logits, torch.stack(keys), torch.stack(values)]


def _verify(worker, step: Step, gamma: int, graph: bool) -> list[torch.Tensor]:
    runner = worker._verifier._runners[gamma]
    captured, runner.decode_cuda_graph_runner = (
        runner.decode_cuda_graph_runner,
        runner.decode_cuda_graph_runner if graph else runner.eager_runner,
    )
    tokens_NB = 11 + torch.arange((gamma + 1) * step.batch_size, device=worker.device).view(gamma + 1, -1) % 50
    output, ran_graph = worker._verifier.forward(worker._verifier.prepare(_batch(step), step, gamma), tokens_NB)
    runner.decode_cuda_graph_runner = captured
    assert ran_graph == (graph and worker.device.type == "cuda")
    return [output.next_token_logits.clone()]


def _batch(step: Step):
    """What ForwardBatch.init_new and Verifier.prepare read of a ScheduleBatch."""
    requests = [SimpleNamespace(lora_id=None, rid="check", token_type_ids=None) for _ in range(step.batch_size)]
    values = {field.name: None for field in dataclasses.fields(ScheduleBatch)}
    values.update(
        reqs=requests,
        seq_lens=step.seq_lens_B,
        req_pool_indices=step.req_pool_indices_B,
        return_logprob=False,
        return_hidden_states=False,
        return_hidden_states_mode=CaptureHiddenMode.NULL,
        has_grammar=False,
        model_config=SimpleNamespace(is_generation=True),
    )
    return SimpleNamespace(**values)
