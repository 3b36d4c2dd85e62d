"""The shared layers against their formulas, spelt out in float64."""

import math

import pytest
import torch
from helpers import EXACT, TEXT, assert_close_std

from models.layers import attention, timestep_embedding


@pytest.mark.parametrize("heads", (1, 4))
@pytest.mark.parametrize("causal", (False, True))
def test_attention(heads, causal):
    generator = torch.Generator().manual_seed(0)
    length = 6 if causal else 9
    q = torch.randn(2, 6, 32, generator=generator)
    k, v = torch.randn(2, 2, length, 32, generator=generator)
    out = attention(q, k, v, heads, causal)

    d = 32 // heads
    for head in range(heads):
        part = slice(head * d, head * d + d)
        scores = q[..., part].double() @ k[..., part].double().mT / math.sqrt(d)
        if causal:
            later = torch.ones(6, 6, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        by_hand = scores.softmax(dim=-1) @ v[..., part].double()
        assert_close_std(out[..., part], by_hand, TEXT)


def test_timestep_embedding():
    t = torch.tensor([0, 1, 500, 999])
    out = timestep_embedding(t, 8)
    rows = []
    for step in t.tolist():
        angles = [step * 10_000 ** (-i / 4) for i in range(4)]
        rows.append([math.cos(x) for x in angles] + [math.sin(x) for x in angles])
    # Angles up to 999 radians lose digits in float32, as in every published model.
    assert_close_std(out, torch.tensor(rows, dtype=torch.float64), 10 * EXACT)
