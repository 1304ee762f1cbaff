"""What may change while serving, and what may not.

    POST /set_internal_state {"server_args": {"self_quant": {"mode": "auto", "ladder": [1, 2, 3]}}}
    POST /set_internal_state {"server_args": {"self_quant={\"mode\": \"auto\", \"ladder\": [1, 2, 3]}": 1}}

The second is the same, for SGLang since 0.5.16, which lets only numbers through: the settings are part of a name.
Any settings of the policy; those not named stay as they are, except that `cycle` goes with its mode. On a server that
was started with a simulated acceptance, "simulate_acceptance" sets another one, for all attention windows or (an object)
for each; no request can start to simulate.
A change is checked in full before anything changes. It then decides from the next step on as a server started with it
would: acceptance estimate at its prior, no hysteresis, no probes owed. Counters run on.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from er_sglang.config import acceptance_by_window, checked
from er_sglang.errors import ConfigError
from er_sglang.policy.config import PolicyConfig

KEY = "self_quant"


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """policy: the settings in force. simulated_acceptance: by attention window, None for the real rule."""

    policy: PolicyConfig
    simulated_acceptance: dict[int, float] | None


def spelled_out(server_args: Mapping[str, object]) -> dict[str, object]:
    """`server_args` of a request in the first form; settings that are no JSON stay a string, to be refused."""
    return dict(_spelled_out(name, value) for name, value in server_args.items())


def _spelled_out(name: str, value: object) -> tuple[str, object]:
    key, _, text = name.partition("=")
    if key != KEY or not text:
        return name, value
    try:
        return KEY, json.loads(text)
    except ValueError:
        return KEY, text


def as_name(settings: Mapping[str, object]) -> str:
    """The name that stands for these settings in the second form."""
    return f"{KEY}={json.dumps(settings)}"


def replaced(
    now: Control, server_args: Mapping[str, object], *, prepared: Collection[int], measured: Collection[int]
) -> Control:
    """`now`, with the settings that the request names; ValueError (ConfigError is one) if it must be refused.

    prepared: gammas that the server captured graphs for. measured: those with step times.
    """
    if set(server_args) != {KEY}:
        raise ConfigError(f"{KEY} comes alone, without {', '.join(sorted(set(server_args) - {KEY}))}.")
    if not isinstance(server_args[KEY], Mapping) or not server_args[KEY]:
        raise ConfigError(f'{KEY} must be a JSON object of settings, such as {{"mode": "off"}}.')
    settings = dict(server_args[KEY])
    alpha = now.simulated_acceptance
    if "simulate_acceptance" in settings:
        alpha = _acceptance(settings.pop("simulate_acceptance"), alpha)
    settings = checked(PolicyConfig, settings, KEY)
    if settings.get("mode", now.policy.mode) != "cycle":
        settings = {"cycle": (), **settings}
    policy = replace(now.policy, **settings)
    if missing := set(policy.gammas) - set(prepared):
        raise ConfigError(
            f"mode {policy.mode} would draft {sorted(missing)} tokens, for which this server prepared no graphs; it "
            f"did for {sorted(prepared)}. Choose among these, or start a server whose policy has the others."
        )
    if policy.needs_profile and (missing := set(policy.gammas) - set(measured)):
        raise ConfigError(
            f"mode {policy.mode} decides by step times, and this server has none for gamma {sorted(missing)}: start "
            'it in mode "auto" or "paper", which measure them, or with a "profile".'
        )
    return Control(policy=policy, simulated_acceptance=alpha)


def _acceptance(wanted: object, now: dict[int, float] | None) -> dict[int, float]:
    if now is None:
        raise ConfigError(
            "this server samples from the policy; simulate_acceptance is for benchmark servers, those started with "
            "ER_SGLANG_SIMULATE_ACCEPTANCE."
        )
    return acceptance_by_window(wanted, list(now), "simulate_acceptance")
