"""A small but real RL loop: GRPO with a torch trainer and a live SELF_QUANT server, on one CPU.

    rollouts.py    the server's side: sample with log-probabilities, send the new policy; start reading here
    training.py    GRPO's loss and one training step
    task.py        the toy reasoning task, its prompts and its reward
    report.py      table, statistic and plot
    __main__.py    `launch/grpo/run`: the arms, the seeds and the loop
"""
