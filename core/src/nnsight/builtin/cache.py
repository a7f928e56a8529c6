"""`tracer.cache(...)`: keep what passes, module by module, without asking for each.

The cache has a seat of its own in the run, behind all blocks: at every visit it is served last, so it sees what the
model goes on with. What it keeps are copies. Its block is a plain function, called where others are resumed.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nnsight._words import nearest
from nnsight.builtin.cached import Cache, Record
from nnsight.builtin.copying import Copier, make_copier
from nnsight.builtin.paths import every_name, find
from nnsight.errors import CacheError, CacheWarning, InputError
from nnsight.kernel.envoy import Envoy
from nnsight.kernel.mediator import Mediator
from nnsight.protocols import Locatable

if TYPE_CHECKING:
    from nnsight.kernel.interleaver import Interleaver
    from nnsight.tracing.tracer import Tracer


def cache(
    tracer: Tracer,
    modules: Iterable[Any] | Any = None,
    device: torch.device | str | None = "cpu",
    dtype: torch.dtype | None = None,
    detach: bool = True,
    include_output: bool = True,
    include_inputs: bool = False,
) -> Cache:
    """Keep the outputs, and the inputs if wanted, of modules from here on: `cache = tracer.cache()`.

    Inside an invoke the cache holds the rows of that invoke. A value is kept when all blocks are done with it, so the
    one at which a block stops the run is not.

    Args:
        tracer: the open trace.
        modules: which: paths, envoys, torch modules or operations of a `.source`, or one of them; None for all modules.
        device: where the copies are; None for where the values are.
        dtype: what floating-point values are cast to; None for what they are.
        detach: whether the copies are cut off from the graph.
        include_output: whether to keep outputs.
        include_inputs: whether to keep inputs.

    Returns:
        The cache. It fills while the run goes on.

    Raises:
        InputError: one of `modules` is not in the model or never called, or an option cannot be used.
        CacheError: the run is over.
    """
    block, run, root = _open(tracer)
    if not (include_output or include_inputs):
        raise InputError("A cache with include_output=False and include_inputs=False would record nothing.")
    copier = make_copier(_device(device), _dtype(dtype), detach)
    places = _chosen(block, root, modules)
    numbers = [given for given, _ in places if include_inputs and given >= 0]
    numbers += [output for _, output in places if include_output]
    if not numbers:
        raise InputError("What this cache was to hold has no input of its own: cache it with include_output=True.")
    if modules is not None:
        _tell_passed(run, numbers)
    made = Cache(root, include_output, include_inputs)
    _Seat(run, made._records, copier, getattr(block, "batch", None)).take(numbers)
    block.save(made)
    return made


def _open(tracer: Tracer) -> tuple[Mediator, Interleaver, Envoy]:
    """Return the block that the calling code is in, its run and the root of the model.

    Raises:
        CacheError: nothing more would pass.
    """
    block = tracer.current_block()
    run, envoy = block.run, tracer._envoy
    if run is None or run.is_over or envoy is None or (run.tree is not None and run.at == run.tree.result):
        raise CacheError("The run of this trace is over, so a cache would record nothing. Place it before `.result`.")
    if tracer._invokes is not None and not tracer._batched and run is tracer._run:
        raise CacheError("With batched=False every invoke is a run of its own: place the cache inside the invokes.")
    return block, run, envoy._traced_root()


class _EveryVisit(dict[int, int]):
    """What a cache wants, as a mediator says it: of each location the visit that is on, unless it has had that one.

    As a dict it is empty: a seat that was served for a location goes on waiting for it.
    """

    def __init__(self, counts: list[int]) -> None:
        self._counts = counts
        self.had: dict[int, int] = {}

    def __getitem__(self, number: int) -> int:
        count = self._counts[number]
        return -1 if self.had.get(number) == count else count - 1


class _Seat(Mediator):
    """The seat of a cache.

    Args:
        run: the run.
        records: where to put (location, occurrence, copy).
        copier: copies a value.
        batch: the rows that are kept; None for all.
    """

    def __init__(self, run: Interleaver, records: list[Record], copier: Copier, batch: Any) -> None:
        super().__init__(run, _no_request, _no_request, order=sys.maxsize + 1)
        del self.to_block  # the method below: a bound method in its place would be a reference cycle
        self._records = records
        self._copier = copier
        self._batch = batch
        self._every = _EveryVisit(run.counts)
        self._deferred: set[tuple[int, int]] = set()

    def take(self, numbers: list[int]) -> None:
        """Wait for every visit of these locations from here on."""
        run = self.run
        assert run is not None
        run.count(max(numbers))  # locations may have been numbered since the run was made
        self.wanted = self._every
        waiting = run.waiting
        for number in numbers:
            if number in waiting:
                run.enqueue(self, number)
            else:
                waiting[number] = self
            if self._batch is not None:
                self._batch.joint.watch(run, number, run.counts[number])

    def to_block(self) -> None:
        """Keep a copy of the value that the model stands at. Other blocks are resumed here."""
        run, every = self.run, self._every
        assert run is not None
        number = run.at
        count = run.counts[number]
        self.wanted = every
        every.had[number] = count
        if run.conditions and (number, count) not in self._deferred:
            self._defer(run, number, count)
            return
        value, batch = run.value, self._batch
        if batch is not None:
            batch.joint.meet(number, count - 1, value)
            batch.joint.watch(run, number, count)
            value = batch.narrow(value, [])
        self._records.append((number, count - 1, self._copier(value)))

    def _defer(self, run: Interleaver, number: int, count: int) -> None:
        """Wait until no block can go on at this visit: one that waits for a name or a barrier may still edit it."""

        def is_last() -> bool:
            others = [is_met for seat, is_met, _ in run.conditions if not isinstance(seat, _Seat)]
            return run.at == number and run.counts[number] == count and not any(is_met() for is_met in others)

        self._deferred.add((number, count))
        run.conditions = [*run.conditions, (self, is_last, "the end of a visit")]


def _no_request() -> None:
    raise AssertionError("a cache asks for nothing")


def _chosen(block: Mediator, root: Envoy, modules: Any) -> list[tuple[int, int]]:
    """Return the numbers of the inputs and outputs that are meant.

    Raises:
        InputError: one of them is not in the model, or is never called.
    """
    if modules is None:
        return [(envoy._number, envoy._number + 1) for envoy in (root, *root._envoys.values())]
    is_one = isinstance(modules, str | nn.Module) or (isinstance(modules, Envoy) and not _is_list(modules))
    found: list[tuple[int, int]] = []
    for one in [modules] if is_one or isinstance(modules, Locatable) else modules:
        if not isinstance(one, str | nn.Module | Envoy) and isinstance(one, Locatable):
            found += one.locate(block)
            continue
        envoy = _one(root, one)
        if _is_list(envoy):
            kind = type(envoy._module).__name__
            raise InputError(f"`{envoy.path}` cannot be cached: a {kind} only holds modules and is never called.")
        found.append((envoy._number, envoy._number + 1))
    if not found:
        raise InputError("cache(modules=[]) would record nothing. Leave modules out to record all.")
    return list(dict.fromkeys(found))


def _one(root: Envoy, one: Any) -> Envoy:
    if isinstance(one, Envoy):
        if one._tree is root._tree:
            return one
        raise InputError(f"`{one.path}` cannot be cached: it is an envoy of another model than the one traced.")
    if isinstance(one, nn.Module):
        known = root if one is root._module else root._envoys.get(id(one))
        if known is not None and known._module is one:
            return known
        raise InputError(f"This {type(one).__name__} cannot be cached: it is not a module of the model traced.")
    if isinstance(one, str):
        found = find(root, one)
        if found is not None:
            return found
        near = nearest(one if one.startswith("model.") else f"model.{one}", every_name(root))
        raise InputError(f"cache(modules=[{one!r}]): the model has no such module.{near}")
    raise InputError(f"`modules` takes paths, envoys, torch modules and operations, not {type(one).__name__!r}.")


def _is_list(envoy: Envoy) -> bool:
    return type(envoy._module).forward is nn.Module.forward


def _tell_passed(run: Interleaver, numbers: list[int]) -> None:
    """Warn of locations that the run has passed: their values so far are not in the cache."""
    assert run.tree is not None
    passed = [str(run.tree[number]) for number in numbers if run.count(number) and run.at != number]
    if passed:
        warnings.warn(
            f"The run has passed {', '.join(f'`{name}`' for name in passed[:3])}"
            f"{' and others' if len(passed) > 3 else ''} before this cache was placed: it records from here on. Place "
            "the cache before the first value is asked for.",
            CacheWarning,
            stacklevel=3,
        )


def _device(device: Any) -> torch.device | None:
    if device is None:
        return None
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"cache(device={device!r}): that is no device. {error}") from None
    if chosen.type not in ("cpu", "meta"):
        try:
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError, ImportError) as error:
            raise InputError(f"cache(device={device!r}): that is no device here. {error}") from None
    return chosen


def _dtype(dtype: Any) -> torch.dtype | None:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise InputError(f"cache(dtype={dtype!r}): that is no dtype. Give one such as torch.float16.")
    return dtype
