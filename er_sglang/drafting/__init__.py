"""The drafter, and when it follows the policy.

drafter.py     the quantized shadow of the live policy
shadow.py      a module tree with some modules replaced
twins.py       what replaces norms, activations and rotation on Hopper
early.py       the kernels of these twins
updates.py     one refresh per policy update
"""
