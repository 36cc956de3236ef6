"""Corruption shift for image tensors: how a network behaves on data a little unlike its training data.

Four corruptions at severities 1 to 5 act on images [N, C, H, W], each deterministic given its generator. The tables
below are the whole definition. The functions of `CORRUPTIONS` take images whose value range has width one; `corrupt`
rescales for other ranges. Contrast factors are those of CIFAR-10-C, noise those of ImageNet-C (relative to the value
range); blur and rotation are our own tables, made for images of 8 to 64 pixels.

Reference: Hendrycks & Dietterich, Benchmarking neural network robustness to common corruptions, ICLR 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ockham.errors import DataError
from ockham.run.measure import Predictor, auroc, ece

__all__ = [
    "BLUR_STD",
    "CONTRAST_FACTOR",
    "CORRUPTIONS",
    "NOISE_STD",
    "ROTATION_DEGREES",
    "SEVERITIES",
    "STANDARDISED_RANGE",
    "contrast",
    "corrupt",
    "corruption_shift",
    "gaussian_blur",
    "gaussian_noise",
    "ood_auroc",
    "rotation",
]

SEVERITIES = (1, 2, 3, 4, 5)
NOISE_STD = (0.08, 0.12, 0.18, 0.26, 0.38)  # share of the value range
BLUR_STD = (0.4, 0.6, 0.8, 1.1, 1.5)  # pixels
ROTATION_DEGREES = (10.0, 20.0, 30.0, 40.0, 50.0)  # counter-clockwise
CONTRAST_FACTOR = (0.75, 0.5, 0.4, 0.3, 0.15)  # what is left of the distance to the mean of image and channel
STANDARDISED_RANGE = 4.0  # width taken for standardised images: [0, 1] divided by a standard deviation of 1/4

Corruption = Callable[[Tensor, int, torch.Generator], Tensor]


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    *,
    low: float | Tensor | None = None,
    high: float | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images under the corruption called ``name``.

    Args:
        images: [N, C, H, W], floating point; flat images are reshaped by the caller.
        name: one of `CORRUPTIONS`.
        severity: strength from 1 (mild) to 5 (strong).
        low: smallest possible value (a number, or [C, 1, 1] where channels differ); results are clamped to it.
        high: largest possible value, likewise. Without both, images count as standardised: a value range of width
            `STANDARDISED_RANGE`, not clamped.
        generator: source of the noise. None is a fresh one seeded with 0, so equal calls give equal images; pass one
            generator along when corrupting batch by batch.

    Returns:
        Tensor of the shape, dtype and device of ``images``, which are left alone.

    Raises:
        DataError: unknown name or severity, no image tensor, or values outside [low, high].
    """
    if images.ndim != 4 or images.numel() == 0:
        raise DataError(
            f"corruptions need images [N, C, H, W]; got shape {tuple(images.shape)}; flat images: "
            "reshape(N, 1, side, side) before and flatten(1) after"
        )
    if not images.is_floating_point():
        raise DataError(f"images must be floating point; got {images.dtype}; divide bytes by 255 first")
    if not bool(images.isfinite().all()):
        raise DataError("images have NaN or infinite values")
    if name not in CORRUPTIONS:
        raise DataError(f"unknown corruption {name!r}; known are {', '.join(CORRUPTIONS)}")
    work = images.to(torch.promote_types(images.dtype, torch.float32))
    bounds = _bounds(work, low, high)
    width = STANDARDISED_RANGE if bounds is None else bounds[1] - bounds[0]
    noise = torch.Generator().manual_seed(0) if generator is None else generator
    shifted = CORRUPTIONS[name](work / width, severity, noise) * width
    return (shifted if bounds is None else shifted.clamp(*bounds)).to(images.dtype)


