"""Run a training script of AReaL with rollouts by SELF_QUANT: python3 train.py SCRIPT.py [its arguments]

launch/areal/gsm8k.yaml shows the whole command. In a script of your own, call use_self_quant() at its top instead.
"""

import runpy
import sys

from er_sglang.integrations.areal import use_self_quant

if __name__ == "__main__":
    use_self_quant()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
