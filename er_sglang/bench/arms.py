"""The arms of a benchmark: what each server is started with.

plain         SGLang without speculation
standalone:G  SGLang's own STANDALONE: a 4-bit draft of the same shape, with its own weights and KV cache, G tokens a cycle
self_quant:G  SELF_QUANT, G tokens a cycle
self_quant:0  SELF_QUANT that is never allowed to draft: must cost nothing against `plain`
auto:G        SELF_QUANT, up to G tokens a cycle as its measured policy decides
paper:G       SELF_QUANT by EfficientRollout's rule, up to G tokens a cycle (11 for its own ladder)
"""

import json
from dataclasses import dataclass
from pathlib import Path

from er_sglang.policy.acceptance import emitted
from er_sglang.config import CONFIG_ENV, SIMULATE_ACCEPTANCE_ENV

POLICY_MODES = {"self_quant": "always", "auto": "auto", "paper": "paper"}
DRAFTERS = ("standalone", *POLICY_MODES)


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
        if algorithm not in DRAFTERS or not gamma.isdecimal() or (algorithm != "self_quant" and gamma == "0"):
            raise ValueError(f"unknown arm {text!r}; choose plain, standalone:G, auto:G, paper:G (G > 0) or self_quant:G, such as self_quant:3")
        return cls(algorithm=algorithm, gamma=int(gamma))

    def __str__(self) -> str:
        return self.algorithm if self.gamma is None else f"{self.algorithm}:{self.gamma}"

    @property
    def self_quant(self) -> bool:
        """Whether SELF_QUANT is served."""
        return self.algorithm in POLICY_MODES

    @property
    def policy_mode(self) -> str:
        return POLICY_MODES[self.algorithm] if self.drafts else "off"

    @property
    def drafts(self) -> bool:
        return bool(self.gamma)

    def args(self, draft_path: Path | None, idle_gamma: int) -> dict[str, object]:
        """Server flags. `draft_path` is the STANDALONE draft model; `idle_gamma` the largest gamma that self_quant:0 forgoes."""
        if self.algorithm == "plain":
            return {}
        if self.self_quant:
            return {"speculative-algorithm": "SELF_QUANT", "speculative-num-steps": self.gamma or idle_gamma}
        return {
            "speculative-algorithm": "STANDALONE",
            "speculative-draft-model-path": draft_path,
            "speculative-num-steps": self.gamma,
            "speculative-eagle-topk": 1,
            "speculative-num-draft-tokens": self.gamma + 1,
        }

    def env(self, alpha: float | None, self_quant_config: dict) -> dict[str, str]:
        """Environment. `alpha` is the acceptance to simulate, None for the real one.

        SELF_QUANT accepts each drafted token with probability alpha; STANDALONE has SGLang's own switch,
        which takes the accept length: the same in expectation.
        """
        env = {}
        if self.self_quant:
            env[CONFIG_ENV] = json.dumps({**self_quant_config, "policy": {"mode": self.policy_mode}})
        if alpha is not None and self.drafts:
            if self.self_quant:
                env[SIMULATE_ACCEPTANCE_ENV] = str(alpha)
            else:
                env["SGLANG_SIMULATE_ACC_LEN"] = str(self.expected_accept_length(alpha))
                env["SGLANG_SIMULATE_ACC_METHOD"] = "match-expected"
        return env

    def expected_accept_length(self, alpha: float) -> float | None:
        """Tokens per request and cycle at acceptance `alpha`: (1 - alpha^(gamma+1)) / (1 - alpha); None if gamma varies."""
        if self.self_quant and self.policy_mode not in ("always", "off"):
            return None
        gamma = self.gamma or 0
        return emitted([alpha] * gamma)[gamma]
