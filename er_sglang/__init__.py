"""Self-quantized speculative decoding for RL rollouts in SGLang.

The policy drafts for itself: a weight-quantized copy, built in memory from the live weights, shares the
policy's KV cache, proposes a chain of gamma tokens, and the policy verifies them by exact rejection sampling.

One request, from batch to accepted tokens:

    worker.py             one scheduler step: prefill, plain decode (gamma = 0) or a cycle (gamma > 0)
    steering/steering.py  asks policy/ how far to draft, and watches what comes of it
    cycle/chain.py        the cycle's draft: gamma plain decodes of the drafter, one CUDA graph
    cycle/verifier.py     the policy's forward over [last, d1..dgamma], a CUDA graph per batch size and gamma
    sampling/             draw the drafts, accept or reject them, exactly

Words:

    policy     the model that is served and trained. (policy/ and the setting "policy" are about deciding: how far to draft)
    drafter    its quantized copy; what it proposes is a draft
    cycle      a step that drafts: draft, verify, judge. A plain step, gamma = 0, is SGLang's own decode
    gamma      drafted tokens of a request in a cycle; a rung is a gamma and an attention window
    emitted    what a request gets of a cycle: the accepted drafts and one token more
    rider      a request that takes a plain step inside a cycle of others; a blocker is why a whole batch does
    probe      a cycle that drafts to learn the acceptance, not to gain
    update     all that happens to the policy's weights until generation goes on; at a refresh the drafter follows
"""

__version__ = "0.1.0"
