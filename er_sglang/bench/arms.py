"""The arms of a benchmark, and what their servers are started with.

The SELF_QUANT arms of one benchmark share a server, which is switched between them: see `servers` and `Arm.settings`.
"""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from er_sglang.bench.load import OPTIONS
from er_sglang.config import AUTO_WINDOWS, CONFIG_ENV, SIMULATE_ACCEPTANCE_ENV, checked
from er_sglang.policy.acceptance import emitted
from er_sglang.policy.config import PolicyConfig, ladder_up_to
from er_sglang.policy.profile import Profile
from er_sglang.tools.serving import ON_CPU, Server
from er_sglang.tools.simulate import window_factors

ARMS = """\
arms
  plain         SGLang without speculation
  standalone:G  SGLang's STANDALONE with a 4-bit draft of the same shape, G drafted tokens a cycle (CUDA only)
  self_quant:G  SELF_QUANT, G drafted tokens a cycle
  self_quant:0  SELF_QUANT that never drafts; should equal plain
  auto:G        SELF_QUANT, up to G drafted tokens a cycle as its measured policy decides
  paper:G       SELF_QUANT by EfficientRollout's rule; G = 11 for its own ladder
"""
POLICY_MODES = {"self_quant": "always", "auto": "auto", "paper": "paper"}
DRAFTERS = ("standalone", *POLICY_MODES)
SEED = 0  # of prompts, lengths and servers
CONTEXT_SLACK_TOKENS = 64  # beyond prompt and response; a drafting server reserves a few
SHORTEST = {"self_quant": 0, "paper": PolicyConfig().paper_ladder[0]}  # gamma; of the others, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One arm. `gamma` is None for plain decoding."""

    algorithm: str
    gamma: int | None

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """From "plain", "standalone:3", "self_quant:3" or "self_quant:0"; raises ValueError on anything else."""
        if text == "plain":
            return cls(algorithm="plain", gamma=None)
        algorithm, _, gamma = text.partition(":")
        if algorithm not in DRAFTERS or not gamma.isdecimal() or int(gamma) < SHORTEST.get(algorithm, 1):
            raise ValueError(
                f"unknown arm {text!r}; choose plain, standalone:G, auto:G (G > 0), paper:G (G >= {SHORTEST['paper']}) "
                "or self_quant:G, such as self_quant:3"
            )
        return cls(algorithm=algorithm, gamma=int(gamma))

    def __str__(self) -> str:
        return self.algorithm if self.gamma is None else f"{self.algorithm}:{self.gamma}"

    @property
    def self_quant(self) -> bool:
        """Whether SELF_QUANT is served."""
        return self.algorithm in POLICY_MODES

    @property
    def drafts(self) -> bool:
        return bool(self.gamma)

    @property
    def policy(self) -> dict:
        """SELF_QUANT's policy settings; mode off for an arm that does not draft."""
        if not self.drafts:
            return {"mode": "off"}
        mode = POLICY_MODES[self.algorithm]
        if mode == "always":
            return {"mode": mode, "fixed_gamma": self.gamma}
        if mode == "auto":
            return {"mode": mode, "ladder": list(ladder_up_to(self.gamma))}
        return {"mode": mode, "paper_ladder": [gamma for gamma in PolicyConfig().paper_ladder if gamma <= self.gamma]}

    @property
    def policy_config(self) -> PolicyConfig:
        return PolicyConfig(**checked(PolicyConfig, self.policy, str(self)))

    def settings(self, alpha: float | None, windows: Mapping[int, float] | None = None) -> dict:
        """What to ask a SELF_QUANT server for before this arm; `alpha`: the acceptance to simulate, None for the real
        one; `windows`: factors of it, see `by_window`."""
        stated = {"simulate_acceptance": by_window(alpha, windows)} if alpha is not None and self.drafts else {}
        return {**self.policy, **stated}

    def expected_accept_length(self, alpha: float) -> float | None:
        """Tokens per request and cycle at acceptance `alpha`: (1 - alpha^(gamma+1)) / (1 - alpha); None if gamma
        varies."""
        if self.drafts and self.self_quant and self.policy["mode"] != "always":
            return None
        gamma = self.gamma or 0
        return emitted([alpha] * gamma)[gamma]


def by_window(alpha: float, windows: Mapping[int, float] | None) -> float | dict[str, float]:
    """What a SELF_QUANT server is to simulate: `alpha` for every attention window or, where factors are given, times
    the factor of each window that auto chooses from."""
    if not windows:
        return alpha
    return {str(window): alpha * windows.get(window, 1.0) for window in AUTO_WINDOWS}


