"""What `embodied-rl doctor` says of Vulkan and of simulators; tests/cli runs it whole."""

import ctypes.util
import os

import pytest
import torch

from embodied_rl import doctor, sims, vulkan


@pytest.fixture
def unset(monkeypatch):
    """Nothing that names a driver comes from outside, and nothing that a check chooses stays behind."""
    monkeypatch.setenv(vulkan.DRIVERS, "")
    monkeypatch.delenv(vulkan.DRIVERS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def found(monkeypatch, *names):
    """Let Vulkan find these devices; returns the drivers it was told to use, look by look."""
    told = []
    monkeypatch.setattr(vulkan, "devices", lambda: told.append(os.environ.get(vulkan.DRIVERS)) or list(names))
    return told


def test_vulkan_is_looked_for_with_the_driver_that_the_env_chooses(unset, monkeypatch, tmp_path):
    monkeypatch.setattr(vulkan, "SOFTWARE", tmp_path / "driver.json")
    told = found(monkeypatch, "SwiftShader Device (LLVM 16.0.0)")
    assert doctor.check_vulkan() == "for ManiSkill: SwiftShader Device (LLVM 16.0.0)"
    (tmp_path / "driver.json").touch()
    doctor.check_vulkan()
    monkeypatch.setenv(vulkan.DRIVERS, "mine.json")
    doctor.check_vulkan()
    assert told == [None, str(tmp_path / "driver.json"), "mine.json"]


def test_a_gpu_draws_by_itself(unset, monkeypatch, tmp_path):
    monkeypatch.setattr(vulkan, "SOFTWARE", tmp_path)
    monkeypatch.setattr(vulkan.Path, "is_file", lambda self: True)
    assert vulkan.draw_in_software()
    monkeypatch.delenv(vulkan.DRIVERS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not vulkan.draw_in_software() and vulkan.DRIVERS not in os.environ


def test_a_driver_that_sapien_refuses_does_not_count(unset, monkeypatch, tmp_path):
    monkeypatch.setattr(vulkan, "SOFTWARE", tmp_path / "nowhere.json")
    found(monkeypatch, "llvmpipe (LLVM 15.0.6, 256 bits)")
    with pytest.raises(RuntimeError, match=r"^only Mesa's software driver is there, which SAPIEN \(ManiSkill\) refuses$"):
        doctor.check_vulkan()
    found(monkeypatch, "llvmpipe (LLVM 15.0.6, 256 bits)", "NVIDIA H200")
    assert doctor.check_vulkan() == "for ManiSkill: NVIDIA H200"
    found(monkeypatch)
    with pytest.raises(RuntimeError, match="it finds no driver$"):
        doctor.check_vulkan()
    monkeypatch.setenv(vulkan.DRIVERS, "/nonexistent.json")
    with pytest.raises(RuntimeError, match=r"no driver \(VK_ICD_FILENAMES is /nonexistent.json: unset it, or name another"):
        doctor.check_vulkan()
    cure = doctor.CHECKS["Vulkan"].cure
    assert cure.startswith("sudo apt-get install -y libvulkan1 chromium libgl1 ") and "mesa" not in cure


@pytest.mark.skipif(
    not vulkan.SOFTWARE.is_file() or ctypes.util.find_library("vulkan") is None or torch.cuda.is_available(),
    reason="needs libvulkan1 and chromium, and no GPU",
)
def test_the_software_driver_is_found_for_real(monkeypatch):
    monkeypatch.delenv(vulkan.DRIVERS, raising=False)
    finding = doctor._in_a_process("Vulkan", doctor.CHECKS["Vulkan"])
    assert finding.works and finding.detail.startswith("for ManiSkill: SwiftShader")
    monkeypatch.setenv(vulkan.DRIVERS, "/nonexistent.json")
    assert not doctor._in_a_process("Vulkan", doctor.CHECKS["Vulkan"]).works


def test_extras_and_simulators_are_told_with_the_command_that_installs_them(monkeypatch, tmp_path):
    monkeypatch.setenv("EMBODIED_RL_SIMS", str(tmp_path))
    monkeypatch.setattr(doctor, "CHECKS", {})
    for name in ("mine", "half"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").touch()
        (tmp_path / name / "lock.txt").write_text("numpy==2.0.0\n")
    (tmp_path / "mine" / sims.STAMP).write_text(sims._digest(tmp_path / "mine" / "lock.txt"))
    told = {f.name: f for f in doctor.examine(tmp_path)}
    assert told["mani_skill"].works or told["mani_skill"].cure == "pip install 'embodied-rl[maniskill]'"
    assert (told["mine"].works, told["half"].works, told["libero"].works) == (True, False, False)
    assert str(tmp_path / "mine") in told["mine"].detail and f"unfinished in {tmp_path / 'half'}" in told["half"].detail
    assert told["libero"].cure == "embodied-rl sim install libero" and "not installed" in told["libero"].detail
    assert not told["libero"].core
