"""The sampler as kernels that read each row of logits once, and each row with filters twice more, seldom thrice.

Cost per cycle without filters: a draft step reads its [B, V] logits once (one split pass and one reduction). The
verdict reads [B, N, V] once for the log-sum-exps, which log-probabilities share; of each request up to gamma - 1 rows of
the target and of the draft, for how many drafts are accepted; and a row of each for the token after them. Rows with top-k,
top-p or min-p find their floor by radix selection (summary.cu). No probabilities are ever stored and nothing is sorted.

Random numbers, floors and tie rules are those of ``reference.py``; both run under the same tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import triton
import triton.language as tl

from er_sglang.sampling.base import LEAST_FLOAT, STREAM_ACCEPT, STREAM_RESIDUAL, Sampler, SamplingParams, Verdict

BLOCK = 4096
RACE_BLOCK = 1024  # of the token after the drafts: few rows, each a long way for few warps
SUMMARY_THREADS = 1024  # kThreads in summary.cu

# Triton compiles a kernel anew for integers that are 1 or a multiple of 16. These vary from step to step, and no load
# is wider for knowing them.
_varying = triton.jit(do_not_specialize=("rows_per_request", "stream", "gamma"))


@triton.jit
def _bits(state_ptr, token, row, stream):
    """32 random bits per token; ``token`` int32 [...], the rest scalars."""
    seed = tl.load(state_ptr)
    cycle = (tl.load(state_ptr + 1) & 0xFFFFFFFF).to(tl.uint32)
    zero = (token * 0).to(tl.uint32)
    c0, _, _, _ = tl.philox(seed, token.to(tl.uint32), zero + row.to(tl.uint32), zero + stream, zero + cycle)
    return c0


@triton.jit
def _uniform(bits):
    return (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def _log_exponential(bits):
    """log of a standard exponential; exact in the small values that win the race."""
    u = _uniform(bits)
    return tl.log(tl.where(u < 1e-3, u + 0.5 * u * u, -tl.log(1.0 - u)))


@triton.jit
def _scaled(row_ptr, offset, size, temperature):
    return tl.load(row_ptr + offset, mask=offset < size, other=float("-inf")).to(tl.float32) / temperature


@_varying
def _partials_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, state_ptr, max_ptr, sum_ptr, best_ptr, arg_ptr,
    row_stride, size, rows_per_request, blocks, stream, NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per (row, block): largest scaled logit, sum of exp below it, and the leader of the race in this block.

    Without NOISE, or for a greedy request, the leader is the largest logit.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    request = row // rows_per_request
    offset = block * BLOCK + tl.arange(0, BLOCK)
    x = _scaled(logits_ptr + row.to(tl.int64) * row_stride, offset, size, tl.load(temperature_ptr + request))
    top = tl.max(x, 0)
    score = x
    if NOISE:
        if tl.load(top_k_ptr + request) > 1:
            score = x - _log_exponential(_bits(state_ptr, offset, request, stream))
    out = row * blocks + block
    tl.store(max_ptr + out, top)
    # A mask may leave nothing of a block, and -inf - -inf is no number. A logit that is none shows in the sum.
    tl.store(sum_ptr + out, tl.sum(tl.where(x == float("-inf"), 0.0, tl.exp(x - top)), 0))
    tl.store(best_ptr + out, tl.max(score, 0))
    tl.store(arg_ptr + out, block * BLOCK + tl.argmax(score, 0))


@triton.jit
def _probability(x, floor, lse):
    value = tl.exp(x - lse)
    # Of logits that are no numbers nothing is accepted: tl.minimum would make 1 of NaN.
    return tl.where((x >= floor) & (value > 0), value, 0.0)


@triton.jit
def _probabilities(row_ptr, floor_ptr, lse_ptr, offset, size, temperature):
    return _probability(_scaled(row_ptr, offset, size, temperature), tl.load(floor_ptr), tl.load(lse_ptr))


@triton.jit
def _draft_row(draft_ptr, step, request, step_stride, row_stride):
    return draft_ptr + tl.cast(step, tl.int64) * step_stride + request.to(tl.int64) * row_stride


@triton.jit
def _joint_kernel(
    target_ptr, draft_ptr, tokens_ptr, temperature_ptr, top_k_ptr, state_ptr,
    p_floor_ptr, p_lse_ptr, p_top_ptr, q_floor_ptr, q_lse_ptr, rides_ptr, joint_ptr,
    target_stride, draft_step_stride, draft_row_stride, tokens_stride, q_stride, stream,
    simulated_acceptance, LEAST_FLOAT: tl.constexpr, GAMMA: tl.constexpr, SIMULATE: tl.constexpr, RIDES: tl.constexpr,
):  # fmt: skip
    """Per request: joint_0 to joint_GAMMA."""
    request = tl.program_id(0)
    temperature = tl.load(temperature_ptr + request)
    greedy = tl.load(top_k_ptr + request) <= 1
    joint = 1.0
    tl.store(joint_ptr + request * (GAMMA + 1), joint)
    if RIDES:
        joint = 1.0 - tl.load(rides_ptr + request).to(tl.float32)
    for step in tl.static_range(GAMMA):
        row = request * (GAMMA + 1) + step
        token = tl.load(tokens_ptr + (step + 1) * tokens_stride + request)
        if SIMULATE:
            u = _uniform(_bits(state_ptr, tl.full((), step, tl.int32), request, stream))
            joint *= (u < simulated_acceptance).to(tl.float32)
        else:
            p_x = tl.load(target_ptr + row.to(tl.int64) * target_stride + token) / temperature
            q_row = _draft_row(draft_ptr, step, request, draft_step_stride, draft_row_stride)
            q_x = tl.load(q_row + token).to(tl.float32) / temperature
            p = _probability(p_x, tl.load(p_floor_ptr + row), tl.load(p_lse_ptr + row))
            q_at = step * q_stride + request
            q = _probability(q_x, tl.load(q_floor_ptr + q_at), tl.load(q_lse_ptr + q_at))
            same = (token == tl.load(p_top_ptr + row)).to(tl.float32)
            ratio = tl.where(q > 0, joint * p / tl.maximum(q, LEAST_FLOAT), 0.0)
            joint = tl.where(greedy, joint * same, tl.minimum(ratio, 1.0))
        tl.store(joint_ptr + row + 1, joint)


@_varying
def _rest_kernel(
    target_ptr, draft_ptr, temperature_ptr, joint_ptr, p_floor_ptr, p_lse_ptr, q_floor_ptr, q_lse_ptr, rest_ptr,
    target_stride, draft_step_stride, draft_row_stride, q_stride, size, blocks, gamma,
    SIMULATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per (request, step from 1 to gamma - 1, block): its share of rest_step."""
    request, step, block = tl.program_id(0), tl.program_id(1) + 1, tl.program_id(2)
    temperature = tl.load(temperature_ptr + request)
    row = request * (gamma + 1) + step
    offset = block * BLOCK + tl.arange(0, BLOCK)
    joint = tl.load(joint_ptr + row)
    rest = 0.0
    # Of a joint of 0 there is none, and of 1 nobody asks for it. Simulated ones are nothing else: they read all the same.
    if (joint > 0) & (joint < 1) | SIMULATE:
        p_row = target_ptr + row.to(tl.int64) * target_stride
        p = _probabilities(p_row, p_floor_ptr + row, p_lse_ptr + row, offset, size, temperature)
        q_row = _draft_row(draft_ptr, step, request, draft_step_stride, draft_row_stride)
        q_at = step * q_stride + request
        q = _probabilities(q_row, q_floor_ptr + q_at, q_lse_ptr + q_at, offset, size, temperature)
        rest = tl.sum(tl.maximum(joint * p - q, 0.0), 0)
    tl.store(rest_ptr + row * blocks + block, rest)


