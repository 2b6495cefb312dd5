"""Films: files that players open, captions that say what is seen."""

import json
import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from embodied_rl.errors import RunFolderError, ShapeError
from embodied_rl.video import (
    FAILURE,
    NEUTRAL,
    SUCCESS,
    Clip,
    beside,
    framed,
    grid,
    read_clips,
    write_gif,
    write_mp4,
    write_pairs,
    write_videos,
)


def film(length: int, height: int = 48, width: int = 64, colour: tuple[int, int, int] = (200, 40, 40)) -> np.ndarray:
    """A grey picture with a coloured square that moves to the right."""
    frames = np.full((length, height, width, 3), 180, np.uint8)
    for t in range(length):
        frames[t, 10:30, 2 * t : 2 * t + 20] = colour
    return frames


def read_mp4(path) -> tuple[str, np.ndarray]:
    """What ffmpeg says of the stream, and its frames."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    stream = next(line for line in done.stderr.decode().splitlines() if "Video:" in line)
    size = re.search(r", (\d+)x(\d+)", stream)
    assert size is not None
    return stream, np.frombuffer(done.stdout, np.uint8).reshape(-1, int(size[2]), int(size[1]), 3)


def test_an_mp4_holds_every_frame_at_the_right_speed(tmp_path):
    frames = film(12)
    write_mp4(tmp_path / "videos" / "a.mp4", frames, fps=20)
    stream, seen = read_mp4(tmp_path / "videos" / "a.mp4")
    assert "h264" in stream and "yuv420p" in stream and " 20 fps" in stream
    assert seen.shape == frames.shape
    assert np.abs(seen.astype(int) - frames).mean() < 6
    assert [p.name for p in (tmp_path / "videos").iterdir()] == ["a.mp4"]


def test_odd_sizes_and_tensors_are_taken(tmp_path):
    write_mp4(tmp_path / "a.mp4", torch.from_numpy(film(3, height=51, width=65)), fps=10)
    assert read_mp4(tmp_path / "a.mp4")[1].shape == (3, 50, 64, 3)


def test_a_gif_loops_and_keeps_its_pace_at_a_tenth_of_a_second(tmp_path):
    write_gif(tmp_path / "a.gif", film(20), fps=20)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 10 and gif.info["duration"] == 100 and gif.info["loop"] == 0
        gif.seek(9)
        picture = np.asarray(gif.convert("RGB")).astype(int)
    assert np.abs(picture - film(20)[18]).mean() < 6


def test_a_gif_gives_small_things_their_colour(tmp_path):
    colours = {(40, 60, 200): 0, (120, 40, 160): 10, (230, 200, 40): 20, (240, 120, 30): 30}
    frames = np.full((2, 200, 200, 3), 180, np.uint8)
    frames[:, :, :, 0] += np.arange(60, dtype=np.uint8).repeat(4)[:200]  # a background of many shades
    frames[:, :, :, 1] += np.arange(60, dtype=np.uint8).repeat(4)[:200, None]
    for colour, x in colours.items():
        frames[:, 90:96, x : x + 6] = colour
    write_gif(tmp_path / "a.gif", frames, fps=10)
    with Image.open(tmp_path / "a.gif") as gif:
        picture = np.asarray(gif.convert("RGB")).astype(int)
    for colour, x in colours.items():
        assert np.abs(picture[93, x + 3] - colour).max() < 30, colour


def test_two_films_beside_each_other_go_in_step_and_the_shorter_holds_its_last_frame():
    left, right = film(2), film(5, colour=(40, 40, 200))
    both = beside(left, right, gap=6)
    assert both.shape == (5, 48, 64 + 6 + 64, 3)
    assert (both[:, :, 64:70] == 255).all() and (both[:, :, 70:] == right).all()
    assert (both[:2, :, :64] == left).all() and (both[2:, :, :64] == left[1]).all()
    assert (beside(right, left, gap=6)[4, :, 70:] == left[1]).all()


def test_clips_are_read_back_with_what_was_said_of_them(tmp_path):
    clips = [Clip(film(4), "push", "push it", True, 3, 1.5), Clip(film(6), "a/b", success=False, length=5, episode_return=0.0)]
    write_videos(tmp_path, clips, fps=20)
    for clip, again in zip(clips, read_clips(tmp_path), strict=True):
        facts = [(c.task, c.instruction, c.success, c.length, c.episode_return) for c in (clip, again)]
        assert facts[0] == facts[1] and again.frames.shape == clip.frames.shape
        assert np.abs(again.frames.astype(int) - clip.frames).mean() < 6
    assert read_clips(tmp_path / "nowhere") == []
    (tmp_path / "00_push_success.mp4").write_text("no film")
    with pytest.raises(RunFolderError, match="00_push_success.mp4: is not a film that ffmpeg can read"):
        read_clips(tmp_path)


def test_pairs_of_films_are_indexed_for_the_report(tmp_path):
    before = [Clip(film(6, height=51), "push", "push it", False, 5, 0.0), Clip(film(6), "a/b", "", False, 5, 0.0)]
    after = [Clip(film(3, height=50), "push", "push it", True, 2, 1.0), Clip(film(6), "a/b", "", False, 5, 0.0)]
    write_pairs(tmp_path / "pairs", before, after, fps=10)
    index = json.loads((tmp_path / "pairs" / "index.json").read_text())
    assert index["fps"] == 10 and [pair["file"] for pair in index["pairs"]] == ["00_push.mp4", "01_a-b.mp4"]
    assert index["pairs"][0] == {
        "file": "00_push.mp4", "task": "push", "instruction": "push it",
        "before": {"success": False, "length": 5, "return": 0.0}, "after": {"success": True, "length": 2, "return": 1.0},
    }  # fmt: skip
    assert read_mp4(tmp_path / "pairs" / "00_push.mp4")[1].shape == (6, 50, 64 + 4 + 64, 3)
    assert read_mp4(tmp_path / "pairs" / "grid.mp4")[1].shape[0] == 6 and (tmp_path / "pairs" / "grid.gif").is_file()


def test_a_wide_gif_is_made_smaller(tmp_path):
    write_gif(tmp_path / "a.gif", film(4, height=100, width=400), fps=5, width=200)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.size == (200, 50) and gif.n_frames == 4


@pytest.mark.parametrize(
    ("frames", "found"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), "[2, 4, 4, 3] and type float32"),
        (np.zeros((4, 4, 3), np.uint8), "[4, 4, 3] and type uint8"),
        (np.zeros((2, 3, 4, 4), np.uint8), "[2, 3, 4, 4] and type uint8"),
        (np.zeros((0, 4, 4, 3), np.uint8), "[0, 4, 4, 3] and type uint8"),
    ],
)
def test_other_shapes_are_refused(frames, found, tmp_path):
    for make in (lambda: write_mp4(tmp_path / "a.mp4", frames, 10), lambda: Clip(frames, "push")):
        with pytest.raises(ShapeError) as error:
            make()
        assert str(error.value) == f"frames have shape {found}; a video needs [T, H, W, 3] uint8, T >= 1"


@pytest.mark.parametrize(("success", "colour"), [(True, SUCCESS), (False, FAILURE), (None, NEUTRAL)])
def test_the_border_tells_the_outcome_and_the_picture_is_inside(success, colour):
    clip = Clip(film(3), "push", "push the red cube to the ring", success)
    pictures = framed(clip, cell=192)
    border = 4
    assert (pictures[:, border + 1, 20:-20] == colour).all()
    inside = pictures[1, 2 * border : 2 * border + 144, 2 * border : 2 * border + 192]
    expected = np.asarray(Image.fromarray(clip.frames[1]).resize((192, 144), Image.Resampling.BICUBIC))
    assert (inside == expected).all()
    caption = pictures[0, 3 * border + 150 :]
    assert (caption < 128).any(), "there is text below"


def test_a_caption_changes_with_its_words_and_long_ones_stay_inside():
    short, other = (framed(Clip(film(1), "push", text)) for text in ("push the cube", "lift the cube"))
    assert short.shape == other.shape and not (short == other).all()
    long = framed(Clip(film(1), "push", "push " + "the very red cube that stands on the left " * 4))
    assert long.shape == short.shape
    assert framed(Clip(film(1), "push", "x" * 400)).shape == short.shape


def test_a_grid_holds_the_last_frame_of_short_clips():
    clips = [Clip(film(5), "reach", success=True), Clip(film(2), "lift", success=False), Clip(film(3), "push")]
    whole = grid(clips, columns=2)
    tile = framed(clips[1])
    height, width = tile.shape[1:3]
    assert whole.shape == (5, 2 * height, 2 * width, 3)
    assert (whole[4, :height, width:] == tile[-1]).all() and (whole[0, :height, width:] == tile[0]).all()
    assert (whole[:, height:, width:] == 255).all(), "an empty place stays white"


def test_videos_are_indexed_for_the_report(tmp_path):
    clips = [
        Clip(film(4), "push", "push it", True, 4, 1.5),
        Clip(film(6), "a/b", "", False, 6, -2.0),
        Clip(film(2), "free"),
    ]
    index = write_videos(tmp_path / "videos", clips, fps=20)
    assert json.loads((tmp_path / "videos" / "index.json").read_text()) == {"fps": 20, "clips": index}
    assert index[0] == {
        "file": "00_push_success.mp4", "task": "push", "instruction": "push it", "success": True, "length": 4, "return": 1.5,
    }  # fmt: skip
    assert [clip["file"] for clip in index[1:]] == ["01_a-b_failure.mp4", "02_free.mp4"]
    found = {p.name for p in (tmp_path / "videos").iterdir()}
    assert found == {"grid.mp4", "grid.gif", "index.json", *(clip["file"] for clip in index)}
    assert len(read_mp4(tmp_path / "videos" / "grid.mp4")[1]) == 6


def test_no_clips_no_files(tmp_path):
    assert write_videos(tmp_path / "videos", [], fps=20) == []
    assert not (tmp_path / "videos").exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "videos").write_text("")
    with pytest.raises(RunFolderError, match="cannot write the video: a part of this path is a file"):
        write_mp4(tmp_path / "videos" / "a.mp4", film(2), fps=20)
