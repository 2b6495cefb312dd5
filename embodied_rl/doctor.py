"""What works on this machine, what does not, and the one command that would mend it.

Each check does a little of the real thing (a step of physics, one picture) in a process of its own, so that a driver
that crashes or hangs is a line in the table and not the end of it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embodied_rl import sims, vulkan
from embodied_rl.registry import EXTRAS

SECONDS = 300
"""Longest a check may take; MuJoCo Warp compiles its kernels on first use."""
FREE_GIB = 2.0
"""Room that a run with checkpoints and videos should find."""

# A red box, 1 m above the ground and falling, seen from 1 m away.
SCENE = """
<mujoco>
  <worldbody>
    <light pos="0 0 4"/>
    <camera name="front" pos="0 -1 1" xyaxes="1 0 0 0 0 1"/>
    <body pos="0 0 1"><freejoint/><geom type="box" size=".2 .2 .2" rgba="1 0 0 1"/></body>
  </worldbody>
</mujoco>
"""
STEPS = 25  # of MuJoCo's default 2 ms
FALLEN = 0.5 * 9.81 * (STEPS * 0.002) ** 2  # m


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    name: str
    works: bool
    detail: str
    """What was measured, or what is wrong."""
    cure: str = ""
    """The command that would mend it; "" when it works."""
    core: bool = True
    """Training needs it; the exit code depends only on these."""


@dataclass(frozen=True)
class Check:
    """One thing to try: `run` returns what it measured, and raises when it does not work."""

    run: Callable[[], str]
    cure: str
    core: bool = True


def check_torch() -> str:
    """Multiply two matrices."""
    import torch

    assert torch.equal(torch.eye(3) @ torch.ones(3, 3), torch.ones(3, 3))
    return f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads"


def check_cuda() -> str:
    """Compute on the first CUDA device; without one the CPU is what `device: auto` takes."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            return "no NVIDIA driver: device auto is the CPU"
        raise RuntimeError(f"there is an NVIDIA driver, but torch {torch.__version__} cannot use it")
    assert float(torch.ones(8, device="cuda").sum()) == 8
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"device auto is cuda:0; {', '.join(names)}"


def check_mujoco() -> str:
    """Let a box fall with the native engine and its thread pool."""
    import mujoco
    import mujoco.rollout
    import numpy as np

    model = mujoco.MjModel.from_xml_string(SCENE)
    data = [mujoco.MjData(model) for _ in range(2)]
    start = np.zeros((2, mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_FULLPHYSICS)))
    start[:, 3:5] = 1.0  # after the time: x, y, height, then the quaternion's first entry
    with mujoco.rollout.Rollout(nthread=2) as pool:
        state, _ = pool.rollout([model] * 2, data, start, nstep=STEPS)
    _assert_fallen(float(state[0, -1, 3]))
    return f"mujoco {mujoco.__version__}, native physics in threads"


def check_warp() -> str:
    """Let the same box fall with MuJoCo Warp."""
    import mujoco_warp
    import warp

    device, _, data = _warp_scene()
    _assert_fallen(float(data.qpos.numpy()[0, 2]))
    version = importlib.metadata.version("mujoco-warp")
    assert mujoco_warp is not None
    return f"mujoco-warp {version} with warp {warp.__version__} on {device}"


def check_cameras() -> str:
    """Draw one picture with the batch ray tracer; no OpenGL, EGL or display is involved."""
    import mujoco
    import mujoco_warp
    import warp

    device, model, data = _warp_scene()
    with warp.ScopedDevice(device):
        host = mujoco.MjModel.from_xml_string(SCENE)
        context = mujoco_warp.create_render_context(host, nworld=1, cam_res=(32, 32), render_rgb=True)
        mujoco_warp.refit_bvh(model, data, context)
        mujoco_warp.render(model, data, context)
        picture = warp.zeros((1, 32, 32), dtype=warp.vec3f)
        mujoco_warp.get_rgb(context, 0, picture)
        red, green, _ = picture.numpy()[0, 16, 16]
    assert red > 2 * green, f"the box should be red, its pixel is ({red:.2f}, {green:.2f}, ...)"
    return f"batch ray tracer on {device}"


def check_video() -> str:
    """Find the ffmpeg that encodes MP4."""
    import imageio_ffmpeg

    return f"ffmpeg {imageio_ffmpeg.get_ffmpeg_version()}"


def check_egl() -> str:
    """Draw one picture with OpenGL over EGL, as some simulators do."""
    os.environ["MUJOCO_GL"] = "egl"
    import mujoco

    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    with mujoco.Renderer(model, 32, 32) as renderer:
        renderer.update_scene(data, "front")
        red, green, _ = (int(x) for x in renderer.render()[16, 16])
    assert red > 2 * green, f"the box should be red, its pixel is ({red}, {green}, ...)"
    return "OpenGL pictures without a display"


def check_vulkan() -> str:
    """Find a Vulkan device that SAPIEN (ManiSkill) draws with, with the driver that the env would choose."""
    vulkan.draw_in_software()
    found = vulkan.devices()
    usable = [name for name in found if vulkan.REFUSED not in name]
    if usable:
        return f"for ManiSkill: {', '.join(usable)}"
    drivers = os.environ.get(vulkan.DRIVERS)
    chosen = f" ({vulkan.DRIVERS} is {drivers}: unset it, or name another driver)" if drivers else ""
    if found:
        raise RuntimeError(f"only Mesa's software driver is there, which SAPIEN (ManiSkill) refuses{chosen}")
    raise RuntimeError(f"the Vulkan loader is there, but it finds no driver{chosen}")


