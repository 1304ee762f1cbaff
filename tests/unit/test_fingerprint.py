"""A profile is not taken for one of other code."""

from pathlib import Path

import pytest

pytest.importorskip("sglang", reason="asks SGLang for the tensor-parallel group")
import er_sglang
from er_sglang.calibration.fingerprint import timed_sources


def test_the_code_of_a_step_is_in_the_fingerprint():
    package = Path(er_sglang.__file__).parent
    kernels = {*package.rglob("*.cuh"), *package.rglob("*.cu")}
    launchers = {package / "drafting" / name for name in ("attention.py", "early.py", "twins.py")}
    assert len(kernels) > 5 and kernels | launchers | {package / "worker.py"} <= set(timed_sources())
