"""Files of demonstrations: reading tells damage in one sentence, writing leaves them whole after a kill."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embodied_rl.demo_format import RESTORE, DemonstrationError
from embodied_rl.runfolder import replace_file


def read_table(path: Path, columns: Sequence[str] | None = None, *, verify: bool = False) -> pa.Table:
    """Some columns of a data file, or all; with `verify` the checksums of its pages are compared.

    Raises:
        DemonstrationError: The file is missing, cut short or damaged.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=verify) as file:
            have = file.schema_arrow.names
            wanted = have if columns is None else [name for name in columns if name in have]
            # The library takes a dot for a step into a struct, and so may return more than was asked for.
            return file.read(columns=wanted, use_threads=False).select(wanted)
    except FileNotFoundError:
        raise DemonstrationError(f"{path}: is missing; {RESTORE}") from None
    except (pa.ArrowException, OSError) as error:
        raise DemonstrationError(f"{path}: is cut short or damaged ({_first(error)}); {RESTORE}") from error


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def read_lines(path: Path) -> tuple[list[Any], bool]:
    """Objects of a .jsonl file, and whether its last line was cut (an interrupted write): that line is left out.

    Raises:
        DemonstrationError: The file is missing, or another line is not JSON.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DemonstrationError(f"{path}: cannot be read ({error.strerror}); {RESTORE}") from error
    rows: list[Any] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError:
            if number == len(lines):
                return rows, True
            raise DemonstrationError(f"{path}:{number}: is not a JSON object; {RESTORE}") from None
        rows.append(row)
    return rows, False


def read_json(path: Path) -> dict[str, Any]:
    """The object in a .json file.

    Raises:
        DemonstrationError: It is missing or no JSON object.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise DemonstrationError(f"{path}: cannot be read ({error.strerror}); {RESTORE}") from error
    except ValueError as error:
        raise DemonstrationError(f"{path}: is not valid JSON ({error}); {RESTORE}") from error
    if not isinstance(data, dict):
        raise DemonstrationError(f"{path}: holds a {type(data).__name__}, expected a JSON object; {RESTORE}")
    return data


def write_json(path: Path, data: Any) -> None:
    """Replace a JSON file in one step; NaN and infinity are refused (ValueError)."""
    with writable(path):
        replace_file(path, (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def line_of(row: Mapping[str, Any]) -> str:
    """A line of a .jsonl file."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line to a .jsonl file and wait until it is on the disk."""
    with open(path, "ab") as file:
        file.write(line_of(row).encode())
        file.flush()
        os.fsync(file.fileno())


def lock(folder: Path) -> int:
    """Let only this process write into a set; the lock is the handle, which ends with the process.

    Raises:
        DemonstrationError: Another process has it.
    """
    handle = os.open(folder / "meta" / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise DemonstrationError(
                f"{folder}: another process is collecting into it; wait for it, stop it, or choose another --out"
            ) from None
        raise
    return handle


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a DemonstrationError that says what to do."""
    try:
        yield
    except OSError as error:
        raise DemonstrationError(
            f"{path}: cannot be written ({error.strerror or error}); finished episodes are kept: mend that and run the "
            "same command again, or choose another --out"
        ) from error
