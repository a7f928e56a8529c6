"""A block, a run and its results as data: source, JSON and tensors. No pickle.

What plugins use is here; docs/payload.md describes the format.
"""

from __future__ import annotations

from nnsight.payload.container import FORMAT as FORMAT
from nnsight.payload.instances import attributes as attributes
from nnsight.payload.instances import can_take as can_take
from nnsight.payload.library import is_installed as is_installed
from nnsight.payload.library import register as register
from nnsight.payload.outside import Outside as Outside
from nnsight.payload.results import Results as Results
from nnsight.payload.results import pack_values as pack_values
from nnsight.payload.results import unpack_values as unpack_values
from nnsight.payload.results import write_results as write_results
from nnsight.payload.run import Run as Run
from nnsight.payload.run import write_run as write_run
from nnsight.payload.sending import Own as Own
from nnsight.payload.sending import SentBlocks as SentBlocks
from nnsight.payload.sending import pack_blocks as pack_blocks
from nnsight.payload.tree import describe_model as describe_model
from nnsight.payload.tree import envoy_at as envoy_at
from nnsight.payload.tree import model_key as model_key
from nnsight.payload.views import warn_of_end as warn_of_end
