"""Between a decision and a verdict: one draft and one verify forward.

step.py        what a step reads of a batch
chain.py       the draft: gamma plain decodes of the drafter, one CUDA graph
attended.py    what the latest draft attended to
window.py      what of a long context a draft reads
shaping.py     penalties, bias, masks and processors on the policy's logits
verifier.py    the policy's forward over [last, d1..dgamma], one CUDA graph
logprobs.py    log-probabilities of the emitted tokens
"""
