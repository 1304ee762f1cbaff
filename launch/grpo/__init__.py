"""A small but real RL loop: GRPO with a torch trainer and a live SELF_QUANT server, on one CPU.

loop.py        sample, judge, train, send the new policy; start reading here
rollouts.py    the server: how to sample with log-probabilities, how to send a policy
training.py    GRPO's loss and one training step
task.py        the toy reasoning task, its prompts and its reward
__main__.py    `launch/grpo/run`: arms and seeds
report.py      table, comparison and plot of them
"""
