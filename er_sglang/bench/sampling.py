"""Time drawing and judging beside SGLang's plain sampler: what filters and log-probabilities cost a cycle.

    python -m er_sglang.bench.sampling --batch 1 8 32 64 128 --gamma 3 5

Microseconds in a CUDA graph. ``cycle`` is gamma draws, the judging and, with
log-probabilities, theirs; ``plain`` is SGLang's sampler for as many steps as a cycle emits tokens on average. Needs a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from sglang.srt.layers.sampler import Sampler as PlainSampler
from sglang.srt.runtime_context import get_flags
from tqdm import tqdm

from er_sglang.bench.timing import graph_us
from er_sglang.cycle.logprobs import attach_logprobs
from er_sglang.sampling import Draft, RandomState, SamplingParams
from er_sglang.sampling.fused import FusedSampler
from er_sglang.tools.results import write_rows
from er_sglang.tools.serving import ON_CPU

TOP_K_ALL = 1 << 30
FILTERS = {
    "none": {},
    "top_p": {"top_p": 0.95},
    "top_k": {"top_k": 50},
    "top_k, top_p": {"top_k": 50, "top_p": 0.95},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 50, "top_p": 0.95, "min_p": 0.05},
}
LOGITS = {"peaked": 2.0, "flat": 1.0, "blank": 1e-4}  # standard deviation of most


def time_us(run: Callable[[], object]) -> float:
    return graph_us(lambda _: run(), copies=3)


def make_logits(kind: str, *shape: int) -> torch.Tensor:
    """``peaked``: twenty tokens far above the others, as a trained model has. ``flat``: normal. ``blank``: nearly equal, as
    ``--load-format dummy`` gives."""
    logits = LOGITS[kind] * torch.randn(*shape, device="cuda")
    if kind == "peaked":
        logits[..., :20] += torch.linspace(22, 12, 20, device="cuda")
    return logits


def plain_sampler() -> PlainSampler:
    """SGLang's, without a server."""
    sampler = PlainSampler.__new__(PlainSampler)
    torch.nn.Module.__init__(sampler)
    sampler.rl_on_policy_target = None
    sampler.enable_deterministic = sampler.use_log_softmax_logprob = sampler.use_ascend_backend = False
    return sampler


def make_params(rows: int, top_k: int = TOP_K_ALL, top_p: float = 1.0, min_p: float = 0.0) -> SamplingParams:
    def fill(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device="cuda")

    return SamplingParams(
        temperature_B=fill(1.0, torch.float32),
        top_k_B=fill(top_k, torch.int32),
        top_p_B=fill(top_p, torch.float32),
        min_p_B=fill(min_p, torch.float32),
        sequential_B=fill(min_p > 0, torch.bool),
    )


def sampling_info(params: SamplingParams, filters: dict) -> SimpleNamespace:
    """What SGLang's sampler and log-probabilities read of a SamplingBatchInfo."""
    return SimpleNamespace(
        temperatures=params.temperature_B.view(-1, 1),
        top_ks=params.top_k_B,
        top_ps=params.top_p_B,
        min_ps=params.min_p_B,
        need_top_k_sampling="top_k" in filters,
        need_top_p_sampling="top_p" in filters,
        need_min_p_sampling="min_p" in filters,
        is_all_greedy=False,
        has_custom_logit_processor=False,
        grammars=None,
        sampling_seed=None,
        device="cuda",
    )


