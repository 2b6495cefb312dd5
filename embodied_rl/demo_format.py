"""How demonstrations lie on disk: LeRobot's dataset layout v2.1, pictures as PNG inside the Parquet files.

Layout:
    <folder>/
        meta/info.json                 version, features, frames per second, totals, where the data lies
        meta/episodes.jsonl            one line per episode: what is not listed here is not part of the set
        meta/tasks.jsonl               task_index -> instruction
        meta/episodes_stats.jsonl      statistics of each episode
        meta/stats.json                statistics of the whole set, with quantiles
        data/chunk-000/episode_000000.parquet

This file knows names, types and single values; `demonstrations` reads sets, `demo_writer` writes them, `demo_check`
finds what is wrong with one. Reading and writing files is in `demo_files`.
"""

from __future__ import annotations

import io
import json
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from embodied_rl.errors import UserError
from embodied_rl.types import TensorSpec

VERSION = "v2.1"
INFO, EPISODES, TASKS = "meta/info.json", "meta/episodes.jsonl", "meta/tasks.jsonl"
EPISODE_STATS, STATS = "meta/episodes_stats.jsonl", "meta/stats.json"
DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
CHUNKS_SIZE = 1000
"""Episodes in one folder of data files."""
LONGEST_INSTRUCTION = 500
"""Characters."""
OWN = "embodied_rl"
"""Key of info.json with what the layout has no place for: how the set was made, and the env's observation."""

_PICTURES, _ENTRY = "observation.images.", "observation."


RESTORE = "restore the file from a copy, or collect the set anew"
CUT = "its last line is cut; go on with embodied-rl collect, or delete it"
NO_EPISODE = "holds no episode; collect some with: embodied-rl collect"


class DemonstrationError(UserError, ValueError):
    """A set of demonstrations is damaged, incomplete, or made for another env."""


@dataclass(frozen=True)
class Feature:
    """One column of the frames.

    Example: `Feature("float32", (7,), ["dx", "dy", "dz", "drx", "dry", "drz", "gripper"])`.
    """

    dtype: str
    """A NumPy type, "image" (PNG or JPEG bytes) or "video" (which is not read)."""
    shape: tuple[int, ...]
    names: Any = None

    @property
    def size(self) -> int:
        """Values of one frame."""
        return math.prod(self.shape)

    @property
    def is_picture(self) -> bool:
        """Whether a frame is a picture."""
        return self.dtype in ("image", "video")

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """H, W, 3, whatever order the set lists them in."""
        a, b, c = self.shape
        return (b, c, a) if a == 3 and c != 3 else (a, b, c)

    @property
    def arrow(self) -> pa.DataType:
        """Type of the column."""
        if self.dtype == "image":
            return pa.struct({"bytes": pa.binary(), "path": pa.string()})
        kind = _ARROW[self.dtype]
        for size in reversed(self.shape if self.size > 1 else ()):
            kind = pa.list_(kind, size)
        return kind

    def describe(self) -> dict[str, Any]:
        """The feature as info.json has it."""
        return {"dtype": self.dtype, "shape": list(self.shape), "names": self.names}


_ARROW = {
    "float32": pa.float32(), "float64": pa.float64(), "int64": pa.int64(), "int32": pa.int32(), "uint8": pa.uint8(),
    "bool": pa.bool_(),
}  # fmt: skip
DTYPES = {
    "float32": torch.float32, "float64": torch.float64, "int64": torch.int64, "int32": torch.int32,
    "uint8": torch.uint8, "bool": torch.bool, "image": torch.uint8, "video": torch.uint8,
}  # fmt: skip
FRAME: dict[str, Feature] = {
    "next.reward": Feature("float32", (1,)),
    "next.success": Feature("bool", (1,)),
    "next.done": Feature("bool", (1,)),
    "timestamp": Feature("float32", (1,)),
    "frame_index": Feature("int64", (1,)),
    "episode_index": Feature("int64", (1,)),
    "index": Feature("int64", (1,)),
    "task_index": Feature("int64", (1,)),
}
"""What every frame has beside observation and action. `next.` is what the frame's action led to."""


