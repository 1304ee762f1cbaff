"""`er-sglang simulate`: predict rollout time per policy mode from a profile, before any deployment."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

from tqdm import tqdm

from er_sglang.config import AUTO_WINDOWS, SINK_TOKENS, WINDOW_RULES
from er_sglang.errors import ConfigError
from er_sglang.policy.config import PolicyConfig
from er_sglang.policy.decide import Controller
from er_sglang.policy.profile import Profile
from er_sglang.tools import simulator
from er_sglang.tools.workload import draw_lengths, make_requests

_EXAMPLES = """examples:
  A synchronous GRPO batch, 128 responses with a long tail:
    er-sglang simulate --profile profile.json --requests 128 --lengths lognormal:1500:0.9:8192 --alpha 0.92
  A refilled pool (asynchronous RL), 1000 responses at 64 a time, the longest of which accept least:
    er-sglang simulate --profile profile.json --requests 1000 --max-running 64 --alpha 0.92 --tail-alpha 0.6
  Requests that arrive over ten minutes:
    er-sglang simulate --profile profile.json --requests 1000 --max-running 64 --arrival-s 600
  Multi-turn agents: four turns, two seconds in the environment after each:
    er-sglang simulate --profile profile.json --turns 4 --turn-wait-s 2 --turn-prompt-tokens 300
  What your policy will gain, from its measured acceptance:
    er-sglang simulate --profile profile.json --acceptance acceptance-results/acceptance.json
  A table measured elsewhere: --profile table.csv with the columns phase,gamma,batch,context_tokens,seconds, where phase
  is target (gamma 0), draft (seconds of one drafted token) or verify.
