"""Between a decision and a verdict: one draft and one verify forward.

step.py        what a step reads of a batch
slots.py       where its tokens go; slots_fused.py, the kernel
chain.py       the draft: gamma plain decodes of the drafter, one CUDA graph
inputs.py      where that graph finds a step; inputs_fused.py, the kernel
attended.py    what the latest draft attended to
window.py      what of a long context a draft reads; window_fused.py, the kernel
shaping.py     penalties, bias, masks and processors on the policy's logits
verifier.py    the policy's forward over [last, d1..dgamma], one CUDA graph
logprobs.py    log-probabilities of the emitted tokens
"""
