"""A small but real RL loop: GRPO with a torch trainer and a live SELF_QUANT server, on a CPU or on one GPU.

loop.py        sample, judge, train, send the new policy; start reading here
rollouts.py    the server: its arms, how to sample with log-probabilities, to sleep, and to get a new policy
training.py    GRPO's loss, and the trainer
place.py       CPU or GPU
countdown.py, arithmetic.py    tasks: prompts and rewards
__main__.py    `launch/grpo/run`: arms and seeds
report.py      runs in files; tables, comparison and plot of them
"""
