"""What a runner does: rebuild the model's stand-in and the block, run the block, send back what it saved."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import socket
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import nnsight
from nnsight import Mediator, Tracer, payload
from nnsight_ndif import exposure, job
from nnsight_ndif.channel import Channel, Kind
from nnsight_ndif.kinds import give
from nnsight_ndif.link import Link
from nnsight_ndif.outside import Watch
from nnsight_ndif.puppet import Helper, StandIn, StandInModel
from nnsight_ndif.report import describe
from nnsight_ndif.served import modes
from nnsight_ndif.stays import Stays
from nnsight_ndif.window import DTYPES, Window

_CHUNK = 1 << 16
#: What the block has marked, by identity. They are kept alive, so that no other object gets the place of one.
_saved: dict[int, Any] = {}


def warm() -> None:
    """Import and set up what every job needs, in the process that runners are forked from."""
    with contextlib.suppress(ImportError):
        importlib.import_module("numpy.random")  # numpy itself would do so for the first job
    sys.meta_path.insert(0, _Compilers())
    exposure.watch()
    model = nnsight.NNsight(torch.nn.Linear(1, 1))
    with model.session() as session:
        blocks: tuple[type, ...] = (Mediator, type(session._block))
    for block in blocks:
        setattr(block, "save", _save)  # noqa: B010 - in this process alone
    with model.trace(torch.zeros(1, 1)):
        model.output.save()
    _saved.clear()


class _Compilers:
    """Lets torch's compilers be imported without a folder for their files: its optimizers import them, and use none."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Find nothing; the import goes on elsewhere."""
        if name == "torch._dynamo":
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = "/"


def _save(block: Any, value: Any) -> None:
    _saved[id(value)] = value


class Prepared:
    """A runner before it is confined: it has what it will need open.

    Args:
        descriptors: the socket, the window it fills, the window it reads.
    """

    def __init__(self, descriptors: list[int]) -> None:
        self.link = Link(Channel(socket.socket(fileno=descriptors[0])), Window(descriptors[2]), Window(descriptors[1]))
        for descriptor in descriptors[1:]:
            os.close(descriptor)

    def run(self) -> None:
        """Run one job. Whatever it raises is sent."""
        link = self.link
        _, (description, order) = link.channel.receive()
        sys.stdout, sys.stderr = _Printer(link, "stdout"), _Printer(link, "stderr")
        warnings.showwarning = partial(_warn, link)
        try:
            model = StandInModel.described(link, description)
            self._finish(*_execute(link, model, order))
        except BaseException as error:  # noqa: BLE001 - the border of the process
            link.channel.send(Kind.RAISED, describe(error, _is_ours))

    def _finish(self, result: Callable[[], list[Any]], error: BaseException | None) -> None:
        """Send what comes back of a block: also of one that has raised, as far as it got."""
        sys.stdout.flush()
        sys.stderr.flush()
        data = None
        try:
            data = result()
        except Exception:  # what the block has raised counts for more
            if error is None:
                raise
        if data is None:
            assert error is not None
            raise error
        self.link.channel.send(Kind.DONE, [*data, None if error is None else describe(error, _is_ours)])


def _execute(
    link: Link, model: StandInModel, order: dict[str, Any]
) -> tuple[Callable[[], list[Any]], BaseException | None]:
    """Run the block; return what makes data of its result, and what it has raised."""
    modes(order["modes"], torch.device("cpu")).__enter__()  # for good
    torch.set_default_dtype(DTYPES[order["default_dtype"]])
    torch.default_generator.manual_seed(order["seed"])  # of the CPU: all that there is here
    random.seed(order["seed"])
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(order["seed"] % (1 << 32))
    find = partial(payload.envoy_at, model)
    envoy = find(order["path"])
    sent = payload.SentBlocks(
        order["sent"], link.incoming.get, find, link.modules.__getitem__, lambda _: torch.device("cpu")
    )
    (block,) = sent.blocks
    give(model, sent.values["kinds"])
    model.untold = order["untold"]
    assert sent.outside is not None
    watch = Watch(sent.outside, lambda value: isinstance(value, nnsight.Envoy | StandIn | Helper), exposure.is_exposed)
    stays = Stays(model, sent)
    exposure.forget()
    error = None
    try:
        with model.session() if order["method"] == "session" else _tracer(link, envoy, order, sent) as entered:
            block.run(entered)
    except BaseException as raised:  # noqa: BLE001 - it is sent with what the block has done before
        error = raised
    ask = partial(link.ask, Kind.PART)

    def result() -> list[Any]:
        *data, lost = job.results(block.bound(), _saved, link.held, link.outgoing, ask, model, sent, watch)
        return [*data, [*lost, *stays.lost()]]

    return result, error


def _tracer(link: Link, envoy: Any, order: dict[str, Any], sent: payload.SentBlocks) -> Tracer:
    args, kwargs = sent.values["arguments"]
    driver = sent.values.get("functions")
    function = link.given(driver) if driver else partial(link.drive, order["path"], order["method"])
    return Tracer(envoy, order["method"], function, args, kwargs, order["batched"])


class _Printer:
    """A text stream whose lines go to the process of the caller."""

    encoding, errors = "utf-8", "strict"

    def __init__(self, link: Link, name: str) -> None:
        self._link = link
        self._name = name
        self._text: list[str] = []

    def write(self, text: str) -> int:
        self._text.append(text)
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        text, self._text = "".join(self._text), []
        for start in range(0, len(text), _CHUNK):
            self._link.channel.send(Kind.PRINT, [self._name, text[start : start + _CHUNK]])

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True


def _warn(link: Link, message: Any, category: Any, filename: str, line: int, *_: Any) -> None:
    text = str(message)[:_CHUNK]
    link.channel.send(Kind.WARN, [text, [category.__module__, category.__qualname__], filename, line])


_PACKAGES = tuple(
    os.path.dirname(os.path.abspath(module.__file__)) + os.sep for module in (nnsight, job) if module.__file__
)


#: Programs that test a transport are users' programs, wherever they are.
_PROGRAMS = os.path.join(_PACKAGES[0], "testing", "")


def _is_ours(filename: str) -> bool:
    return filename.startswith(_PACKAGES) and not filename.startswith(_PROGRAMS)
