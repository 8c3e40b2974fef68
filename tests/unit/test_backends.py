"""Which backend is chosen, on machines made of stub programs on the PATH."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dynrun.errors import DynrunError
from dynrun.llamacpp import backends
from dynrun.llamacpp.backends import BACKENDS, Choice, choose_backend, missing_toolkit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a Mac has Metal; the stubs are shell scripts")

RTX = "echo 'NVIDIA GeForce RTX 4090, 8.9'"
VULKAN = "echo 'deviceName         = {}'"
Machine = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine on which only the given programs are; ``nvidia_smi="exit 9"`` is the body of nvidia-smi."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(backends, "TOOLKIT_FOLDERS", ())

    def install(**programs: str) -> None:
        for name, body in programs.items():
            path = folder / name.replace("_", "-")
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(0o755)

    return install


def test_a_bare_machine_is_cpu(machine: Machine) -> None:
    assert choose_backend("auto") == Choice("cpu", "no GPU device found")


def test_a_device_with_its_toolkit_is_cuda_for_its_architecture(machine: Machine) -> None:
    machine(nvidia_smi=RTX, nvcc="exit 0")
    assert choose_backend("auto") == Choice("cuda", "found NVIDIA GeForce RTX 4090", "89")


def test_the_first_of_several_devices_counts(machine: Machine) -> None:
    machine(nvidia_smi="echo 'NVIDIA H100, 9.0'; echo 'NVIDIA GeForce RTX 4090, 8.9'", nvcc="exit 0")
    assert choose_backend("auto").architecture == "90"


@pytest.mark.parametrize(
    "answer",
    ["exit 9", "echo 'No devices were found'", "echo 'NVIDIA-SMI has failed because of the driver'; exit 9", "exit 0"],
)
def test_a_toolkit_without_a_device_is_not_cuda(machine: Machine, answer: str) -> None:
    machine(nvcc="exit 0", nvidia_smi=answer)
    assert choose_backend("auto") == Choice("cpu", "no GPU device found")


def test_a_device_without_its_toolkit_is_cpu_and_the_reason_says_so(machine: Machine) -> None:
    machine(nvidia_smi=RTX)
    choice = choose_backend("auto")
    assert choice.backend == "cpu"
    assert choice.reason == "NVIDIA GeForce RTX 4090 is here, but nvcc (CUDA toolkit) is not"


def test_a_toolkit_that_is_not_on_the_path_counts(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvcc").touch()
    monkeypatch.setattr(backends, "TOOLKIT_FOLDERS", (tmp_path,))
    machine(nvidia_smi=RTX)
    assert choose_backend("auto").backend == "cuda"


def test_a_vulkan_device_is_taken_where_there_is_nothing_better(machine: Machine) -> None:
    machine(vulkaninfo=VULKAN.format("Intel Arc A770"), glslc="exit 0")
    assert choose_backend("auto") == Choice("vulkan", "found Intel Arc A770")


def test_a_software_device_is_ignored(machine: Machine) -> None:
    machine(vulkaninfo=VULKAN.format("llvmpipe (LLVM 15.0.7, 256 bits)"), glslc="exit 0")
    assert choose_backend("auto") == Choice("cpu", "no GPU device found")


def test_a_device_behind_a_software_device_is_seen(machine: Machine) -> None:
    both = VULKAN.format("llvmpipe (LLVM 15.0.7, 256 bits)") + "; " + VULKAN.format("AMD Radeon 780M")
    machine(vulkaninfo=both, glslc="exit 0")
    assert choose_backend("auto") == Choice("vulkan", "found AMD Radeon 780M")


def test_cuda_is_preferred_to_vulkan(machine: Machine) -> None:
    machine(vulkaninfo=VULKAN.format("NVIDIA GeForce RTX 4090"), glslc="exit 0", nvidia_smi=RTX, nvcc="exit 0")
    assert choose_backend("auto").backend == "cuda"


def test_a_backend_that_is_asked_for_needs_no_device(machine: Machine) -> None:
    machine(nvcc="exit 0")
    assert choose_backend("cuda") == Choice("cuda", "asked for")
    assert choose_backend("cpu") == Choice("cpu", "asked for")


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cpu"])
def test_a_backend_that_cannot_be_built_is_one_line(machine: Machine, backend: str) -> None:
    with pytest.raises(DynrunError, match=f"the {backend} backend cannot be built here: ") as caught:
        choose_backend(backend)
    assert "use --backend cpu" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert missing_toolkit(backend)


def test_an_unknown_backend_is_one_line(machine: Machine) -> None:
    with pytest.raises(DynrunError, match="no backend 'abacus' — choose one of auto, cpu, cuda"):
        choose_backend("abacus")