"""


def add_command(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "simulate",
        help="predict rollout time per policy mode from a profile",
        description=simulator.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, defaults = parser.add_argument, PolicyConfig()
    add("--profile", required=True, type=Path, help="JSON of `er-sglang calibrate`, or a CSV of the same quantities")
    add(
        "--windows",
        type=window_factors,
        default={},
        metavar="TOKENS:FACTOR,...",
        help="attention windows that auto chooses from besides full attention, each with its acceptance over that of full "
        f'attention: 256:0.96,1024:0.99; a draft reads so many tokens and {SINK_TOKENS} at the ends ("drafter": '
        '{"attention_window": "auto"} in a server\'s config). Default: full attention alone',
    )
    add("--requests", type=count, default=128, help="requests of one rollout (default %(default)s)")
    add(
        "--lengths",
        default="lognormal:1500:0.9:8192",
        help="tokens to generate: fixed:N, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA:MAX, or a file with one length per "
        "line (default %(default)s)",
    )
    add("--prompt-tokens", type=int, default=512, help="prompt length (default %(default)s)")
    add(
        "--alpha",
        type=alpha_list,
        default="0.9",
        help="acceptance per drafted token; a list is per draft position: 0.92,0.9,0.88 (default %(default)s)",
    )
    add(
        "--acceptance",
        type=Path,
        metavar="FILE",
        help="acceptance.json of `er-sglang acceptance`: simulates each drafter of it that the profile has times of, with the "
        "windows measured, in place of --alpha and --windows",
    )
    add("--temperature", type=float, help="of --acceptance, if it holds several")
    add(
        "--tail-alpha",
        type=float,
        help="acceptance of the longest request; it falls towards it with length (default: no fall)",
    )
    add(
        "--arrival-s",
        type=float,
        default=0.0,
        help="requests arrive evenly over so many seconds (default: all at once)",
    )
    add("--max-running", type=count, default=1 << 30, help="requests decoded at once (default: all)")
    add("--turns", type=count, default=1, help="turns that each request's tokens are split into (default %(default)s)")
    add("--turn-wait-s", type=float, default=0.0, help="seconds in the environment between turns (default %(default)s)")
    add(
        "--turn-prompt-tokens",
        type=int,
        default=0,
        help="tokens that the environment adds per turn (default %(default)s)",
    )
    add("--prefill-tokens-per-s", type=float, default=inf, help="prefill speed (default: instant)")
    add(
        "--rollouts",
        type=count,
        default=4,
        help="rollouts in a row, a policy update before each but the first; times are sums (default %(default)s)",
    )
    add(
        "--modes",
        default="off,always,auto",
        help="comma-separated, of auto, always, off, threshold, paper (default %(default)s)",
    )
    add("--ladder", type=gamma_list, help="draft lengths of auto, such as 1,2,3 (default: all that the profile holds)")
    add(
        "--fixed-gamma",
        type=int,
        help=f"draft length of always and threshold (default {defaults.fixed_gamma}, or the profile's longest if that is less)",
    )
    add(
        "--threshold-batch",
        type=int,
        default=defaults.threshold_batch,
        help="batch of mode threshold (default %(default)s)",
    )
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="also write all figures to this file")
    parser.set_defaults(run=run)


def count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def alpha_list(text: str) -> tuple[float, ...]:
    return tuple(float(alpha) for alpha in text.split(","))


def gamma_list(text: str) -> tuple[int, ...]:
    return tuple(int(gamma) for gamma in text.split(","))


def window_factors(text: str) -> dict[int, float]:
    pairs = (pair.partition(":") for pair in text.split(","))
    return {int(window): float(factor) for window, _, factor in pairs}


@dataclass(frozen=True, slots=True)
class Measured:
    """A drafter of `er-sglang acceptance`: acceptance per draft position, and of windows by each rule over that of full
    attention."""

    config: dict
    alphas: tuple[float, ...]
    windows: dict[str, dict[int, float]]


def read_acceptance(path: Path, temperature: float | None) -> list[Measured]:
    """The drafters with full attention. Raises ConfigError where none was measured, or not at this temperature."""
    rows = [row for row in json.loads(path.read_text())["rows"] if row["context_tokens"] is None]
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    if temperature is None and len(temperatures) == 1:
        (temperature,) = temperatures
    if temperature not in temperatures:
        raise ConfigError(f"{path} holds the temperatures {temperatures}: give one of them with --temperature.")

    def key(row: dict) -> tuple:
        return row["weights"], row["head"], row["group_size"]

    rows = [row for row in rows if row["temperature"] == temperature]
    if all(row["attention_window"] for row in rows):
        raise ConfigError(f"{path} has no drafter with full attention: measure with --windows 0 before any other.")
    return [
        Measured(
            config=dict(zip(("weights", "head", "group_size"), key(full))),
            alphas=tuple(full["alphas"]),
            windows={
                rule: {
                    row["attention_window"]: row["alphas"][0] / full["alphas"][0]
                    for row in rows
                    if row["attention_window"] and key(row) == key(full) and row.get("window_by", "recency") == rule
                }
                for rule in WINDOW_RULES
            },
        )
        for full in rows
        if not full["attention_window"]
    ]


def run(args: argparse.Namespace) -> int:
    profile = Profile.read(args.profile)
    if args.acceptance is None:
        results = simulate_modes(profile, args.alpha, args.windows, args)
        print(format_table(results))
    else:
        results = compare_drafters(profile, read_acceptance(args.acceptance, args.temperature), args)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 0


def compare_drafters(profile: Profile, drafters: Sequence[Measured], args: argparse.Namespace) -> dict[str, dict]:
    """Plain decoding against mode auto with each drafter, with full attention and with a server's choice of windows."""
    weights, head, _, _, rule, *_ = [*profile.fingerprint.get("drafter", [None] * 4), "recency"]
    timed = [
        each for each in drafters if weights is None or (each.config["weights"], each.config["head"]) == (weights, head)
    ]
    if not timed:
        raise ConfigError(f"{args.acceptance} has no drafter of {args.profile}: weights {weights}, head {head}.")
    plain = simulate_modes(profile, timed[0].alphas, {}, args, modes="off")["off"]
    results, best = {"off": plain}, None
    for each in timed:
        auto_windows = {window: factor for window, factor in each.windows[rule].items() if window in AUTO_WINDOWS}
        for windows, setting in (({}, 0), (auto_windows, "auto")):
            if setting == 0 or windows:
                config = {**each.config, "window_by": rule, "attention_window": setting}
                name = "{weights} g{group_size}, {head} head, window {attention_window}".format(**config)
                results[name] = simulate_modes(profile, each.alphas, windows, args, modes="auto")["auto"]
                if results[name]["time_s"] < min(plain["time_s"], best[0] if best else inf):
                    best = results[name]["time_s"], config
    print(format_table(results))
    for each in drafters:
        if each not in timed:
            print(f"not simulated, the profile has no times of it: {each.config}")
    if best is None:
        print("Drafting does not pay for this load.")
    else:
        print(
            f"Best: {json.dumps({'drafter': best[1]})}, {plain['time_s'] / best[0]:.2f} x the speed of plain decoding."
        )
    return results


