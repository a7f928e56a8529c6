"""The cache that belongs to code objects; plugins have it from `nnsight.protocols`."""

from nnsight.protocols import PerCode as PerCode