@dataclass(frozen=True)
class EpisodeLine:
    """One line of episodes.jsonl.

    Example: `EpisodeLine(3, 50, ("lift the cube",), {"attempt": 5, "seed": 718, "task": "lift", "success": True})`.
    """

    index: int
    length: int
    """Frames."""
    tasks: tuple[str, ...]
    """Its instructions; more than one where frames differ in theirs."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Attempt number, start seed, name of the env's task and success; empty in sets made elsewhere."""


def feature_of(entry: str, spec: TensorSpec) -> tuple[str, Feature]:
    """Name and feature under which an entry of the observation is stored.

    Raises:
        DemonstrationError: Its type has no place in the format.
    """
    if entry == "action":
        raise DemonstrationError("observation 'action' has the name that the actions have: rename it in the env")
    if spec.dtype == torch.uint8 and len(spec.shape) == 3 and spec.shape[2] == 3:
        return _PICTURES + entry, Feature("image", spec.shape, ["height", "width", "channels"])
    dtype = str(spec.dtype).removeprefix("torch.")
    if dtype not in _ARROW:
        raise DemonstrationError(
            f"observation '{entry}' is {dtype}, and demonstrations hold {', '.join(_ARROW)}: convert it in the env"
        )
    return _ENTRY + entry, Feature(dtype, spec.shape or (1,))


def entry_of(feature: str) -> str | None:
    """The observation's name of a feature: "state" of "observation.state", "wrist" of "observation.images.wrist"."""
    for prefix in (_PICTURES, _ENTRY):
        if feature.startswith(prefix):
            return feature.removeprefix(prefix)
    return None


def arrow_schema(features: Mapping[str, Feature]) -> pa.Schema:
    """Columns of a data file, with the note by which the `datasets` library shows pictures as pictures."""
    note = {name: hint for name, f in features.items() if (hint := _hint(f)) is not None}
    metadata = {"huggingface": json.dumps({"info": {"features": note}})}
    return pa.schema([pa.field(name, f.arrow) for name, f in features.items()], metadata=metadata)


def _hint(feature: Feature) -> dict[str, Any] | None:
    if feature.dtype == "image":
        return {"_type": "Image"}
    value = {"dtype": feature.dtype, "_type": "Value"}
    if feature.size == 1:
        return value
    return {"feature": value, "length": feature.size, "_type": "Sequence"} if len(feature.shape) == 1 else None


def to_arrow(values: np.ndarray, feature: Feature) -> pa.Array:
    """Frames [T, *shape] as a column; pictures become PNG."""
    if feature.dtype == "image":
        pictures = [{"bytes": encode_picture(picture), "path": None} for picture in values]
        return pa.array(pictures, type=feature.arrow)
    column = pa.array(np.ascontiguousarray(values).reshape(-1), type=_ARROW[feature.dtype])
    for size in reversed(feature.shape if feature.size > 1 else ()):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def from_arrow(table: pa.Table, name: str, feature: Feature) -> np.ndarray:
    """A column as frames [T, *shape], pictures [T, H, W, 3].

    Raises:
        DemonstrationError: The column is missing, or its values are not what info.json promises.
    """
    if name not in table.column_names:
        raise DemonstrationError(f"column '{name}' is missing")
    column = table.column(name).combine_chunks()
    if feature.is_picture:
        return _pictures(column, name, feature)
    values, depth = column, 0
    while pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        wanted = feature.shape[depth] if depth < len(feature.shape) else 0
        if any(length != wanted for length in lengths):
            found = next(length for length in lengths if length != wanted)
            raise DemonstrationError(f"'{name}' has {found or 'no'} numbers, info.json says {wanted}")
        values, depth = values.flatten(), depth + 1
    if values.null_count or len(values) != len(column) * feature.size:
        raise DemonstrationError(f"'{name}' has missing values, or not the {list(feature.shape)} of info.json")
    if values.type != _ARROW[feature.dtype]:
        raise DemonstrationError(f"'{name}' is {values.type}, info.json says {feature.dtype}")
    array: np.ndarray = values.to_numpy(zero_copy_only=False)
    return array.reshape(len(column), *feature.shape)


