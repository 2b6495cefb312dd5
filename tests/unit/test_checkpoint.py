"""Checkpoints: what goes in comes out bit for bit, and no kill, full disk or damage loses what was saved before."""

import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from embodied_rl import checkpoint
from embodied_rl.checkpoint import CheckpointWarning, best, latest, load, resolve, save
from embodied_rl.errors import CheckpointError, NotFoundError, RunFolderError


def same(a, b) -> bool:
    """Equal types and equal bits, all the way down."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        a, b = (x.resolve_conj().contiguous().flatten().view(torch.uint8) for x in (a, b))
        return a.equal(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(type(k) is type(j) for k, j in zip(a, b, strict=True)) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return math.isnan(a) and math.isnan(b) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return a == b


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def state_of(update: int) -> dict:
    return {"weights": torch.full((5,), float(update)), "update": update}


def random_tensors() -> dict:
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    return {
        "float": x,
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "double": torch.randn(3, dtype=torch.float64),
        "half": torch.randn(7).half(),
        "bfloat16": torch.randn(7).bfloat16(),
        "float8": torch.randn(5).to(torch.float8_e4m3fn),
        "complex": torch.randn(2, dtype=torch.complex64),
        "bool": torch.tensor([True, False, True]),
        "int64": torch.tensor([2**62, -1]),
        "int8": torch.tensor([-128, 127], dtype=torch.int8),
        "scalar": torch.tensor(3),
        "scalar bool": torch.tensor(True),
        "empty": torch.zeros(0, 3),
        "generator": torch.Generator().manual_seed(7).get_state(),
        "transposed": x.t(),
        "window": x[1:3, ::2],
        "rows of a larger tensor": torch.randn(6, 4)[2:4],
        "expanded": torch.tensor([1.0]).expand(4),
        "the same again": x,
        "conjugate": torch.randn(2, dtype=torch.complex64).conj(),
        "needs grad": torch.nn.Parameter(torch.randn(2)),
    }


@pytest.mark.parametrize("name", random_tensors())
def test_every_kind_of_tensor_round_trips_bit_for_bit(name, tmp_path):
    tensors = random_tensors()
    restored = load(save(tmp_path, {"all": tensors}, update=1, keep=1))["all"]
    assert same(restored[name], tensors[name].detach())
    assert not restored[name].requires_grad
    storages = [t.untyped_storage().data_ptr() for t in restored.values() if t.numel()]
    assert len(set(storages)) == len(storages), "tensors of a loaded checkpoint share no memory"
    assert all(p % 64 == 0 for p in storages), "and lie as torch would have laid them, so that sums run in the same order"


def test_saving_changes_neither_the_tensors_nor_their_memory(tmp_path):
    x = torch.arange(6.0).view(2, 3).t()
    pointer, stride = x.data_ptr(), x.stride()
    save(tmp_path, {"x": x}, update=1, keep=1)
    assert (x.data_ptr(), x.stride()) == (pointer, stride)


def test_plain_values_round_trip_exactly(tmp_path):
    state = {
        "big": 2**4096 + 1, "negative": -(2**127), "true": True, "one": 1, "none": None, "text": "é\n\udc80\u2028",
        "floats": [0.1, 1e-320, -0.0, math.inf, -math.inf, math.nan, 1.7976931348623157e308],
        "tuple": (1, (2.0, "x"), ()), "empty": [{}, [], ""],
    }  # fmt: skip
    assert same(load(save(tmp_path, state, update=1, keep=1)), state)


def test_int_keys_and_keys_that_look_like_tags_round_trip(tmp_path):
    state = {
        "optimizer": {0: {"step": torch.tensor(1.0)}, 1: {"step": torch.tensor(2.0)}},
        "mixed": {1: "int", "1": torch.tensor(1), 2: torch.tensor(2), "2": torch.tensor(3)},
        "tags": {"$tensor": "a/b", "$float": "nan"}, "tag": {"$tuple": [1]}, "a": {"b": torch.tensor(5)},
        "a/b": torch.tensor(6), "__metadata__": torch.tensor(7), "": torch.tensor(8),
    }  # fmt: skip
    assert same(load(save(tmp_path, state, update=1, keep=1)), state)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
trees = st.dictionaries(
    st.text() | st.integers(),
    st.recursive(plain, lambda x: st.lists(x) | st.dictionaries(st.text() | st.integers(), x) | st.tuples(x, x), max_leaves=8),
)


@given(trees)
def test_any_tree_of_plain_values_round_trips(tree):
    tensors: dict = {}
    encoded = checkpoint._encode(tree, (), tensors, set())
    assert same(checkpoint._decode(json.loads(json.dumps(encoded, allow_nan=False)), tensors), tree)


def test_an_optimizer_and_every_generator_continue_bit_for_bit(tmp_path):
    def step(net, optimizer):
        optimizer.zero_grad()
        net(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()

    torch.manual_seed(1)
    net = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    step(net, optimizer)
    path = save(
        tmp_path,
        {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "torch": torch.get_rng_state(), "python": random.getstate()},
        update=1,
        keep=1,
    )
    step(net, optimizer)
    wanted = [p.clone() for p in net.parameters()], random.random()

    state = load(path)
    other = torch.nn.Linear(4, 2)
    other.load_state_dict(state["net"])
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    step(other, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(wanted[0], other.parameters(), strict=True))
    assert random.random() == wanted[1]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"env": {"rng": [1, {2}]}},
            "state at 'env/rng/1' is of type set; a checkpoint holds tensors, str, int, float, bool, None, dicts, lists and tuples: "
            "convert it in get_state",
        ),
        (
            {"env": {(1, 2): 0}},
            "state at 'env' has the key (1, 2) of type tuple; keys must be str or int: convert it in get_state",
        ),
        ({True: 0}, "state at '' has the key True of type bool; keys must be str or int: convert it in get_state"),
        (
            {"x": torch.eye(2).to_sparse()},
            "state at 'x' is a sparse or quantized tensor; store dense tensors",
        ),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused_by_place(state, message, tmp_path):
    with pytest.raises(CheckpointError) as error:
        save(tmp_path, state, update=1, keep=1)
    assert str(error.value) == message
    assert not names(tmp_path)


def test_numpy_scalars_are_refused_rather_than_changed(tmp_path):
    numpy = pytest.importorskip("numpy")
    with pytest.raises(CheckpointError, match="'x' is of type float64"):
        save(tmp_path, {"x": numpy.float64(0.5)}, update=1, keep=1)


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    path = save(tmp_path, state_of(1), update=1, keep=1)
    assert names(path) == ["state.json", "tensors.safetensors"]
    json.loads((path / "state.json").read_text())
    header = int.from_bytes((path / "tensors.safetensors").read_bytes()[:8], "little")
    assert "weights" in json.loads((path / "tensors.safetensors").read_bytes()[8 : 8 + header])


def test_equal_states_give_equal_files(tmp_path):
    a, b = (save(tmp_path / n, state_of(1), update=1, keep=1) for n in "ab")
    assert all((a / f).read_bytes() == (b / f).read_bytes() for f in ("state.json", "tensors.safetensors"))


def test_the_newest_and_the_best_are_kept(tmp_path):
    for update, score in [(1, 0.2), (2, 0.9), (3, None), (4, 0.5), (5, math.nan), (6, None)]:
        save(tmp_path, state_of(update), update=update, keep=2, best_score=score)
        assert latest(tmp_path).name == f"update_{update:06d}"
    assert names(tmp_path) == ["update_000002", "update_000005", "update_000006"]
    assert best(tmp_path).name == "update_000002"
    save(tmp_path, state_of(7), update=7, keep=2, best_score=0.9)
    assert best(tmp_path).name == "update_000007", "of equals the newest"
    assert names(tmp_path) == ["update_000006", "update_000007"]


def test_without_checkpoints_there_is_no_latest_and_no_best(tmp_path):
    assert latest(tmp_path) is None and best(tmp_path) is None
    assert latest(tmp_path / "missing") is None and best(tmp_path / "missing") is None
    save(tmp_path, state_of(1), update=1, keep=1)
    assert best(tmp_path) is None


def test_an_update_can_be_saved_twice(tmp_path):
    for value in (1, 2, 3):
        path = save(tmp_path, {"value": value}, update=5, keep=1)
        assert load(latest(tmp_path)) == {"value": value} and latest(tmp_path) == path
        assert len(names(tmp_path)) == 1


def test_going_back_to_an_earlier_update_drops_the_abandoned_later_ones(tmp_path):
    for update in (1, 2, 3):
        save(tmp_path, state_of(update), update=update, keep=3, best_score=update / 10)
    save(tmp_path, {"again": True}, update=2, keep=3)
    assert load(latest(tmp_path)) == {"again": True}
    assert names(tmp_path) == ["update_000001", "update_000002-2"]
    assert best(tmp_path).name == "update_000001"


def test_updates_past_a_million_stay_in_order(tmp_path):
    save(tmp_path, state_of(999_999), update=999_999, keep=2)
    save(tmp_path, state_of(1_000_000), update=1_000_000, keep=2)
    assert latest(tmp_path).name == "update_1000000"


def damage(path: Path, how: str) -> None:
    tensors, tree = path / "tensors.safetensors", path / "state.json"
    if how == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-3])
    elif how == "flipped bit":
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(content)
    elif how == "no tensors":
        tensors.unlink()
    elif how == "truncated tree":
        tree.write_text(tree.read_text()[:-9])
    elif how == "edited tree":
        tree.write_text(tree.read_text().replace('"update": 2}', '"update": 3}'))
    elif how == "foreign":
        tree.write_text('{"project": "another"}')
    elif how == "newer format":
        tree.write_text(tree.read_text().replace('"format": 1', '"format": 2'))
    elif how == "emptied":
        tensors.unlink()
        tree.unlink()
        (path / "model.pt").write_bytes(b"")


DAMAGES = {
    "truncated tensors": "is damaged: tensors.safetensors has 97 bytes instead of 100",
    "flipped bit": "is damaged: the checksum of tensors.safetensors is wrong",
    "no tensors": "is not a whole checkpoint: tensors.safetensors missing, found state.json",
    "truncated tree": "is damaged: state.json is not valid JSON (",
    "edited tree": "is damaged: the checksum of state.json is wrong",
    "foreign": "is foreign: state.json was not written by embodied_rl",
    "newer format": "has format 2, this version reads 1: use the version that wrote it",
    "emptied": "is not a whole checkpoint: state.json and tensors.safetensors missing, found model.pt",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_told_with_what_was_found_and_which_checkpoint_to_use(how, tmp_path):
    older = save(tmp_path, state_of(1), update=1, keep=2)
    path = save(tmp_path, state_of(2), update=2, keep=2, best_score=0.5)
    whole = (path / "tensors.safetensors").stat().st_size
    damage(path, how)
    problem = DAMAGES[how].replace("97", str(whole - 3)).replace("100", str(whole))
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: {problem}")
    assert str(error.value).endswith(f"; use {older}, which is intact")
    with pytest.warns(CheckpointWarning) as caught:
        assert latest(tmp_path) == older
    assert str(caught[0].message).startswith(f"{path}: {problem}")
    assert str(caught[0].message).endswith(f"; going back to the older checkpoint {older}")
    with pytest.warns(CheckpointWarning, match="it is passed over in the search for the best"):
        assert best(tmp_path) is None


def test_when_every_checkpoint_is_damaged_latest_says_so(tmp_path):
    for update in (1, 2):
        save(tmp_path, state_of(update), update=update, keep=2)
    damage(tmp_path / "update_000001", "flipped bit")
    damage(tmp_path / "update_000002", "no tensors")
    with pytest.raises(CheckpointError) as error:
        latest(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: no checkpoint is intact ({tmp_path}/update_000002: is not a whole checkpoint: tensors.safetensors missing, "
        f"found state.json; {tmp_path}/update_000001: is damaged: the checksum of tensors.safetensors is wrong); "
        "start the run again under another name"
    )


def test_a_file_of_another_program_is_not_a_checkpoint(tmp_path):
    foreign = tmp_path / "model.pt"
    foreign.write_bytes(b"PK")
    with pytest.raises(CheckpointError) as error:
        load(foreign)
    assert str(error.value) == f"{foreign}: is a file; a checkpoint is a folder that holds state.json and tensors.safetensors"
    with pytest.raises(NotFoundError, match="no such checkpoint"):
        load(tmp_path / "update_000009")


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path):
    path = save(tmp_path / "run" / "checkpoints", state_of(3), update=3, keep=1)
    assert resolve(tmp_path / "run") == resolve(tmp_path / "run" / "checkpoints") == resolve(path) == path
    with pytest.raises(NotFoundError, match="no such run or checkpoint"):
        resolve(tmp_path / "runn")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="holds no checkpoint"):
        resolve(tmp_path / "empty")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to kill a child at a chosen line")
def test_a_save_killed_at_any_line_loses_nothing(tmp_path, monkeypatch):
    """A child dies at the n-th line of the functions that touch the disk, for every n until a save survives."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a killed process leaves its writes to the system: only slow here
    folder, killed = tmp_path / "checkpoints", 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        for update in (1, 2):
            save(folder, state_of(update), update=update, keep=2, best_score=0.5 if update == 1 else None)
        child = os.fork()
        if child == 0:
            _die_at_line(folder, killed + 1)
        status = os.waitpid(child, 0)[1]
        newest = latest(folder)
        state = load(newest)
        assert same(state, state_of(state["update"])) and state["update"] in (2, 3)
        assert load(best(folder))["update"] == 1
        save(folder, state_of(4), update=4, keep=2)
        assert not [n for n in names(folder) if n.startswith(".tmp-")], "leftovers are cleaned by the next save"
        assert load(latest(folder))["update"] == 4
        if os.waitstatus_to_exitcode(status) == 0:
            assert state["update"] == 3
            break
        killed += 1
    assert killed > 40


