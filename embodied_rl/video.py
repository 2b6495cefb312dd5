"""Films of episodes: MP4 and GIF files, and one captioned grid with a border that tells success from failure."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import imageio
import matplotlib
import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from embodied_rl.errors import RunFolderError, ShapeError
from embodied_rl.runfolder import explained, write_json_atomic

SUCCESS, FAILURE, NEUTRAL = (46, 139, 87), (200, 62, 58), (110, 118, 129)
"""Border colours, RGB; neutral for envs without a notion of success."""
INDEX = "index.json"
BEFORE, PAIRS = "before", "pairs"
"""Folders in a run's `videos/`: the policy that training started from, and that one beside the trained one."""


@dataclass
class Clip:
    """One filmed episode.

    Example: `Clip(frames, task="push", instruction="push the red cube to the ring", success=True, length=41,
    episode_return=17.3)` with frames of shape [42, 128, 128, 3].
    """

    frames: np.ndarray
    """[T, H, W, 3] uint8."""
    task: str
    instruction: str = ""
    success: bool | None = None
    """Goal reached at some step; None when the env has no such notion."""
    length: int | None = None
    """Control steps."""
    episode_return: float | None = None

    def __post_init__(self) -> None:
        self.frames = as_frames(self.frames)


def as_frames(frames: np.ndarray | Tensor) -> np.ndarray:
    """Check pictures and return them as a NumPy array.

    Args:
        frames: [T, H, W, 3] uint8 array or tensor, T >= 1.

    Raises:
        ShapeError: Another shape or type.
    """
    array = frames.cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise ShapeError(
            f"frames have shape {list(array.shape)} and type {array.dtype}; a video needs [T, H, W, 3] uint8, T >= 1"
        )
    return array


