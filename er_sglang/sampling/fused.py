"""The sampler as Triton kernels that read each row of logits once.

Cost per cycle without filters, V = 151,936: a draft step reads its [B, V] logits once (one split pass and one
reduction), the verdict reads [B, N, V] once for the log-sum-exps and one target and one draft row per request for
the token after the last acceptance. Rows with top-k, top-p or min-p search their floor by bisection, 34 passes over
a row that sits in the L2 cache; other rows skip that. No probabilities are ever stored and nothing is sorted.

Random numbers, floors and tie rules are those of ``reference.py``; both run under the same tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from er_sglang.sampling.base import STREAM_ACCEPT, STREAM_RESIDUAL, Sampler, Verdict

BLOCK = 4096

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
def _ordered(x):
    """float32 -> int32 with the same order."""
    i = x.to(tl.int32, bitcast=True)
    return i ^ ((i >> 31) & 0x7FFFFFFF)


@triton.jit
def _unordered(i):
    return (i ^ ((i >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


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
    tl.store(sum_ptr + out, tl.sum(tl.exp(x - top), 0))
    tl.store(best_ptr + out, tl.max(score, 0))
    tl.store(arg_ptr + out, block * BLOCK + tl.argmax(score, 0))


@_varying
def _summary_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, state_ptr, max_ptr, sum_ptr, best_ptr, arg_ptr,
    floor_ptr, lse_ptr, token_ptr,
    row_stride, size, rows_per_request, blocks, stream,
    NOISE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS_POW2: tl.constexpr,
):  # fmt: skip
    """Per row: floor, log of the kept mass, and the winner (drawn token with NOISE, first largest logit without)."""
    row = tl.program_id(0)
    request = row // rows_per_request
    part = tl.arange(0, BLOCKS_POW2)
    valid = part < blocks
    part_max = tl.load(max_ptr + row * blocks + part, mask=valid, other=float("-inf"))
    part_sum = tl.load(sum_ptr + row * blocks + part, mask=valid, other=0.0)
    part_best = tl.load(best_ptr + row * blocks + part, mask=valid, other=float("-inf"))
    top = tl.max(part_max, 0)
    lse = top + tl.log(tl.sum(part_sum * tl.exp(part_max - top), 0))
    floor = float("-inf")
    token = tl.load(arg_ptr + row * blocks + tl.argmax(part_best, 0))

    temperature = tl.load(temperature_ptr + request)
    top_k = tl.load(top_k_ptr + request)
    top_p = tl.load(top_p_ptr + request)
    min_p = tl.load(min_p_ptr + request)
    filtered = ((top_k < size) | (top_p < 1.0) | (min_p > 0.0)) & (top_k > 1)
    if filtered:
        row_ptr = logits_ptr + row.to(tl.int64) * row_stride
        # Bisect for the smallest value above which fewer than top_k tokens and at most top_p of the mass lie.
        # Values 105 below the largest weigh nothing in float32.
        low = _ordered(top - 105.0)
        high = _ordered(top)
        for _ in range(32):
            middle = (low & high) + ((low ^ high) >> 1)
            mass = 0.0
            count = 0
            for block in range(blocks):
                x = _scaled(row_ptr, block * BLOCK + tl.arange(0, BLOCK), size, temperature)
                above = _ordered(x) > middle
                mass += tl.sum(tl.where(above, tl.exp(x - lse), 0.0), 0)
                count += tl.sum(above.to(tl.int32), 0)
            fits = ((mass <= top_p) | (top_p >= 1.0)) & (count < top_k)  # rounded, the mass exceeds 1
            high = tl.where(fits, middle, high)
            low = tl.where(fits, low, middle)
        floor = tl.maximum(_unordered(high), top + tl.log(min_p))
        kept = 0.0
        best = float("-inf")
        for block in range(blocks):
            offset = block * BLOCK + tl.arange(0, BLOCK)
            x = _scaled(row_ptr, offset, size, temperature)
            kept += tl.sum(tl.where(x >= floor, tl.exp(x - top), 0.0), 0)
            if NOISE:
                score = x - _log_exponential(_bits(state_ptr, offset, request, stream))
                score = tl.where(x >= floor, score, float("-inf"))
                if tl.max(score, 0) > best:
                    best = tl.max(score, 0)
                    token = block * BLOCK + tl.argmax(score, 0)
        lse = top + tl.log(kept)
    tl.store(floor_ptr + row, floor)
    tl.store(lse_ptr + row, lse)
    tl.store(token_ptr + row, token)


@triton.jit
def _probability(x, floor, lse):
    return tl.where(x >= floor, tl.exp(x - lse), 0.0)


@triton.jit
def _accept_kernel(
    target_ptr, draft_ptr, tokens_ptr, temperature_ptr, top_k_ptr, state_ptr,
    p_floor_ptr, p_lse_ptr, p_top_ptr, q_floor_ptr, q_lse_ptr, rides_ptr, accepted_ptr,
    target_stride, draft_step_stride, draft_row_stride, tokens_stride, q_stride, stream,
    simulated_acceptance, GAMMA: tl.constexpr, SIMULATE: tl.constexpr, RIDES: tl.constexpr,
):  # fmt: skip
    """Per request: how many drafted tokens are accepted before the first rejection."""
    request = tl.program_id(0)
    temperature = tl.load(temperature_ptr + request)
    greedy = tl.load(top_k_ptr + request) <= 1
    alive = 1
    if RIDES:
        alive = 1 - tl.load(rides_ptr + request).to(tl.int32)
    accepted = 0
    for step in tl.static_range(GAMMA):
        row = request * (GAMMA + 1) + step
        token = tl.load(tokens_ptr + (step + 1) * tokens_stride + request)
        p_x = tl.load(target_ptr + row.to(tl.int64) * target_stride + token) / temperature
        q_row = draft_ptr + step * draft_step_stride + request.to(tl.int64) * draft_row_stride
        q_x = tl.load(q_row + token).to(tl.float32) / temperature
        p = _probability(p_x, tl.load(p_floor_ptr + row), tl.load(p_lse_ptr + row))
        q = _probability(
            q_x, tl.load(q_floor_ptr + step * q_stride + request), tl.load(q_lse_ptr + step * q_stride + request)
        )
        u = _uniform(_bits(state_ptr, tl.full((), step, tl.int32), request, stream))
        if SIMULATE:
            accept = (u < simulated_acceptance).to(tl.int32)
        else:
            drawn = (u * q < p).to(tl.int32)
            same = (token == tl.load(p_top_ptr + row)).to(tl.int32)
            accept = tl.where(greedy, same, drawn)
        alive = alive * accept
        accepted += alive
    tl.store(accepted_ptr + request, accepted)


@_varying
def _residual_kernel(
    target_ptr, draft_ptr, temperature_ptr, state_ptr, accepted_ptr, p_floor_ptr, p_lse_ptr, q_floor_ptr, q_lse_ptr,
    rides_ptr, best_ptr, arg_ptr, fallback_ptr, fallback_arg_ptr,
    target_stride, draft_step_stride, draft_row_stride, q_stride, size, blocks, stream, gamma,
    RIDES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per (request, block): the leader of the race over max(p - q, 0), and over p for an empty residual."""
    request, block = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperature_ptr + request)
    step = tl.load(accepted_ptr + request)
    row = request * (gamma + 1) + step
    offset = block * BLOCK + tl.arange(0, BLOCK)
    x = _scaled(target_ptr + row.to(tl.int64) * target_stride, offset, size, temperature)
    p = _probability(x, tl.load(p_floor_ptr + row), tl.load(p_lse_ptr + row))
    weight = p
    subtract = step < gamma
    if RIDES:
        subtract = subtract & (tl.load(rides_ptr + request) == 0)
    if subtract:
        q_row = draft_ptr + step.to(tl.int64) * draft_step_stride + request.to(tl.int64) * draft_row_stride
        q_x = _scaled(q_row, offset, size, temperature)
        q = _probability(
            q_x, tl.load(q_floor_ptr + step * q_stride + request), tl.load(q_lse_ptr + step * q_stride + request)
        )
        weight = tl.maximum(p - q, 0.0)
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
    if tl.load(top_k_ptr + request) <= 1:
        last = tl.load(p_top_ptr + request * (GAMMA + 1) + accepted)
    for step in tl.static_range(GAMMA + 1):
        token = tl.full((), 0, tl.int64)
        if step < GAMMA:
            token = tl.load(tokens_ptr + (step + 1) * tokens_stride + request)
        token = tl.where(step < accepted, token, tl.where(step == accepted, last.to(tl.int64), 0))
        tl.store(emitted_ptr + request * (GAMMA + 1) + step, token)
    tl.store(accept_lens_ptr + request, accepted + 1)
    tl.store(last_ptr + request, last.to(tl.int64))


