"""The UNet against CompVis' and Stability's (golden numbers) and against diffusers (live)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CONTEXT_GRAD,
    EXACT,
    FAMILIES,
    UNET,
    VECTOR_GRAD,
    assert_close_std,
    below,
    embed,
    fill,
    golden,
    golden_keys,
    randomize,
    renamed,
    schedule,
    shapes,
    tiny_text_encoder,
    tiny_unet,
)

from models.unet import UNet, UNetConfig

FULL_SIZE = {
    "ldm-text2img-large": UNetConfig(context_dim=1280),
    "sd-v1-compvis": UNetConfig(context_dim=768),
    "sd-v2-compvis": UNetConfig(
        context_dim=1024, heads=None, head_width=64, linear_projection=True
    ),
}


@pytest.mark.parametrize("table", FULL_SIZE)
def test_full_size_keys(table):
    prefix = "model.diffusion_model."
    with torch.device("meta"):
        unet = UNet(FULL_SIZE[table])
    assert shapes(unet) == below(golden_keys(table), prefix)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_every_block(family):
    g, unet = golden(family), tiny_unet(family)
    seen = {}

    def record(name):
        def hook(module, inputs, output):
            row = output[0]
            seen[name] = torch.cat([row.mean()[None], row.std()[None], row.flatten()[:6]])

        return hook

    out = unet(g["unet.x"], g["unet.t"], g["unet.context"])
    assert_close_std(out, g["unet.out"], UNET)

    # In float64: in float32 some processors' own rounding is 8e-5 in a block, 1e-5 in the output.
    wide = copy.deepcopy(unet).double()
    for name, module in wide.named_modules():
        if f"unet.trace.{name}" in g:
            module.register_forward_hook(record(name))
    wide(g["unet.x"].double(), g["unet.t"], g["unet.context"].double())
    assert {f"unet.trace.{name}" for name in seen} == {k for k in g if "trace" in k}
    for name, trace in seen.items():
        # Compared in units of the block's own output, entry 1 of the trace.
        reference = g[f"unet.trace.{name}"]
        assert (trace - reference).abs().max() <= UNET * reference[1], name


@pytest.mark.parametrize("family", FAMILIES)
def test_short_context(family):
    g = golden(family)
    out = tiny_unet(family)(g["unet.x"][:1], g["unet.t"][:1], g["unet.context"][:1, :9])
    assert_close_std(out, g["unet.out_short_context"], UNET)


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_to_the_context(family, checkpointing):
    g, unet = golden(family), tiny_unet(family)
    context = g["unet.context"].clone().requires_grad_()
    unet.gradient_checkpointing = checkpointing
    try:
        loss = F.mse_loss(unet(g["unet.x"], g["unet.t"], context), g["unet.target"])
        (grad,) = torch.autograd.grad(loss, context)
    finally:
        unet.gradient_checkpointing = False
    assert_close_std(loss, g["unet.loss"], EXACT)
    assert_close_std(grad, g["unet.grad_context"], CONTEXT_GRAD)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_textual_inversion_step(family):
    """Noise, embed the word, predict, compare; the gradient of the word's vector."""
    g, encoder, noising = golden(family), tiny_text_encoder(family), schedule(family)
    vector = g["text.replace.vec1"].clone().requires_grad_()
    x_0, t, noise = g["ti.x0"], g["ti.t"], g["ti.noise"]
    context = encoder(embed(encoder, g["text.ids"][3:], g["text.placeholder_id"].item(), vector))
    prediction = tiny_unet(family)(noising.q_sample(x_0, t, noise), t, context)
    loss = F.mse_loss(prediction, noising.target(x_0, t, noise))
    (grad,) = torch.autograd.grad(loss, vector)
    assert_close_std(loss, g["ti.loss"], EXACT)
    assert_close_std(grad, g["ti.grad"], VECTOR_GRAD)


def test_bfloat16_weights_take_float32_inputs():
    g, unet = golden("sd1"), copy.deepcopy(tiny_unet("sd1")).bfloat16()
    out = unet(g["unet.x"], g["unet.t"], g["unet.context"])
    assert out.dtype == torch.bfloat16
    assert_close_std(out, g["unet.out"], 0.3)


@pytest.mark.parametrize("version", (1, 2))
def test_live_against_diffusers(version):
    """A narrow UNet of the full depth, at an odd aspect ratio."""
    diffusers = pytest.importorskip("diffusers")
    widths, second = (32, 64, 96, 96), version == 2
    reference = diffusers.UNet2DConditionModel(
        block_out_channels=widths,
        layers_per_block=2,
        cross_attention_dim=40,
        # Trap: this is the number of heads in diffusers, whatever it is called.
        attention_head_dim=[2, 4, 6, 6] if second else 8,
        use_linear_projection=second,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    randomize(reference, seed=version)
    heads = {"heads": None, "head_width": 16} if second else {}
    unet = UNet(UNetConfig(widths, context_dim=40, linear_projection=second, **heads))
    names = f"map-sd-v{version}-unet-compvis-to-diffusers"
    fill(unet, renamed(reference.state_dict(), names, "model.diffusion_model."))

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 24, generator=generator)
    context = torch.randn(2, 11, 40, generator=generator)
    t = torch.tensor([7, 981])
    assert_close_std(unet(x, t, context), reference(x, t, context).sample, UNET)
