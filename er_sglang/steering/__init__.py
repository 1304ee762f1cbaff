"""What a step is told to draft, and who watches what comes of it.

steering.py    gives every decode step its gamma and takes back its result
control.py     what may be set while serving
metrics.py     counters for /server_info and Prometheus
trace.py       a line of JSON per decode step
agreement.py   the check that tensor-parallel ranks decide alike
"""
