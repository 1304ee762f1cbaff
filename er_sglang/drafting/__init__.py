"""The drafter, and when it follows the policy.

drafter.py         the quantized shadow of the live policy
linear.py          what its Linear layers do
policy_weight.py   what the copy is made from: a layer's weight after loading, in bf16 or fp8
shadow.py          a module tree with some modules replaced
rescoring.py       the leading tokens of a quantized lm_head, scored again; rescoring_fused.py, its kernels
twins.py           what replaces norms, activations and rotation on Hopper
fused.py           most of a decoder layer in one launch, for a few rows
early.py           the kernels of these twins
attention.py       attention of drafts on Hopper
attention_scores.py   what a draft attends to; attention_scores_fused.py, its kernels
choice.py          the tokens with the highest scores; choice_fused.py, its kernels
updates.py         one refresh per policy update
"""
