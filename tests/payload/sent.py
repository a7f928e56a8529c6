"""A `with` item that keeps its block as a payload, for tests of what reads one."""

from __future__ import annotations

from nnsight import Capture, payload


class Sent(Capture):
    what = "trace"

    def __init__(self, envoy, *args):
        self.envoy, self.arguments = envoy, (args, {})

    def _captured(self, block):
        self.bytes = b"".join(payload.write_run(self.envoy, "trace", self.arguments, block.scope))
