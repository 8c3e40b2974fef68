"""Probes and whole schemes in place: what they measure is what the file would show, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from dynrun.calibration.imatrix import Imatrix, Sums, read_imatrix, write_imatrix
from dynrun.calibration.sequences import TokenSequence
from dynrun.gguf.header import read_header
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.gguf.weights import WeightFile, encode
from dynrun.llamacpp import tools
from dynrun.llamacpp.engine import Engine, Logits
from dynrun.llamacpp.library import ggml
from dynrun.scoring.divergence import divergence
from dynrun.sensitivity.errors import Quantizer
from dynrun.sensitivity.in_place import InPlace, quantized, stored_as
from dynrun.sensitivity.sweep import Job, LocalProbes, Sweep
from tests.tiny import write_tiny_llama
from tests.tiny_shared import write_tiny_shared

pytestmark = pytest.mark.native
TOKENS = (5, 70, 71, 200, 9, 33, 120, 121, 4, 4, 250, 17, 60, 61, 62, 63)
SEQUENCES = [
    TokenSequence("a", "chat", TOKENS),
    TokenSequence("b", "chat", TOKENS[::-1]),
    TokenSequence("c", "chat", TOKENS[3:10]),
]
# Going on from the middle of a decode is as exact as this, in nats per token (Sweep relies on it).
EXACT = 1e-9


@dataclass(frozen=True)
class World:
    kind: str
    path: Path
    engine: Engine
    quantizer: Quantizer

    def logits(self) -> list[Logits]:
        return [self.engine.logits(sequence.tokens) for sequence in SEQUENCES]

    def kld(self, before: list[Logits]) -> list[float]:
        """Of each sequence, by full decodes of the model as it is now."""
        return [float(divergence(a, b).kld.mean()) for a, b in zip(before, self.logits(), strict=True)]


def write_tiny_imatrix(model: Path, path: Path) -> None:
    random = np.random.default_rng(0)
    sums: dict[str, Sums] = {}
    counts: dict[str, Sums] = {}
    for name, tensor in quantizable(read_header(model)).items():
        n_expert = int(np.prod(tensor.shape[2:]))
        counts[name] = np.linspace(10.0, 10.0 * n_expert, n_expert)
        mean: Sums = random.random((n_expert, tensor.shape[0])) + 0.1
        sums[name] = mean * counts[name][:, None]
    write_imatrix(Imatrix(sums, counts), path)


@pytest.fixture(scope="module", params=["dense", "experts", "tied"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("tiny")
    n_expert = 4 if request.param == "experts" else 0
    path = write_tiny_llama(folder / "tiny.gguf", n_block=2, n_ff=256, n_expert=n_expert, tied=request.param == "tied")
    write_tiny_imatrix(path, folder / "imatrix.gguf")
    quantizer = Quantizer(WeightFile(path), read_imatrix(folder / "imatrix.gguf"), 2)
    with Engine.open(path, n_ctx=64, n_threads=2) as engine:
        yield World(request.param, path, engine, quantizer)


def coarse(world: World, type_name: str = "Q3_K") -> dict[str, str]:
    return dict.fromkeys(quantizable(world.engine.header), type_name)


def test_a_probe_of_any_tensor_is_a_full_decode_with_it_replaced(world: World) -> None:
    before, sweep = world.logits(), Sweep(world.engine, world.quantizer, SEQUENCES)
    assert sweep.furthest == 0
    for name in quantizable(world.engine.header):
        probe = sweep.run(Job("one", {name: "Q3_K"}, 0, 3))
        by_hand = world.quantizer.replacement(name, "Q3_K")
        with world.engine.replaced(name, encode(by_hand.values, "F16")):
            assert probe.klds == pytest.approx(world.kld(before), rel=1e-5, abs=EXACT), name
        assert min(probe.klds) > 1e-6
        assert probe.errors == [by_hand.error]
        assert probe.weights == [16, 16, 7]


@pytest.mark.parametrize(
    ("n_block", "n_shared", "n_per_layer", "furthest"), [(4, 2, 0, -1), (6, 2, 0, 1), (6, 2, 256, 1), (4, 0, 256, 2)]
)
def test_layers_whose_caches_are_read_later_are_not_left_out(
    tmp_path: Path, n_block: int, n_shared: int, n_per_layer: int, furthest: int
) -> None:
    path = write_tiny_shared(tmp_path / "shared.gguf", n_block=n_block, n_shared=n_shared, n_per_layer=n_per_layer)
    write_tiny_imatrix(path, tmp_path / "imatrix.gguf")
    quantizer = Quantizer(WeightFile(path), read_imatrix(tmp_path / "imatrix.gguf"), 2)
    with Engine.open(path, n_ctx=64, n_threads=2) as engine:
        world = World("shared", path, engine, quantizer)
        before, sweep = world.logits(), Sweep(engine, quantizer, SEQUENCES)
        assert sweep.furthest == furthest
        for name in quantizable(engine.header):
            probe = sweep.run(Job("one", {name: "Q3_K"}, 0, 3))
            with engine.replaced(name, by_hand(world, name, "Q3_K")):
                assert probe.klds == pytest.approx(world.kld(before), rel=1e-5, abs=EXACT), name
            assert max(probe.klds) > 1e-7, name


def test_tensors_of_a_job_are_replaced_together(world: World) -> None:
    before, sweep = world.logits(), Sweep(world.engine, world.quantizer, SEQUENCES)
    types = {"blk.1.attn_q.weight": "Q2_K", "blk.0.attn_output.weight": "Q4_K", "token_embd.weight": "Q5_K"}
    probe = sweep.run(Job("several", types, 0, 3))
    with (
        world.engine.replaced("blk.1.attn_q.weight", by_hand(world, "blk.1.attn_q.weight", "Q2_K")),
        world.engine.replaced("blk.0.attn_output.weight", by_hand(world, "blk.0.attn_output.weight", "Q4_K")),
        world.engine.replaced("token_embd.weight", by_hand(world, "token_embd.weight", "Q5_K")),
    ):
        assert probe.klds == pytest.approx(world.kld(before), rel=1e-5, abs=EXACT)
    assert probe.error == sum(world.quantizer.replacement(name, t).error for name, t in types.items())
    assert probe.kld == pytest.approx(np.average(probe.klds, weights=[16, 16, 7]))


def by_hand(world: World, name: str, type_name: str) -> npt.NDArray[np.uint8]:
    return encode(world.quantizer.replacement(name, type_name).values, "F16")


def test_only_the_jobs_own_sequences_are_measured(world: World) -> None:
    sweep = Sweep(world.engine, world.quantizer, SEQUENCES)
    types = {"blk.1.attn_v.weight": "Q3_K"}
    jobs = [Job("all", types, 0, 3), Job("last", types, 2, 3), Job("middle", types, 1, 2)]
    whole, last, middle = LocalProbes(sweep).run(jobs)
    assert (last.first, last.klds, last.weights) == (2, whole.klds[2:], [7])
    assert (middle.first, middle.klds, middle.weights) == (1, whole.klds[1:2], [16])


def test_after_a_probe_the_model_is_what_it_was(world: World) -> None:
    before, sweep = world.logits(), Sweep(world.engine, world.quantizer, SEQUENCES)
    sweep.run(Job("everything", coarse(world), 0, 3))
    assert all(np.array_equal(a, b) for a, b in zip(before, world.logits(), strict=True))
    # F16 of an F16 model changes nothing.
    trivial = sweep.run(Job("trivial", {"blk.1.attn_q.weight": "F16"}, 0, 3))
    assert trivial.klds == pytest.approx([0.0] * 3, abs=EXACT)
    assert trivial.errors == [0.0]


def test_a_probe_that_fails_leaves_the_model_as_it_was(world: World) -> None:
    before, sweep = world.logits(), Sweep(world.engine, world.quantizer, SEQUENCES)
    with pytest.raises(IndexError):
        sweep.run(Job("beyond the last sequence", coarse(world), 2, 4))
    with pytest.raises(KeyError):
        sweep.run(Job("no such type", {"blk.0.attn_q.weight": "Q3_K", "blk.1.attn_q.weight": "Q3_X"}, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(before, world.logits(), strict=True))


def test_the_reference_of_a_sweep_is_the_model_as_it_stands(world: World) -> None:
    """At an operating point: the same tensor among others that are quantized too."""
    name = "blk.1.attn_output.weight"
    placed = InPlace(world.engine, world.quantizer)
    placed.place({"blk.0.attn_v.weight": "Q2_K"})
    before = world.logits()
    probe = Sweep(world.engine, world.quantizer, SEQUENCES).run(Job("one", {name: "Q3_K"}, 0, 3))
    with world.engine.replaced(name, by_hand(world, name, "Q3_K")):
        assert probe.klds == pytest.approx(world.kld(before), rel=1e-5, abs=EXACT)
    placed.place({})


def test_what_was_placed_is_taken_out_again_to_the_last_bit(world: World) -> None:
    before, names = world.logits(), list(quantizable(world.engine.header))
    stored = [world.engine.read(name) for name in names]
    placed = InPlace(world.engine, world.quantizer)
    placed.place(coarse(world))
    assert min(world.kld(before)) > 1e-3
    placed.place({})
    assert all(np.array_equal(world.engine.read(name), data) for name, data in zip(names, stored, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(before, world.logits(), strict=True))


def test_a_scheme_in_place_does_not_depend_on_those_before_it(world: World) -> None:
    before, placed = world.logits(), InPlace(world.engine, world.quantizer)
    mixed = coarse(world) | {"blk.1.attn_q.weight": "Q5_K", "token_embd.weight": "Q8_0"}
    few = {"blk.0.attn_q.weight": "Q4_K", "blk.1.attn_q.weight": "Q5_K"}
    placed.place(mixed)
    wanted = world.kld(before)
    for other in (coarse(world, "Q2_K"), few, {}):
        placed.place(other)
        placed.place(mixed)
        assert world.kld(before) == wanted
    placed.place(few)
    with world.engine.replaced("blk.1.attn_q.weight", by_hand(world, "blk.1.attn_q.weight", "F16")):
        only_first = world.kld(before)
    placed.place({"blk.0.attn_q.weight": "Q4_K"})
    assert world.kld(before) == only_first
    placed.place({})


def test_tensors_that_no_decode_touches_are_passed_over(world: World) -> None:
    before, placed = world.logits(), InPlace(world.engine, world.quantizer)
    placed.place({"blk.9.nextn.eh_proj.weight": "Q3_K"})
    assert all(np.array_equal(a, b) for a, b in zip(before, world.logits(), strict=True))
    placed.place({})


def test_what_is_put_in_place_has_the_error_that_is_stated(world: World) -> None:
    name = "blk.1.attn_v.weight"
    assert stored_as(world.engine, name) == "F16"
    assert stored_as(world.engine, "blk.1.attn_norm.weight") == "F32"
    data, error = quantized(world.engine, world.quantizer, name, "Q3_K")
    replaced = world.quantizer.replacement(name, "Q3_K")
    assert error == replaced.error
    assert np.array_equal(data.view(np.float16).reshape(replaced.values.shape), replaced.values.astype(np.float16))


def made_by_llama_quantize(world: World, types: Mapping[str, str], folder: Path) -> Path:
    write_tiny_imatrix(world.path, folder / "imatrix.gguf")
    tools.write_tensor_types(types, folder / "types.txt")
    tools.quantize(
        world.path,
        "made.gguf",
        "Q4_K_M",
        folder=folder,
        n_threads=2,
        imatrix="imatrix.gguf",
        tensor_type_file="types.txt",
    )
    made = folder / "made.gguf"
    assert {name: read_header(made).tensors[name].type for name in types} == dict(types)
    return made


def values_of(path: Path, name: str) -> npt.NDArray[np.uint8]:
    """A quantized tensor of a file, dequantized, as the bytes of an F16 one."""
    header = read_header(path)
    tensor = header.tensors[name]
    start = header.data_offset + tensor.offset
    data = np.fromfile(path, dtype=np.uint8, offset=start, count=tensor.nbytes)
    values = ggml().dequantize(TENSOR_TYPES[tensor.type].ggml_id, data, int(np.prod(tensor.shape[1:])), tensor.shape[0])
    return encode(values, "F16")


def mixed(world: World) -> dict[str, str]:
    """Types of all families; of those whose codebooks take a second to set up two, in one of the models."""
    menu = ("Q3_K", "Q8_0", "IQ4_XS", "Q2_K", "Q5_0", "Q4_K")
    slow = {"blk.0.attn_k.weight": "IQ2_S", "blk.0.attn_v.weight": "IQ3_S"} if world.kind == "dense" else {}
    types = {name: menu[i % len(menu)] for i, name in enumerate(quantizable(world.engine.header))}
    return types | slow


def test_a_scheme_in_place_is_the_file_that_llama_quantize_makes_of_it(world: World, tmp_path: Path) -> None:
    """The weights are the same to the last bit of their F16; the divergence is within a tenth: the file's kernels
    quantize activations too, to 8 bits in blocks of 32 or 256, which errs far less than these types do."""
    before, placed = world.logits(), InPlace(world.engine, world.quantizer)
    types = mixed(world)
    placed.place(types)
    in_place, logits, stored = world.kld(before), world.logits(), {name: world.engine.read(name) for name in types}
    placed.place({})
    made = made_by_llama_quantize(world, types, tmp_path)
    for name in types:
        assert np.array_equal(stored[name], values_of(made, name)), name
    with Engine.open(made, n_ctx=64, n_threads=2) as engine:
        loaded = [engine.logits(sequence.tokens) for sequence in SEQUENCES]
    from_file = [float(divergence(a, b).kld.mean()) for a, b in zip(before, loaded, strict=True)]
    assert np.mean(in_place) == pytest.approx(np.mean(from_file), rel=0.1)
    # From each other they differ far less than either does from the original.
    apart = [float(divergence(a, b).kld.mean()) for a, b in zip(logits, loaded, strict=True)]
    assert np.mean(apart) < 0.03 * np.mean(from_file)
