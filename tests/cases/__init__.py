"""The rows of the shared table."""

from cases import equinox_models, fallbacks, haiku_models, linen_models, nnx_models, plain_ops, plain_programs
from cases.registry import CASES as CASES
from cases.registry import Case as Case
