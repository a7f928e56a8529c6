"""Small image classifiers: a model, a processor that makes its input of images, and folders to keep both in.

It knows nothing of nnsight; the tutorial's plugin is written for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import interpolate


class Processor:
    """Makes `pixels`, (B, 1, size, size) float, of grey images of any size: one array (H, W), or a list of them.

    Numbers are 0 to 255 in arrays of integers, 0 to 1 in arrays of floats.
    """

    def __init__(self, size: int = 16) -> None:
        self.size = size

    def __call__(self, images: Any) -> torch.Tensor:
        batch = images if isinstance(images, list) else [images]
        if not batch:
            raise ValueError("an empty list of images")
        return torch.cat([self._one(image) for image in batch])

    def _one(self, image: Any) -> torch.Tensor:
        array = np.asarray(image)
        if array.dtype.kind not in "uif" or array.ndim != 2:
            raise ValueError(f"an image is an array of numbers of shape (H, W), not {array.dtype} of {array.shape}")
        scale = 255 if array.dtype.kind in "ui" else 1
        pixels = torch.from_numpy(array.astype("float32") / scale)[None, None]
        return interpolate(pixels, (self.size, self.size), mode="bilinear")


class Stage(nn.Module):
    """A convolution beside a residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.conv(torch.relu(self.norm(x)))
        return result


class Classifier(nn.Module):
    """Patches of 4 by 4 pixels, stages, and a head with one number per label."""

    def __init__(self, labels: list[str], width: int = 16, stages: int = 3) -> None:
        super().__init__()
        self.labels = labels
        self.config = {"labels": labels, "width": width, "stages": stages}
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.stages = nn.ModuleList(Stage(width) for _ in range(stages))
        self.head = nn.Linear(width, len(labels))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the logits, (B, labels), for `pixels`, (B, 1, size, size)."""
        x = self.patches(pixels)  # (B, width, size / 4, size / 4)
        for stage in self.stages:
            x = stage(x)
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def save(model: Classifier, processor: Processor, folder: str | Path) -> None:
    """Write a model to a folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "config.json").write_text(json.dumps({**model.config, "size": processor.size}))
    torch.save(model.state_dict(), Path(folder) / "weights.pt")


def load(folder: str | Path) -> tuple[Classifier, Processor]:
    """Return the model in a folder, in eval mode, and its processor."""
    config = json.loads((Path(folder) / "config.json").read_text())
    processor = Processor(config.pop("size"))
    model = Classifier(**config)
    model.load_state_dict(torch.load(Path(folder) / "weights.pt", weights_only=True))
    return model.eval(), processor
