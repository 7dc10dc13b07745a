"""Whole models with gn_fast under them, beside what they were: python -m benchmarks.models

Of random weights and no download; diffusers and transformers are needed: pip install -e
'.[benchmark,test-torch]'. Stock and accelerated take turns in one process, one for each allocator. The share of
group norm is what a model without its norms saves.
"""

import argparse
import copy
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import gn_fast.torch

from .report import RESULTS, ROOT, insert
from .results import machine, markdown
from .timing import race, turn
from .worker import tune_malloc

ALLOCATORS = {"tuned": tune_malloc, "glibc's": lambda: None}
LAYOUTS = {"contiguous": {}, "channels last": {4: torch.channels_last, 5: torch.channels_last_3d}}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ---- models: each with an input, and what of its result is a tensor --------------------------------------


def unet() -> tuple[nn.Module, tuple[torch.Tensor, ...], Callable[[Any], torch.Tensor]]:
    """DDPM's for images of 32 x 32."""
    import diffusers

    model = diffusers.UNet2DModel(
        sample_size=32, layers_per_block=2, block_out_channels=(128, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, (torch.randn(4, 3, 32, 32), torch.tensor([3, 50, 500, 900])), lambda y: y.sample


def decoder() -> tuple[nn.Module, tuple[torch.Tensor, ...], Callable[[Any], torch.Tensor]]:
    """Stable Diffusion's of half the width, to images of 128 x 128."""
    import diffusers

    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(64, 128, 256, 256), layers_per_block=2,
    ).decoder  # fmt: skip
    return model, (torch.randn(1, 4, 16, 16),), lambda y: y


def wav2vec2() -> tuple[nn.Module, tuple[torch.Tensor, ...], Callable[[Any], torch.Tensor]]:
    """The feature extractor, for two seconds of sound."""
    import transformers
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder

    model = Wav2Vec2FeatureEncoder(transformers.Wav2Vec2Config())
    model._requires_grad = False  # its input is a leaf here
    return model, (torch.randn(1, 32000),), lambda y: y


class UNet3D(nn.Module):
    """Three levels of what segments volumes: convolution, group norm and leaky ReLU."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()

        def block(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv3d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.LeakyReLU(0.01, inplace=True),
                nn.Conv3d(b, b, 3, padding=1), nn.GroupNorm(8, b), nn.LeakyReLU(0.01, inplace=True),
            )  # fmt: skip

        w = width
        self.down = nn.ModuleList([block(1, w), block(w, 2 * w)])
        self.bottom = block(2 * w, 4 * w)
        self.up = nn.ModuleList([block(6 * w, 2 * w), block(3 * w, w)])
        self.out = nn.Conv3d(w, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of each voxel."""
        kept = []
        for down in self.down:
            kept.append(down(x))
            x = F.max_pool3d(kept[-1], 2)
        x = self.bottom(x)
        for up in self.up:
            x = up(torch.cat([kept.pop(), F.interpolate(x, scale_factor=2)], 1))
        y: torch.Tensor = self.out(x)
        return y


def unet3d() -> tuple[nn.Module, tuple[torch.Tensor, ...], Callable[[Any], torch.Tensor]]:
    """A 3-D U-Net, for a volume of 64 x 64 x 64."""
    return UNet3D(), (torch.randn(1, 1, 64, 64, 64),), lambda y: y


MODELS = {"DDPM U-Net": unet, "VAE decoder": decoder, "wav2vec 2.0, features": wav2vec2, "3-D U-Net": unet3d}


# ---- a race ----------------------------------------------------------------------------------------------


def without_norms(model: nn.Module) -> nn.Module:
    """The same model, whose norms give what they are given."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = types.MethodType(lambda self, input: input, module)
    return model


def cases() -> Iterator[tuple[str, str, str]]:
    for name, make in MODELS.items():
        for layout in LAYOUTS:
            for dtype in DTYPES:
                if layout == "contiguous" or make is not wav2vec2:  # which has one spatial dimension
                    yield name, layout, dtype


def measure(name: str, layout: str, dtype: str, rounds: int) -> dict[str, float]:
    """Ratios of minima: stock's time over the accelerated model's, forward and a training step, and norms' share."""
    torch.manual_seed(0)
    stock, (x, *more), result = MODELS[name]()
    form = LAYOUTS[layout].get(x.dim(), torch.contiguous_format)
    stock = stock.to(DTYPES[dtype], memory_format=form)
    x = x.to(DTYPES[dtype], memory_format=form)
    ours = copy.deepcopy(stock)
    gn_fast.torch.accelerate(ours)
    models = {"stock": stock, "ours": ours, "without": without_norms(copy.deepcopy(stock))}

    def forward(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return result(model(x, *more))

    def train(model: nn.Module) -> None:
        model.zero_grad()
        result(model(x, *more)).float().square().mean().backward()

    for model in models.values():
        model.eval()
    expected, y = forward(stock).float(), forward(ours).float()
    error = float((y - expected).abs().max() / expected.abs().max())
    assert error < (1e-4 if dtype == "float32" else 0.1), f"{name}: the results differ by {error}"
    turns = {k: partial(turn, partial(forward, m)) for k, m in models.items()}
    times = {k: min(v) for k, v in race(turns, rounds).items()}
    for model in models.values():
        model.train()
        train(model)
    turns = {k: partial(turn, partial(train, m)) for k, m in models.items() if k != "without"}
    steps = {k: min(v) for k, v in race(turns, rounds).items()}
    return {
        "forward": times["stock"] / times["ours"], "training": steps["stock"] / steps["ours"],
        "share": 1 - times["without"] / times["stock"], "milliseconds": 1e3 * times["stock"],
    }  # fmt: skip


def errors() -> list[list[str]]:
    """Of channels-last results in float32, the largest: what a mean of some standard deviations costs."""
    rows = []
    for ratio in (0, 30, 300):
        x = torch.randn(1, 16, 64, 64, 64, generator=torch.Generator().manual_seed(0)) + ratio
        exact = F.group_norm(x.double(), 8)
        last = x.to(memory_format=torch.channels_last_3d)
        found = [
            float((norm(t, 8) - exact).abs().max())
            for norm, t in ((F.group_norm, x), (F.group_norm, last), (gn_fast.torch.group_norm, last))
        ]
        rows.append([str(ratio), *(f"{error:.1e}" for error in found)])
    return rows


# ---- the report ------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    return markdown([head, ["---"] * len(head), *rows])


def render(found: dict[str, Any]) -> str:
    rows = [
        [name, layout, dtype, f"{100 * of['tuned']['share']:.0f}%",
         *(f"{of[allocator][what]:.2f}" for allocator in ALLOCATORS for what in ("forward", "training"))]
        for (name, layout, dtype), of in ((key.split("/"), of) for key, of in found["cases"].items())
    ]  # fmt: skip
    head = ["model", "layout", "dtype", "share of group norm", "forward, tuned", "training, tuned", "forward, glibc's",
            "training, glibc's"]  # fmt: skip
    return f"""{found["processor"]}, {found["threads"]} threads; PyTorch {found["torch"]}, stock over accelerated by
`gn_fast.torch.accelerate`, ratios of minima of {found["rounds"]} rounds; above 1 gn_fast is faster. With a tuned
allocator, and with glibc's as it comes. The share is of the forward pass with a tuned allocator.

{table(head, rows)}

The largest error of a float32 result of shape (1, 16, 64, 64, 64) in 8 groups, by its mean in standard deviations:

{table(["mean / std", "PyTorch, contiguous", "PyTorch, channels last", "gn_fast, channels last"], found["errors"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="models whose name has this in it")
    parser.add_argument("--allocator", choices=ALLOCATORS, help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help="write the table in docs/torch.md, and models.json")
    options = parser.parse_args()
    wanted = [case for case in cases() if (options.only or "") in case[0]]
    if options.allocator:
        ALLOCATORS[options.allocator]()
        for case in wanted:
            print(json.dumps(["/".join(case), measure(*case, options.rounds)]), flush=True)
        return
    found: dict[str, Any] = {
        "processor": machine()["processor"], "threads": torch.get_num_threads(), "torch": torch.__version__,
        "rounds": options.rounds, "cases": {"/".join(case): {} for case in wanted},
    }  # fmt: skip
    for allocator in ALLOCATORS:
        command = [
            sys.executable,
            "-m",
            "benchmarks.models",
            "--allocator",
            allocator,
            "--rounds",
            str(options.rounds),
        ]
        command += ["--only", options.only] if options.only else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                case, ratios = json.loads(line)
                found["cases"][case][allocator] = ratios
                print(allocator, case, *(f"{k} {v:.2f}" for k, v in ratios.items()), file=sys.stderr)
        if worker.returncode:
            raise SystemExit(f"the models with the allocator {allocator} failed")
    found["errors"] = errors()
    print(render(found))
    if options.save:
        (RESULTS / "models.json").write_text(json.dumps(found, indent=1) + "\n")
        insert(ROOT / "docs" / "torch.md", "models", render(found))


if __name__ == "__main__":
    main()
