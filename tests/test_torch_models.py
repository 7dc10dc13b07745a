"""Real models, of random weights, are what they were when gn_fast is put under them."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn  # noqa: E402
from torch.testing import assert_close  # noqa: E402

import gn_fast.torch  # noqa: E402


def unet():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    model = diffusers.UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip
    return model, (torch.randn(2, 3, 16, 16), torch.tensor([3, 500])), lambda y: y.sample


def decoder():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    model = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(32, 64), norm_num_groups=8,
    ).decoder  # fmt: skip
    return model, (torch.randn(1, 4, 12, 12),), lambda y: y


def wav2vec2():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder

    config = transformers.Wav2Vec2Config(feat_extract_norm="group", conv_dim=(32,) * 3, conv_stride=(5, 2, 2),
                                         conv_kernel=(10, 3, 2), num_feat_extract_layers=3)  # fmt: skip
    model = Wav2Vec2FeatureEncoder(config)
    model._requires_grad = False  # its input is a leaf here
    return model, (torch.randn(2, 4000),), lambda y: y


class UNet3D(nn.Module):
    """Two levels of what segments volumes: convolution, group norm and leaky ReLU."""

    def __init__(self, width=8):
        super().__init__()

        def block(a, b):
            return nn.Sequential(
                *(
                    layer
                    for i in range(2)
                    for layer in (
                        nn.Conv3d(a if i == 0 else b, b, 3, padding=1),
                        nn.GroupNorm(4, b),
                        nn.LeakyReLU(0.01, inplace=True),
                    )
                )
            )

        self.down, self.bottom, self.up = block(1, width), block(width, 2 * width), block(3 * width, width)
        self.pool, self.out = nn.MaxPool3d(2), nn.Conv3d(width, 2, 1)
        self.grow = nn.Upsample(scale_factor=2)

    def forward(self, x):
        a = self.down(x)
        return self.out(self.up(torch.cat([a, self.grow(self.bottom(self.pool(a)))], 1)))


def unet3d():
    return UNet3D(), (torch.randn(1, 1, 12, 12, 12),), lambda y: y


# How many activations are fused in the modules, and in dynamo's graph: all but those behind attention's norms.
# The residual blocks of diffusers' U-Net put the embedding through the SiLU of their norms, transformers' GELU is a
# class of its own.
MODELS = {unet: (0, 17), decoder: (13, 13), wav2vec2: (0, 1), unet3d: (6, 6)}


def made(make):
    torch.manual_seed(0)
    model, inputs, result = make()
    for norm in model.modules():  # not ones and zeros
        if isinstance(norm, nn.GroupNorm):
            nn.init.normal_(norm.weight, 1, 0.1)
            nn.init.normal_(norm.bias, 0, 0.1)
    return model, inputs, result


def step(model, inputs, result):
    """Of training: the loss and all gradients."""
    model.train().zero_grad()
    torch.manual_seed(1)
    loss = result(model(*inputs)).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours, theirs):
    assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        scale = float(gradient.abs().max())
        assert_close(
            ours[1][name], gradient, rtol=0, atol=1e-4 * scale + 1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("make", MODELS)
def test_accelerated(make, layout):
    model, inputs, result = made(make)
    if layout == "channels last" and inputs[0].dim() > 3:
        form = torch.channels_last if inputs[0].dim() == 4 else torch.channels_last_3d
        model, inputs = model.to(memory_format=form), (inputs[0].to(memory_format=form), *inputs[1:])
    text, state = repr(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = result(model.eval()(*inputs))
    training = step(model, inputs, result)
    report = gn_fast.torch.accelerate(model)
    assert len(report.replaced) == sum(isinstance(m, nn.GroupNorm) for m in model.modules()) > 0
    assert len(report.fused) == MODELS[make][0]
    with torch.no_grad():
        y = result(model.eval()(*inputs))
    assert y.stride() == expected.stride()
    assert_close(y, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert_same_step(step(model, inputs, result), training)
    assert_close(dict(model.state_dict()), dict(state))
    model.load_state_dict(state)
    gn_fast.torch.restore(model)
    assert repr(model) == text
    with torch.no_grad():
        assert torch.equal(result(model.eval()(*inputs)), expected)


@pytest.mark.parametrize("make", MODELS)
def test_compiled(make, monkeypatch):
    from gn_fast.torch import _backend

    torch._dynamo.reset()
    model, inputs, result = made(make)
    fused, rewrite = [], _backend.rewrite
    monkeypatch.setattr(_backend, "rewrite", lambda graph: fused.append(rewrite(graph)))
    expected = step(model, inputs, result)
    compiled = torch.compile(model, backend=gn_fast.torch.backend)
    assert_same_step(
        step(compiled, inputs, result),
        {0: expected[0], 1: {f"_orig_mod.{k}": v for k, v in expected[1].items()}},
    )
    assert sum(fused) == MODELS[make][1]


@pytest.mark.parametrize("make", [unet, unet3d])
def test_accelerated_and_compiled_in_one_graph(make):
    torch._dynamo.reset()
    model, inputs, result = made(make)
    with torch.no_grad():
        expected = result(model.eval()(*inputs))
        gn_fast.torch.accelerate(model)
        y = result(torch.compile(model, backend="aot_eager", fullgraph=True)(*inputs))
    assert_close(y, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
