"""What the variables of a block start as, worked out once for all that it depends on."""

from __future__ import annotations

from collections.abc import Collection
from types import CodeType
from typing import TYPE_CHECKING

from nnsight.capture.rewrite import LOAD

if TYPE_CHECKING:
    from nnsight.capture.compiler import Block


class Plan:
    """The cells of a block for one state of the frame that it is entered in.

    Attributes:
        reach: the names that this block and those before it bind.
        marked: the names whose loads ask other blocks first.
        given: the names whose cells start with the frame's value; `empty` those whose cells start empty.
        loads: whether the body reads names through a function; known when it is compiled.
    """

    __slots__ = ("_code", "empty", "given", "loads", "marked", "reach")

    def __init__(self, block: Block, shared: frozenset[str], have: Collection[str]) -> None:
        names, bound, live = block.names, block.bound, block.live
        self.reach = shared if bound <= shared else shared | bound
        others = ((shared & names) | bound.intersection(have)) - live
        self.marked: frozenset[str] = (block.exposed & others if others else others) - block.deleted
        own = names - live
        kept = own.intersection(have) - self.marked
        self.given = tuple(name for name in kept if name not in bound or name in block.deleted)
        begun = (own & (bound | self.marked | block.local)) | own.intersection(have)
        self.empty = tuple(begun.difference(self.given))
        self.loads = False
        self._code: CodeType | None = None

    def compile(self, block: Block) -> CodeType:
        """Return the body of its block as the code of a closure over these cells."""
        code = self._code
        if code is None:
            # What the block around this one reads from others is no variable of its code, but given here all the same.
            cells = block.variables.union(self.given) if block.is_function else block.live.union(self.given, self.empty)
            code = self._code = block.compile(cells, self.marked)
            self.loads = LOAD in code.co_freevars
        return code


def plan_of(block: Block, shared: frozenset[str], have: Collection[str]) -> Plan:
    """Return the plan for a block that is entered.

    Args:
        block: which.
        shared: the names that blocks before it bind.
        have: the names of the block that the frame has values for.
    """
    key = (shared, tuple(have))
    plan = block.plans.get(key)
    if plan is None:
        plan = block.plans[key] = Plan(block, shared, have)
    return plan
