"""Self-quantized speculative decoding for RL rollouts in SGLang.

The policy drafts for itself: a weight-quantized copy, built in memory from the live weights, shares the
policy's KV cache, proposes a chain of gamma tokens, and the policy verifies them by exact rejection sampling.

One request, from batch to accepted tokens:

    worker.py     one scheduler step: prefill, plain decode (gamma = 0) or a cycle (gamma > 0)
    steering.py   gives the step its gamma, and counts what came of it
    policy.py     decides by measured step times (profile.py, measure.py) and live acceptance (acceptance.py)
    chain.py      the cycle's draft: gamma plain decodes of the drafter, one CUDA graph
    verifier.py   the policy's forward over [bonus, d1..dgamma], one CUDA graph per gamma
    sampling/     draw the drafts, accept or reject them, exactly
"""

__version__ = "0.1.0"
