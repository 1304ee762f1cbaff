"""Test-only SGLang plugin: breaks SELF_QUANT on purpose in a running server, to show that the tests would see it.

The file named by ER_SABOTAGE_FILE holds the name of the rule in force ("none" for none) and is read at every step.
ER_SABOTAGE_UNHOOKABLE names a method of SGLang's weight updater which is then no function that could be hooked.
"""

import os
from dataclasses import replace
from pathlib import Path


def activate() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if "ER_SABOTAGE_FILE" in os.environ:
        HookRegistry.register(
            "sglang.srt.managers.scheduler.Scheduler.maybe_init_draft_worker", _install, HookType.AFTER
        )
    if "ER_SABOTAGE_UNHOOKABLE" in os.environ:
        from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

        setattr(SchedulerWeightUpdaterManager, os.environ["ER_SABOTAGE_UNHOOKABLE"], int)


def _rule() -> str:
    return Path(os.environ["ER_SABOTAGE_FILE"]).read_text()


def _install(result, scheduler) -> None:
    import torch

    from er_sglang.cycle.verifier import Verifier
    from er_sglang.sampling import penalties, reference
    from er_sglang.worker import SelfQuantWorker

    judge, residual, verify = reference.ReferenceSampler.judge, reference.residual, Verifier.forward
    cycle, shaped = SelfQuantWorker.cycle, penalties.shaped
    runner = scheduler.tp_worker.model_runner
    updater = type(getattr(runner, "weight_updater", runner))  # a part of it since SGLang 0.5.16
    update = updater.update_weights_from_disk

    def wrong_judge(self, logits_BNV, draft, params, random, rides_B=None):
        self.simulated_acceptance = 1.0 if _rule() == "accept-always" else None
        if _rule() == "q-of-another-step":
            draft = replace(
                draft,
                logits_GBV=draft.logits_GBV.roll(1, 0),
                floor_GB=draft.floor_GB.roll(1, 0),
                lse_GB=draft.lse_GB.roll(1, 0),
            )
        return judge(self, logits_BNV, draft, params, random, rides_B)

    def wrong_residual(p_BV, q_BV, joint_B):
        return p_BV if _rule() == "residual-not-subtracted" else residual(p_BV, q_BV, joint_B)

    def wrong_verify(self, forward_batch, tokens_NB):
        if _rule() == "poison-drafted":
            fill_kv(forward_batch.out_cache_loc, float("nan"))
        return verify(self, forward_batch, tokens_NB)

    def wrong_cycle(self, batch, step, rung, on_publish):
        result = cycle(self, batch, step, rung, on_publish)
        slots_NB = step.slots_NB[: rung.gamma + 1]
        accepted_NB = torch.arange(rung.gamma + 1).view(-1, 1) < result.accept_lens
        if _rule() == "poison-rejected":
            fill_kv(slots_NB[~accepted_NB], float("nan"))
        if _rule() == "poison-accepted":
            fill_kv(slots_NB[accepted_NB], 3.0)
        if _rule() == "token-repeated":
            emitted_BN = result.next_token_ids.view(-1, rung.gamma + 1)
            emitted_BN[:, 1:] = torch.where(result.accept_lens.view(-1, 1) > 1, emitted_BN[:, :1], emitted_BN[:, 1:])
        if _rule() == "slots-leaked":
            scheduler.token_to_kv_pool_allocator.alloc(scheduler.page_size)
        if _rule() == "requests-lost" and scheduler.waiting_queue:
            scheduler.waiting_queue.pop()
        return result

    def wrongly_shaped(logits_BV, words_BW, lens_B, drafted_JB):
        if _rule() == "penalties-ignored":
            return logits_BV
        if _rule() == "penalties-late":  # by the latest token, as SGLang's own with overlap scheduling
            drafted_JB = drafted_JB[:-1]
        return shaped(logits_BV, words_BW, lens_B, drafted_JB)

    def fill_kv(slots, value):
        kv = scheduler.draft_worker.target_worker.model_runner.token_to_kv_pool
        for buffer in (*kv.k_buffer, *kv.v_buffer):
            buffer[slots] = value

    def wrong_update(self, *args, **more):
        return (True, "") if _rule() == "updates-ignored" else update(self, *args, **more)

    updater.update_weights_from_disk = wrong_update
    reference.ReferenceSampler.judge = wrong_judge
    reference.residual = wrong_residual
    Verifier.forward = wrong_verify
    SelfQuantWorker.cycle = wrong_cycle
    penalties.shaped = wrongly_shaped
