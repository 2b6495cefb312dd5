"""Which Vulkan driver draws: envs whose renderer is Vulkan (ManiSkill's SAPIEN) and `doctor` look in the same place."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

SOFTWARE = Path("/usr/lib/chromium/vk_swiftshader_icd.json")
"""SwiftShader's driver, as Debian's package `chromium` brings it."""
REFUSED = "llvmpipe"
"""How Mesa's software driver (lavapipe) calls its device, which SAPIEN refuses."""
DRIVERS = "VK_ICD_FILENAMES"
"""Environment variable that names Vulkan's drivers."""


class _InstanceInfo(ctypes.Structure):
    """VkInstanceCreateInfo."""

    _fields_ = [
        ("sType", ctypes.c_int), ("pNext", ctypes.c_void_p), ("flags", ctypes.c_uint32), ("app", ctypes.c_void_p),
        ("layers", ctypes.c_uint32), ("layer_names", ctypes.c_void_p), ("extensions", ctypes.c_uint32),
        ("extension_names", ctypes.c_void_p),
    ]  # fmt: skip


def draw_in_software() -> bool:
    """Choose the software driver where there is no CUDA device and no driver is named; whether it was chosen now.

    Vulkan reads the choice when it is first used. An explicit one of the user's is never touched.
    """
    import torch  # here, because a doctor must outlive a torch that cannot be imported

    if DRIVERS in os.environ or torch.cuda.is_available() or not SOFTWARE.is_file():
        return False
    os.environ[DRIVERS] = str(SOFTWARE)
    return True


def devices() -> list[str]:
    """Name of every Vulkan device that the loader library finds.

    Raises:
        OSError: There is no loader library.
    """
    vulkan = ctypes.CDLL("libvulkan.so.1")
    instance, count = ctypes.c_void_p(), ctypes.c_uint32()
    if vulkan.vkCreateInstance(ctypes.byref(_InstanceInfo(sType=1)), None, ctypes.byref(instance)):
        return []
    vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
    found = (ctypes.c_void_p * count.value)()
    vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), found)
    names = []
    for device in found[: count.value]:
        # VkPhysicalDeviceProperties, of 824 bytes: five numbers of 4 bytes, then the name.
        properties = ctypes.create_string_buffer(1024)
        vulkan.vkGetPhysicalDeviceProperties(ctypes.c_void_p(device), properties)
        names.append(properties.raw[20:276].partition(b"\0")[0].decode())
    return names
