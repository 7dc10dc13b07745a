"""The shapes and the modes that every benchmark runs, each listed once. Their arrays live in problem.py."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A shape, and the model that normalizes it."""

    name: str
    model: str
    shape: tuple[int, ...]
    num_groups: int

    @property
    def slab_size(self) -> int:
        """The number of values that share their statistics."""
        return math.prod(self.shape[1:]) // self.num_groups

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Mode:
    """What is computed, from what."""

    name: str
    title: str
    dtype: str = "float32"
    activation: str | None = None
    channels_last: bool = False
    fresh: bool = False  # a new array for the result, where `out=` is reused otherwise
    backward: bool = False

    def suits(self, case: Case) -> bool:
        """Whether the case differs in this mode: without spatial dimensions the channels are last in any."""
        return len(case.shape) > 2 or not self.channels_last

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("post", "the blog post that the project starts from", (64, 16, 112, 112), 4),
    Case("resnet-first", "ResNet-50, first stage", (32, 256, 56, 56), 32),
    Case("resnet-last", "ResNet-50, last stage", (32, 2048, 7, 7), 32),
    Case("mask-rcnn", "Mask R-CNN, head", (512, 256, 14, 14), 32),
    Case("unet-outer", "Stable Diffusion, U-Net at 64 x 64", (2, 320, 64, 64), 32),
    Case("unet-middle", "Stable Diffusion, U-Net at 16 x 16", (2, 2560, 16, 16), 32),
    Case("unet-inner", "Stable Diffusion, U-Net at 8 x 8", (2, 1280, 8, 8), 32),
    Case("vae-512", "Stable Diffusion, decoder at 512 x 512", (1, 128, 512, 512), 32),
    Case("vae-256", "Stable Diffusion, decoder at 256 x 256", (1, 256, 256, 256), 32),
    Case("unet-3d", "3-D U-Net", (1, 32, 96, 96, 96), 8),
    Case("volume", "3-D U-Net, a whole volume", (1, 16, 160, 160, 160), 4),
    Case("ddpm-16", "DDPM, U-Net at 16 x 16", (8, 256, 16, 16), 32),
    Case("ddpm-8", "DDPM, U-Net at 8 x 8", (8, 512, 8, 8), 32),
    Case("ddpm-4", "DDPM, U-Net at 4 x 4", (16, 512, 4, 4), 32),
    Case("wav2vec2", "wav2vec 2.0, first layer", (8, 512, 16000), 512),
    Case("one-group", "one sample in one group", (1, 64, 128, 128), 1),
    Case("layer-norm", "layer normalization of a transformer's tokens", (4096, 768), 1),
    Case("groups-2d", "features without positions, in groups", (4096, 256), 16),
    Case("tiny", "the cost of a call", (1, 32, 8, 8), 8),
)

MODES = (
    Mode("out", "forward, out= reused"),
    Mode("fresh", "forward, a fresh result", fresh=True),
    Mode("silu", "forward with SiLU", activation="silu"),
    Mode("channels-last", "forward, channels last", channels_last=True),
    Mode("float16", "forward in float16", dtype="float16"),
    Mode("bfloat16", "forward in bfloat16", dtype="bfloat16"),
    Mode("bfloat16-silu", "forward in bfloat16 with SiLU", dtype="bfloat16", activation="silu"),
    Mode("float64", "forward in float64", dtype="float64"),
    Mode("backward", "backward, out= reused", backward=True),
    Mode("channels-last-backward", "backward, channels last, out= reused", channels_last=True, backward=True),
)


def add_choice(
    parser: argparse.ArgumentParser,
    option: str,
    known: Sequence[Case] | Sequence[Mode],
    default: str | None = None,
) -> None:
    """An option that takes names of these, separated by commas; by default one, or all."""
    by_name = {item.name: item for item in known}

    def chosen(text: str) -> list[Case | Mode]:
        try:
            return [by_name[name] for name in text.split(",")]
        except KeyError as error:
            raise argparse.ArgumentTypeError(f"{error} is none of {', '.join(by_name)}") from None

    parser.add_argument(
        option,
        type=chosen,
        default=default or ",".join(by_name),
        metavar="NAME,...",
        help=f"of {', '.join(by_name)}; default: {default or 'all'}",
    )