def _floats(count: int, *shape: int, device: torch.device) -> list[torch.Tensor]:
    """Uninitialised float32 tensors, each at an address of its own: Triton compiles anew for an unaligned one."""
    return [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(count)]


def _partial_buffers(rows: int, blocks: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    return *_floats(3, rows, blocks, device=device), torch.empty((rows, blocks), dtype=torch.int32, device=device)


class FusedSampler(Sampler):
    def _summarize(self, logits_RV, params, random, stream, noise, floor_R, lse_R, token_R) -> None:
        rows, size = logits_RV.shape
        per_request = rows // params.temperature_B.shape[0]
        blocks = triton.cdiv(size, BLOCK)
        partials = _partial_buffers(rows, blocks, logits_RV.device)
        _partials_kernel[(rows, blocks)](
            logits_RV, params.temperature_B, params.top_k_B, random.state, *partials,
            logits_RV.stride(0), size, per_request, blocks, stream, NOISE=noise, BLOCK=BLOCK,
        )  # fmt: skip
        _summary_kernel[(rows,)](
            logits_RV, params.temperature_B, params.top_k_B, params.top_p_B, params.min_p_B, random.state, *partials,
            floor_R, lse_R, token_R, logits_RV.stride(0), size, per_request, blocks, stream,
            NOISE=noise, BLOCK=BLOCK, BLOCKS_POW2=triton.next_power_of_2(blocks),
        )  # fmt: skip

    def draw(self, logits_BV, params, random, step, token_B, floor_B, lse_B) -> None:
        self._summarize(logits_BV, params, random, step, True, floor_B, lse_B, token_B)

    def judge(self, logits_BNV, draft, params, random, rides_B=None) -> Verdict:
        batch, width, size = logits_BNV.shape
        gamma, device = draft.gamma, logits_BNV.device
        logits_RV = logits_BNV.view(batch * width, size)
        p_floor_R, p_lse_R = _floats(2, batch * width, device=device)
        p_top_R = torch.empty(batch * width, dtype=torch.int32, device=device)
        self._summarize(logits_RV, params, random, 0, False, p_floor_R, p_lse_R, p_top_R)

        accepted_B = torch.empty(batch, dtype=torch.int32, device=device)
        draft_strides = draft.logits_GBV.stride(0), draft.logits_GBV.stride(1)
        _accept_kernel[(batch,)](
            logits_RV, draft.logits_GBV, draft.tokens_NB, params.temperature_B, params.top_k_B, random.state,
            p_floor_R, p_lse_R, p_top_R, draft.floor_GB, draft.lse_GB, rides_B, accepted_B,
            logits_RV.stride(0), *draft_strides, draft.tokens_NB.stride(0), draft.lse_GB.stride(0), STREAM_ACCEPT,
            self.simulated_acceptance or 0.0, GAMMA=gamma, SIMULATE=self.simulated_acceptance is not None,
            RIDES=rides_B is not None,
        )  # fmt: skip
        blocks = triton.cdiv(size, BLOCK)
        best, fallback = _floats(2, batch, blocks, device=device)
        arg, fallback_arg = (torch.empty((batch, blocks), dtype=torch.int32, device=device) for _ in range(2))
        _residual_kernel[(batch, blocks)](
            logits_RV, draft.logits_GBV, params.temperature_B, random.state, accepted_B,
            p_floor_R, p_lse_R, draft.floor_GB, draft.lse_GB, rides_B, best, arg, fallback, fallback_arg,
            logits_RV.stride(0), *draft_strides, draft.lse_GB.stride(0), size, blocks, STREAM_RESIDUAL,
            gamma, RIDES=rides_B is not None, BLOCK=BLOCK,
        )  # fmt: skip
        emitted_BN = torch.empty((batch, width), dtype=torch.int64, device=device)
        accept_lens_B = torch.empty(batch, dtype=torch.int32, device=device)
        last_B = torch.empty(batch, dtype=torch.int64, device=device)
        _emit_kernel[(batch,)](
            draft.tokens_NB, params.top_k_B, accepted_B, p_top_R, best, arg, fallback, fallback_arg,
            emitted_BN, accept_lens_B, last_B, draft.tokens_NB.stride(0), blocks,
            GAMMA=gamma, BLOCKS_POW2=triton.next_power_of_2(blocks),
        )  # fmt: skip
        return Verdict(emitted_BN, accept_lens_B, last_B)