def _pictures(column: Any, name: str, feature: Feature) -> np.ndarray:
    if feature.dtype == "video":
        raise DemonstrationError(f"'{name}' is a video, and pictures are read from Parquet only: convert it to images")
    if not pa.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
        raise DemonstrationError(f"'{name}' is {column.type}, expected pictures (struct of bytes and path)")
    out = np.empty((len(column), *feature.picture_shape), np.uint8)
    for row, data in enumerate(column.field("bytes").to_pylist()):
        try:
            picture = decode_picture(data or b"")
        except DemonstrationError as error:
            raise DemonstrationError(f"'{name}' of frame {row} {error}") from None
        if picture.shape != feature.picture_shape:
            height, width, _ = feature.picture_shape
            raise DemonstrationError(
                f"'{name}' of frame {row} has {picture.shape[0]} x {picture.shape[1]} pixels, info.json says "
                f"{height} x {width}"
            )
        out[row] = picture
    return out


def encode_picture(picture: np.ndarray) -> bytes:
    """PNG of a picture [H, W, 3] uint8."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=3)  # twice as fast as 6, hardly larger
    return buffer.getvalue()


def decode_picture(data: bytes) -> np.ndarray:
    """Picture [H, W, 3] uint8 of PNG or JPEG bytes.

    Raises:
        DemonstrationError: Not a whole picture, or not one of three 8-bit colours; reads on after the picture's name.
    """
    if not data:
        raise DemonstrationError("is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode != "RGB":
                raise DemonstrationError(f"has colour mode {image.mode}, expected RGB with 8 bits per colour")
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:  # what the library raises for damaged files
        if isinstance(error, DemonstrationError):
            raise
        raise DemonstrationError("is not a whole PNG or JPEG picture") from error


def instruction_problem(text: object) -> str:
    """What is wrong with an instruction, "" when nothing is; non-ASCII text is welcome, control characters are not."""
    if not isinstance(text, str):
        return f"the instruction is {type(text).__name__}, expected text"
    if not text.strip():
        return f"the instruction is empty, expected 1 to {LONGEST_INSTRUCTION} printable characters"
    if len(text) > LONGEST_INSTRUCTION:
        return f"the instruction has {len(text):,} characters, expected at most {LONGEST_INSTRUCTION}"
    # Joiners (Cf) and every kind of space belong to ordinary text; tabs, line breaks and lone surrogates do not.
    bad = [c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp")]
    if bad:
        return f"the instruction has the character U+{ord(bad[0]):04X}, expected printable characters only"
    return ""


def parse_episode(row: Mapping[str, Any], where: str) -> EpisodeLine:
    """A line of episodes.jsonl.

    Raises:
        DemonstrationError: It lacks what every episode has.
    """
    index, length, tasks = row.get("episode_index"), row.get("length"), row.get("tasks")
    counts = type(index) is int and index >= 0 and type(length) is int and length > 0
    if not counts or not isinstance(tasks, list) or not tasks or not all(isinstance(t, str) for t in tasks):
        raise DemonstrationError(
            f"{where}: expected episode_index, length of at least 1 and tasks (a list of instructions), found "
            f"{json.dumps(dict(row), ensure_ascii=False)[:200]}; {RESTORE}"
        )
    extra = {k: v for k, v in row.items() if k not in ("episode_index", "length", "tasks")}
    return EpisodeLine(int(row["episode_index"]), int(row["length"]), tuple(tasks), extra)
