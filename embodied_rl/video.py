"""Films of episodes: MP4 and GIF files, and one captioned grid with a border that tells success from failure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import imageio
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from embodied_rl.errors import ShapeError
from embodied_rl.runfolder import explained, write_json_atomic

SUCCESS, FAILURE, NEUTRAL = (46, 139, 87), (200, 62, 58), (110, 118, 129)
"""Border colours, RGB; neutral for envs without a notion of success."""
INDEX = "index.json"


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
    palette = sample.quantize(colors, method=Image.Quantize.MEDIANCUT)
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
        task = "".join(c if c.isalnum() or c in "-_" else "-" for c in clip.task)
        name = f"{i:02d}_{task}{outcome}.mp4"
        write_mp4(folder / name, clip.frames, fps)
        index.append(
            {"file": name, "task": clip.task, "instruction": clip.instruction, "success": clip.success,
             "length": clip.length, "return": clip.episode_return}
        )  # fmt: skip
    whole = grid(clips)
    write_mp4(folder / "grid.mp4", whole, fps)
    write_gif(folder / "grid.gif", whole, fps)
    write_json_atomic(folder / INDEX, {"fps": fps, "clips": index})
    return index


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
