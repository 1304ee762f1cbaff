"""Self-quantized speculative decoding for RL rollouts in SGLang.

The policy drafts for itself: a weight-quantized copy, built in memory from the live weights, shares the
policy's KV cache, proposes a chain of gamma tokens, and the policy verifies them by exact rejection sampling.

One request, from batch to accepted tokens:

    worker.py             one scheduler step: prefill, plain decode (gamma = 0) or a cycle (gamma > 0)
    steering/steering.py  asks policy/ how far to draft, and watches what comes of it
    cycle/chain.py        the cycle's draft: gamma plain decodes of the drafter, one CUDA graph
    cycle/verifier.py     the policy's forward over [last, d1..dgamma], a CUDA graph per batch size and gamma
    sampling/             draw the drafts, accept or reject them, exactly
"""

__version__ = "0.1.0"
