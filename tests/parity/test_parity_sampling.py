"""Filters of sampling leave the tokens that those of transformers leave."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.generation import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lora_jax.generate.sampling import Sampling, kept


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(7, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2), (20, 0.9, 0.05)])
def test_filters_leave_the_same_tokens(top_k: int, top_p: float, min_p: float) -> None:
    logits = np.random.default_rng(1).normal(scale=3.0, size=(8, 100)).astype(np.float32)
    filters = LogitsProcessorList([TopKLogitsWarper(top_k)] if top_k else [])
    filters += [TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)]
    left = torch.isfinite(filters(torch.zeros(8, 1, dtype=torch.long), torch.tensor(logits))).numpy()
    ours = kept(jnp.asarray(logits), Sampling(top_k=top_k, top_p=top_p, min_p=min_p))
    np.testing.assert_array_equal(ours, left)
    assert left.sum() < left.size
