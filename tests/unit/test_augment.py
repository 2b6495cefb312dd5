"""Pictures in other light, by what it does to every pixel."""

import math

import pytest
import torch

from embodied_rl.augment import Augment

N = 4000


def pictures(low=90, high=120):
    """[N, 4, 6, 3] dark enough that nothing is cut off at 255."""
    g = torch.Generator().manual_seed(0)
    return torch.randint(low, high, (N, 4, 6, 3), generator=g, dtype=torch.uint8)


def vary(seed=0, **settings):
    obs = {"camera": pictures(), "joints": torch.ones(N, 3), "words": torch.ones(N, 5, dtype=torch.int64)}
    out = Augment(**settings)(obs, torch.Generator().manual_seed(seed))
    assert out["joints"] is obs["joints"] and out["words"] is obs["words"]
    return obs["camera"].float(), out["camera"].float()


def reaches(factor, reach):
    """Factors fill [e^-reach, e^reach] evenly in their logarithm: ends, mean 0 and deviation reach / sqrt 3."""
    log = factor.log() / reach
    assert -1.08 < float(log.min()) < -0.95 and 0.95 < float(log.max()) < 1.08
    assert abs(float(log.mean())) < 5 / math.sqrt(3 * len(log))
    assert float(log.std()) == pytest.approx(1 / math.sqrt(3), rel=0.05)


def test_brightness_is_one_factor_for_each_picture():
    x, y = vary(brightness=0.5)
    factor = y.sum((1, 2, 3)) / x.sum((1, 2, 3))
    torch.testing.assert_close(y, x * factor[:, None, None, None], rtol=0, atol=1.2)  # rounded to whole numbers
    reaches(factor, 0.5)


def test_contrast_stretches_differences_from_the_pictures_mean():
    x, y = vary(contrast=0.4)
    torch.testing.assert_close(x.mean((1, 2, 3)), y.mean((1, 2, 3)), rtol=0, atol=0.3)
    reaches(y.std((1, 2, 3)) / x.std((1, 2, 3)), 0.4)


def test_colour_is_one_factor_for_each_channel():
    x, y = vary(colour=0.3)
    factor = y.sum((1, 2)) / x.sum((1, 2))
    torch.testing.assert_close(y, x * factor[:, None, None, :], rtol=0, atol=1.2)
    for channel in range(3):
        reaches(factor[:, channel], 0.3)
    assert abs(float(torch.corrcoef(factor.T)[0, 1])) < 0.1, "channels are drawn apart"


def test_nothing_asked_for_changes_nothing_and_a_seed_says_all():
    obs = {"camera": pictures()}
    assert Augment()(obs, torch.Generator()) is obs and not Augment().changes
    a, b, c = (vary(seed, brightness=0.4, contrast=0.4, colour=0.1)[1] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_too_bright_is_white_and_not_dark_again():
    white = {"camera": torch.full((50, 2, 2, 3), 250, dtype=torch.uint8)}
    out = Augment(brightness=1.0)(white, torch.Generator().manual_seed(0))["camera"]
    assert int(out.max()) == 255 and 80 < int(out.min()) < 130
