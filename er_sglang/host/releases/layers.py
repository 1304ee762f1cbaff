"""What a decoder layer holds besides its modules."""

NORMS_ARE_FOLLOWED = False  # whether a copied layer of any model calls its replaced norms


def followed(value, replaced):
    """``value``, held by a copied layer, for the layer's replaced modules; None where it needs no change.

    A layer's boundaries hold the policy's norms, which compute what a drafter's would.
    """
    return None
