"""What is found inside a function: its operations, each with its name, its place in the source and its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnsight import Interleaver

#: The kinds of operations, and what the name of each is put behind.
KINDS = {"call": "", "variable": "vars.", "operator": "ops.", "return": ""}

#: What is put behind the path of a function, for what it is wrapped in.
WRAPPER = ".wrapper"

#: What torch computes whole layers with, in one call.
_FUSED = ("torch._native_multi_head_attention", "torch._transformer_encoder_layer_fwd")


@dataclass(frozen=True, slots=True)
class Spot:
    """One operation in the source of a function.

    Attributes:
        kind: "call", "variable", "operator" or "return".
        name: its name among its kind: `self_c_proj_0`.
        output: the number of its output, counted from the function's first; `input` that of its input, -1 for none;
            `given` that of the input of what computes it: its own, or that of the call whose result it is.
        callee: the called thing as a dotted path, "" where it is none.
        span: first line, first column, last line, last column, as a syntax tree counts them.
        under: the statements whose course decides whether it is reached and how often, innermost last: line and what
            the statement is.
        after: the line of a return statement before it that may have been taken, 0 for none.
    """

    kind: str
    name: str
    input: int
    output: int
    given: int
    callee: str
    span: tuple[int, int, int, int]
    under: tuple[tuple[int, str], ...]
    after: int

    @property
    def label(self) -> str:
        return KINDS[self.kind] + self.name

    @property
    def line(self) -> int:
        return self.span[0]

    def numbers(self, first: int) -> tuple[int, int]:
        """Return the numbers of its input and output, where the function's first location has `first`."""
        return (first + self.input if self.input >= 0 else -1), first + self.output

    @property
    def is_always_reached(self) -> bool:
        """Whether one call of the function reaches it exactly once."""
        return not self.under and not self.after

    @property
    def is_repeated(self) -> bool:
        """Whether one call of the function may reach it more than once."""
        return any(what in ("loop", "function") for _, what in self.under)


class Rewritten:
    """A function compiled once more so that it passes each of its operations through a visit.

    Attributes:
        code: what it is compiled to.
        spots: its operations, by kind and name, in the order of the source.
        size: how many locations they are.
        lines: its source from the `def` on; `first` is the line of that in `file`.
        name: its qualified name.
        arguments: the names of its arguments, and `variables` all names that are its own.
    """

    def __init__(
        self,
        code: CodeType,
        spots: list[Spot],
        size: int,
        lines: tuple[str, ...],
        first: int,
        arguments: tuple[str, ...],
    ) -> None:
        self.code = code
        self.spots: dict[str, dict[str, Spot]] = {kind: {} for kind in KINDS}
        for spot in spots:
            self.spots[spot.kind][spot.name] = spot
        self.size = size
        self.lines = lines
        self.first = first
        self.file = code.co_filename
        self.name = code.co_qualname
        self.arguments = arguments
        self.variables = frozenset((*code.co_varnames, *code.co_cellvars))
        self.given = {spot.output: spot.given for spot in spots if spot.given >= 0 > spot.input}
        self.unrepeated = [spot for spot in spots if not spot.is_repeated]
        self._labels = {spot.label: spot for spot in spots}
        self._below: dict[str, list[tuple[str, str]]] = {}

    def below(self, prefix: str) -> list[tuple[str, str]]:
        """Return the path and port of each location, below a module's path; `prefix` is the function's, below that."""
        known = self._below.get(prefix)
        if known is not None:
            return known
        found = self._below[prefix] = [("", "")] * self.size
        for label, spot in self._labels.items():
            path = f"{prefix}.{label}"
            if spot.input >= 0:
                found[spot.input] = path, "input"
            found[spot.output] = path, "output"
        return found

    def text_of(self, line: int) -> str:
        """Return a line of the source without its indentation."""
        return self.lines[line - self.first].strip()

    def explain(self, run: Interleaver, number: int) -> str:
        """Say why a run did not reach an operation although the module that it lies in was called."""
        return self._explain(run, number, False)

    def explain_wrapped(self, run: Interleaver, number: int) -> str:
        """Say the same of a function that is wrapped in another one."""
        return self._explain(run, number, True)

    def _explain(self, run: Interleaver, number: int, is_wrapped: bool) -> str:
        assert run.tree is not None
        path, port = run.tree[number]
        label = path.rpartition(".source.")[2]
        while label.startswith(f"{WRAPPER[1:]}."):
            label = label.removeprefix(f"{WRAPPER[1:]}.")
        spot = self._labels[label]
        if spot.kind == "call" and port == "input" and spot.input < 0:
            return ""
        where = f"It is at {self.file}:{spot.line}, in `{self.name}`"
        first = number - (spot.input if port == "input" else spot.output)
        if any(one.callee in _FUSED and run.count(first + one.output) for one in self.spots["call"].values()):
            return (
                f"{where}. In eval mode without gradients torch runs this as one fused C++ operation, which never "
                "passes through Python. Call `torch.backends.mha.set_fastpath_enabled(False)` before the trace, and "
                "its operations are reached."
            )
        if is_wrapped and not any(run.counts[first : first + self.size]):
            wrapper = f"{path.removesuffix('.' + label)}{WRAPPER}"
            return (
                f"{where}, which was not called: what it is wrapped in called something else in its place. "
                f"`{wrapper}` has the operations of that, `print({wrapper})` shows them."
            )
        if spot.under:
            line, what = spot.under[-1]
            return f"{where}, {_WHY[what].format(text=self.text_of(line), line=line)}."
        if spot.after:
            return f"{where}, and the function returned before it (perhaps in line {spot.after})."
        return f"{where}, which was not run up to there: another function was called in its place, or it raised."


_WHY = {
    "if": "under `{text}` in line {line}, and this branch was not taken",
    "else": "in the branch taken when `{text}` in line {line} is false, and this branch was not taken",
    "loop": "in the loop `{text}` in line {line}, whose body was not run",
    "try": "in the `try` of line {line}, and was not run up to there",
    "except": "in the handler `{text}` in line {line}, and nothing was handled there",
    "case": "in `{text}` in line {line}, and this case was not the one",
    "expression": "in a part of the expression in line {line} (`{text}`) that was not evaluated",
    "function": "in a function that is defined in line {line} (`{text}`) and was not called",
}
