"""A block, a run and its results as data: source, JSON and tensors. No pickle.

What plugins use is here; docs/payload.md describes the format.
"""

from __future__ import annotations

from nnsight.payload.runs import SentBlocks as SentBlocks
from nnsight.payload.runs import pack_blocks as pack_blocks
