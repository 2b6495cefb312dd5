"""Progress as nearness to the run's own successes, seen by a frozen encoder (SRPO).

    features   z = encoder(what is seen): pictures averaged over a coarse grid, vectors as they are; nothing is trained
    references z where the goal first held, in the episodes of the same task or of the same start
    centres    of the references' clusters (DBSCAN); their mean where nothing clusters
    distance   d = min over centres |z - centre|
    progress   sigmoid(steepness (0.5 - (d - low) / (high - low))), low and high over the last states of failed episodes

While there is no success to compare with, it says nothing and no reward is paid.

Why a grid of mean colours: the frozen encoder has to work without a download, on any size of picture. Along the
tabletop's demonstrations an 8 x 8 grid orders states in time as well as fixed random convolutions do, and better than
they do when the layout differs (docs/performance.md). A pretrained vision model sees more: `encoder` takes its folder.

Source: Fei et al. 2025, section 3 (SRPO, arXiv:2511.15605), with the constants of the authors' code (siiRL). Differs:
the encoder sees states instead of whole videos (V-JEPA 2 in the paper; `embed: trajectory` averages over the episode),
successes of earlier rollouts are kept, and the clusters' radius is per feature, so that it does not depend on how many
features there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from embodied_rl.errors import CapabilityError
from embodied_rl.rewards import Episode, RewardConfig, RewardModel
from embodied_rl.rewards._encoders import Encoder
from embodied_rl.types import EnvSpec, State


class Config(RewardConfig):
    """Settings of self-referential progress."""

    type: Literal["self_referential"] = "self_referential"
    use: Literal["potential", "outcome"] = "outcome"
    """outcome, as in SRPO: pays failed episodes their last progress; potential: pays the change of progress, judged by
    earlier rollouts, which leaves the best policy the best."""
    coef: float = Field(0.6, gt=0)
    """Reward per unit of progress; with outcome keep it below what the env pays for success."""
    compare: Literal["task", "group"] = "task"
    """Whose successes count: those of the same task, or (where every start is another layout) of the same start."""
    memory: int = Field(64, ge=0)
    """Latest successes of earlier rollouts that are kept for each task beside the new ones; 0: the new ones alone."""
    embed: Literal["state", "trajectory"] = "state"
    """state: where the episode is; trajectory: the mean of all its states so far."""
    encoder: str = Field("pixels", min_length=1)
    """pixels: mean colours over a grid; or the folder of a Hugging Face vision model (extra: vla)."""
    grid: int = Field(8, ge=1)
    """Rows and columns of the pixels encoder; finer sees smaller objects, but also nothing else as near."""
    entries: tuple[str, ...] | None = None
    """Entries of the observation that it looks at; null: the pictures, or the vectors where there are none."""
    radius: float = Field(0.5, gt=0)
    """Successes this near belong to one cluster: root mean square over features, in standard deviations of them."""
    neighbours: int = Field(2, ge=1)
    """Successes, itself included, that one needs within the radius to found a cluster; 1: every success counts."""
    steepness: float = Field(10.0, gt=0)
    """How sharply progress falls from 1 to 0 with the distance."""

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.compare == "group" and self.use == "potential":
            raise ValueError(
                "compare (group) knows no success before the rollout that it judges, and use (potential) may look at "
                "earlier ones only: set compare: task, or use: outcome"
            )
        if self.compare == "group" and self.memory != type(self).model_fields["memory"].default:
            raise ValueError(f"memory ({self.memory}) does nothing with compare (group), whose starts never come back")
        if self.encoder != "pixels" and self.grid != type(self).model_fields["grid"].default:
            raise ValueError(
                f"grid ({self.grid}) does nothing with encoder ({self.encoder}): remove it, or set encoder: pixels"
            )
        return self

    @property
    def needs_groups(self) -> bool:
        """Whether copies must share starts."""
        return self.compare == "group"

    @property
    def needs_whole_episodes(self) -> bool:
        """Whether an episode must lie within one rollout."""
        return self.use == "outcome" or self.embed == "trajectory"


def cluster(x: Tensor, radius: float, neighbours: int) -> Tensor:
    """DBSCAN: points with enough points nearby found clusters, which grow as far as such points reach.

    Args:
        x: [M, D].
        radius: Largest distance of a neighbour.
        neighbours: Points within the radius, itself included, that make a point a core.

    Returns:
        label: [M] int64, the lowest core index of the cluster; M for points in none. A point that is no core goes to
            the first of the clusters it touches.

    Source: Ester et al. 1996.
    """
    m = len(x)
    near = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") <= radius
    core = near.sum(1) >= neighbours
    nobody = torch.full((), m, device=x.device)
    label = torch.where(core, torch.arange(m, device=x.device), nobody)
    while True:  # the lowest label walks from core to core
        reached = torch.where(near, label, nobody).amin(1)
        grown = torch.where(core, reached, label)
        if torch.equal(grown, label):
            return reached
        label = grown


def cluster_centres(x: Tensor, radius: float, neighbours: int) -> Tensor:
    """Mean of each cluster of successes; the mean of all where nothing clusters.

    Clusters are found among features of mean 0 and (population) standard deviation 1, at a root mean square distance.

    Args:
        x: [M, D], M >= 1.
        radius: See `cluster`, per feature.
        neighbours: See `cluster`.

    Returns:
        centres: [K, D].
    """
    std = x.std(0, unbiased=False)
    scaled = (x - x.mean(0)) / torch.where(std > 0, std, torch.ones_like(std))
    label = cluster(scaled, radius * x.shape[1] ** 0.5, neighbours)
    found = [x[label == i].mean(0) for i in label.unique().tolist() if i < len(x)]
    return torch.stack(found) if found else x.mean(0, keepdim=True)


class SelfReferential(RewardModel):
    """See the module docstring."""

    def __init__(self, config: Config, env: EnvSpec, device: torch.device) -> None:
        """Start without any success.

        Raises:
            CapabilityError: The env tells no success.
        """
        if not env.has_success:
            raise CapabilityError(
                "reward self_referential learns from successes, and this env does not say which episodes succeed "
                "(it has no success): remove the section, or choose another reward model"
            )
        self.config, self.device = config, device
        self.encoder = Encoder(config.encoder, config.grid, config.entries, env, device)
        self.references: dict[int, Tensor] = {}
        """Task or group -> [M, D], oldest first."""
        self.scale: dict[int, tuple[float, float]] = {}
        """Task or group -> smallest and largest distance of a failure."""

    def judge(self, episodes: Sequence[Episode]) -> list[Tensor | None]:
        """See `RewardModel.judge`; learns from the rollout before judging it (outcome) or after (potential)."""
        seen = self._embed(episodes)
        if self.config.use == "outcome":
            self._learn(episodes, seen)
            return self._answers(episodes, seen)
        answers = self._answers(episodes, seen)
        self._learn(episodes, seen)
        return answers

    def _key(self, episode: Episode) -> int:
        return episode.task if self.config.compare == "task" else episode.group

    def _embed(self, episodes: Sequence[Episode]) -> list[Tensor]:
        """[L + 1, D] of each episode."""
        z = self.encoder([e.obs for e in episodes])
        if self.config.embed == "state":
            return z
        return [x.cumsum(0) / torch.arange(1, len(x) + 1, device=x.device).unsqueeze(-1) for x in z]

    def _learn(self, episodes: Sequence[Episode], seen: Sequence[Tensor]) -> None:
        """Take over the rollout's successes, and how far its failures stayed from them."""
        if self.config.compare == "group":  # starts do not come back
            self.references, self.scale = {}, {}
        new: dict[int, list[Tensor]] = {}
        for e, z in zip(episodes, seen, strict=True):
            if e.success is not None and e.succeeded:
                new.setdefault(self._key(e), []).append(z[int(e.success.int().argmax()) + 1])
        for key in sorted(self.references.keys() | new.keys()):
            kept = self.references.get(key, torch.empty(0, *seen[0].shape[1:], device=self.device))
            kept = kept[max(0, len(kept) - self.config.memory) :]
            self.references[key] = torch.cat([kept, torch.stack(new[key])]) if key in new else kept
        far: dict[int, list[float]] = {}
        centres = self._centres()
        for e, z in zip(episodes, seen, strict=True):
            if e.failed and (key := self._key(e)) in centres:
                far.setdefault(key, []).append(float(distance(z[-1:], centres[key])))
        self.scale |= {key: (min(d), max(d)) for key, d in far.items()}

    def _centres(self) -> dict[int, Tensor]:
        c = self.config
        return {key: cluster_centres(x, c.radius, c.neighbours) for key, x in self.references.items() if len(x)}

    def _answers(self, episodes: Sequence[Episode], seen: Sequence[Tensor]) -> list[Tensor | None]:
        centres = self._centres()
        out: list[Tensor | None] = []
        for e, z in zip(episodes, seen, strict=True):
            key = self._key(e)
            known = key in centres and key in self.scale
            out.append(progress(distance(z, centres[key]), *self.scale[key], self.config.steepness) if known else None)
        return out

    def state_dict(self) -> State:
        """Successes and scales."""
        return {
            "references": {str(key): x for key, x in self.references.items()},
            "scale": {str(key): list(x) for key, x in self.scale.items()},
        }

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict`."""
        self.references = {int(key): x.to(self.device) for key, x in state["references"].items()}
        self.scale = {int(key): (low, high) for key, (low, high) in state["scale"].items()}


def distance(z: Tensor, centres: Tensor) -> Tensor:
    """[N] Euclidean distance of features [N, D] to the nearest of the centres [K, D]."""
    return torch.cdist(z, centres, compute_mode="donot_use_mm_for_euclid_dist").amin(1)


def progress(d: Tensor, low: float, high: float, steepness: float) -> Tensor:
    """sigmoid(steepness (0.5 - (d - low) / (high - low))); 0.5 where low and high are the same.

    Args:
        d: [N] distances.
        low: Distance of the nearest failure.
        high: Distance of the farthest.
        steepness: Factor.

    Returns:
        progress: [N] in [0, 1].
    """
    if high - low < 1e-6:
        return torch.full_like(d, 0.5)
    return torch.sigmoid(steepness * (0.5 - (d - low) / (high - low)))


def build(config: Config, *, env: EnvSpec, device: torch.device) -> SelfReferential:
    """Make the model for an env."""
    return SelfReferential(config, env, device)
