r"""The body that all small vision-language-action policies share: pictures, words and joints in, tokens out.

    picture --conv--> 16 x 16 features --\      (words scale and shift the features on their way)
    words ----------> queries -----------+-> where the words look: tokens (what is there, and where)  \
    words ----------> one token                                                                        +-> prefix
    vectors --------> one token each                                                                  /
    prefix tokens attend to each other; suffix tokens (an action chunk) attend to the prefix and to themselves

The prefix is computed once per decision and its keys and values are kept, so action tokens and denoising steps cost a
few small matrix products each.

Source: the split into a prefix that never sees the suffix is that of Black et al. 2024 (pi0, arXiv:2410.24164); the
expected picture coordinates are the spatial softmax of Levine et al. 2016 (arXiv:1504.00702), here asked by words.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from embodied_rl.errors import CapabilityError
from embodied_rl.policies._critic import ValueHead
from embodied_rl.section import Section
from embodied_rl.types import EnvSpec, Obs, TensorSpec

MIN_ROWS = 16
"""Smaller batches are padded: matrix kernels change their summation order below it, and then the log-probability of a
decision would depend on the size of the batch it is evaluated in."""
WORD_STD = 0.15
"""Standard deviation of untrained word vectors; with 1 the words that say nothing drown the one that matters."""
SHARPNESS = 2.0
"""Factor on the words' questions and on the scores of a glance. From a flat start the expected place is the middle of
the picture for everything: with 1 and features that are not normalised, 600 steps of supervised search for the object
meant ended 7 cm off; with 2 and normalised ones, 300 steps ended 1.4 cm off."""
PATCH = 4
"""Pixels per feature along each axis of a picture."""
FAR = 4.0
"""m; what is farther away is as far as that."""

KeysValues = tuple[Tensor, Tensor]
Cache = list[KeysValues]
"""Keys and values [N, heads, tokens, width / heads] of the prefix, layer by layer."""


class Prefix(NamedTuple):
    """What is made of an observation, once per decision."""

    summary: Tensor
    """[N, width] for the critic."""
    cache: Cache
    """For `Trunk.suffix`."""
    sight: Tensor
    """[N, ...] what foresight reads."""


class Look(NamedTuple):
    """What an observation shows before its parts have met: words, and where they look."""

    words: Tensor
    """[N, words]"""
    glances: list[Tensor]
    """[N, glances, width] of each picture."""
    sight: Tensor
    """[N, ...] both, for foresight."""


class TrunkConfig(Section):
    """Settings that all policies on this trunk have."""

    width: int = Field(128, ge=16)
    """Width of a token."""
    layers: int = Field(2, ge=1)
    """Transformer layers."""
    heads: int = Field(4, ge=1)
    """Attention heads of a layer."""
    channels: int = Field(48, ge=8)
    """Channels of the picture encoder."""
    glances: int = Field(8, ge=1)
    """Tokens per picture: places that the words and the network ask for."""
    chunk: int = Field(4, ge=1)
    """Control steps that one decision covers."""
    foresight: float = Field(1.0, ge=0)
    """Weight, while imitating, of a second loss: predict where the robot will be at the end of the demonstration. It
    teaches the eye where to look long before the actions could; 0 leaves it out."""
    foresight_reads: Literal["sight", "summary"] = "sight"
    """sight: pictures and words only, so that it cannot follow the robot instead of looking; summary: vectors as well,
    where one of them tells the goal. hf_vla, whose model mixes all it is given, reads the summary and has no choice."""
    critic: ValueHead = ValueHead()

    @model_validator(mode="after")
    def _fits_together(self) -> TrunkConfig:
        if not self.foresight and self.foresight_reads != "sight":
            raise ValueError(
                f"foresight_reads ({self.foresight_reads}) does nothing with foresight (0): remove it, or set foresight"
            )
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        return self


class Attention(nn.Module):
    """Multi-head attention whose keys and values can be kept."""

    def __init__(self, width: int, heads: int) -> None:
        """Four square matrices."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, past: KeysValues | None, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """From [N, L, width] to the same, and the keys and values of all that was attended to.

        Args:
            x: Tokens.
            past: Keys and values of tokens before them.
            mask: [L, past + L] bool, who may look at whom; None for all.
        """
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(seen.transpose(1, 2).reshape(n, length, width)), k, v


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        """Attention and a perceptron of twice the width."""
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, past: KeysValues | None, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Attention`."""
        seen, k, v = self.attention(self.norm1(x), past, mask)
        x = x + seen
        return x + self.down(F.gelu(self.up(self.norm2(x)))), k, v


