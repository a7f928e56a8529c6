"""Small torch modules for tests: blocks in a row, containers between parts, and a model that runs in steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from nnsight.tracing.model import NNsight, traceable

WIDTH = 8

Made = TypeVar("Made", bound=nn.Module)


class Block(nn.Module):
    """Two linear layers beside a residual stream."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, (B, width), with what the layers make of it added."""
        added: torch.Tensor = x + self.mlp(torch.relu(self.attn(x)))
        return added


class Net(nn.Module):
    """Blocks in a row and a head, as language models have them: `emb`, `h`, `lm_head`."""

    def __init__(self, blocks: int = 3, width: int = WIDTH) -> None:
        super().__init__()
        self.emb = nn.Linear(width, width)
        self.h = nn.ModuleList(Block(width) for _ in range(blocks))
        self.lm_head = nn.Linear(width, 2 * width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, 2 * width) for x, (B, width)."""
        x = self.emb(x)
        for block in self.h:
            x = block(x)
        logits: torch.Tensor = self.lm_head(x)
        return logits


class Pair(nn.Module):
    """Returns a tuple."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two tensors of the shape of x."""
        return x + 1, x * 2


class Mapping(nn.Module):
    """Returns a dict with a tuple in it."""

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        """Return `hidden` and `extra`."""
        return {"hidden": x + 1, "extra": (x * 2,)}


@dataclass
class Answer:
    """What `Answering` returns."""

    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]


class Answering(nn.Module):
    """Returns a dataclass with a tuple in it."""

    def forward(self, x: torch.Tensor) -> Answer:
        """Return `logits` and `hidden`."""
        return Answer(x + 1, (x, x * 2))


class Structured(nn.Module):
    """Passes tuples, dicts and dataclasses between its parts: `pair`, `mapping`, `answering`. It has no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.mapping, self.answering = Pair(), Mapping(), Answering()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the shape of x."""
        left, right = self.pair(x)
        mapped = self.mapping(left + right)
        answer = self.answering(mapped["hidden"] + mapped["extra"][0])
        logits: torch.Tensor = answer.logits + answer.hidden[1]
        return logits


class Stepping(nn.Module):
    """Gives what can be given to it again: `first`, `second`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the shape of x."""
        hidden: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return hidden


class Repeats(NNsight):
    """A model that is run in steps, as one that generates: `with model.repeat(x, times=4) as tracer:`."""

    @traceable
    def repeat(self, x: torch.Tensor, times: int) -> torch.Tensor:
        """Return what the module gives when it is fed its own output so many times."""
        return repeat(self._module, x, times)


def repeat(module: nn.Module, x: torch.Tensor, times: int) -> torch.Tensor:
    """Return what a bare module gives when it is fed its own output so many times."""
    for _ in range(times):
        x = module(x)
    return x


def seeded(kind: Callable[..., Made], *args: Any, seed: int = 0, **kwargs: Any) -> Made:
    """Return a module whose weights depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(*args, **kwargs)


def rows(seed: int = 0, n: int = 2, width: int = WIDTH) -> torch.Tensor:
    """Return an input, (n, width), that depends on the seed alone."""
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