def add_self_quant_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--self-quant-config",
        type=json.loads,
        default={},
        metavar="JSON",
        help='SELF_QUANT settings besides "policy", e.g. \'{"drafter": {"weights": "fp8"}}\'',
    )


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """What the servers of all arms are started with and asked for."""
    add = parser.add_argument
    add(
        "--windows",
        type=window_factors,
        default={},
        metavar="TOKENS:FACTOR,...",
        help="of drafts with an attention window, the stated acceptance over that with full attention, as for "
        "`er-sglang simulate`: 256:0.91,512:0.99; default 1 for all",
    )
    add(
        "--options",
        nargs="+",
        choices=OPTIONS,
        default=["default"],
        metavar="NAME",
        help=f"what the requests ask for, each in turn: {', '.join(OPTIONS)}",
    )
    add_self_quant_config(parser)
    add(
        "--server-args",
        type=shlex.split,
        default=[],
        metavar="'--FLAG VALUE ...'",
        help="more flags for every server; write --server-args='--tp 2'",
    )


def arm_argument(text: str) -> Arm:
    """`Arm.parse` for argparse, which shows no other error's words."""
    try:
        return Arm.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def servers(arms: Sequence[Arm]) -> list[tuple[Arm, ...]]:
    """The arms of each server: all SELF_QUANT arms on one, every other arm on its own."""
    shared = tuple(arm for arm in arms if arm.self_quant)
    alone = [(arm,) for arm in arms if not arm.self_quant]
    return [*alone, shared] if shared else alone


def server_name(arms: Sequence[Arm]) -> str:
    """For files of the server of `arms`."""
    return "self_quant" if len(arms) > 1 else str(arms[0]).replace(":", "-")


def start_policy(arms: Sequence[Arm]) -> dict:
    """The policy to start a SELF_QUANT server with that is to serve all of `arms`: it prepares all their gammas, and
    measures step times if one of them decides by these. A single arm's server starts as that arm."""
    if len(arms) == 1:
        return arms[0].policy
    policies = [arm.policy_config for arm in arms]
    gammas = sorted({gamma for policy in policies for gamma in policy.gammas})
    if any(policy.needs_profile for policy in policies):
        return {"mode": "auto", "ladder": gammas}
    return {"mode": "cycle", "cycle": gammas or [0]}


def keep_profile(server: Server, arms: Sequence[Arm], folder: Path) -> None:
    """Copy the step times by which the server of `arms` decides, if it has any, to profile.json in `folder`."""
    if arms[0].self_quant and (path := server.self_quant()["profile"]):
        Profile.load(path).save(folder / "profile.json")


def shared_args(requests: int, tokens: int) -> dict[str, object]:
    """Flags of every arm's server, of dummy weights, for so many requests at once and tokens in each, prompt and
    response."""
    return {
        "skip-tokenizer-init": True,
        "load-format": "dummy",
        "random-seed": SEED,
        "max-running-requests": requests,
        "context-length": tokens + CONTEXT_SLACK_TOKENS,  # nothing longer need be calibrated
        **({} if ON_CPU else {"dtype": "bfloat16", "cuda-graph-backend-prefill": "disabled"}),
    }


def server_args(arms: Sequence[Arm], draft_path: Path | None, idle_gamma: int) -> dict[str, object]:
    """Flags of the server of `arms`. `draft_path` is the STANDALONE draft model; `idle_gamma` the largest gamma that a
    lone self_quant:0 forgoes."""
    arm = arms[0]
    if arm.algorithm == "plain":
        return {}
    gamma = max(arm.gamma for arm in arms)
    if arm.self_quant:
        return {"speculative-algorithm": "SELF_QUANT", "speculative-num-steps": gamma or idle_gamma}
    return {
        "speculative-algorithm": "STANDALONE",
        "speculative-draft-model-path": draft_path,
        "speculative-num-steps": gamma,
        "speculative-eagle-topk": 1,
        "speculative-num-draft-tokens": gamma + 1,
    }


def server_env(arms: Sequence[Arm], alpha: float | None, self_quant_config: dict) -> dict[str, str]:
    """Environment of the server of `arms`. `alpha` is the acceptance to simulate, None for the real one.

    SELF_QUANT accepts each drafted token with probability alpha; STANDALONE has SGLang's own switch,
    which takes the accept length: the same in expectation.
    """
    arm, env = arms[0], {}
    if arm.self_quant:
        env[CONFIG_ENV] = json.dumps({**self_quant_config, "policy": start_policy(arms)})
    if alpha is not None and any(arm.drafts for arm in arms):
        if arm.self_quant:
            env[SIMULATE_ACCEPTANCE_ENV] = str(alpha)
        else:
            env["SGLANG_SIMULATE_ACC_LEN"] = str(arm.expected_accept_length(alpha))
            env["SGLANG_SIMULATE_ACC_METHOD"] = "match-expected"
    return env
