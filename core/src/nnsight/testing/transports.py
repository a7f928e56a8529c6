"""The conformance suite for transports: one list of programs, and what plain torch gives for each.

class TestMine(TransportConformance):
    transport = Transport("mine", {"backend": Mine()})
"""

from __future__ import annotations

from nnsight.testing._programs_beyond import Beyond
from nnsight.testing._programs_blocks import Blocks
from nnsight.testing._programs_runs import Gradients, Runs
from nnsight.testing._programs_saved import Saved
from nnsight.testing._programs_values import Values


class TransportConformance(Values, Blocks, Runs, Gradients, Saved, Beyond):
    """What a program gives must not depend on where its block runs."""