def write_mp4(path: Path, frames: np.ndarray | Tensor, fps: float) -> None:
    """Write an H.264 MP4 that every browser plays.

    Args:
        path: Ends in .mp4.
        frames: [T, H, W, 3] uint8; an odd height or width loses its last row or column, which H.264 requires.
        fps: Frames per second.

    Raises:
        RunFolderError: It cannot be written.
    """
    array = as_frames(frames)
    array = array[:, : array.shape[1] // 2 * 2, : array.shape[2] // 2 * 2]
    temporary = path.with_name(f".tmp-{path.name}")
    with explained(path, "write the video"):
        path.parent.mkdir(parents=True, exist_ok=True)
        writer: Any = imageio.get_writer(
            temporary, fps=fps, codec="libx264", pixelformat="yuv420p", quality=None, macro_block_size=2,
            ffmpeg_log_level="error", output_params=["-crf", "24", "-preset", "veryfast", "-movflags", "+faststart"],
        )  # fmt: skip
        with writer:
            for frame in array:
                writer.append_data(frame)
        temporary.replace(path)


def write_gif(path: Path, frames: np.ndarray | Tensor, fps: float, *, width: int = 640, colors: int = 64) -> None:
    """Write a looping GIF, made small: at most 10 frames per second, `width` pixels and `colors` colours.

    Args:
        path: Ends in .gif.
        frames: [T, H, W, 3] uint8.
        fps: Frames per second of `frames`.
        width: Largest width, pixels.
        colors: Palette size, at most 256.

    Raises:
        RunFolderError: It cannot be written.
    """
    array = as_frames(frames)
    stride = max(1, round(fps / 10))
    pictures = [Image.fromarray(frame) for frame in array[::stride]]
    if array.shape[2] > width:
        size = (width, round(array.shape[1] * width / array.shape[2]))
        pictures = [p.resize(size, Image.Resampling.LANCZOS) for p in pictures]
    # One palette for all frames: a palette each makes still backgrounds flicker, and the file three times larger.
    sample = Image.new("RGB", (pictures[0].width, pictures[0].height * 3))
    for i, p in enumerate((pictures[0], pictures[len(pictures) // 2], pictures[-1])):
        sample.paste(p, (0, i * p.height))
    palette = sample.quantize(colors, method=Image.Quantize.FASTOCTREE)  # a median cut gives small things no colour
    indexed = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures]
    with explained(path, "write the video"):
        path.parent.mkdir(parents=True, exist_ok=True)
        duration = round(1000 * stride / fps)
        temporary = path.with_name(f".tmp-{path.name}")
        indexed[0].save(temporary, "GIF", save_all=True, append_images=indexed[1:], duration=duration, loop=0)
        temporary.replace(path)


def grid(clips: Sequence[Clip], *, columns: int | None = None, cell: int = 192) -> np.ndarray:
    """Lay clips side by side, each with its caption and a border coloured by outcome; short ones hold their last frame.

    Args:
        clips: At least one; pictures of any size.
        columns: Clips per row; about twice as many columns as rows when None.
        cell: Width of one picture, pixels.

    Returns:
        frames: [T, H, W, 3] uint8, T of the longest clip.
    """
    columns = columns or min(len(clips), math.ceil(math.sqrt(2 * len(clips))))
    rows = math.ceil(len(clips) / columns)
    length = max(len(c.frames) for c in clips)
    tiles = [framed(c, cell) for c in clips]
    height = max(t.shape[1] for t in tiles)
    width = tiles[0].shape[2]
    out = np.full((length, rows * height, columns * width, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // columns * height, i % columns * width
        out[: len(tile), y : y + tile.shape[1], x : x + width] = tile
        out[len(tile) :, y : y + tile.shape[1], x : x + width] = tile[-1]
    return out


def framed(clip: Clip, cell: int = 192) -> np.ndarray:
    """One clip scaled to `cell` pixels wide, with a coloured border and its caption: [T, H, W, 3] uint8."""
    border, line = max(3, cell // 48), max(10, cell // 13)
    colour = NEUTRAL if clip.success is None else SUCCESS if clip.success else FAILURE
    height = round(clip.frames.shape[1] * cell / clip.frames.shape[2])
    outer = (cell + 4 * border, height + 4 * border + round(3.7 * line))
    canvas = Image.new("RGB", outer, "white")
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((border, border, outer[0] - border - 1, height + 3 * border - 1), fill=colour)
    outcome = "" if clip.success is None else "success" if clip.success else "failure"
    top = height + 3 * border
    font, small = _font(line, bold=True), _font(round(line * 0.82))
    draw.text((border, top), clip.task, fill=(32, 36, 42), font=font)
    draw.text((outer[0] - border, top), outcome, fill=colour, font=font, anchor="ra")
    for i, text in enumerate(_wrapped(clip.instruction, small, cell)):
        draw.text((border, top + round((1.35 + 1.1 * i) * line)), text, fill=(90, 96, 105), font=small)
    background = np.asarray(canvas)
    out = np.repeat(background[None], len(clip.frames), axis=0)
    enlarge = clip.frames.shape[2] < cell
    resample = Image.Resampling.BICUBIC if enlarge else Image.Resampling.LANCZOS
    for i, frame in enumerate(clip.frames):
        picture = Image.fromarray(frame).resize((cell, height), resample)
        out[i, 2 * border : 2 * border + height, 2 * border : 2 * border + cell] = np.asarray(picture)
    return out


def read_clips(folder: Path) -> list[Clip]:
    """The clips that `write_videos` wrote into a folder, as H.264 kept them; none when there is no folder."""
    if not (folder / INDEX).is_file():
        return []
    clips = json.loads((folder / INDEX).read_text(encoding="utf-8"))["clips"]
    return [
        Clip(read_mp4(folder / c["file"]), c["task"], c["instruction"], c["success"], c["length"], c["return"])
        for c in clips
    ]


def read_mp4(path: Path) -> np.ndarray:
    """Frames [T, H, W, 3] uint8 of an MP4.

    Raises:
        RunFolderError: ffmpeg cannot read it.
    """
    # Not imageio's reader, which leaves its pipes open at the end of a file.
    command = [get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=False)
    size = re.search(r"Video:.*?, (\d+)x(\d+)", done.stderr.decode(errors="replace"))
    if done.returncode or size is None:
        raise RunFolderError(f"{path}: is not a film that ffmpeg can read; delete it and its index, and go on without")
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, int(size[2]), int(size[1]), 3)


def beside(left: np.ndarray, right: np.ndarray, gap: int = 4) -> np.ndarray:
    """Two films of one height in one, in step; the shorter holds its last frame.

    Args:
        left: [T1, H, W1, 3] uint8.
        right: [T2, H, W2, 3] uint8.
        gap: White columns between them.

    Returns:
        frames: [max(T1, T2), H, W1 + gap + W2, 3] uint8.
    """
    length = max(len(left), len(right))
    sides = [frames[np.minimum(np.arange(length), len(frames) - 1)] for frames in (left, right)]
    white = np.full((length, left.shape[1], gap, 3), 255, np.uint8)
    return np.concatenate([sides[0], white, sides[1]], axis=2)


def write_pairs(folder: Path, before: Sequence[Clip], after: Sequence[Clip], fps: float) -> None:
    """Write a film for each start that two policies played, one beside the other, with a grid and an index.

    Args:
        folder: Where to.
        before: Clips of the first policy.
        after: Clips of the second, of the same starts in the same order.
        fps: Frames per second.
    """
    index, tiles = [], []
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        name = f"{i:02d}_{_plain(a.task)}.mp4"
        height = min(a.frames.shape[1], b.frames.shape[1])  # H.264 may have cost one of them its last row
        write_mp4(folder / name, beside(a.frames[:, :height], b.frames[:, :height]), fps)
        index.append(
            {"file": name, "task": a.task, "instruction": a.instruction, "before": _facts(a), "after": _facts(b)}
        )
        tiles += [replace(clip, task=f"{clip.task}, {when}") for clip, when in ((a, "before"), (b, "after"))]
    whole = grid(tiles, columns=2 * max(1, round(math.sqrt(len(index)))))
    write_mp4(folder / "grid.mp4", whole, fps)
    write_gif(folder / "grid.gif", whole, fps)
    write_json_atomic(folder / INDEX, {"fps": fps, "pairs": index})


def write_videos(folder: Path, clips: Sequence[Clip], fps: float) -> list[dict[str, Any]]:
    """Write every clip as MP4, all of them as grid.mp4 and grid.gif, and an index that the report reads.

    Args:
        folder: The run's `videos/`.
        clips: Any number; nothing is written when there is none.
        fps: Frames per second, usually the env's control rate.

    Returns:
        index: One entry per clip: file, task, instruction, success, length, return.
    """
    index: list[dict[str, Any]] = []
    if not clips:
        return index
    for i, clip in enumerate(clips):
        outcome = "" if clip.success is None else "_success" if clip.success else "_failure"
        name = f"{i:02d}_{_plain(clip.task)}{outcome}.mp4"
        write_mp4(folder / name, clip.frames, fps)
        index.append({"file": name, "task": clip.task, "instruction": clip.instruction, **_facts(clip)})
    whole = grid(clips)
    write_mp4(folder / "grid.mp4", whole, fps)
    write_gif(folder / "grid.gif", whole, fps)
    write_json_atomic(folder / INDEX, {"fps": fps, "clips": index})
    return index


def _plain(name: str) -> str:
    """A task's name as part of a file name."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)


def _facts(clip: Clip) -> dict[str, Any]:
    return {"success": clip.success, "length": clip.length, "return": clip.episode_return}


@lru_cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into at most two lines of `width` pixels; what does not fit ends with an ellipsis."""
    words, first = text.split(), ""
    while words and font.getlength(f"{first} {words[0]}".strip()) <= width:
        first = f"{first} {words.pop(0)}".strip()
    rest = " ".join(words)
    if font.getlength(rest) <= width:
        return [first, rest]
    while rest and font.getlength(rest + "…") > width:
        rest = rest[:-1]
    return [first, rest.rstrip() + "…"]
