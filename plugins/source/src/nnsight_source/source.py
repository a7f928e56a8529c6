"""What `module.source` gives: the operations inside a function, each with its values."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, overload

from nnsight import NotInTreeError
from nnsight_source.errors import SourceError
from nnsight_source.show import listed, show_function, show_spot
from nnsight_source.site import Site
from nnsight_source.travel import packed, spot_of, unpacked

if TYPE_CHECKING:
    from nnsight import Envoy, Mediator
    from nnsight_source.spots import Spot


def source_of(envoy: Envoy) -> Source:
    """Return the operations inside a module's forward. In a block, its run looks into the forward from now on."""
    site = Site.of_module(envoy)
    site.look_into()
    return Source(site)


class Group:
    """The operations of one kind inside a function, by name and by number, in the order of the source."""

    def __init__(self, site: Site, kind: str) -> None:
        self._site = site
        self._kind = kind

    @property
    def names(self) -> list[str]:
        """The names of the operations."""
        return list(self._spots)

    @property
    def _spots(self) -> dict[str, Spot]:
        return self._site.rewritten.spots[self._kind]

    def locate(self, block: Mediator) -> list[tuple[int, int]]:
        """Return the numbers of the inputs and outputs of all of them in the run of a block; `tracer.cache` asks."""
        first = self._site.locate(block)
        return [spot.numbers(first) for spot in self._spots.values()]

    def __getattr__(self, name: str) -> Operation:
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        spot = self._spots.get(name)
        if spot is None:
            near = difflib.get_close_matches(name, self._spots, n=3, cutoff=0.6)
            what = {"call": "operation", "return": "return"}.get(self._kind, self._kind)
            raise NotInTreeError(
                f"`{self._site.path}` has no {what} {name!r}"
                + (f" (perhaps {' or '.join(near)})" if near else "")
                + f"; available: {listed(self._spots)}."
            )
        return Operation(self._site, spot)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            raise AttributeError(
                f"`{self._site.path}.{name}` cannot be assigned to: assign to its `.output`, or to its `.input` or "
                "`.inputs` before it runs."
            )
        object.__setattr__(self, name, value)

    @overload
    def __getitem__(self, key: int | str) -> Operation: ...
    @overload
    def __getitem__(self, key: slice) -> list[Operation]: ...
    def __getitem__(self, key: int | str | slice) -> Operation | list[Operation]:
        if isinstance(key, slice):
            return list(self)[key]
        if isinstance(key, str):
            try:
                return self.__getattr__(key)
            except NotInTreeError as error:
                raise KeyError(str(error)) from None
        spots = list(self._spots.values())
        try:
            return Operation(self._site, spots[key])
        except IndexError:
            raise IndexError(f"`{self._site.path}` has {len(spots)} of these, so there is no {key}.") from None

    def __iter__(self) -> Iterator[Operation]:
        return (Operation(self._site, spot) for spot in self._spots.values())

    def __len__(self) -> int:
        return len(self._spots)

    def __bool__(self) -> bool:
        return True

    def __contains__(self, name: object) -> bool:
        return name in self._spots

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(name for name in self._spots if name.isidentifier())]

    def __repr__(self) -> str:
        return show_function(self._site.rewritten, self._kind)

    def __nnsight_pack__(self) -> list[Any]:
        return [*packed(self._site), self._kind]

    @classmethod
    def __nnsight_unpack__(cls, root: Any, content: Any) -> Group:
        *where, kind = content
        site = unpacked(where)
        return Source(site) if kind == "call" else Group(site, kind)


