"""The picture of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from nnsight_hf.demo import Findings

_BLUE, _ORANGE, _GREY = "#2b6cb0", "#dd6b20", "#718096"


def draw(findings: Findings, path: Path) -> None:
    """Write a PNG: the logit lens on the left, the probabilities before and after the patch on the right.

    Args:
        findings: what to show.
        path: the file; its folder is made when it is missing.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    lens, patch = figure.subplots(1, 2, width_ratios=(3, 2))

    layers = range(len(findings.paris_by_layer))
    lens.plot(layers, findings.paris_by_layer, color=_BLUE, marker="o", markersize=3.5, linewidth=1.8)
    lens.set(xlabel="layer", ylabel="P( Paris)", ylim=(-0.02, 1), title="The Eiffel Tower is in the city of ...")

    words = list(findings.before)
    for offset, values, color, label in (
        (-0.2, findings.before, _GREY, "before"),
        (+0.2, findings.after, _ORANGE, "after the patch"),
    ):
        bars = patch.bar([i + offset for i in range(len(words))], list(values.values()), 0.38, color=color, label=label)
        patch.bar_label(bars, fmt="%.2f", padding=2)
    patch.set_xticks(range(len(words)), [word.strip() for word in words])
    patch.set(ylabel="probability", ylim=(0, 1), title="The capital of France is ...")
    patch.legend(frameon=False)

    for axes in (lens, patch):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)
