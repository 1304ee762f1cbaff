"""How many tokens to draft: live acceptance, measured step times, and the decision. Neither torch nor SGLang.

decide.py       the rung with the most tokens per second; every mode; start reading here
acceptance.py   conditional acceptance per draft position, live, with its uncertainty
profile.py      measured seconds per step, by batch, context and gamma (arithmetic in tables.py)
live.py         how far live step times are from the profile's
paper.py        EfficientRollout's own rule, a baseline
config.py       settings
"""
