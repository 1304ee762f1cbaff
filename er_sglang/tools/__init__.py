"""The commands of ``er-sglang``, and what they share with the benchmarks.

calibrate.py    er-sglang calibrate
acceptance.py   er-sglang acceptance
simulate.py     er-sglang simulate
plots.py        er-sglang plot
compiling.py    er-sglang compile
patching.py     er-sglang patch
simulator.py    a rollout by the step times of a profile, and (workload.py) its requests
serving.py      a real server as a child process
results.py      environment, table and raw data of a result
"""
