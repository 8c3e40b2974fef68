"""The clone's virtual environment: locked packages, torch, the bindings on the compiled libraries.

Each step leaves a stamp when it is done and is redone only when what it depends on changed, so an interrupted set-up
goes on. Standard library only: build.py imports this.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dynrun.artifacts import discard, key_of, sha256_bytes, write_text
from dynrun.errors import DynrunError
from dynrun.llamacpp.backends import Choice
from dynrun.llamacpp.build import Installation, Report, record_installation
from dynrun.llamacpp.process import capture, new_log
from dynrun.llamacpp.source import Pin, explain_pip_failure
from dynrun.paths import repository_root

_STAMPS = "dynrun-setup.json"


@dataclass(frozen=True)
class Venv:
    """A virtual environment at ``path``."""

    path: Path

    @property
    def bin(self) -> Path:
        return self.path / ("Scripts" if sys.platform == "win32" else "bin")

    @property
    def python(self) -> Path:
        return self.bin / ("python.exe" if sys.platform == "win32" else "python")

    def stamps(self) -> dict[str, str]:
        """What each finished step depended on."""
        try:
            stamps: dict[str, str] = json.loads((self.path / _STAMPS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stamps

    def stamp(self, step: str, key: str) -> None:
        """Declare ``step`` done."""
        write_text(self.path / _STAMPS, json.dumps({**self.stamps(), step: key}, indent=1) + "\n")

    def done(self, step: str, key: str) -> bool:
        return self.stamps().get(step) == key


def make_venv(report: Report) -> Venv:
    """The clone's ``.venv``, made if it is missing or belongs to another Python."""
    venv = Venv(repository_root() / ".venv")
    key = f"{sys.version_info[:3]} {sysconfig.get_platform()} {venv.path}"
    if venv.done("venv", key) and venv.python.exists():
        return venv
    if venv.path.exists():
        report("the environment .venv is unfinished or of another Python: making it anew", True)
        discard_venv()
    report(f"making .venv with Python {sys.version.split()[0]}", False)
    try:
        # A Python that itself runs in an environment makes the new one from its base.
        capture([sys.executable, "-m", "venv", venv.path], log=new_log("venv"))
    except DynrunError as error:
        raise DynrunError(
            "Python cannot make a virtual environment",
            fix="install its venv module (Debian, Ubuntu: apt install python3-venv)",
            log=error.log,
        ) from error
    venv.stamp("venv", key)
    return venv


def discard_venv() -> None:
    """Remove the clone's ``.venv``."""
    discard(repository_root() / ".venv", _STAMPS)


def install_locked(venv: Venv, report: Report) -> None:
    """Everything in requirements.lock, each file checked against its hash."""
    lock = repository_root() / "requirements.lock"
    key = sha256_bytes(lock.read_bytes())
    if venv.done("locked", key):
        return
    report("installing the locked packages", False)
    _pip(venv, ("install", "--require-hashes", "-r", lock), "the locked packages")
    venv.stamp("locked", key)


def install_torch(venv: Venv, pin: Pin, choice: Choice, report: Report) -> None:
    """torch from the sources pip is configured with; a CPU build where there is no CUDA device and one is to be had."""
    key = f"{pin.torch_version} {'cuda' if choice.backend == 'cuda' else 'cpu'}"
    if venv.done("torch", key):
        return
    versions = [pin.torch_version] if choice.backend == "cuda" else [f"{pin.torch_version}+cpu", pin.torch_version]
    for version in versions:
        # A build of its own local version ("+cpu") exists only on some sources; the plain one may be any build.
        plan = _torch_plan(venv, version, last=version == versions[-1])
        if plan is not None:
            break
    assert plan is not None
    report(f"installing {plan}", True)
    _pip(venv, ("install", f"torch=={version}"), "torch")
    venv.stamp("torch", key)


