"""Corruptions: what each keeps, what grows with severity, and the references of scipy and numpy."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.ndimage
import torch

from ockham.errors import DataError
from ockham.run import shift

SEVERITIES = (1, 2, 3, 4, 5)


def pictures(n=6, channels=2, height=16, width=16, dtype=torch.float64):
    """Smooth blobs off the centre, values in [0, 1]."""
    g = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    centre = torch.rand(2, n, channels, 1, 1, generator=g) - 0.5
    return torch.exp(-((x - centre[0]) ** 2 + 3 * (y - centre[1]) ** 2) / 0.1).to(dtype)


def distance(name, severity, images):
    return float((shift.corrupt(images, name, severity, low=0.0, high=1.0) - images).square().mean().sqrt())


@pytest.mark.parametrize("name", shift.CORRUPTIONS)
@pytest.mark.parametrize("side", [8, 16, 28])
def test_distance_grows_with_severity(name, side):
    images = pictures(height=side, width=side)
    steps = [distance(name, s, images) for s in SEVERITIES]
    assert steps[0] > 1e-3 and all(a < b for a, b in itertools.pairwise(steps))


@pytest.mark.parametrize("name", shift.CORRUPTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keeps_shape_and_dtype_and_leaves_the_argument_alone(name, dtype):
    images = pictures(height=9, width=14, dtype=dtype)
    before = images.clone()
    got = shift.corrupt(images, name, 3)
    assert got.shape == images.shape and got.dtype == dtype and torch.equal(images, before)
    assert bool(got.isfinite().all()) and not torch.equal(got, images)
    assert torch.equal(got, shift.corrupt(images.to(torch.promote_types(dtype, torch.float32)), name, 3).to(dtype))
    shift.CORRUPTIONS[name](images, 3, torch.Generator())
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", shift.CORRUPTIONS)
def test_deterministic_and_global_random_state_untouched(name):
    images, state = pictures(), torch.get_rng_state()
    assert torch.equal(shift.corrupt(images, name, 2), shift.corrupt(images, name, 2))
    seeded = [shift.corrupt(images, name, 2, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(seeded[0], seeded[1])
    assert torch.equal(seeded[0], seeded[2]) == (name != "gaussian_noise")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", shift.CORRUPTIONS)
def test_order_of_the_images_does_not_matter_but_for_noise(name):
    if name == "gaussian_noise":
        generator = torch.Generator().manual_seed(0)
        first, second = (shift.corrupt(pictures(), name, 1, generator=generator) for _ in range(2))
        assert not torch.equal(first, second)  # one generator, batch after batch: fresh noise
    else:
        assert torch.equal(shift.corrupt(pictures().flip(0), name, 4), shift.corrupt(pictures(), name, 4).flip(0))


@pytest.mark.parametrize("name", shift.CORRUPTIONS)
def test_value_range_is_a_change_of_units(name):
    images = pictures()
    low, high = torch.tensor([-3.0, 10.0]).reshape(2, 1, 1), torch.tensor([5.0, 11.0]).reshape(2, 1, 1)
    unit = shift.corrupt(images, name, 3, low=0.0, high=1.0)
    scaled = shift.corrupt(low + images * (high - low), name, 3, low=low, high=high)
    torch.testing.assert_close(scaled, low + unit * (high - low), rtol=0, atol=1e-5)
    assert float(unit.min()) >= 0 and float(unit.max()) <= 1


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_the_std_of_the_table(severity):
    flat = torch.zeros(4, 3, 64, 64)
    noise = shift.corrupt(flat, "gaussian_noise", severity)
    assert float(noise.std()) == pytest.approx(4 * shift.NOISE_STD[severity - 1], rel=0.02)
    assert abs(float(noise.mean())) < 0.03
    clamped = shift.corrupt(flat, "gaussian_noise", severity, low=0.0, high=1.0)
    assert float(clamped.min()) == 0 and float((clamped == 0).double().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("size", [(3, 5), (16, 16), (9, 30)])
def test_blur_is_scipys_and_keeps_the_mean(severity, size):
    images = torch.rand(3, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = shift.corrupt(images, "gaussian_blur", severity)
    std = shift.BLUR_STD[severity - 1]
    radius = math.ceil(4 * std)
    expected = scipy.ndimage.gaussian_filter(
        images.numpy(), (0, 0, std, std), mode="reflect", radius=(0, 0, radius, radius)
    )
    torch.testing.assert_close(got, torch.as_tensor(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.mean((2, 3)), images.mean((2, 3)), rtol=0, atol=1e-12)
    assert bool((got.std((2, 3)) < images.std((2, 3))).all())


def test_rotation_is_scipys_in_the_interior():
    images = pictures(height=21, width=33)
    for severity, degrees in zip(SEVERITIES, shift.ROTATION_DEGREES, strict=True):
        got = shift.corrupt(images, "rotation", severity)
        expected = scipy.ndimage.rotate(images.numpy(), degrees, axes=(3, 2), reshape=False, order=1, mode="nearest")
        torch.testing.assert_close(got, torch.as_tensor(expected), rtol=0, atol=1e-6)


def test_rotation_by_a_right_angle_is_counter_clockwise():
    images = pictures()
    torch.testing.assert_close(shift._rotate(images, 90.0), torch.rot90(images, 1, (2, 3)), rtol=0, atol=1e-12)
    assert torch.equal(shift._rotate(images, 0.0).round(decimals=12), images.round(decimals=12))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_shrinks_the_std_and_keeps_the_mean(severity):
    images = pictures()
    got = shift.corrupt(images, "contrast", severity)
    torch.testing.assert_close(got.mean((2, 3)), images.mean((2, 3)))
    torch.testing.assert_close(got.std((2, 3)), shift.CONTRAST_FACTOR[severity - 1] * images.std((2, 3)))


def test_standardised_images_are_not_clamped_and_constant_images_survive():
    images = torch.full((1, 1, 8, 8), 7.0)
    for name in ("gaussian_blur", "rotation", "contrast"):
        torch.testing.assert_close(shift.corrupt(images, name, 5), images)
    assert float(shift.corrupt(images, "gaussian_noise", 5).max()) > 8


ONES = torch.ones(2, 1, 8, 8)
MISTAKES = {
    "unknown name": (lambda: shift.corrupt(ONES, "fog", 1), "'fog'; known are gaussian_noise, gaussian_blur"),
    "severity 0": (lambda: shift.corrupt(ONES, "contrast", 0), r"\(1, 2, 3, 4, 5\); got 0"),
    "severity 6": (lambda: shift.corrupt(ONES, "rotation", 6), "got 6"),
    "severity 2.5": (lambda: shift.corrupt(ONES, "gaussian_noise", 2.5), "got 2.5"),
    "flat images": (lambda: shift.corrupt(torch.ones(2, 64), "contrast", 1), r"\(2, 64\).*reshape"),
    "one image": (lambda: shift.corrupt(ONES[0], "contrast", 1), r"\[N, C, H, W\]"),
    "empty": (lambda: shift.corrupt(ONES[:0], "contrast", 1), r"\(0, 1, 8, 8\)"),
    "bytes": (lambda: shift.corrupt(ONES.to(torch.uint8), "contrast", 1), "divide bytes by 255"),
    "NaN": (lambda: shift.corrupt(ONES * float("nan"), "contrast", 1), "NaN"),
    "half a range": (lambda: shift.corrupt(ONES, "contrast", 1, low=0.0), "both ends"),
    "empty range": (lambda: shift.corrupt(ONES, "contrast", 1, low=1.0, high=1.0), "smaller than high"),
    "outside": (lambda: shift.corrupt(ONES * 3, "contrast", 1, low=0.0, high=1.0), "3 to 3, outside"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(DataError, match=message):
        call()
