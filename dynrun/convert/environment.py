"""The environment of the vendored converter: the packages it pins, and the product's own torch.

Made on first need in the user's cache, every file of it checked against a hash of requirements.lock (requirements.in
says how that was chosen), whole or not at all, shared by all clones. dynrun itself never imports anything of it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dynrun.artifacts import file_lock, key_of, sha256_bytes, translated_os_errors, write_json
from dynrun.errors import DoesNotFitError, DynrunError
from dynrun.llamacpp.process import capture, new_log
from dynrun.llamacpp.source import explain_pip_failure
from dynrun.paths import cache_dir

LOCK = Path(__file__).parent / "requirements.lock"
NEEDED_BYTES = 400_000_000
_MARKER = "environment.json"
_PARTIAL = ".making-"
# Of torch itself; with CUDA its libraries are found beside it. What it imports besides is in the lock.
_TORCH_PARTS = ("torch", "torchgen", "functorch", "torch.libs", "nvidia", "triton")
# All that a child may see of the user's environment.
_KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "TMP", "TEMP", "SYSTEMROOT")

Say = Callable[[str], None]


@dataclass(frozen=True)
class ConversionEnvironment:
    """``python`` runs with the locked packages; ``torch`` is a folder of links to the product's torch."""

    python: Path
    torch: Path

    def command(self, script: Path, *arguments: str | Path) -> list[str | Path]:
        """The argument list that runs ``script``; neither its folder nor the working folder can be imported from."""
        return [self.python, "-P", "-s", script, *arguments]

    def variables(self, home: Path) -> dict[str, str]:
        """A child's whole environment: offline, on the CPU, its caches in ``home``, no secrets, no user's packages."""
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        return kept | {
            "HOME": str(home),
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(self.torch),
            "PYTHONUTF8": "1",
            "PYTHONWARNINGS": "ignore",
        }


def lock_sha256() -> str:
    """What the environment is made of."""
    return sha256_bytes(LOCK.read_bytes())


def conversion_environment(say: Say) -> ConversionEnvironment:
    """The environment, made if it is not there yet.

    Raises NetworkError where the package index cannot be reached, WrongHashError for another file than the locked one,
    DoesNotFitError where the disk is full.
    """
    facts = {"lock": lock_sha256(), "python": list(sys.version_info[:3]), "platform": sysconfig.get_platform()}
    folder = _rooms() / key_of(facts)
    with file_lock(folder.with_suffix(".lock"), waiting="another process makes the conversion environment; waiting"):
        if not (folder / _MARKER).is_file():
            say("making the environment for conversions (transformers and what it needs, 60 MB to download, once)")
            _make(folder, facts)
        return ConversionEnvironment(_python(folder), _torch_links())


def _rooms() -> Path:
    return cache_dir() / "convert"


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _make(folder: Path, facts: Mapping[str, object]) -> None:
    with translated_os_errors(folder):
        for left in folder.parent.glob(f"{_PARTIAL}{folder.name}-*"):
            shutil.rmtree(left)
        free = shutil.disk_usage(folder.parent).free
        if free < NEEDED_BYTES:
            raise DoesNotFitError(
                f"the conversion environment needs {NEEDED_BYTES / 1e9:.1f} GB in {folder.parent} and "
                f"{free / 1e9:.1f} GB are free",
                fix="free some space, or set DYNRUN_CACHE to another disk",
            )
        partial = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{folder.name}-", dir=folder.parent))
        try:
            _install(partial)
            write_json(partial / _MARKER, {**facts, "made": int(time.time())})
            # What a removal that was killed left there.
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _install(folder: Path) -> None:
    try:
        capture([sys.executable, "-m", "venv", "--without-pip", folder], log=new_log("convert-venv"))
    except DynrunError as error:
        raise DynrunError(
            "Python cannot make a virtual environment",
            fix="install its venv module (Debian, Ubuntu: apt install python3-venv)",
            log=error.log,
        ) from error
    log = new_log("pip-convert")
    pip = (sys.executable, "-m", "pip", "--python", _python(folder), "install", "--disable-pip-version-check")
    # No sources: building one runs its code. The lock names every package, so none need be looked for.
    flags = ("--quiet", "--no-deps", "--only-binary", ":all:", "--no-compile", "--require-hashes", "-r", LOCK)
    done = capture([*pip, *flags], log=log, check=False)
    if done.exit_code:
        raise explain_pip_failure(done, "the conversion environment")


def _torch_links() -> Path:
    """A folder that has torch, and nothing else, of the product's own packages."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise DynrunError("torch is not installed", fix="run python3 build.py")
    site = Path(spec.origin).parent.parent
    wanted = [site / name for name in _TORCH_PARTS if (site / name).exists()]
    metadata = importlib.metadata.distribution("torch")
    wanted += [path for path in site.glob("torch-*.dist-info") if path.name.startswith(f"torch-{metadata.version}")]
    folder = _rooms() / f"torch-{key_of({'parts': [str(path) for path in wanted]})}"
    with translated_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in wanted:
            link = folder / path.name
            if not link.is_symlink():
                link.symlink_to(path)
    return folder