def _torch_plan(venv: Venv, version: str, *, last: bool) -> str | None:
    """What pip would fetch for torch and how large it is; None where this version is not to be had."""
    log = new_log("pip-torch")
    pip = (venv.python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet")
    argv = (*pip, "--dry-run", "--report", "-", f"torch=={version}")
    done = capture(argv, log=log, check=False)
    if done.exit_code:
        if not last:
            return None
        raise explain_pip_failure(done, f"torch {version}")
    packages = json.loads(done.stdout[done.stdout.index("{") :])["install"]
    sizes = [_download_bytes(str(package["download_info"]["url"])) for package in packages]
    known = sum(size for size in sizes if size)
    names = [str(package["metadata"]["name"]) for package in packages]
    more = f" and {len(names) - 1} more packages" if len(names) > 1 else ""
    size = f"{known / 1e6:,.0f} MB" + ("" if all(sizes) else " at least")
    cuda = any(name.startswith(("nvidia", "cuda")) for name in names)
    return f"torch {version}{more} ({'CUDA' if cuda else 'CPU'} build, {size})"


def _download_bytes(url: str) -> int | None:
    if url.startswith("file:"):
        with suppress(OSError):
            return Path(urllib.request.url2pathname(url.removeprefix("file://"))).stat().st_size
        return None
    with suppress(OSError, ValueError):
        request = urllib.request.Request(url, method="HEAD")  # noqa: S310
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            return int(answer.headers["Content-Length"])
    return None


def install_bindings(venv: Venv, pin: Pin, archive: Path, source: Path, report: Report) -> None:
    """llama-cpp-python without native code, and the vendored gguf-py, newer than the one on the index."""
    if venv.done("bindings", pin.sha256):
        return
    report("installing the bindings and gguf-py", False)
    offline = ("install", "--no-deps", "--no-build-isolation", "--no-index", "--force-reinstall")
    environment = {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF", "PATH": f"{venv.bin}{os.pathsep}{os.environ.get('PATH', '')}"}
    _pip(venv, (*offline, archive, source / "gguf-py"), "the bindings", environment)
    venv.stamp("bindings", pin.sha256)


def install_dynrun(venv: Venv, report: Report) -> None:
    """This clone itself, editable."""
    key = key_of({"pyproject": sha256_bytes((repository_root() / "pyproject.toml").read_bytes())})
    if venv.done("dynrun", key):
        return
    report("installing dynrun", False)
    _pip(venv, ("install", "--no-deps", "--no-build-isolation", "--no-index", "-e", repository_root()), "dynrun")
    venv.stamp("dynrun", key)


def finish(venv: Venv, installed: Installation) -> None:
    """Have the environment use the compiled llama.cpp; check that the bindings load it."""
    record_installation(venv.path, installed)
    key = f"{installed.fingerprint} {installed.bin}"
    if venv.done("checked", key):
        return
    check = "from dynrun.llamacpp.library import ggml, llama; ggml(); print(llama().llama_print_system_info().decode())"
    capture([venv.python, "-c", check], log=new_log("check"))
    venv.stamp("checked", key)


def _pip(venv: Venv, arguments: Sequence[str | Path], what: str, environment: dict[str, str] | None = None) -> None:
    log = new_log(f"pip-{re.sub('[^a-z]+', '-', what)}")
    argv = (venv.python, "-m", "pip", arguments[0], "--disable-pip-version-check", *arguments[1:])
    done = capture(argv, log=log, check=False, env={**os.environ, **(environment or {})})
    if done.exit_code:
        raise explain_pip_failure(done, what)


def exec_in(venv: Venv, argv: Sequence[str]) -> int:
    """Run the environment's Python in the terminal; its exit code, 128 + the signal's number where one ended it."""
    with subprocess.Popen([venv.python, *argv], cwd=repository_root()) as child:
        while True:
            # Ctrl+C reaches the child as well: its answer counts.
            with suppress(KeyboardInterrupt):
                code = child.wait()
                return 128 - code if code < 0 else code