def _die_at_line(folder: Path, number: int) -> None:
    count = 0
    touch = ("save", "_write", "_fsync", "_remove_leftovers", "_free_name", "_prune")

    def trace(frame, event, _argument):
        nonlocal count
        ours = frame.f_code.co_filename == checkpoint.__file__ and frame.f_code.co_name in touch
        deleting = frame.f_code.co_filename == shutil.__file__ and frame.f_code.co_name in ("rmtree", "_rmtree_safe_fd")
        if not ours and not deleting:
            return None
        if event == "line":
            count += 1
            if count == number:
                os._exit(9)
        return trace

    sys.settrace(trace)
    save(folder, state_of(3), update=3, keep=1)
    os._exit(0)


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
@pytest.mark.parametrize(
    ("number", "reason", "cure"),
    [
        (errno.ENOSPC, "the disk is full (", "free some space and run again with --resume"),
        (errno.EDQUOT, "the disk is full (", "free some space and run again with --resume"),
        (errno.EROFS, "[Errno 30] ", "make the folder writable and run again with --resume"),
    ],
)
def test_a_disk_that_refuses_loses_nothing(step, number, reason, cure, tmp_path, monkeypatch):
    save(tmp_path, state_of(1), update=1, keep=1)

    def refuse(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(checkpoint, "save_file", refuse)
        else:
            patch.setattr(os, step, refuse)
        with pytest.raises(RunFolderError) as error:
            save(tmp_path, state_of(2), update=2, keep=1)
    assert str(error.value).startswith(f"{tmp_path}: cannot write the checkpoint of update 2: {reason}")
    assert str(error.value).endswith(f"; earlier checkpoints are untouched; {cure}")
    assert names(tmp_path) == ["update_000001"]
    assert load(latest(tmp_path))["update"] == 1


def test_a_full_disk_is_recognised_in_the_error_of_the_library_that_writes_tensors(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(RunFolderError) as error:
        save(tmp_path, {"x": torch.zeros(2**18)}, update=7, keep=1)
    start = f"{tmp_path}: cannot write the checkpoint of update 7: the disk is full (1.0 MiB are needed, "
    assert str(error.value).startswith(start)


def test_a_really_full_disk_loses_nothing(tmp_path):
    """On a file system of 300 kB, where this test may mount one."""
    small = tmp_path / "small"
    small.mkdir()
    if shutil.which("mount") is None or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting needs root")
    try:
        state = {"x": torch.ones(30_000)}
        for update in (1, 2):
            save(small / "checkpoints", state, update=update, keep=3)
        with pytest.raises(RunFolderError, match=r"the disk is full \(0.1 MiB are needed, 0.1 MiB are free\)"):
            save(small / "checkpoints", state, update=3, keep=3)
        assert names(small / "checkpoints") == ["update_000001", "update_000002"]
        assert same(load(latest(small / "checkpoints")), state)
        save(small / "checkpoints", {"x": torch.ones(300)}, update=3, keep=1)
        assert names(small / "checkpoints") == ["update_000003"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_path_that_goes_through_a_file_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(RunFolderError, match="cannot write the checkpoint of update 1"):
        save(tmp_path / "checkpoints", state_of(1), update=1, keep=1)


def test_checkpoints_can_be_read_by_whoever_can_read_their_folder(tmp_path):
    path = save(tmp_path, state_of(1), update=1, keep=1)
    (tmp_path / "file").write_text("")
    assert {(path / f).stat().st_mode for f in names(path)} == {(tmp_path / "file").stat().st_mode}


def test_size_counts_the_bytes_of_all_tensors():
    assert checkpoint.size({"a": torch.zeros(3), "b": [torch.zeros(2, dtype=torch.bool)]}) == 14
