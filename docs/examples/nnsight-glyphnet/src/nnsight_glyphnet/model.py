"""The model class, and what it adds to tracers."""

from typing import Any

import glyphnet
from nnsight import InputError, NNsight, Tracer
from nnsight.protocols import Inputs


class GlyphClassifier(NNsight):
    """A classifier in a folder, or a loaded one: `with model.trace(image): model.stages[0].output`."""

    requires_input = True

    def __init__(self, model: Any, processor: Any = None, **options: Any) -> None:
        if not isinstance(model, glyphnet.Classifier):
            model, processor = glyphnet.load(model)
        super().__init__(model, **options)
        self.processor = processor or glyphnet.Processor()

    def prepare(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Make pixels of an image, or of a list of images."""
        if not args:
            return super().prepare(method, args, kwargs)
        try:
            pixels = self.processor(*args)
        except (TypeError, ValueError) as error:
            raise InputError(f"`model.{method}` takes an image or a list of images: {error}") from error
        return Inputs((pixels.to(self.device),), kwargs, rows=len(pixels))


def labels(tracer: Tracer) -> list[str]:
    """Return the label that the model gives each image: `tracer.labels()`."""
    names = tracer.envoy.root.labels
    return [names[int(row.argmax())] for row in tracer.result]