def measure(
    logits_kind: str, size: int, batch: int, gammas: list[int], acceptance: float, plain: PlainSampler | None
) -> list[dict]:
    """A table row per gamma and filter."""
    widest = max(gammas) + 1
    logits_BNV = make_logits(logits_kind, batch, widest, size)
    draft_GBV = torch.empty(widest - 1, batch, size, device="cuda")
    for i in range(widest - 1):
        draft_GBV[i] = logits_BNV[:, i] + 0.1 * LOGITS[logits_kind] * torch.randn(batch, size, device="cuda")
    ours = FusedSampler()
    random = RandomState.create(1, torch.device("cuda"))
    rows = []
    for name, filters in FILTERS.items():
        params = make_params(batch, **filters)
        info = sampling_info(params, filters)
        draft = Draft(
            torch.zeros(widest, batch, dtype=torch.int64, device="cuda"),
            draft_GBV,
            *(torch.empty(widest - 1, batch, device="cuda") for _ in range(2)),
        )

        def draw(i: int) -> None:
            ours.draw(draft_GBV[i], params, random, i, draft.tokens_NB[i + 1], draft.floor_GB[i], draft.lse_GB[i])

        random.advance()
        for i in range(widest - 1):
            draw(i)
        draw_us = time_us(lambda: draw(0))

        scratch_BV = logits_BNV[:, 0].contiguous()

        def plain_step(return_logprob: bool) -> None:
            scratch_BV.copy_(logits_BNV[:, 0])
            output = SimpleNamespace(next_token_logits=scratch_BV)
            plain(output, info, return_logprob, [0] * batch, [None] * batch, None)

        plain_us = plain_logprob_us = None
        if plain:
            copy_us = time_us(lambda: scratch_BV.copy_(logits_BNV[:, 0]))
            plain_us, plain_logprob_us = (time_us(lambda: plain_step(flag)) - copy_us for flag in (False, True))
        for gamma in gammas:
            judged_BNV, first = logits_BNV[:, : gamma + 1].contiguous(), draft.first(gamma)
            verdict = ours.judge(judged_BNV, first, params, random)
            batch_info = SimpleNamespace(
                seq_lens=params.top_k_B, sampling_info=info, top_logprobs_nums=[0] * batch, token_ids_logprobs=[None]
            )
            output = SimpleNamespace(next_token_logits=judged_BNV.view(-1, size))
            judge_us = time_us(lambda: ours.judge(judged_BNV, first, params, random))
            logprob_us = time_us(lambda: attach_logprobs(batch_info, output, verdict, ours))
            emitted = sum(acceptance**i for i in range(gamma + 1))
            rows.append(
                {
                    "logits": logits_kind,
                    "requests": batch,
                    "gamma": gamma,
                    "filters": name,
                    "draw": draw_us,
                    "judge": judge_us,
                    "logprob": logprob_us,
                    "cycle": gamma * draw_us + judge_us,
                    "cycle, logprob": gamma * draw_us + judge_us + logprob_us,
                    "plain": plain and emitted * plain_us,
                    "plain, logprob": plain and emitted * plain_logprob_us,
                }
            )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m er_sglang.bench.sampling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 64, 128], metavar="B", help="requests")
    parser.add_argument("--gamma", nargs="+", type=int, default=[3, 5], metavar="G", help="drafted tokens a cycle")
    parser.add_argument("--logits", nargs="+", choices=LOGITS, default=list(LOGITS))
    parser.add_argument("--vocabulary", type=int, default=152_064, metavar="V", help="default %(default)s")
    parser.add_argument("--acceptance", type=float, default=0.93, metavar="A", help="stated; default %(default)s")
    parser.add_argument(
        "--plain",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="SGLang's sampler, too: flashinfer compiles it for minutes at first; default yes",
    )
    parser.add_argument("--out", type=Path, default=Path("sampling-results"), metavar="DIR", help="default %(default)s")
    args = parser.parse_args(argv)
    if ON_CPU:
        parser.error("needs a GPU: it times CUDA kernels")
    plain = plain_sampler() if args.plain else None
    get_flags().sampling_backend = "flashinfer"
    rows = []
    for kind in args.logits:
        for batch in tqdm(args.batch, desc=kind):
            rows += measure(kind, args.vocabulary, batch, args.gamma, args.acceptance, plain)
    write_rows(args.out, rows, settings={**vars(args), "out": str(args.out)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
