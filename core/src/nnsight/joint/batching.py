"""The rows of a joint batch that belong to one block: what it reads of a value, and how what it writes goes back.

Reading gives views, so in-place edits flow on. Writing copies the joint value once per visit, however many blocks
write. Which rows of a tensor are a block's is said by the model class (`rows`); what it does not say is not guessed.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from nnsight.errors import BatchError
from nnsight.joint.containers import fields_of, rebuild_sequence, transform, with_fields, with_items
from nnsight.joint.joining import concatenate
from nnsight.joint.origins import Origins, Stamp, is_changed, stamp
from nnsight.joint.tables import storage_of
from nnsight.kernel.interleaver import Interleaver
from nnsight.kernel.mediator import Mediator
from nnsight.protocols import Deferred

_CONSTANT = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, slice, range)

NOT_ROWS = (
    "`{where}` holds a tensor of shape {shape} whose rows are not those of the batch ({total} rows), so what an invoke "
    "writes there would reach the others. Read it only, write it from an invoke without input (which has the whole "
    "batch), or let the model class declare its layout in `rows`."
)


class Joint:
    """What all invokes of a run share: the joint call and the tensors already copied for writing.

    Attributes:
        total: how many rows the batch has.
        args: the joint call's positional arguments; `kwargs` its keyword arguments.
        rows: the model class's word on which rows of a tensor are a block's.
        origins: what the copies made for writing stand for.
    """

    def __init__(self, total: int, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Rows, tables: set[int]) -> None:
        self.total = total
        self.args = args
        self.kwargs = kwargs
        self.rows = rows
        #: Visits of outputs that are made of nothing of the batch, until somebody who asked for one meets it.
        self.without_rows: set[tuple[int, int]] = set()
        self._tables = tables
        self._visit: tuple[int, int] | None = None
        self._copies: dict[int, torch.Tensor] = {}
        self.origins = Origins()
        self._watched: set[tuple[int, int]] = set()
        self._kept: list[torch.Tensor] = []

    def is_table(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is (a view of) a parameter or buffer, or sparse: then it has no rows of a batch."""
        storage = storage_of(tensor)
        return tensor.layout is not torch.strided if storage is None else storage in self._tables

    def watch(self, run: Interleaver, number: int, occurrence: int) -> None:
        """Find out whether a module whose output a block is about to ask for is given anything of the batch.

        Args:
            run: the run.
            number: the location asked for.
            occurrence: which visit of it.
        """
        key = (number, occurrence)
        if key in self._watched or run.tree is None:
            return
        self._watched.add(key)
        given = run.tree.given(number) if run.tree[number].port == "output" else None
        if given is not None:
            Watch(run, given, occurrence, functools.partial(self._note, number))

    def _note(self, number: int, occurrence: int, given: Any) -> None:
        """Note what an output is made of: without rows of the batch in that, there are none in the output."""
        if not _may_hold_rows(given, self):
            self.without_rows.add((number, occurrence))

    def meet(self, number: int, occurrence: int, value: Any) -> None:
        """Take the tensors of a value for tables, if it is known that they have no rows of the batch."""
        if (number, occurrence) in self.without_rows:
            self.without_rows.remove((number, occurrence))
            transform(value, self._keep)

    def _keep(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            storage = storage_of(leaf)
            if storage is not None:
                self._kept.append(leaf)  # for as long as its address is known as a table's
                self._tables.add(storage)
        return leaf

    def copy(self, tensor: torch.Tensor, visit: tuple[int, int]) -> torch.Tensor:
        """Return a copy of the joint tensor to write rows into: one per visit."""
        if self._visit != visit:
            self._visit, self._copies = visit, {}
        if id(tensor) in self._copies:
            return tensor
        new = tensor.clone()
        self._copies[id(new)] = new
        self.origins.add(new, tensor)
        return new


class Batch:
    """The rows of one block.

    Attributes:
        start: its first row; `size` how many it has.
        joint: what it shares with the other blocks.
    """

    __slots__ = ("_of_copies", "joint", "size", "start")

    def __init__(self, start: int, size: int, joint: Joint) -> None:
        self.start, self.size, self.joint = start, size, joint
        self._of_copies: list[Stamp] = []

    def slice_of(self, tensor: torch.Tensor) -> slice | None:
        """Return which slice of dim 0 is this block's; None when the rows are not those of the batch."""
        if tensor.ndim == 0 or self.joint.is_table(tensor):
            return None
        return self.joint.rows(tensor, self)

    def narrow(self, value: Any, whole: list[torch.Tensor]) -> Any:
        """Return what this block sees of a value: views of its rows. Tensors given whole are added to `whole`."""

        def view(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            rows = self.slice_of(leaf)
            if rows is None:
                whole.append(leaf)
                return leaf
            if self.joint.origins and self.joint.origins.has(leaf):
                self._of_copies.append(stamp(leaf))
            return leaf[rows]

        return view(value) if isinstance(value, torch.Tensor) else transform(value, view)

    def carry_edits(self) -> None:
        """Do what the block has done in place to its rows of copies to what those stand for."""
        of_copies, self._of_copies = self._of_copies, []
        for stamped in of_copies:
            if is_changed(stamped):
                self.joint.origins.carry(stamped[0], self)

    def splice(self, whole: Any, part: Any, seen: Any, visit: tuple[int, int], where: str) -> Any:
        """Return the joint value with this block's rows replaced by `part`; itself when nothing is new.

        Args:
            whole: the joint value.
            part: what the block has assigned.
            seen: what the block had read of it, as it was then; what was left as it was is recognised by identity.
            visit: the visit, for one copy per visit.
            where: the location, for messages.
        """
        if isinstance(whole, torch.Tensor):
            return self._splice_tensor(whole, part, seen, visit, where)
        if part is whole or (seen is not None and part is seen):
            return whole
        if isinstance(whole, tuple | list):
            if not isinstance(part, tuple | list) or len(part) != len(whole):
                raise BatchError(f"`{where}` is a {type(whole).__name__} of {len(whole)}; got {_describe(part)}.")
            olds = seen if isinstance(seen, tuple | list) and len(seen) == len(whole) else [None] * len(whole)
            items = [self.splice(*triple, visit, where) for triple in zip(whole, part, olds, strict=True)]
            is_same = all(new is old for new, old in zip(items, whole, strict=True))
            return whole if is_same else rebuild_sequence(whole, items)
        if isinstance(whole, dict):
            if not isinstance(part, dict) or set(part) != set(whole):
                raise BatchError(
                    f"`{where}` is a {type(whole).__name__} with keys {list(whole)}; got {_describe(part)}."
                )
            before = seen if isinstance(seen, dict) else {}
            values = {key: self.splice(whole[key], part[key], before.get(key), visit, where) for key in whole}
            return whole if all(value is whole[key] for key, value in values.items()) else with_items(whole, values)
        if dataclasses.is_dataclass(whole) and type(part) is type(whole):
            values = {
                name: self.splice(value, getattr(part, name), getattr(seen, name, None), visit, where)
                for name, value in fields_of(whole).items()
            }
            is_same = all(value is getattr(whole, name) for name, value in values.items())
            return whole if is_same else with_fields(whole, values)
        if (whole is None or isinstance(whole, bool | int | float | str)) and part == whole:
            return whole
        raise BatchError(
            f"`{where}` holds a {type(whole).__name__}, which cannot be replaced for the rows of one invoke. Write it "
            "from an invoke without input, which has the whole batch."
        )

    def _splice_tensor(self, whole: torch.Tensor, part: Any, seen: Any, visit: tuple[int, int], where: str) -> Any:
        if part is whole or (seen is not None and part is seen):
            return whole
        rows = self.slice_of(whole)
        if rows is None:
            raise BatchError(NOT_ROWS.format(where=where, shape=tuple(whole.shape), total=self.joint.total))
        if not isinstance(part, torch.Tensor):
            raise BatchError(f"`{where}` is a tensor of shape {tuple(whole[rows].shape)}; got {_describe(part)}.")
        if part.shape != whole[rows].shape:
            raise BatchError(
                f"`{where}` has shape {tuple(whole[rows].shape)} for the rows of this invoke, and the value assigned "
                f"has shape {tuple(part.shape)}. In a joint batch every invoke must keep the shape."
            )
        new = self.joint.copy(whole, visit)
        new[rows] = part.to(new.dtype) if part.dtype != new.dtype else part
        self.joint.origins.replace(new, self)
        return new

    def skip(self, value: Any, pending: tuple[Any] | None, path: str) -> PartialSkip:
        """Return what the module being skipped shall give, with this block's rows of it added."""
        partial = pending[0] if pending and isinstance(pending[0], PartialSkip) else PartialSkip(path, self.joint.total)
        partial.pieces[self.start] = (self.size, value)
        return partial


Rows = Callable[[torch.Tensor, Batch], slice | None]


class Watch(Mediator):
    """A seat without a block: sees what a module is given, after everybody else, and lets the model go on.

    Args:
        run: the run.
        number: the module's input.
        occurrence: which call of it.
        note: called with the occurrence and `(args, kwargs)`.
    """

    def __init__(self, run: Interleaver, number: int, occurrence: int, note: Callable[[int, Any], None]) -> None:
        super().__init__(run, self._look, self._look, order=sys.maxsize)
        self._note = note
        if run.count(number) <= occurrence:
            self.number, self.occurrence = number, occurrence
            run.enqueue(self, number)
        elif run.at == number and run.count(number) == occurrence + 1:
            self.occurrence = occurrence
            self._look()

    def _look(self) -> None:
        assert self.run is not None
        self._note(self.occurrence, self.run.value)
        self.close()


class _Found(BaseException):
    """Ends a search."""


def _may_hold_rows(value: Any, joint: Joint) -> bool:
    """Return whether rows of the batch may be in a value: what it holds besides tensors and constants may have them."""

    def look(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            # In any dim, and any number of times: a module may turn its input around, or fold rows into another dim.
            if any(not size % joint.total for size in leaf.shape) and not joint.is_table(leaf):
                raise _Found
        elif not isinstance(leaf, _CONSTANT):
            raise _Found
        return leaf

    try:
        transform(value, look)
    except _Found:
        return True
    return False


class PartialSkip(Deferred):
    """What a skipped module gives, in pieces that the invokes bring."""

    def __init__(self, path: str, total: int) -> None:
        self.path = path
        self.total = total
        self.pieces: dict[int, tuple[int, Any]] = {}

    def resolve(self) -> Any:
        """Return the pieces joined.

        Raises:
            BatchError: some invoke has not skipped the module.
        """
        covered = sum(size for size, _ in self.pieces.values())
        if covered != self.total:
            raise BatchError(
                f"A batched .skip() has to cover every row: `{self.path}` was skipped for {covered} of {self.total} "
                "rows. Skip it in every invoke, or assign its output instead."
            )
        return concatenate([value for _, (_, value) in sorted(self.pieces.items())], self.path)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list | dict) else "")
