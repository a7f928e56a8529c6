"""Names that our own distributions provide, so that a missing one can say how to install it."""

from __future__ import annotations

#: entry-point group -> name -> the extra of nnsight-core that brings it. `command` is for `python -m nnsight`.
KNOWN: dict[str, dict[str, str]] = {
    "nnsight.exports": {
        "LanguageModel": "hf",
        "VisionLanguageModel": "hf",
        "TransformersModel": "hf",
        "DiffusionModel": "diffusers",
        "VLLM": "vllm",
        "RemoteBackend": "ndif",
        "open_remote": "ndif",
        "register": "ndif",
        "is_model_running": "ndif",
        "ndif_status": "ndif",
    },
    "nnsight.modeling": {
        "language": "hf",
        "transformers": "hf",
        "vision": "hf",
        "vlm": "hf",
        "diffusers": "diffusers",
        "diffusion": "diffusers",
        "vllm": "vllm",
    },
    "nnsight.envoy": {"source": "source"},
    "nnsight.tracer": {},
    "nnsight": {"hf": "hf", "source": "source", "diffusers": "diffusers", "vllm": "vllm", "ndif": "ndif"},
    "command": {"demo": "hf", "serve": "ndif"},
}


def extra_for(group: str, name: str) -> str | None:
    """Return the extra of nnsight-core that provides a name, or None if it is not one of ours."""
    return KNOWN.get(group, {}).get(name)


def how_to_install(extra: str) -> str:
    """Return the command that installs an extra."""
    return f'pip install "nnsight-core[{extra}]"'
