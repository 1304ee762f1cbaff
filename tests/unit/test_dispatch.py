"""What a module of SGLang computes is known before it is called first: drafters are built then."""

import pytest

pytest.importorskip("sglang", reason="needs SGLang's modules")

from sglang.srt.layers.layernorm import RMSNorm

from er_sglang.host.releases import adapter


def test_forward_of_a_module_that_was_never_called():
    norm = RMSNorm(8)
    method = adapter("dispatch").forward_method(norm)
    assert method.__self__ is norm and method.__func__ in vars(RMSNorm).values()
