"""What a decoder layer holds besides its modules: a boundary before each stage, with a plan that holds the stage's norm."""

import copy

from sglang.srt.layers.layer_boundary.stage import StageBoundary

SEAMS = """
layers.layer_boundary.stage:StageBoundary.__init__ self plan declaration
layers.layer_boundary.stage:StageBoundary.norm self
layers.layer_boundary.stage:StageBoundary._prepare self hidden_states stream forward_batch steps
layers.layer_boundary.construction:StagePlan.__init__ self kind norm variants
"""


def followed(value, replaced):
    """``value``, held by a copied layer, for the layer's replaced modules; None where it needs no change.

    What else a plan was given refers to itself: where an all-reduce computes the norm, too, it still is the policy's.
    """
    if not isinstance(value, StageBoundary):
        return None
    boundary = copy.copy(value)
    boundary.plan = copy.copy(value.plan)
    boundary.plan.norm = replaced.get(value.plan.norm, value.plan.norm)
    return boundary
