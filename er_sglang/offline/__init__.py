"""Acceptance of a checkpoint's drafts without a server, in transformers: what `er-sglang acceptance` measures.

texts.py      prompts, and the policy's own responses to them
chain.py      the draft chain of a server over every position of a text at once
drafters.py   the drafters to compare, and what each would have proposed
estimate.py   acceptance per draft position, with intervals
measure.py    all of them together: a row per drafter
"""