def simulate_modes(
    profile: Profile,
    alphas: Sequence[float],
    window_acceptance: Mapping[int, float],
    args: argparse.Namespace,
    modes: str | None = None,
) -> dict[str, dict]:
    """The rollouts of each policy mode, and their time."""
    for window in set(window_acceptance) - set(profile.windows):
        profile = profile.with_attention_window(window, SINK_TOKENS)
    windows = (*profile.windows[:1], *sorted(window_acceptance))
    fixed_gamma = args.fixed_gamma
    if fixed_gamma is None:
        fixed_gamma = min(PolicyConfig().fixed_gamma, max(profile.gammas))
    results = {}
    for mode in (modes or args.modes).split(","):
        config = PolicyConfig(
            mode=mode,
            ladder=args.ladder or profile.gammas,
            fixed_gamma=fixed_gamma,
            threshold_batch=args.threshold_batch,
        )
        controller = Controller(config, profile, windows)
        rollouts = []
        for index in tqdm(range(args.rollouts), desc=mode, leave=False):
            if index:
                controller.policy_updated()
            requests = make_requests(
                draw_lengths(args.lengths, args.requests, seed=args.seed + index),
                alphas,
                tail_alpha=args.tail_alpha,
                prompt_tokens=args.prompt_tokens,
                turns=args.turns,
                turn_prompt_tokens=args.turn_prompt_tokens,
                turn_wait_s=args.turn_wait_s,
                arrival_s=args.arrival_s,
            )
            rollouts.append(
                simulator.simulate(
                    profile,
                    requests,
                    controller,
                    max_running=args.max_running,
                    prefill_tokens_per_s=args.prefill_tokens_per_s,
                    window_acceptance=window_acceptance,
                    seed=args.seed + index,
                ).summary()
            )
        results[mode] = {"time_s": sum(rollout["time_s"] for rollout in rollouts), "rollouts": rollouts}
    return results


def format_table(results: dict[str, dict]) -> str:
    """A line per mode; speed is relative to the first mode."""
    width = max(10, *(len(mode) + 2 for mode in results))
    first_s = next(iter(results.values()))["time_s"]
    lines = [f"{'mode':<{width}}{'time':>11}{'speed':>8}{'drafting':>10}{'accept length':>15}{'switches':>10}"]
    for mode, result in results.items():
        last = result["rollouts"][-1]
        length = f"{last['accept_length']:.2f}" if last["accept_length"] else "-"
        lines.append(
            f"{mode:<{width}}{result['time_s']:>9.1f} s{first_s / result['time_s']:>7.2f}x{last['drafting_share']:>10.0%}"
            f"{length:>15}{last['switches']:>10}"
        )
    return "\n".join([*lines, "drafting (share of steps), accept length and switches are of the last rollout"])
