"""Blocks that run in another process: here, in an isolated one (`remote="local"`)."""

from __future__ import annotations

from nnsight import payload
from nnsight_ndif.isolation import Limits as Limits
from nnsight_ndif.local import Local as Local
from nnsight_ndif.local import open_remote as open_remote
from nnsight_ndif.remote import RemoteBackend as RemoteBackend

register = payload.register
