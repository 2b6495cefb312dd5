"""A camera's depth is read like a picture: where something is, and how far away."""

import pytest
import torch

from embodied_rl.errors import CapabilityError
from embodied_rl.policies._trunk import FAR, Trunk, TrunkConfig
from embodied_rl.types import ActionSpec, TensorSpec
from tests.kit import spec

CONFIG = TrunkConfig(width=32, layers=1, heads=2, channels=16, glances=2, foresight=0)


def trunk(shape=(32, 32, 1), dtype=torch.float32):
    torch.manual_seed(0)
    return Trunk(spec({"eye_depth": TensorSpec(shape, dtype)}, ActionSpec("continuous", 2)), CONFIG)


def scenes(n, generator):
    """Something half a metre away before a wall that is one away: depths, and where it is."""
    corner = torch.randint(0, 28, (n, 2), generator=generator)
    depth = torch.ones(n, 32, 32, 1)
    for row, (y, x) in enumerate(corner.tolist()):
        depth[row, y : y + 5, x : x + 5] = 0.5
    return depth, corner / 14.0 - 1


def test_where_a_thing_is_can_be_learned_from_depth_alone():
    eye, head = trunk(), torch.nn.Linear(32, 2)
    optimizer = torch.optim.Adam([*eye.parameters(), *head.parameters()], lr=3e-3)
    generator, errors = torch.Generator().manual_seed(0), []
    for _ in range(120):
        depth, place = scenes(64, generator)
        error = (head(eye.prefix({"eye_depth": depth}).summary) - place).square().mean()
        optimizer.zero_grad(), error.backward(), optimizer.step()
        errors.append(error.item())
    assert sum(errors[-10:]) / 10 < 0.03, "a guess of the middle is off by 0.33"


def test_how_far_away_a_thing_is_matters_up_to_a_limit():
    eye = trunk()
    summary = [eye.prefix({"eye_depth": torch.full((16, 32, 32, 1), metres)}).summary for metres in (0.2, 0.4, FAR, 9 * FAR)]
    assert not torch.allclose(summary[0], summary[1]) and not torch.allclose(summary[1], summary[2])
    assert torch.equal(summary[2], summary[3])


@pytest.mark.parametrize(("shape", "dtype"), [((32, 32, 2), torch.float32), ((32, 32, 1), torch.uint8), ((32, 32, 3), torch.float32)])
def test_other_pictures_are_refused(shape, dtype):
    with pytest.raises(CapabilityError, match=r"RGB pictures \[H, W, 3\] uint8, depths \[H, W, 1\] in metres, vectors"):
        trunk(shape, dtype)


def test_a_depth_that_does_not_fit_the_patches_is_refused():
    with pytest.raises(CapabilityError, match="'eye_depth' is a picture of 30 x 32 pixels"):
        trunk((30, 32, 1))
