"""What lies in dynrun's own cache, where a disk or a hand may have damaged it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import numpy as np

from dynrun.artifacts import MANIFEST, StageFolder
from dynrun.errors import DynrunError
from dynrun.scoring.divergence import divergence
from dynrun.scoring.reference import ReferenceLogits, Scored, ignored_recordings, record_reference, reference_folder

N_VOCAB = 24
PARTS = (Scored("0", (1, 2, 3, 4), (1, 2, 3), "chat"),)
_KEYS = {"model_sha256": lambda _: "0" * 64, "installation": lambda: SimpleNamespace(commit="0" * 40, backend="cpu")}


def logits() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((3, N_VOCAB)).astype(np.float32)


@contextmanager
def _cache() -> Iterator[StageFolder]:
    """The folder of a recording in a cache of one's own."""
    with (
        TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {"DYNRUN_CACHE": folder}),
        mock.patch.multiple("dynrun.scoring.reference", **_KEYS),
    ):
        stage = reference_folder(Path("model.gguf"), PARTS)
        stage.path.mkdir(parents=True)
        yield stage


def recording(path: Path) -> object:
    """Logits that are finite and compare, or an error; what is damaged is gone afterwards."""
    with _cache() as stage:
        kept = stage / "00000.npy"
        kept.write_bytes(path.read_bytes())
        try:
            kld = divergence(ReferenceLogits(stage, PARTS, N_VOCAB).coded(0), logits()).kld
        except DynrunError:
            assert not kept.exists()
            raise
    assert kld.shape == (3,)
    assert np.isfinite(kld).all()
    return kld


def manifest(path: Path) -> object:
    """A recording that is whole, or is made again; here there is no model to make it with."""
    with _cache() as stage:
        (stage / "00000.npy").write_bytes(b"whole")
        (stage / MANIFEST).write_bytes(path.read_bytes())
        other = stage.path.with_name("other")
        other.mkdir()
        (other / MANIFEST).write_bytes(path.read_bytes())
        said = ignored_recordings(Path("model.gguf"), PARTS)
        with mock.patch("dynrun.scoring.reference.open_for", side_effect=DynrunError("it would be made again")):
            return said, record_reference(Path("model.gguf"), PARTS, n_threads=1).n_vocab


TARGETS: dict[str, tuple[Callable[[Path], object], str]] = {
    "kld-cache": (recording, "codes.npy"),
    "kld-manifest": (manifest, MANIFEST),
}
