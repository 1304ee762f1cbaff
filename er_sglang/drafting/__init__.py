"""The drafter, and when it follows the policy.

drafter.py     the quantized shadow of the live policy
updates.py     one refresh per policy update
"""