class Source(Group):
    """The operations inside a function: its calls by name, and further kinds in groups of their own.

    Attributes:
        names: the names of the calls: the dotted path that is called joined by `_`, and a counter.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site, "call")

    @property
    def vars(self) -> Group:
        """What is assigned, by the name it is assigned to: `vars.attn_output_0`."""
        return Group(self._site, "variable")

    @property
    def ops(self) -> Group:
        """What operators give: `ops.matmul_0` for `@`, `ops.add_0`, `ops.getitem_0`, `ops.lt_0`, ..."""
        return Group(self._site, "operator")

    @property
    def returns(self) -> Group:
        """What the function returns, by number: `returns[0]` for its first `return` statement."""
        return Group(self._site, "return")

    @property
    def wrapper(self) -> Source:
        """The operations inside what the function is wrapped in: what a decorator has put around it.

        In a block, its run looks into that from now on.

        Raises:
            SourceError: it is wrapped in nothing, or in what has no Python source.
        """
        site = self._site.wrapper()
        site.look_into()
        return Source(site)

    def __repr__(self) -> str:
        around = self._site.wrapped_in
        return show_function(self._site.rewritten, self._kind, "" if around is None else around.__code__.co_qualname)


class Operation:
    """One operation inside a function. Its values are there only inside a block."""

    __slots__ = ("_site", "_spot")

    def __init__(self, site: Site, spot: Spot) -> None:
        self._site = site
        self._spot = spot

    @property
    def name(self) -> str:
        """Its name among its kind."""
        return self._spot.name

    @property
    def path(self) -> str:
        """Where it is, from the root: `model.transformer.h.0.attn.source.self_c_proj_0`."""
        return f"{self._site.path}.{self._spot.label}"

    @property
    def line(self) -> int:
        """The line of the file at which it begins."""
        return self._spot.line

    @property
    def output(self) -> Any:
        """What the operation gives. Only inside a block."""
        block, first = self._site.enter(self._spot, "output")
        return block.read(first + self._spot.output)

    @output.setter
    def output(self, value: Any) -> None:
        block, first = self._site.enter(self._spot, "output")
        block.write(first + self._spot.output, value)

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, the operands of an operator: `(args, kwargs)`. Only inside a block."""
        number = self._input("inputs")
        block, first = self._site.enter(self._spot, "inputs")
        found: tuple[tuple[Any, ...], dict[str, Any]] = block.read(first + number)
        return found

    @inputs.setter
    def inputs(self, value: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        number = self._input("inputs")
        try:
            args, kwargs = value
            checked = (tuple(args), dict(kwargs))
        except (TypeError, ValueError):
            raise TypeError(
                f"`{self.path}.inputs` takes (args, kwargs), a tuple and a dict; got {type(value).__name__}. To "
                "replace the first argument only, assign to `.input`."
            ) from None
        block, first = self._site.enter(self._spot, "inputs")
        block.write(first + number, checked)

    @property
    def input(self) -> Any:
        """The first argument passed, positional or by keyword. Only inside a block."""
        self._input("input")
        args, kwargs = self.inputs
        if args:
            return args[0]
        if kwargs:
            return next(iter(kwargs.values()))
        raise ValueError(f"`{self.path}` was called without arguments, so it has no `.input`.")

    @input.setter
    def input(self, value: Any) -> None:
        self._input("input")
        args, kwargs = self.inputs
        if args or not kwargs:
            self.inputs = ((value, *args[1:]), kwargs)
        else:
            self.inputs = (args, {**kwargs, next(iter(kwargs)): value})

    def skip(self, value: Any) -> None:
        """Let the operation give `value` without being run. Only inside a block, before it is reached.

        Args:
            value: what the code around it gets.
        """
        number = self._input("skip")
        block, first = self._site.enter(self._spot, "skip")
        block.skip(first + number, value)

    @property
    def source(self) -> Source:
        """The operations inside the function that this call calls; of a submodule, its own `.source`.

        In a block it is the function that is really called, and the block waits for the call. Elsewhere it is what the
        names in the source mean at the time.

        Raises:
            SourceError: it is not written in Python, or not known before it is called.
        """
        return Source(self._site.called(self._spot))

    def locate(self, block: Mediator) -> list[tuple[int, int]]:
        """Return the numbers of its input (-1 for none) and output in the run of a block; `tracer.cache` asks."""
        return [self._spot.numbers(self._site.locate(block))]

    def _input(self, port: str) -> int:
        number = self._spot.input
        if number < 0:
            kind = {"call": "is called from the frame it stands in", "return": "is a return"}
            what = kind.get(self._spot.kind, f"is the value of {self._spot.name.rpartition('_')[0]!r}")
            raise SourceError(f"`{self.path}` {what}, so it has no `.{port}`; read or assign its `.output`.")
        return number

    def __nnsight_pack__(self) -> list[Any]:
        return [*packed(self._site), self._spot.kind, self._spot.name]

    @classmethod
    def __nnsight_unpack__(cls, root: Any, content: Any) -> Operation:
        *where, kind, name = content
        site = unpacked(where)
        return cls(site, spot_of(site, kind, name))

    def __repr__(self) -> str:
        return show_spot(self._site.rewritten, self._spot, self.path)
