"""`python -m er_sglang.bench.readme` with other workloads: three draws of short rollouts without options, 32 long ones, and 16
requests alone at 8000 tokens (of the 14B 4 and 8, too)."""

import sys

from er_sglang.bench import decode, readme, rollout

readme.WORKLOADS["rollout"] = (
    rollout,
    "--requests 128 --lengths lognormal:200:0.8:1000 --prompt-tokens 128 --rollouts 3",
)
readme.WORKLOADS["32-long"] = (rollout, "--requests 32 --lengths lognormal:2500:0.6:8192 --prompt-tokens 128")
if "14b" not in sys.argv:
    readme.WORKLOADS["long-context"] = (decode, "--concurrency 16 --context 8000 --least-tokens 2048")
raise SystemExit(readme.main())
