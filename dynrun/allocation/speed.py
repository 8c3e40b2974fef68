"""Predicted time of decoding one token: the weights that a token uses, times the time per weight of their type.

Takes a table that somebody measured on their machine, gives seconds per token of a tensor in a type; measures nothing
and knows nothing of attention, the KV cache or samplers, which no choice of types changes. The table is TOML::

    [ns_per_weight]               # nanoseconds per weight
    Q4_K = 0.045
    Q6_K = 0.071

    [ns_per_weight.ffn_down_exps] # optional: other values for one kind of tensor (blk.N.KIND.weight)
    Q4_K = 0.060

``llama-bench -n 128 -p 0`` on files of a single type gives such values: seconds per token / weights per token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrun.artifacts import read_toml
from dynrun.errors import UsageError
from dynrun.gguf.header import Header, TensorInfo
from dynrun.gguf.quantizable import is_mtp
from dynrun.gguf.tensor_types import known_type

_KEY = "ns_per_weight"
# A token reads one row of these.
_LOOKUPS = frozenset({"token_embd.weight", "per_layer_token_embd.weight"})


@dataclass(frozen=True)
class SpeedTable:
    """Seconds per weight of each type, ``by_kind`` first; ``name`` says which file in errors."""

    name: str
    seconds: Mapping[str, float]
    by_kind: Mapping[str, Mapping[str, float]]

    def seconds_per_weight(self, tensor: str, type_name: str) -> float:
        """Raises UsageError for a type that the table does not name."""
        found = self.by_kind.get(kind_of(tensor), {}).get(type_name, self.seconds.get(type_name))
        if found is None:
            raise UsageError(
                f"{self.name} says nothing of {type_name}, which {tensor} may have",
                fix=f"add it to [{_KEY}], or leave it out by --types",
            )
        return found


def kind_of(tensor: str) -> str:
    """``ffn_down_exps`` of ``blk.7.ffn_down_exps.weight``: what the tensors of all layers have in common."""
    return re.sub(r"^blk\.\d+\.", "", tensor).removesuffix(".weight")


def read_speed_table(path: Path) -> SpeedTable:
    """Raises NotFoundError for no file, UsageError for no TOML, an unknown key or type, or a time that is none."""
    data = read_toml(path, "--speed-table")
    table = data.get(_KEY)
    if set(data) != {_KEY} or not isinstance(table, dict):
        raise UsageError(f"{path} is no table of speeds", fix=f"write one table [{_KEY}] with lines as Q4_K = 0.045")
    kinds = {key: value for key, value in table.items() if isinstance(value, dict)}
    whole = {key: value for key, value in table.items() if key not in kinds}
    where = f"{path}, [{_KEY}"
    return SpeedTable(
        name=str(path),
        seconds=_times(whole, f"{where}]"),
        by_kind={kind: _times(values, f"{where}.{kind}]") for kind, values in kinds.items()},
    )


def _times(table: Mapping[str, Any], where: str) -> dict[str, float]:
    times: dict[str, float] = {}
    for key, value in table.items():
        name = known_type(key, where)
        # A TOML boolean is an int to Python; comparing refuses a nan.
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise UsageError(f"{where} {key} is {value!r:.60}", fix="it must be nanoseconds, finite and not negative")
        if name in times:
            raise UsageError(f"{where} names {name} twice", fix="keep one")
        times[name] = value * 1e-9
    return times


def check_kinds(table: SpeedTable, tensors: Collection[str]) -> None:
    """Raise UsageError where the table has a kind that no tensor of the model is of."""
    kinds = sorted({kind_of(name) for name in tensors})
    for kind in table.by_kind:
        if kind not in kinds:
            raise UsageError(
                f"{table.name}: the model has no tensor of kind {kind!r}", fix=f"its kinds: {', '.join(kinds)}"
            )


def weights_per_token(tensor: TensorInfo, header: Header) -> float:
    """How many weights of ``tensor`` are multiplied to decode one token.

    Of experts the share that the router chooses; none of a table of embeddings, unless it is the output too; none of
    an MTP block, which plain decoding does not run.
    """
    if is_mtp(tensor.name, header.metadata):
        return 0.0
    if tensor.name in _LOOKUPS:
        tied = tensor.name == "token_embd.weight" and "output.weight" not in header.tensors
        return float(tensor.n_elements) if tied else 0.0
    n_expert = header.metadata.get(f"{header.architecture}.expert_count", 0)
    n_used = header.metadata.get(f"{header.architecture}.expert_used_count", 0)
    if n_expert and n_used and len(tensor.shape) > 2 and tensor.shape[2] == n_expert:
        return tensor.n_elements * min(float(n_used) / float(n_expert), 1.0)
    return float(tensor.n_elements)


def seconds_per_token(table: SpeedTable, tensor: TensorInfo, type_name: str, header: Header) -> float:
    """Predicted seconds that ``tensor`` in ``type_name`` adds to the time of a token."""
    n = weights_per_token(tensor, header)
    return n * table.seconds_per_weight(tensor.name, type_name) if n else 0.0