class Words(nn.Module):
    """An instruction's word ids as one vector."""

    def __init__(self, spec: TensorSpec, width: int) -> None:
        """Untrained vectors, and one attention layer so that the order of words can matter."""
        super().__init__()
        self.embedding = nn.Embedding(int(spec.high or 0) + 1, width, padding_idx=0)
        self.embedding.weight.data.mul_(WORD_STD)
        self.place = nn.Parameter(WORD_STD * torch.randn(spec.shape[0], width))
        self.attention = Attention(width, 2)
        nn.init.zeros_(self.attention.out.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """[N, L] int64 to [N, width]: the sum over words, for in a mean the one that matters would drown."""
        present = ids != 0
        x = self.embedding(ids)
        # A row of padding only may look at itself: a softmax over nothing is not a number.
        allowed = (present | ~present.any(1, keepdim=True))[:, None, None, :]
        seen, _, _ = self.attention(x + self.place, None, allowed)
        return ((x + seen) * present.unsqueeze(-1)).sum(1)


class Film(nn.Module):
    """Words say which features of a picture matter: y_c = x_c (1 + a_c(words)) + b_c(words), at first y = x.

    Source: Perez et al. 2018 (FiLM, arXiv:1709.07871), eq. 2.
    """

    def __init__(self, words: int, channels: int) -> None:
        """The identity: nothing is drawn."""
        super().__init__()
        self.change = nn.utils.skip_init(nn.Linear, words, 2 * channels)
        nn.init.zeros_(self.change.weight), nn.init.zeros_(self.change.bias)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """[N, C, H, W] and [N, words] to [N, C, H, W]."""
        a, b = self.change(words)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(b, x, 1 + a)


class Eye(nn.Module):
    """A picture as a few tokens: features averaged over the places that the words ask for, and those places."""

    where: Tensor
    shades: Tensor

    def __init__(self, spec: TensorSpec, words: int, config: TrunkConfig) -> None:
        """Two convolutions; queries from the words and of their own.

        They read each colour and its logarithm, in which a face in the shade is darker by the same number whatever its
        colour: that is what tells a cube from a cylinder five pixels wide. Of a depth in metres they read the same two.
        """
        super().__init__()
        height, width, channels = spec.shape
        c = config.channels
        self.conv1 = nn.Conv2d(2 * channels, c, 2 * PATCH, PATCH, padding=PATCH // 2)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1)
        self.film1, self.film2 = Film(words, c), Film(words, c)
        self.norm = nn.LayerNorm(c)
        self.query = nn.Parameter(torch.randn(config.glances, c))
        self.ask = nn.Linear(words, config.glances * c)
        self.token = nn.Linear(c + 2, config.width)
        self.name = nn.Parameter(0.1 * torch.randn(config.glances, config.width))
        rows, columns = height // PATCH, width // PATCH
        y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
        self.register_buffer("where", 2 * torch.stack([x, y], -1).flatten(0, 1), persistent=False)
        shade = torch.arange(256.0)
        pair = torch.stack([shade / 127.5 - 1.0, torch.log((shade + 8.0) / 90.0)], dim=1)
        # Both numbers of a colour as one of 64 bits: looking them up is several times as fast as computing them.
        self.register_buffer("shades", pair.view(torch.int64).squeeze(1), persistent=False)

    def forward(self, picture: Tensor, words: Tensor) -> Tensor:
        """[N, H, W, 3] uint8, or [N, H, W, 1] in metres, and [N, words] to [N, glances, width]."""
        if picture.dtype == torch.uint8:
            shades = self.shades.index_select(0, picture.flatten().int()).view(torch.float32)
            x = shades.view(*picture.shape[:3], 6)
        else:
            metres = picture.clamp(0.0, FAR)
            x = torch.cat([metres - 1.0, torch.log(metres + 0.1)], dim=3)
        n, x = len(x), x.permute(0, 3, 1, 2).to(self.conv1.weight.dtype)
        x = F.gelu(self.film1(self.conv1(x), words))
        x = x + F.gelu(self.film2(self.conv2(x), words))
        features = self.norm(x.flatten(2).transpose(1, 2))
        c = features.shape[2]
        query = self.query + SHARPNESS * self.ask(words).view(n, -1, c)
        weight = torch.softmax(torch.bmm(query, features.transpose(1, 2)) * (SHARPNESS / math.sqrt(c)), dim=-1)
        places = torch.matmul(weight, self.where)
        return self.token(torch.cat([torch.bmm(weight, features), places], dim=-1)) + self.name


def row_of_words(env: EnvSpec) -> str:
    """Name of an env's row of word ids, "" when it has none.

    Raises:
        CapabilityError: It has several.
    """
    rows = [n for n, o in env.seen.items() if o.dtype == torch.int64 and len(o.shape) == 1 and o.high is not None]
    if len(rows) > 1:
        raise CapabilityError(
            f"this env shows {len(rows)} rows of word ids ({', '.join(rows)}), and this policy reads one: show one "
            "(parts of a mixture share it under one name where their ids are of one vocabulary), or use policy mlp"
        )
    return rows[0] if rows else ""


class Trunk(nn.Module):
    """See the module docstring."""

    no_words: Tensor

    def __init__(self, env: EnvSpec, config: TrunkConfig) -> None:
        """Choose an encoder for each entry of the observation by its dtype and rank.

        Raises:
            CapabilityError: An entry that is neither picture, vector nor word ids, or a second row of word ids.
        """
        super().__init__()
        self.config = config
        word_width = 64
        self.pictures: list[str] = []
        self.vectors: list[str] = []
        self.eyes, self.joints = nn.ModuleDict(), nn.ModuleDict()
        self.words_entry = row_of_words(env)
        for name, spec in env.seen.items():
            floats, shape = spec.dtype.is_floating_point, spec.shape
            if len(shape) == 3 and ((spec.dtype == torch.uint8 and shape[2] == 3) or (floats and shape[2] == 1)):
                if spec.shape[0] % PATCH or spec.shape[1] % PATCH:
                    raise CapabilityError(
                        f"observation '{name}' is a picture of {spec.shape[0]} x {spec.shape[1]} pixels; this policy "
                        f"takes multiples of {PATCH}: make the env's pictures {-(-spec.shape[0] // PATCH) * PATCH} x "
                        f"{-(-spec.shape[1] // PATCH) * PATCH}"
                    )
                self.pictures.append(name)
                self.eyes[name] = Eye(spec, word_width, config)
            elif floats and len(shape) == 1:
                self.vectors.append(name)
                self.joints[name] = nn.Linear(spec.shape[0], config.width)
            elif name == self.words_entry:
                self.words = Words(spec, word_width)
                self.word_token = nn.Linear(word_width, config.width)
            else:
                raise CapabilityError(
                    f"policy with the tiny VLA trunk cannot read observation '{name}' ({spec.dtype}, shape "
                    f"{list(spec.shape)}): it takes RGB pictures [H, W, 3] uint8, depths [H, W, 1] in metres, "
                    "vectors, and one row of word ids"
                )
        self.register_buffer("no_words", torch.zeros(word_width), persistent=False)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.summary = nn.Parameter(0.1 * torch.randn(config.width))
        sight = len(self.pictures) * config.glances * config.width + word_width * bool(self.words_entry)
        self.looks = bool(sight) and config.foresight_reads == "sight"
        wanted = bool(config.foresight and self.vectors)
        self.sight = sight if self.looks else config.width
        self.foresight = Foresight(env, self.vectors, self.sight, config.width) if wanted else None

    def fit_vectors(self, statistics: dict[str, dict[str, Tensor]]) -> None:
        """See `embodied_rl.types.Imitator`."""
        if self.foresight is not None:
            self.foresight.fit(statistics)

    def foresight_loss(self, sight: Tensor, last: Obs) -> Tensor:
        """[N, 1] what `foresight` adds to the loss of a demonstrated frame."""
        if self.foresight is None:
            return sight.new_zeros(len(sight), 1)
        return self.config.foresight * self.foresight.loss(sight, last).unsqueeze(1)

    def prefix(self, obs: Obs) -> Prefix:
        """Encode what is seen.

        Args:
            obs: [N, ...], N at least MIN_ROWS (see `padded`).

        Returns:
            prefix: Summary, keys and values, and what was seen.
        """
        n = len(next(iter(obs.values())))
        words, glances, sight = self.look(obs)
        joints = [self.joints[name](obs[name]).unsqueeze(1) for name in self.vectors]
        sentence = [self.word_token(words).unsqueeze(1)] if self.words_entry else []
        summary, cache = self.run(torch.cat([self.summary.expand(n, 1, -1), *glances, *joints, *sentence], dim=1))
        return Prefix(summary, cache, sight if self.looks else summary)

    def look(self, obs: Obs) -> Look:
        """Read the words, and pictures where the words look: [N, ...], N at least MIN_ROWS."""
        n = len(next(iter(obs.values())))
        words = self.words(obs[self.words_entry]) if self.words_entry else self.no_words.expand(n, -1)
        glances = [self.eyes[name](obs[name], words) for name in self.pictures]
        sight = [g.flatten(1) for g in glances] + ([words] if self.words_entry else [])
        return Look(words, glances, torch.cat(sight, dim=1) if sight else words)

    def run(self, x: Tensor) -> tuple[Tensor, Cache]:
        """Let prefix tokens [N, L, width] attend to each other: the first one [N, width], and all keys and values."""
        cache: Cache = []
        for block in self.blocks:
            x, k, v = block(x, None, None)
            cache.append((k, v))
        return x[:, 0], cache

    def suffix(self, x: Tensor, cache: Cache, *, mask: Tensor | None = None, grow: bool = False) -> Tensor:
        """Run action tokens over the prefix.

        Args:
            x: [N, L, width].
            cache: Of `prefix`; with `grow` it becomes that of prefix and suffix.
            mask: [L, prefix + L] bool, who may look at whom; None for all.
            grow: Keep the new keys and values for the next call.

        Returns:
            out: [N, L, width].
        """
        for i, block in enumerate(self.blocks):
            x, k, v = block(x, cache[i], mask)
            if grow:
                cache[i] = (k, v)
        return x


def causal_mask(length: int, cache: Cache) -> Tensor:
    """[L, prefix + L] bool: the prefix and the tokens before one, and itself."""
    past = cache[0][0].shape[2]
    return torch.ones(length, past + length, dtype=torch.bool, device=cache[0][0].device).tril(past)


class Foresight(nn.Module):
    """Predict the observation's vectors at the end of a demonstration.

    Those of the moment are best kept from it: late in a demonstration where the hand is tells where it ends, and a
    prediction that follows the hand instead of the picture goes astray with the hand.

    Only imitation trains it; it is frozen until then, so that a policy gradient alone carries it along unchanged.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, env: EnvSpec, names: list[str], sight: int, width: int) -> None:
        """One hidden layer, from `sight` numbers to all vectors of the observation."""
        super().__init__()
        self.names = names
        size = sum(env.observation[name].shape[0] for name in names)
        self.hidden, self.head = nn.Linear(sight, width), nn.Linear(width, size)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.requires_grad_(False)

    def fit(self, statistics: dict[str, dict[str, Tensor]]) -> None:
        """Take over mean and std of each entry, and become trainable."""
        self.mean.copy_(torch.cat([statistics[name]["mean"] for name in self.names]))
        self.std.copy_(torch.cat([statistics[name]["std"] for name in self.names]).clamp(min=0.01))
        self.requires_grad_(True)

    def loss(self, sight: Tensor, last: Obs) -> Tensor:
        """[N] mean Huber loss of the error in standard deviations, times 2: squared up to 1, then linear.

        A direction that is the same in nearly all demonstrations has a standard deviation of nearly nothing, and where
        it does differ a squared error of 40 of them would drown everything else.
        """
        target = (torch.cat([last[name] for name in self.names], dim=1) - self.mean) / self.std
        return 2 * F.huber_loss(self.head(F.gelu(self.hidden(sight))), target, reduction="none").mean(1)


def padded(obs: Obs) -> tuple[Obs, int]:
    """Observations with at least MIN_ROWS rows, and how many of them are real."""
    n = len(next(iter(obs.values())))
    return ({k: pad_rows(v) for k, v in obs.items()} if n < MIN_ROWS else obs), n


def pad_rows(x: Tensor) -> Tensor:
    """Append zero rows up to MIN_ROWS."""
    missing = MIN_ROWS - len(x)
    return x if missing <= 0 else torch.cat([x, x.new_zeros(missing, *x.shape[1:])])


class ActionScale(nn.Module):
    """Between the actions of demonstrations and numbers of order one; part of the checkpoint."""

    center: Tensor
    reach: Tensor

    def __init__(self, size: int) -> None:
        """The identity for `size` action dimensions."""
        super().__init__()
        self.register_buffer("center", torch.zeros(size))
        self.register_buffer("reach", torch.ones(size))

    def fit(self, low: Tensor, high: Tensor) -> None:
        """Map [low, high] to [-1, 1]; a dimension that never moves keeps a small range around its value."""
        self.center.copy_((low + high) / 2)
        self.reach.copy_(((high - low) / 2).clamp(min=0.01))

    def normalise(self, action: Tensor) -> Tensor:
        """(a - center) / reach over the last axis."""
        return (action - self.center) / self.reach

    def restore(self, x: Tensor) -> Tensor:
        """The inverse, limited to the action range."""
        return (x * self.reach + self.center).clamp(-1, 1)
