"""What a user can set, validated once. The only reader of our JSON file, ER_SGLANG_CONFIG, ER_SGLANG_CACHE and
ER_SGLANG_SIMULATE_ACCEPTANCE.

Precedence: ``ER_SGLANG_CONFIG`` (a path, or the JSON object itself) replaces the file named by
``--speculative-adaptive-config``, an existing ``ServerArgs`` string that every trainer already forwards.
``--speculative-num-steps`` is the largest gamma. Knows neither torch nor SGLang.

    {"policy": {"mode": "auto", "ladder": [1, 2, 3]}, "drafter": {"weights": "int4"}, "trace": "steps.jsonl"}
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from er_sglang.errors import ConfigError
from er_sglang.policy.config import PolicyConfig, ladder_up_to

CONFIG_ENV = "ER_SGLANG_CONFIG"
CACHE_ENV = "ER_SGLANG_CACHE"
SIMULATE_ACCEPTANCE_ENV = "ER_SGLANG_SIMULATE_ACCEPTANCE"
WEIGHT_FORMATS = ("int4", "int4_asym", "fp8")
HEADS = ("int4", "int4_rescored", "policy")
SINK_TOKENS = 64  # the first of a context, which a draft attends to whatever its attention window ...
FIRST_TOKENS, LAST_TOKENS = 4, 60  # ... and which first and last ones, if the window goes by attention
WINDOW_RULES = ("attention", "recency")
AUTO_WINDOWS = (0, 128, 256, 512, 1024)  # tokens; 0: all


@dataclass(frozen=True, kw_only=True, slots=True)
class DrafterConfig:
    """How the drafter's weights are made from the policy's, and what of a context it reads.

    weights: storage format of the Linear layers ("int4", "int4_asym" or "fp8").
    head: of lm_head, "int4_rescored": int4, its leading tokens scored again with the policy's rows; "int4"; or "policy", its
        own weight, which a draft of few requests reads for up to a fifth of its time. Drafts are exact with each; which
        is accepted more, and which pays, is for measurement.
    group_size: input channels that share one scale (int4 formats).
    attention_window: tokens of a context that a draft attends to, besides SINK_TOKENS at its ends; 0: all; "auto": at each
        step, the one of AUTO_WINDOWS that pays best by measurement (mode auto; all, in the others). In long contexts a
        draft reads more KV cache than weights: a window makes it cheaper, for some acceptance.
    window_by: which tokens these are. "attention": those that the latest accepted draft attended to most, between the
        first FIRST_TOKENS and the last LAST_TOKENS. "recency": the last ones, after the first SINK_TOKENS.
    """

    weights: str = "int4"
    head: str = "int4_rescored"
    group_size: int = 128
    attention_window: int | str = "auto"
    window_by: str = "attention"

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_FORMATS:
            raise ConfigError(f"drafter.weights is {self.weights!r}; choose one of {', '.join(WEIGHT_FORMATS)}.")
        if self.head not in HEADS:
            raise ConfigError(f"drafter.head is {self.head!r}; choose one of {', '.join(HEADS)}.")
        if self.group_size not in (32, 64, 128):
            raise ConfigError(f"drafter.group_size is {self.group_size}; choose 32, 64 or 128.")
        if self.attention_window != "auto" and (type(self.attention_window) is str or self.attention_window < 0):
            raise ConfigError(
                f'drafter.attention_window is {self.attention_window!r}; choose "auto", a number of tokens, or 0 for all.'
            )
        if self.window_by not in WINDOW_RULES:
            raise ConfigError(f"drafter.window_by is {self.window_by!r}; choose one of {', '.join(WINDOW_RULES)}.")

    @property
    def windows(self) -> tuple[int, ...]:
        """Attention windows that a step can draft with."""
        return AUTO_WINDOWS if self.attention_window == "auto" else (self.attention_window,)

    @property
    def head_format(self) -> str | None:
        """Storage format of lm_head; None if it is the policy's."""
        return None if self.head == "policy" else "int4"

    @property
    def formats(self) -> set[str]:
        """The formats of all that is quantized."""
        return {self.weights, self.head_format} - {None}


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdatesConfig:
    """When the drafter follows the policy. In between it is stale, which costs acceptance and never exactness.

    refresh_interval: policy updates per refresh of the drafter. One update is all that happens to the policy's weights
        until generation goes on: any number of calls, then ``continue_generation`` or the next decode step.
    refresh_on_acceptance_drop: with an interval above 1, refresh at once when live acceptance has fallen by more than
        this since the drafter was last up to date; 1: never.
    """

    refresh_interval: int = 1
    refresh_on_acceptance_drop: float = 1.0

    def __post_init__(self) -> None:
        if self.refresh_interval < 1:
            raise ConfigError(f"updates.refresh_interval is {self.refresh_interval}; it must be at least 1.")
        if not 0.0 < self.refresh_on_acceptance_drop <= 1.0:
            raise ConfigError(
                f"updates.refresh_on_acceptance_drop is {self.refresh_on_acceptance_drop}; it must be above 0 and at "
                "most 1."
            )
        if self.refresh_interval == 1 and self.refresh_on_acceptance_drop < 1.0:
            raise ConfigError(
                "updates.refresh_on_acceptance_drop has no effect at refresh_interval 1, where every update refreshes: "
                "raise the interval, or leave it out."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfQuantConfig:
    """All settings of SELF_QUANT.

    gamma_max: drafted tokens per request and cycle, at most; from ``--speculative-num-steps``.
    max_draft_batch: running requests above which a step never drafts (bounds graphs and draft buffers). Where there are
        CUDA graphs, nor does it above the largest that SGLang captures (--cuda-graph-max-bs-decode).
    policy: how many tokens a step drafts. Left open, ``ladder`` is ``ladder_up_to(gamma_max)``, and
        ``fixed_gamma`` is gamma_max.
    drafter, updates: what it is made of, and when it follows the policy.
    profile: measured times to decide by; None: those in the cache, measured at start-up if there are none.
    calibration_s: how long that measuring may take (on a CPU, 5 at most); on a GPU every cell is measured three to five
        times.
    trace: file to append a line of JSON to for every decode step; ending with a slash, a folder in which every server
        that shares this config writes a file of its own.
    trace_max_mb: size at which a trace ends, in 10^6 bytes; a busy server writes 2000 a day.
    """

    gamma_max: int = 7
    max_draft_batch: int = 128
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    updates: UpdatesConfig = field(default_factory=UpdatesConfig)
    profile: str | None = None
    calibration_s: float = 25.0
    trace: str | None = None
    trace_max_mb: float = 256.0

    def __post_init__(self) -> None:
        if not 1 <= self.gamma_max <= 15:
            raise ConfigError(f"--speculative-num-steps is {self.gamma_max}; choose 1 to 15.")
        if max(self.policy.gammas, default=0) > self.gamma_max:
            raise ConfigError(
                f"policy mode {self.policy.mode} drafts {list(self.policy.gammas)} tokens, more than "
                f"--speculative-num-steps ({self.gamma_max}): raise it, or leave out the longer ones."
            )
        if self.calibration_s < 0.0:
            raise ConfigError(f"calibration_s is {self.calibration_s}; it must not be negative.")
        if self.trace_max_mb <= 0.0:
            raise ConfigError(f"trace_max_mb is {self.trace_max_mb}; it must be above 0 (leave out trace for none).")
        if self.max_draft_batch < 1:
            raise ConfigError(f"max_draft_batch is {self.max_draft_batch}; it must be at least 1.")


def load_config(path: str | None, gamma_max: int | None, env: Mapping[str, str] = os.environ) -> SelfQuantConfig:
    """Settings from ``env``, else from the JSON file at ``path``, else the defaults.

    Raises ConfigError for an unreadable file, an unknown key or a value out of range.
    """
    inline = env.get(CONFIG_ENV)
    if inline is not None and inline.lstrip().startswith("{"):
        values, source = _parse(inline, CONFIG_ENV), CONFIG_ENV
    elif (file := inline or path) is not None:
        values, source = _parse(_read(file), file), file
    else:
        values, source = {}, "defaults"
    if gamma_max is not None:
        if values.setdefault("gamma_max", gamma_max) != gamma_max:
            raise ConfigError(
                f"{source} sets gamma_max to {values['gamma_max']} but --speculative-num-steps is {gamma_max}: "
                "give one of them."
            )
    values = checked(SelfQuantConfig, {"policy": {}, "drafter": {}, "updates": {}, **values}, source)
    limit = max(1, values.get("gamma_max", SelfQuantConfig().gamma_max))
    values["policy"] = PolicyConfig(**{"ladder": ladder_up_to(limit), "fixed_gamma": limit, **values["policy"]})
    values["drafter"] = DrafterConfig(**values["drafter"])
    values["updates"] = UpdatesConfig(**values["updates"])
    return SelfQuantConfig(**values)


def cache_folder(env: Mapping[str, str] = os.environ) -> Path:
    """Where measured profiles, and the examples' policies, are kept between starts."""
    return Path(env.get(CACHE_ENV) or Path.home() / ".cache" / "er_sglang")


def simulated_acceptance(windows: Sequence[int], env: Mapping[str, str] = os.environ) -> dict[int, float] | None:
    """Acceptance rate forced on every drafted token, by attention window; None for the real rule. A server of real
    weights refuses it."""
    text = env.get(SIMULATE_ACCEPTANCE_ENV)
    if text is None:
        return None
    try:
        stated = json.loads(text)
    except json.JSONDecodeError:
        stated = text
    return acceptance_by_window(stated, windows, SIMULATE_ACCEPTANCE_ENV)


def acceptance_by_window(stated: object, windows: Sequence[int], source: str) -> dict[int, float]:
    """From a number for all windows, or an object with one for each: {"0": 0.93, "256": 0.9}."""
    rates = stated if isinstance(stated, dict) else {str(window): stated for window in windows}
    if set(rates) != {str(window) for window in windows} or not all(
        type(rate) in (int, float) and 0.0 <= rate <= 1.0 for rate in rates.values()
    ):
        raise ConfigError(
            f"{source} is {stated!r}; it must be a number from 0 to 1, or an object with one for each attention window, "
            f"{', '.join(map(str, windows))}."
        )
    return {window: float(rates[str(window)]) for window in windows}


def _read(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the SELF_QUANT config {file}: {error.strerror}.") from error


def _parse(text: str, source: str) -> dict:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold a JSON object, not a {type(values).__name__}.")
    return values


def checked(cls: type, values: dict, source: str) -> dict:
    """``values`` with lists as tuples; raises ConfigError for a key or a type that ``cls`` does not know."""
    defaults, types = cls(), typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(set(values) - set(names)):
        raise ConfigError(f"{source}: unknown setting {', '.join(unknown)}; known: {', '.join(sorted(names))}.")
    settings = {}
    for name, value in values.items():
        default = getattr(defaults, name)
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {name} must be a JSON object.")
            value = checked(type(default), value, f"{source}: {name}")
        elif isinstance(default, tuple):
            if not isinstance(value, list) or not all(type(v) is int for v in value):
                raise ConfigError(f"{source}: {name} must be a list of integers.")
            value = tuple(value)
        else:
            expected = set(typing.get_args(types[name]) or [types[name]]) - {type(None)}  # None is what is left out
            if type(value) not in expected and (expected, type(value)) != ({float}, int):
                kinds = " or ".join(sorted(each.__name__ for each in expected))
                raise ConfigError(f"{source}: {name} must be of type {kinds}, not {value!r}.")
            if type(value) is float and not math.isfinite(value):
                raise ConfigError(f"{source}: {name} must be a finite number, not {value!r}.")
        settings[name] = value
    return settings
