"""All that knows SGLang's internals: where we attach, what we check, what we refuse.

seams.py         the functions of SGLang that we rely upon, and the check that this SGLang has them
releases/        what differs between SGLang's releases, a drift a module
algorithm.py     SELF_QUANT in SGLang's registry
refusals.py      settings and models that SELF_QUANT cannot serve
machine.py       GPUs, compilers, disks and memory that are too little
hooks.py         what we change in SGLang's functions; more of it, by what it is about, in the next four
emission.py      what SGLang does with the token of a step, done for each of several
reservation.py   KV slots: of requests that near their length limit, and the kernel that notes them
penalties.py     whose emitted tokens are counted, instead of by SGLang
processes.py     what of ours the processes need that SGLang starts without plugins
cpu.py           stand-ins for SGLang's kernels on a CPU
served.py        the worker as the hooks see it
relay.py         what a step hands to the next one
riders.py        requests that take a plain step inside a cycle
"""
