"""Measure the profile with the very code and graphs that serve: at start-up, once per configuration.

For batch sizes that have graphs, those just above (they are padded to the next graph: time is a staircase) and a few
contexts, synthetic requests are laid into the still unused KV pool and stepped by the server's own code, back to back,
so that host work counts where the GPU waits for it: plain decoding, the shortest and the longest chain, and every
gamma's verify with its verdict. T_draft is what the longest chain takes per token; what the shortest takes beyond that
is counted to T_verify, so that gamma * T_draft + T_verify is a whole cycle. With an attention window only the longest
chain is measured, in contexts longer than the window; in others it leaves nothing out.

The first pass compiles and is not counted. The grid is then gone over until `calibration_s` is spent, at least three
times, so that a disturbance spoils one sample of a cell and the median forgets it, and at most five. The table is kept
on disk under a fingerprint of all that it depends on.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from sglang.srt.distributed import get_tp_group
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams
from tqdm import tqdm

from er_sglang.calibration.fingerprint import fingerprint
from er_sglang.calibration.subject import Subject
from er_sglang.config import cache_folder
from er_sglang.cycle.step import Step
from er_sglang.errors import ConfigError
from er_sglang.host.relay import SelfQuantDraftInput
from er_sglang.policy.profile import Profile, Rung, Sample, widest_first

logger = logging.getLogger(__name__)

# By device type. A CPU serves for trying things out: its start should not take longer than its use.
CONTEXTS_TOKENS = {"cuda": (256, 2048, 8192, 32768), "cpu": (64, 256)}
LONGEST_S = {"cuda": float("inf"), "cpu": 5.0}
BATCHES_WITHOUT_GRAPHS = (1, 8, 32)
MIN_PASSES = {"cuda": 3, "cpu": 1}
MAX_PASSES = 5


def obtain_profile(subject: Subject) -> tuple[Profile, Path | None]:
    """The profile that the config names, else the cached one, else one measured now; the same on every rank.

    Returns it and the path of rank 0's file, None if none could be kept. Raises ConfigError for a profile that is
    unreadable or was measured elsewhere.
    """
    group = get_tp_group()
    expected, cells = fingerprint(subject), _grid(subject)
    path = Path(subject.config.profile or _cached(expected, cells))
    profile, refusal = None, None
    if group.rank_in_group == 0 and (subject.config.profile or path.exists()):
        try:
            profile = Profile.load(path, expected)
            logger.info("Step times are those of %s.", path)
        except (OSError, ValueError) as error:
            refusal = f'{error}. To measure at start-up, take "profile" out of the config, or delete a spoilt {path}.'
    profile, refusal = group.broadcast_object((profile, refusal), src=0)
    if refusal:
        raise ConfigError(refusal)
    if profile is None:
        profile = group.broadcast_object(_measure(subject, cells, expected), src=0)
        if group.rank_in_group == 0:
            try:
                profile.save(path)
                logger.info("Step times were measured and saved as %s.", path)
            except OSError as error:
                logger.warning("Step times cannot be kept in %s (%s): every start measures.", path, error.strerror)
                path = None
            for outlier in profile.outliers:
                logger.warning("Step times: %s.", outlier)
    return profile, path


def _cached(expected: dict, cells: list[tuple[int, int]]) -> Path:
    """cells: others for another size of the KV cache, which then measures its own."""
    digest = hashlib.sha256(json.dumps({**expected, "cells": cells}, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "profiles" / f"{digest[:16]}.json"


def _measure(subject: Subject, cells: list[tuple[int, int]], expected: dict) -> Profile:
    group = get_tp_group()
    budget_s = min(subject.config.calibration_s, LONGEST_S[subject.device.type])
    least = MIN_PASSES[subject.device.type]
    samples: list[Sample] = []
    random = subject.random.state.clone()
    gpus = [subject.device] if subject.device.type == "cuda" else []

    def go_over(cells: list[tuple[int, int]], what: str) -> Iterator[tuple[int, int]]:
        return tqdm(cells, desc=f"Measuring step times, {what}", unit="cell", disable=group.rank_in_group != 0)

    # The cells' requests take the rows after the first, which is SGLang's padding.
    rows = subject.req_to_token[: 1 + max(batch for batch, _ in cells), : _stride(subject, cells[-1][1])]
    # A server that measures samples the same tokens as one that finds its profile.
    with torch.no_grad(), torch.random.fork_rng(gpus), _borrowed(rows):
        for batch, context_tokens in go_over([cell for cell in cells if cell[1] == cells[0][1]], "warm-up"):
            _measure_cell(subject, batch, context_tokens)
        start_s = time.perf_counter()
        for done in range(MAX_PASSES):
            spent_s = time.perf_counter() - start_s
            # Every pass takes as long as the mean of those before; rank 0's clock decides for all.
            if done >= least and not group.broadcast_object(spent_s * (done + 1) <= budget_s * done, src=0):
                break
            for batch, context_tokens in go_over(cells, f"pass {done + 1}"):
                samples += _measure_cell(subject, batch, context_tokens)
    subject.random.state.copy_(random)
    return Profile.from_samples(samples, expected)


def _grid(subject: Subject) -> list[tuple[int, int]]:
    """(batch, context) cells that the KV pool holds; a context in which a single batch size fits is left out."""
    page = subject.server_args.page_size
    limit = subject.runner.model_config.context_len // page * page - subject.config.gamma_max - 1
    wanted = CONTEXTS_TOKENS[subject.device.type]
    contexts = [context for context in wanted if context < limit]
    if len(contexts) < len(wanted):
        contexts.append(limit)
    sizes = subject.graph_batches
    above = [size + 1 for size in sizes[:-1]]
    most = min(len(subject.req_to_token) - 1, subject.config.max_draft_batch)
    batches = [batch for batch in sorted({*sizes, *above}) or BATCHES_WITHOUT_GRAPHS if batch <= most]
    cells = []
    for context in contexts:
        fitting = [b for b in batches if b * _stride(subject, context) < subject.runner.max_total_num_tokens]
        if len(fitting) >= min(2, len(batches)):
            cells += [(batch, context) for batch in fitting]
    if not cells:
        raise ConfigError(
            f"the KV cache holds {subject.runner.max_total_num_tokens} tokens, too few to measure step times: "
            'raise --mem-fraction-static, or choose a policy mode without a profile ("threshold", say).'
        )
    return cells


def _stride(subject: Subject, context_tokens: int) -> int:
    """KV slots of one synthetic request, whole pages."""
    page = subject.server_args.page_size
    return -(-(context_tokens + subject.config.gamma_max + 1) // page) * page


@contextmanager
def _borrowed(rows: torch.Tensor) -> Iterator[None]:
    before = rows.clone()
    try:
        yield
    finally:
        rows.copy_(before)


def _measure_cell(subject: Subject, batch: int, context_tokens: int) -> list[Sample]:
    """One sample of each phase, gamma and window."""
    template = _synthetic_batch(subject, batch, context_tokens)
    gammas, watch = subject.config.policy.gammas, _Stopwatch(subject.device)
    widest, *narrower = widest_first(subject.config.drafter.windows)
    apart = [window for window in narrower if window < context_tokens]

    def step(gamma: int) -> tuple[ScheduleBatch, Step]:
        scheduled = copy.copy(template)
        return scheduled, Step.of_batch(scheduled, subject.req_to_token, gamma + 1, 0)

    subject.decode(*step(0))  # every timed step follows another one
    watch.mark()
    subject.decode(*step(0))
    watch.mark()
    for window in apart:
        subject.draft(step(gammas[-1])[1], Rung(gammas[-1], window))
        watch.mark()
    for gamma in (gammas[0], gammas[-1]):
        draft = subject.draft(step(gamma)[1], Rung(gamma, widest))
        watch.mark()
    for gamma in gammas:
        subject.verify(*step(gamma), draft.first(gamma))
        watch.mark()
    plain_s, *laps_s = watch.laps_s()
    windowed_s, (shortest_s, longest_s, *verify_s) = laps_s[: len(apart)], laps_s[len(apart) :]
    draft_s = {widest: longest_s / gammas[-1]}
    fixed_s = max(0.0, shortest_s - gammas[0] * draft_s[widest])
    draft_s |= dict.fromkeys(narrower, draft_s[widest])
    draft_s |= {window: lap_s / gammas[-1] for window, lap_s in zip(apart, windowed_s)}
    return [
        Sample("target", 0, batch, context_tokens, plain_s),
        *(Sample("draft", 0, batch, context_tokens, each_s, window) for window, each_s in draft_s.items()),
        *(Sample("verify", gamma, batch, context_tokens, fixed_s + lap_s) for gamma, lap_s in zip(gammas, verify_s)),
    ]


def _synthetic_batch(subject: Subject, batch: int, context_tokens: int) -> ScheduleBatch:
    """Requests that decode at ``context_tokens``, each with KV slots of its own, sampled at temperature 1."""
    device, stride = subject.device, _stride(subject, context_tokens)
    starts = subject.server_args.page_size + stride * torch.arange(batch, device=device)
    subject.req_to_token[1 : batch + 1, :stride] = (starts.view(-1, 1) + torch.arange(stride, device=device)).to(
        torch.int32
    )
    scheduled = ScheduleBatch(
        reqs=[Req(f"calibration-{row}", "", [0], SamplingParams(temperature=1.0)) for row in range(batch)],
        device=str(device),
        forward_mode=ForwardMode.DECODE,
        model_config=subject.runner.model_config,
        req_to_token_pool=subject.runner.req_to_token_pool,
        req_pool_indices=torch.arange(1, batch + 1, device=device),
        seq_lens=torch.full((batch,), context_tokens, device=device),
        seq_lens_cpu=torch.full((batch,), context_tokens),
        spec_algorithm=subject.runner.spec_algorithm,
        spec_info=SelfQuantDraftInput(torch.zeros(batch, dtype=torch.int64, device=device)),
    )
    scheduled.sampling_info = SamplingBatchInfo.from_schedule_batch(scheduled, subject.runner.model_config.vocab_size)
    return scheduled


class _Stopwatch:
    """Marks points in time: on CUDA, when the work launched so far is done."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list = []

    def mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def laps_s(self) -> list[float]:
        """Seconds between successive marks."""
        pairs = zip(self._marks, self._marks[1:])
        if not self._on_gpu:
            return [after - before for before, after in pairs]
        self._marks[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]