def _warp_scene() -> tuple[str, Any, Any]:
    """The scene after the fall, on the device that `device: auto` takes: (device, model, data)."""
    import mujoco
    import mujoco_warp
    import warp

    warp.config.quiet = True
    device = "cuda:0" if warp.is_cuda_available() else "cpu"
    host = mujoco.MjModel.from_xml_string(SCENE)
    with warp.ScopedDevice(device):
        model, data = mujoco_warp.put_model(host), mujoco_warp.make_data(host, nworld=1)
        for _ in range(STEPS):
            mujoco_warp.step(model, data)
    return device, model, data


def _assert_fallen(height: float) -> None:
    assert abs(1 - height - FALLEN) < 1e-3, f"a box fell {1 - height:.4f} m in {STEPS} steps, expected {FALLEN:.4f} m"


def _apt(packages: str) -> str:
    return f"sudo apt-get install -y {packages}"


def _pip(name: str) -> str:
    """The command that installs a dependency anew, in a version that this project accepts."""
    wanted = [r for r in importlib.metadata.requires("embodied-rl") or [] if re.match(rf"{name}(?![\w.-])", r)]
    return f"pip install --force-reinstall '{(wanted or [name])[0]}'"


CHECKS: dict[str, Check] = {
    "torch": Check(check_torch, _pip("torch")),
    "GPU": Check(check_cuda, f"{_pip('torch')} --index-url https://pypi.org/simple", core=False),
    "MuJoCo": Check(check_mujoco, _pip("mujoco")),
    "MuJoCo Warp": Check(check_warp, _pip("mujoco-warp")),
    "cameras": Check(check_cameras, _pip("mujoco-warp")),
    "video": Check(check_video, _pip("imageio-ffmpeg")),
    "EGL": Check(check_egl, _apt("libegl1 libgl1 libgles2 libgl1-mesa-dri"), core=False),
    "Vulkan": Check(check_vulkan, _apt("libvulkan1 chromium libgl1") + "  # or an NVIDIA GPU's own driver", core=False),
}


def examine(runs: Path) -> Iterator[Finding]:
    """Try everything, one finding at a time.

    Args:
        runs: Folder where runs will be written; it need not exist.

    Returns:
        findings: Core first.
    """
    yield _python()
    for name, check in CHECKS.items():
        yield _in_a_process(name, check)
    yield _disk(runs)
    for module, extra in sorted(EXTRAS.items()):
        if extra in (importlib.metadata.metadata("embodied-rl").get_all("Provides-Extra") or ()):
            yield _package(module, extra)
    own = (lock.parent.name for lock in sorted(sims.home().glob("*/lock.txt")))
    for name in dict.fromkeys([*sims.names(), *own]):
        yield _simulator(name)


def print_findings(findings: Iterable[Finding]) -> int:
    """Print findings as they come.

    Returns:
        code: 0 when everything that training needs works, else 1.
    """
    broken = 0
    for f in findings:
        broken += f.core and not f.works
        state = "works" if f.works else "BROKEN" if f.core else "not here"
        print(f"{state:9} {f.name:12} {f.detail}", flush=True)
        if f.cure:
            print(f"{'':22} mend it with: {f.cure}", flush=True)
    ready = "ready to train: embodied-rl train tabletop_demo"
    print(f"\n{broken} part(s) that training needs do not work" if broken else f"\n{ready}")
    return 1 if broken else 0


def _python() -> Finding:
    version = f"Python {platform.python_version()} on {platform.platform(terse=True)}"
    good = sys.version_info >= (3, 11)
    return Finding("Python", good, version, "" if good else "make setup PYTHON=python3.11")


def _in_a_process(name: str, check: Check) -> Finding:
    command = [sys.executable, "-W", "ignore", "-m", "embodied_rl.doctor", name]
    try:
        with tempfile.TemporaryDirectory() as folder:  # MuJoCo logs into the working folder
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Finding(name, False, f"no answer within {SECONDS} s", check.cure, check.core)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        answer = json.loads(last)
    except ValueError:
        answer = {"problem": f"its process ended with code {done.returncode} ({done.stderr.strip()[-200:]})"}
    if "detail" in answer:
        return Finding(name, True, answer["detail"], core=check.core)
    return Finding(name, False, answer["problem"], check.cure, check.core)


def _package(module: str, extra: str) -> Finding:
    try:
        version = importlib.metadata.version(module.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return Finding(module, False, "optional, not installed", f"pip install 'embodied-rl[{extra}]'", core=False)
    return Finding(module, True, f"{module} {version}", core=False)


def _simulator(name: str) -> Finding:
    """One that runs in a Python of its own."""
    sim = sims.find(name)
    if sim.state == "ready":
        return Finding(name, True, f"simulator in a Python of its own, in {sim.folder}", core=False)
    state = "not installed" if sim.state == "absent" else f"{sim.state} in {sim.folder}"
    detail = f"optional simulator in a Python of its own, {state}"
    return Finding(name, False, detail, f"embodied-rl sim install {name}", core=False)


def _disk(runs: Path) -> Finding:
    place = runs.expanduser().resolve()
    while not place.exists():
        place = place.parent
    elsewhere = "embodied-rl train RECIPE log.folder=/a/folder/of/yours"
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free / 2**30
    except OSError as error:
        return Finding("run folder", False, f"{place}: cannot be written: {error.strerror}", elsewhere)
    if free < FREE_GIB:
        return Finding("run folder", False, f"{place}: only {free:.1f} GiB free, {FREE_GIB:g} are advised", elsewhere)
    return Finding("run folder", True, f"{place}: {free:.0f} GiB free")


def _main(name: str) -> None:
    """One check, in its own process: a JSON object as the last line."""
    try:
        answer = {"detail": CHECKS[name].run()}
    except Exception as error:  # any failure at all is the finding
        answer = {"problem": f"{type(error).__name__}: {error}".partition("\n")[0]}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main(sys.argv[1])