@triton.jit
def _accept_kernel(
    state_ptr, joint_ptr, rest_ptr, accepted_ptr, blocks, stream, GAMMA: tl.constexpr, BLOCKS_POW2: tl.constexpr
):
    """Per request: how many drafted tokens are accepted."""
    request = tl.program_id(0)
    part = tl.arange(0, BLOCKS_POW2)
    accepted = 0
    for step in tl.static_range(1, GAMMA + 1):
        row = request * (GAMMA + 1) + step
        joint = tl.load(joint_ptr + row)
        stops = joint
        if step < GAMMA:
            rest = tl.sum(tl.load(rest_ptr + row * blocks + part, mask=part < blocks, other=0.0), 0)
            stops = tl.where(joint >= 1.0, 1.0, rest / (rest + 1.0 - joint))
        u = _uniform(_bits(state_ptr, tl.full((), step, tl.int32), request, stream))
        accepted = tl.where(u <= stops, step, accepted)
    tl.store(accepted_ptr + request, accepted)


@_varying
def _residual_kernel(
    target_ptr, draft_ptr, temperature_ptr, state_ptr, accepted_ptr, joint_ptr,
    p_floor_ptr, p_lse_ptr, q_floor_ptr, q_lse_ptr, rides_ptr, best_ptr, arg_ptr, fallback_ptr, fallback_arg_ptr,
    target_stride, draft_step_stride, draft_row_stride, q_stride, size, blocks, stream, gamma,
    RIDES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per (request, block): the leader of the race over max(joint * p - q, 0), and over p for an empty rest."""
    request, block = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperature_ptr + request)
    step = tl.load(accepted_ptr + request)
    row = request * (gamma + 1) + step
    offset = block * BLOCK + tl.arange(0, BLOCK)
    p_row = target_ptr + row.to(tl.int64) * target_stride
    p = _probabilities(p_row, p_floor_ptr + row, p_lse_ptr + row, offset, size, temperature)
    weight = p
    subtract = step < gamma
    if RIDES:
        subtract = subtract & (tl.load(rides_ptr + request) == 0)
    if subtract:
        q_row = _draft_row(draft_ptr, step, request, draft_step_stride, draft_row_stride)
        q_at = step * q_stride + request
        q = _probabilities(q_row, q_floor_ptr + q_at, q_lse_ptr + q_at, offset, size, temperature)
        weight = tl.maximum(tl.load(joint_ptr + row) * p - q, 0.0)
    arrival = _log_exponential(_bits(state_ptr, offset, request, stream))
    score = tl.where(weight > 0, tl.log(weight) - arrival, float("-inf"))
    fallback = tl.where(p > 0, tl.log(p) - arrival, float("-inf"))
    out = request * blocks + block
    tl.store(best_ptr + out, tl.max(score, 0))
    tl.store(arg_ptr + out, block * BLOCK + tl.argmax(score, 0))
    tl.store(fallback_ptr + out, tl.max(fallback, 0))
    tl.store(fallback_arg_ptr + out, block * BLOCK + tl.argmax(fallback, 0))


@triton.jit
def _emit_kernel(
    tokens_ptr, top_k_ptr, accepted_ptr, p_top_ptr, best_ptr, arg_ptr, fallback_ptr, fallback_arg_ptr,
    emitted_ptr, accept_lens_ptr, last_ptr, tokens_stride, blocks, GAMMA: tl.constexpr, BLOCKS_POW2: tl.constexpr,
):  # fmt: skip
    """Per request: the accepted drafts, then the token drawn after them."""
    request = tl.program_id(0)
    accepted = tl.load(accepted_ptr + request)
    part = tl.arange(0, BLOCKS_POW2)
    valid = part < blocks
    best = tl.load(best_ptr + request * blocks + part, mask=valid, other=float("-inf"))
    if tl.max(best, 0) > float("-inf"):
        last = tl.load(arg_ptr + request * blocks + tl.argmax(best, 0))
    else:
        fallback = tl.load(fallback_ptr + request * blocks + part, mask=valid, other=float("-inf"))
        last = tl.load(fallback_arg_ptr + request * blocks + tl.argmax(fallback, 0))
    last = last.to(tl.int64)
    if tl.load(top_k_ptr + request) <= 1:
        last = tl.load(p_top_ptr + request * (GAMMA + 1) + accepted)
    for step in tl.static_range(GAMMA + 1):
        token = tl.full((), 0, tl.int64)
        if step < GAMMA:
            token = tl.load(tokens_ptr + (step + 1) * tokens_stride + request)
        token = tl.where(step < accepted, token, tl.where(step == accepted, last, 0))
        tl.store(emitted_ptr + request * (GAMMA + 1) + step, token)
    tl.store(accept_lens_ptr + request, accepted + 1)
    tl.store(last_ptr + request, last)


def _floats(count: int, *shape: int, device: torch.device) -> list[torch.Tensor]:
    """Uninitialised float32 tensors, each at an address of its own: Triton compiles anew for an unaligned one."""
    return [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(count)]


@cache
def summary_kernel() -> Callable[..., None]:
    """Called with the number of rows and the arguments of summary.cu."""
    from er_sglang.sampling.nvrtc import Kernel

    return Kernel(Path(__file__).with_name("summary.cu"), "summarize_rows", SUMMARY_THREADS)


def _tokens(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device=device)


class FusedSampler(Sampler):
    def __init__(self, simulated_acceptance: float | None = None) -> None:
        super().__init__(simulated_acceptance)
        self._summarize_rows = summary_kernel()

    def _summarize(self, logits_RV, params, state, stream, noise, lse_R, floor_R, kept_lse_R, token_R) -> None:
        """Log-sum-exps of all tokens and of those kept (may be one tensor), floors, and winners: the drawn token with
        ``noise``, the first largest logit without."""
        rows, size = logits_RV.shape
        blocks = triton.cdiv(size, BLOCK)
        sizes = logits_RV.stride(0), size, rows // params.temperature_B.shape[0], blocks
        partials = *_floats(3, rows, blocks, device=logits_RV.device), _tokens(rows, blocks, device=logits_RV.device)
        _partials_kernel[(rows, blocks)](
            logits_RV, params.temperature_B, params.top_k_B, state, *partials, *sizes, stream, NOISE=noise, BLOCK=BLOCK
        )
        self._summarize_rows(
            rows,
            logits_RV, params.temperature_B, params.top_k_B, params.top_p_B, params.min_p_B, params.sequential_B, state,
            *partials, lse_R, floor_R, kept_lse_R, token_R, *sizes, BLOCK, stream, int(noise),
        )  # fmt: skip

    def draw(self, logits_BV, params, random, step, token_B, floor_B, lse_B) -> None:
        self._summarize(logits_BV, params, random.state, step, True, lse_B, floor_B, lse_B, token_B)

    def judge(self, logits_BNV, draft, params, random, rides_B=None) -> Verdict:
        batch, width, size = logits_BNV.shape
        gamma, device = draft.gamma, logits_BNV.device
        logits_RV = logits_BNV.view(batch * width, size)
        lse_BN = torch.empty((batch, width), dtype=torch.float32, device=device)
        p_floor_R, p_lse_R = _floats(2, batch * width, device=device)
        p_top_R = torch.empty(batch * width, dtype=torch.int64, device=device)
        self._summarize(logits_RV, params, random.state, 0, False, lse_BN, p_floor_R, p_lse_R, p_top_R)

        draft_strides = draft.logits_GBV.stride(0), draft.logits_GBV.stride(1)
        p_and_q = p_floor_R, p_lse_R, draft.floor_GB, draft.lse_GB
        (joint_R,) = _floats(1, batch * width, device=device)
        simulate = self.simulated_acceptance is not None
        _joint_kernel[(batch,)](
            logits_RV, draft.logits_GBV, draft.tokens_NB, params.temperature_B, params.top_k_B, random.state,
            p_floor_R, p_lse_R, p_top_R, draft.floor_GB, draft.lse_GB, rides_B, joint_R,
            logits_RV.stride(0), *draft_strides, draft.tokens_NB.stride(0), draft.lse_GB.stride(0), STREAM_ACCEPT,
            self.simulated_acceptance or 0.0, LEAST_FLOAT=LEAST_FLOAT, GAMMA=gamma,
            SIMULATE=simulate, RIDES=rides_B is not None,
        )  # fmt: skip
        blocks = triton.cdiv(size, BLOCK)
        (rest,) = _floats(1, batch * width, blocks, device=device)
        if gamma > 1:
            _rest_kernel[(batch, gamma - 1, blocks)](
                logits_RV, draft.logits_GBV, params.temperature_B, joint_R, *p_and_q, rest,
                logits_RV.stride(0), *draft_strides, draft.lse_GB.stride(0), size, blocks, gamma,
                SIMULATE=simulate, BLOCK=BLOCK,
            )  # fmt: skip
        accepted_B = torch.empty(batch, dtype=torch.int32, device=device)
        _accept_kernel[(batch,)](
            random.state,
            joint_R,
            rest,
            accepted_B,
            blocks,
            STREAM_ACCEPT,
            GAMMA=gamma,
            BLOCKS_POW2=triton.next_power_of_2(blocks),
        )
        racing = triton.cdiv(size, RACE_BLOCK)
        best, fallback = _floats(2, batch, racing, device=device)
        arg, fallback_arg = (_tokens(batch, racing, device=device) for _ in range(2))
        _residual_kernel[(batch, racing)](
            logits_RV, draft.logits_GBV, params.temperature_B, random.state, accepted_B, joint_R, *p_and_q,
            rides_B, best, arg, fallback, fallback_arg,
            logits_RV.stride(0), *draft_strides, draft.lse_GB.stride(0), size, racing, STREAM_RESIDUAL,
            gamma, RIDES=rides_B is not None, BLOCK=RACE_BLOCK,
        )  # fmt: skip
        emitted_BN = torch.empty((batch, width), dtype=torch.int64, device=device)
        accept_lens_B = torch.empty(batch, dtype=torch.int32, device=device)
        last_B = torch.empty(batch, dtype=torch.int64, device=device)
        _emit_kernel[(batch,)](
            draft.tokens_NB, params.top_k_B, accepted_B, p_top_R, best, arg, fallback, fallback_arg,
            emitted_BN, accept_lens_B, last_B, draft.tokens_NB.stride(0), racing,
            GAMMA=gamma, BLOCKS_POW2=triton.next_power_of_2(racing),
        )  # fmt: skip
        return Verdict(emitted_BN, accept_lens_B, last_B, lse_BN)

    def log_sum_exp(self, logits_BNV) -> torch.Tensor:
        one = torch.ones(1, dtype=torch.int32, device=logits_BNV.device)
        greedy = SamplingParams(one.float(), one, one.float(), one.float(), one.bool())
        state = one.long()  # nothing is drawn
        lse_BN = torch.empty(logits_BNV.shape[:2], dtype=torch.float32, device=logits_BNV.device)
        floor_BN, token_BN = torch.empty_like(lse_BN), torch.empty_like(lse_BN, dtype=torch.int64)
        self._summarize(logits_BNV.flatten(0, 1), greedy, state, 0, False, lse_BN, floor_BN, lse_BN, token_BN)
        return lse_BN
