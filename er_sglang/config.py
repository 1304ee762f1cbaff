"""What a user can set, validated once. The only reader of our JSON file and of our environment variables.

Precedence: ``ER_SGLANG_CONFIG`` (a path, or the JSON object itself) replaces the file named by
``--speculative-adaptive-config``, an existing ``ServerArgs`` string that every trainer already forwards.
``--speculative-num-steps`` is the largest gamma. Knows neither torch nor SGLang.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

CONFIG_ENV = "ER_SGLANG_CONFIG"
SIMULATE_ACCEPTANCE_ENV = "ER_SGLANG_SIMULATE_ACCEPTANCE"
WEIGHT_FORMATS = ("int4", "int4_asym", "fp8")
MODES = ("always", "off", "cycle")


class ConfigError(ValueError):
    """A setting that cannot be honoured; the message says what to change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrafterConfig:
    """How the drafter's weights are made from the policy's.

    weights: storage format of the Linear layers ("int4", "int4_asym" or "fp8").
    group_size: input channels that share one scale (int4 formats).
    """

    weights: str = "int4"
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_FORMATS:
            raise ConfigError(f"drafter.weights is {self.weights!r}; choose one of {', '.join(WEIGHT_FORMATS)}.")
        if self.group_size not in (32, 64, 128):
            raise ConfigError(f"drafter.group_size is {self.group_size}; choose 32, 64 or 128.")


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfQuantConfig:
    """All settings of SELF_QUANT.

    mode: "always" drafts gamma_max tokens in every step, "off" never drafts, "cycle" takes the gammas of
        ``cycle`` in turn, one a step (for tests and experiments).
    gamma_max: drafted tokens per request and cycle, at most; from ``--speculative-num-steps``.
    cycle: gammas taken in turn by mode "cycle".
    max_draft_batch: running requests above which a step never drafts (bounds graphs and draft buffers).
    """

    mode: str = "always"
    gamma_max: int = 3
    cycle: tuple[int, ...] = ()
    max_draft_batch: int = 128
    drafter: DrafterConfig = field(default_factory=DrafterConfig)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode is {self.mode!r}; choose one of {', '.join(MODES)}.")
        if not 1 <= self.gamma_max <= 15:
            raise ConfigError(f"--speculative-num-steps is {self.gamma_max}; choose 1 to 15.")
        if (self.mode == "cycle") != bool(self.cycle):
            raise ConfigError('"cycle" lists the gammas of mode "cycle": give both or neither.')
        if any(not 0 <= gamma <= self.gamma_max for gamma in self.cycle):
            raise ConfigError(
                f"cycle {list(self.cycle)} must stay within 0 and --speculative-num-steps ({self.gamma_max})."
            )
        if self.max_draft_batch < 1:
            raise ConfigError(f"max_draft_batch is {self.max_draft_batch}; it must be at least 1.")

    @property
    def gammas(self) -> tuple[int, ...]:
        """Every gamma > 0 that a step can take, ascending: what graphs are captured for."""
        reachable = {"always": (self.gamma_max,), "off": (), "cycle": self.cycle}[self.mode]
        return tuple(sorted(set(reachable) - {0}))


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
    return _build(SelfQuantConfig, values, source)


def simulated_acceptance(env: Mapping[str, str] = os.environ) -> float | None:
    """Acceptance rate forced on every drafted token, for benchmarks on random weights only; None for the real rule."""
    text = env.get(SIMULATE_ACCEPTANCE_ENV)
    if text is None:
        return None
    try:
        alpha = float(text)
    except ValueError:
        alpha = -1.0
    if not 0.0 <= alpha <= 1.0:
        raise ConfigError(f"{SIMULATE_ACCEPTANCE_ENV} is {text!r}; it must be a number from 0 to 1.")
    return alpha


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


def _build(cls: type, values: dict, source: str):
    known = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f"{source}: unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
    kwargs = {}
    for name, value in values.items():
        default = known[name].default_factory() if known[name].default_factory is not dataclasses.MISSING else known[name].default
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {name} must be a JSON object.")
            value = _build(type(default), value, f"{source}: {name}")
        elif isinstance(default, tuple):
            if not isinstance(value, list) or not all(type(v) is int for v in value):
                raise ConfigError(f"{source}: {name} must be a list of integers.")
            value = tuple(value)
        elif type(value) is not type(default) and not (type(default) is float and type(value) is int):
            raise ConfigError(f"{source}: {name} must be of type {type(default).__name__}, not {value!r}.")
        kwargs[name] = value
    return cls(**kwargs)
