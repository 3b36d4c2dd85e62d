"""The shared layers against their formulas, spelt out in float64."""

import math

import pytest
import torch
from helpers import EXACT, TEXT, assert_close_std

from models import layers
from models.layers import Conv2d, Linear, attention
from models.unet import timestep_embedding


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


@pytest.mark.parametrize(
    "dtype, capability, expected",
    (
        (torch.bfloat16, "AVX2", torch.float32),
        (torch.float16, "AVX2", torch.float32),
        (torch.float16, "AVX512", torch.float32),
        (torch.bfloat16, "AVX512", None),
        (torch.float16, "DEFAULT", None),
    ),
)
def test_sixteen_bits_where_the_processor_is_slow_with_them(
    monkeypatch, dtype, capability, expected
):
    """They are multiplied in float32 there, weights and results stay as they are, and so do the
    gradients; on other processors nothing is converted."""
    monkeypatch.setattr(layers, "get_cpu_capability", lambda: capability)
    torch.manual_seed(0)
    linear, conv = Linear(8, 8, bias=False).to(dtype), Conv2d(8, 8, 3, padding=1).to(dtype)
    x = torch.randn(2, 9, 8, dtype=dtype, requires_grad=True)
    picture = x.detach().mT.reshape(2, 8, 3, 3)
    seen = []

    def spy(name):
        original = getattr(torch.nn.functional, name)

        def function(*given, **options):
            seen.append(given[0].dtype)
            return original(*given, **options)

        monkeypatch.setattr(layers.F, name, function)
        return original

    multiply, convolve, attend = map(spy, ("linear", "conv2d", "scaled_dot_product_attention"))
    outs = linear(x), conv(picture), attention(x, x, x, heads=1)
    sum(out.float().sum() for out in outs).backward()
    assert x.grad.dtype == dtype and linear.weight.grad.dtype == dtype
    assert all(out.dtype == dtype for out in outs) and seen == 3 * [expected or dtype]
    if expected:
        wide = x.detach().float()
        bias = conv.bias.float()
        assert torch.equal(outs[0], multiply(wide, linear.weight.float()).to(dtype))
        in_float32 = convolve(picture.float(), conv.weight.float(), bias, padding=1)
        assert torch.equal(outs[1], in_float32.to(dtype))
        assert torch.equal(outs[2], attend(*3 * [wide[:, None]])[:, 0].to(dtype))
