"""Import paths that programs of the 0.6 series use, and where each name lives now.

This is the one place for them: `nnsight.intervention` and `nnsight.ndif` are served from this table by the alias
finder. A target is `module:attribute`; one in `nnsight` itself may be a name that a plugin exports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import TypeAlias

    Object: TypeAlias = Any
else:

    class Object:
        """Any value of a block, for annotations such as `hidden: Object | None`; it has no instances."""

        def __new__(cls, *args, **kwargs):
            raise TypeError("nnsight.Object only serves in annotations; the values of a block are the real tensors")


PATHS: dict[str, dict[str, str]] = {
    "nnsight.intervention": {
        "Envoy": "nnsight:Envoy",
        "NNsight": "nnsight:NNsight",
    },
    "nnsight.intervention.envoy": {"Envoy": "nnsight:Envoy"},
    "nnsight.intervention.interleaver": {
        "Interleaver": "nnsight:Interleaver",
        "Mediator": "nnsight:Mediator",
    },
    "nnsight.intervention.tracing": {},
    "nnsight.intervention.tracing.globals": {
        "Object": "nnsight._compat:Object",
        "save": "nnsight:save",
    },
    "nnsight.intervention.tracing.invoker": {"Invoker": "nnsight:Invoker"},
    "nnsight.intervention.tracing.tracer": {
        "Barrier": "nnsight.builtin.barrier:Barrier",
        "InterleavingTracer": "nnsight:Tracer",
        "Tracer": "nnsight:Tracer",
    },
    "nnsight.intervention.backends": {},
    "nnsight.intervention.backends.remote": {"RemoteBackend": "nnsight:RemoteBackend"},
    "nnsight.ndif": {
        "RemoteBackend": "nnsight:RemoteBackend",
        "is_model_running": "nnsight:is_model_running",
        "ndif_status": "nnsight:ndif_status",
        "register": "nnsight:register",
    },
}
