"""SELF_QUANT as SGLang's registry knows it: predicates, server arguments and the relay between steps."""

from __future__ import annotations

from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo, get_spec

from er_sglang.config import load_config, simulated_acceptance
from er_sglang.host import hooks
from er_sglang.host.cpu import CPU_HOOKS
from er_sglang.host.machine import check_machine
from er_sglang.host.refusals import check_drafter, check_model, check_server_args, check_simulated_acceptance
from er_sglang.host.releases import adapter
from er_sglang.host.seams import ALGORITHM, check_host, warn_if_never_run_on_gpu


class SelfQuantAlgorithm(CustomSpecAlgo):
    """Answers to the questions SGLang asks of an algorithm.

    ``is_standalone`` is true: it selects the branches for a plain language model as drafter (no hidden states).
    No KV cache is set aside for a draft, since no draft model path is given. The last methods are called but missing
    from ``CustomSpecAlgo`` (see ``SpeculativeAlgorithm`` for their originals).
    """

    def is_standalone(self) -> bool:
        return True

    def has_draft_kv(self) -> bool:
        return False

    def handle_server_args(self, server_args) -> None:
        model = adapter("settings").model_config(server_args)
        check_model(model.hf_config)
        config = load_config(server_args.speculative_adaptive_config, server_args.speculative_num_steps)
        check_drafter(config.drafter.weights, model.quantization)
        check_simulated_acceptance(simulated_acceptance(config.drafter.windows), server_args.load_format)
        if server_args.device == "cuda":
            check_machine(config)
        server_args.speculative_num_steps = config.gamma_max
        server_args.speculative_num_draft_tokens = config.gamma_max + 1
        server_args.speculative_eagle_topk = 1

    def need_topk(self) -> bool:
        return False

    def carries_draft_hidden_states(self) -> bool:
        return False

    def create_future_map(self, device, req_to_token_pool, **needs):
        from er_sglang.host.relay import SelfQuantFutureMap

        return SelfQuantFutureMap(device, self, req_to_token_pool, **needs)


def _validate(server_args) -> None:
    """Called where ServerArgs are built, before anything is loaded."""
    check_host()
    refused = adapter("refused")
    check_server_args(server_args, more=refused.FIELDS, gone=refused.GONE)


def _create_worker_class(server_args) -> type:
    """Called by each scheduler that serves SELF_QUANT, before it has memory pools or answers requests."""
    check_host()
    hooks.bind(hooks.SCHEDULER_HOOKS)
    if adapter("settings").published().device == "cpu":
        hooks.bind(CPU_HOOKS)
    else:
        warn_if_never_run_on_gpu()
    from er_sglang.worker import SelfQuantWorker

    return SelfQuantWorker


def register() -> None:
    """Make SELF_QUANT known to SGLang; does nothing if it is."""
    if get_spec(ALGORITHM) is None:
        SpeculativeAlgorithm.register(
            ALGORITHM,
            supports_overlap=True,
            validate_server_args=_validate,
            spec_class=SelfQuantAlgorithm,
        )(_create_worker_class)
