"""What the Models room shows, gathered in worker threads: the models on this machine, and all about one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynrun.errors import DynrunError
from dynrun.tui.words import size

if TYPE_CHECKING:
    from dynrun.gguf.header import Header
    from dynrun.models import Listed

_LONGEST_VALUE = 160
# Shown among the facts where the header has them, after those that are worked out; "*" is the architecture.
_KEYS = (
    ("*.context_length", "context"),
    ("*.block_count", "layers"),
    ("*.embedding_length", "embedding"),
    ("*.attention.head_count", "heads"),
    ("*.attention.head_count_kv", "KV heads"),
    ("*.expert_count", "experts"),
    ("*.expert_used_count", "experts used"),
    ("*.rope.freq_base", "rope base"),
    ("*.rope.scaling.type", "rope scaling"),
    ("tokenizer.ggml.pre", "tokenizer"),
    ("general.license", "licence"),
    ("general.quantized_by", "quantized by"),
    ("quantize.imatrix.dataset", "imatrix of"),
)


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine. ``kld``: mean KL divergence to its reference, measured when it was made; None where
    nobody has measured it. ``used_s``: when somebody last talked to it, as time.time() gives it; 0 for never."""

    listed: Listed
    bpw: float
    kld: float | None
    used_s: float


@dataclass(frozen=True)
class Details:
    """All about one file: facts in pairs, tensors by name, type, shape and size, the chat template, the files."""

    name: str
    facts: tuple[tuple[str, str], ...]
    tensors: tuple[tuple[str, str, str, int], ...]
    template: str
    files: tuple[tuple[str, int], ...]


def local_models() -> list[LocalModel]:
    """The models on this machine, those talked to last first, then by name."""
    from dynrun.demo.builtin import BUILTIN, builtin_path
    from dynrun.gguf.header import read_header
    from dynrun.models import Listed, list_models

    used = _last_used()
    found = []
    for listed in list_models():
        try:
            bpw = read_header(listed.path).bpw
        except DynrunError:
            bpw = 0.0
        found.append(LocalModel(listed, bpw, _measured_kld(listed.path), used.get(listed.name, 0.0)))
    known = {model.listed.name for model in found}
    unmade = [Listed(name, builtin_path(name), 0, "llama", "built in") for name in BUILTIN if name not in known]
    found += [LocalModel(listed, 0.0, None, 0.0) for listed in unmade]
    return sorted(found, key=lambda model: (-model.used_s, model.listed.name))


def details_of(model: Listed) -> Details:
    """From the file's header. Raises DynrunError for one that cannot be read."""
    if not model.size_bytes:
        note = "a small chat model that comes with dynrun; it is fetched and made when it is first used"
        return Details(model.name, (("name", model.name), ("about", note)), (), "", ())
    from dynrun.gguf.header import read_header

    header = read_header(model.path)
    files = _files(model.path)
    facts = [
        ("name", str(header.metadata.get("general.name", model.name))),
        ("architecture", header.architecture),
        ("quant", model.quant),
        ("size", f"{size(model.size_bytes)}, {header.bpw:.2f} bpw, {len(header.tensors)} tensors"),
        ("parameters", _parameters(header.n_elements)),
        ("types", _types(header)),
        *_facts(header),
        ("path", str(model.path)),
    ]
    template = str(header.metadata.get("tokenizer.chat_template", ""))
    return Details(model.name, tuple(facts), tuple(_tensors(header)), template, files)


def _parameters(n: int) -> str:
    return f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"


def _files(path: Path) -> tuple[tuple[str, int], ...]:
    """The file, or all shards of it."""
    stem, mark, count = path.stem.rpartition("-of-")
    names = sorted(path.parent.glob(f"{stem.rpartition('-')[0]}-*-of-{count}.gguf")) if mark else [path]
    return tuple((name.name, name.stat().st_size) for name in names if name.is_file())


def _facts(header: Header) -> Iterable[tuple[str, str]]:
    for key, title in _KEYS:
        value = header.metadata.get(key.replace("*", header.architecture))
        if value not in (None, "", []):
            yield title, _written(value)


def _written(value: Any) -> str:
    if isinstance(value, list):
        return (
            f"{min(value)}–{max(value)} by layer" if all(isinstance(v, int) for v in value) else f"{len(value)} values"
        )
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def _types(header: Header) -> str:
    counts = Counter(tensor.type for tensor in header.tensors.values())
    return ", ".join(f"{n} {kind}" for kind, n in counts.most_common())


def _tensors(header: Header) -> Iterable[tuple[str, str, str, int]]:
    for tensor in header.tensors.values():
        yield tensor.name, tensor.type, " × ".join(map(str, tensor.shape)), tensor.nbytes


def _measured_kld(path: Path) -> float | None:
    """Out of the scheme that `make` laid beside the file."""
    from dynrun.scheme import read_scheme

    beside = path.with_name(f"{path.stem}.scheme.toml")
    if not beside.is_file():
        return None
    try:
        return read_scheme(beside).measured_kld
    except DynrunError:
        return None


def _last_used() -> dict[str, float]:
    """By model, when the latest conversation with it went on."""
    from dynrun.runtime.history import list_chats

    used: dict[str, float] = {}
    for chat in list_chats():
        used[chat.model] = max(used.get(chat.model, 0.0), chat.updated_s)
    return used
