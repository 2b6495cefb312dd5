"""What a policy sees when it has eyes: small pictures of some cameras, redrawn only where something has moved."""

from __future__ import annotations

import torch
from torch import Tensor

from embodied_rl.envs.tabletop.observe import Episode
from embodied_rl.envs.tabletop.scene import Scene
from embodied_rl.types import Obs, TensorSpec


class Pictures:
    """The latest picture of every copy from each camera."""

    def __init__(self, scene: Scene, num_envs: int, cameras: tuple[str, ...], size: int, device: torch.device) -> None:
        """Start the ray tracer.

        Args:
            scene: The tabletop scene.
            num_envs: Copies B.
            cameras: Names out of `scene.CAMERAS`.
            size: Rows and columns of each picture.
            device: Where pictures are made.
        """
        # Only those who ask for pictures pay for importing and compiling the ray tracer.
        from embodied_rl.envs.tabletop.camera import BatchCamera, paint

        self.specs = {
            name: TensorSpec((size, size, 3), torch.uint8, low=0, high=255, meaning=f"RGB picture of camera {name}")
            for name in cameras
        }
        self._scene, self._size, self._paint = scene, size, paint
        # Shadows would make a picture a quarter dearer and tell the policy little.
        self._camera = BatchCamera(scene.model, device, shadows=False)
        self._latest = {
            name: torch.zeros(num_envs, size, size, 3, dtype=torch.uint8, device=device) for name in cameras
        }
        self._stale = torch.ones(num_envs, dtype=torch.bool, device=device)

    def forget(self, copies: Tensor | None = None) -> None:
        """The masked copies [B] bool (None: all) have moved: their pictures are to be drawn again."""
        self._stale |= True if copies is None else copies

    def look(self, qpos: Tensor, episode: Episode) -> Obs:
        """Camera name -> [B, size, size, 3] uint8 of the state given, positions [B, nq]."""
        rows = self._stale.nonzero()[:, 0]
        if len(rows):
            painted = self._paint(self._scene, episode.colors[rows], episode.goal[rows])
            drawn = self._camera.render(qpos[rows], tuple(self._latest), self._size, self._size, *painted)
            for name, picture in self._latest.items():
                picture[rows] = drawn[name]
            self._stale.fill_(False)
        return {name: picture.clone() for name, picture in self._latest.items()}
