"""What a decoder layer holds besides its modules: a LayerCommunicator, and in it the layer's norms."""

import copy

from sglang.srt.layers.communicator import LayerCommunicator

SEAMS = """
layers.communicator:LayerCommunicator.__init__ self layer_scatter_modes input_layernorm post_attention_layernorm
"""


def followed(value, replaced):
    """``value``, held by a copied layer, for the layer's replaced modules; None where it needs no change."""
    if not isinstance(value, LayerCommunicator):
        return None
    communicator = copy.copy(value)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        setattr(communicator, norm, replaced[getattr(value, norm)])
    return communicator