def gaussian_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Independent noise, x + s e with e ~ N(0, 1) and s = `NOISE_STD`; drawn in float32 on the generator's device."""
    noise = torch.randn(images.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return images + _level(NOISE_STD, severity) * noise.to(images)


def gaussian_blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Gaussian blur of `BLUR_STD` pixels with mirrored borders: B_H x B_W', which keeps the mean of an image."""
    std = _level(BLUR_STD, severity)
    offsets = torch.arange(-math.ceil(4 * std), math.ceil(4 * std) + 1)
    weights = torch.softmax(-0.5 * (offsets.double() / std).square(), 0)
    blurs = []
    for size in images.shape[-2:]:  # [size, size], cut at 4 std, folded back at the borders; symmetric, rows sum to one
        source = (torch.arange(size)[:, None] + offsets).remainder(2 * size)
        source = torch.minimum(source, 2 * size - 1 - source)
        blur = torch.zeros(size, size, dtype=torch.float64)
        blurs.append(blur.scatter_add_(1, source, weights.expand(source.shape)).to(images))
    return blurs[0] @ images @ blurs[1].T


def rotation(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Rotation about the centre by `ROTATION_DEGREES`, bilinear; what comes in is the border continued."""
    return _rotate(images, _level(ROTATION_DEGREES, severity))


def contrast(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Less contrast, m + f (x - m) with f = `CONTRAST_FACTOR` and m the mean of each image and channel."""
    mean = images.mean((-2, -1), keepdim=True)
    return mean + _level(CONTRAST_FACTOR, severity) * (images - mean)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "gaussian_blur": gaussian_blur,
    "rotation": rotation,
    "contrast": contrast,
}


def _level(table: tuple[float, ...], severity: int) -> float:
    if severity not in SEVERITIES:
        raise DataError(f"severity must be one of {SEVERITIES}; got {severity!r}")
    return table[int(severity) - 1]


def _bounds(images: Tensor, low: float | Tensor | None, high: float | Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The value range as tensors like ``images``; None when it was not given."""
    if low is None and high is None:
        return None
    if low is None or high is None:
        raise DataError("give both ends of the value range, low and high, or neither (standardised images)")
    lower, upper = (torch.as_tensor(end).to(images) for end in (low, high))
    width = upper - lower
    if not bool((width > 0).all()):
        raise DataError(f"low must be smaller than high; got {low} and {high}")
    if bool(((images < lower - 1e-4 * width) | (images > upper + 1e-4 * width)).any()):
        reach = f"{float(images.min()):.4g} to {float(images.max()):.4g}"
        raise DataError(f"images run from {reach}, outside [low, high] = [{low}, {high}]; are they standardised?")
    return lower, upper


def _rotate(images: Tensor, degrees: float) -> Tensor:
    """Counter-clockwise rotation; the sampling grid is in units of half the sides, hence their ratio."""
    height, width = images.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    theta = [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]
    affine = torch.tensor(theta, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
    grid = torch.nn.functional.affine_grid(affine, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def corruption_shift(
    predictor: Predictor, x: Tensor, y: Tensor, *, low: float | Tensor, high: float | Tensor, seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """Accuracy and ECE of an image classifier under every corruption at severities 1..5.

    Args:
        predictor: a classifier.
        x: images [N, C, H, W].
        y: labels [N].
        low: smallest pixel value, per channel or for all.
        high: largest.
        seed: seed of the noise.
    """
    table: dict[str, dict[str, list[float]]] = {}
    for name in CORRUPTIONS:
        rows: dict[str, list[float]] = {"accuracy": [], "ece": []}
        for severity in range(1, 6):
            shifted = corrupt(x, name, severity, generator=torch.Generator().manual_seed(seed), low=low, high=high)
            p = predictor(shifted).exp()
            rows["accuracy"].append(float((p.argmax(1) == y).double().mean()))
            rows["ece"].append(ece(p, y))
        table[name] = rows
    return table


def ood_auroc(predictor: Predictor, inside: Tensor, outside: Tensor) -> float:
    """How well predictive entropy tells foreign inputs from the test inputs: AUROC, 1 is perfect, .5 is chance."""

    def entropy(x: Tensor) -> Tensor:
        logs = predictor(x)
        return -(logs.exp() * logs.clamp_min(-1e3)).sum(1).reshape(len(x), -1).mean(1)

    return auroc(entropy(inside), entropy(outside))
