r"""Pictures in other light: a scene that was demonstrated once is seen in many lights while it is imitated.

    y = clamp(b k_c (m + g (x - m)), 0, 255),   log b, log g uniform in +-brightness, +-contrast;  log k_c in +-colour

with m the mean of the picture x over pixels and channels; b and g are drawn for each picture, k_c for each of its
channels. What a shape looks like then does not hang on the few shades it was demonstrated in.

Source: the colour jitter of Krizhevsky et al. 2012 and its successors, which vision-language-action models are
fine-tuned with (Kim et al. 2024, OpenVLA, arXiv:2406.09246). Differs: factors are uniform in their logarithm, so that
twice and half are equally likely, and tints are one factor per channel instead of a turn of the hue.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from embodied_rl.section import Section
from embodied_rl.types import Obs


class Augment(Section):
    """How the light of demonstrated pictures is varied; 0 everywhere leaves them as they are."""

    brightness: float = Field(0.0, ge=0, le=2)
    """Pictures are made brighter or darker by a factor of up to e to this: 0.4 is 0.67 to 1.49."""
    contrast: float = Field(0.0, ge=0, le=2)
    """Differences from the picture's mean are stretched or shrunk by a factor of up to e to this."""
    colour: float = Field(0.0, ge=0, le=2)
    """Each channel is made stronger or weaker by a factor of its own, up to e to this. Large values change what a word
    for a colour means."""

    @property
    def changes(self) -> bool:
        """Whether anything is varied."""
        return bool(self.brightness or self.contrast or self.colour)

    def __call__(self, obs: Obs, generator: torch.Generator) -> Obs:
        """Vary every picture of an observation.

        Args:
            obs: name -> [N, ...]; uint8 entries of [N, H, W, 3] are pictures.
            generator: On their device.

        Returns:
            obs: The same entries, the pictures new ones.
        """
        if not self.changes:
            return obs
        return {k: self._picture(x, generator) if x.dtype == torch.uint8 and x.ndim == 4 else x for k, x in obs.items()}

    def _picture(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        def factor(channels: int, reach: float) -> Tensor:
            u = torch.rand(len(picture), 1, 1, channels, generator=generator, device=picture.device)
            return torch.exp(reach * (2 * u - 1))

        x = picture.float()
        light = factor(1, self.brightness) * factor(picture.shape[3], self.colour)
        stretch = factor(1, self.contrast)
        mean = x.mean((1, 2, 3), keepdim=True)
        return (x.mul_(light * stretch).add_(light * (1 - stretch) * mean)).round_().clamp_(0, 255).to(torch.uint8)
