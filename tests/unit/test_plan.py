"""Placements of large models on described machines: as written down in tests/golden/plans.json, and never too large.

`python -m tests.unit.test_plan` writes the golden file anew; look at what changed before it is committed.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrun.errors import UsageError
from dynrun.runtime.command import command_line, layer_map
from dynrun.runtime.machine import GIB, Device, Machine, read_machine
from dynrun.runtime.model_facts import ModelFacts, facts_of
from dynrun.runtime.placement import Choice, Placement, Wishes, choice_from_json
from dynrun.runtime.plan import placed, plan, retreat
from dynrun.runtime.residence import CPU, residence
from tests.shapes import PRESETS, preset_types, shape_header

TESTS = Path(__file__).resolve().parents[1]
GOLDEN = TESTS / "golden" / "plans.json"
MACHINES = {path.stem: read_machine(path) for path in sorted((TESTS / "machines").glob("*.toml"))}
MODELS = [f"{name} {preset}" for name, preset in PRESETS]


@cache
def facts(model: str) -> ModelFacts:
    name, preset = model.split()
    return replace(facts_of(shape_header(name, preset_types(name, preset))), label=preset)


def on_devices(found: Placement) -> int:
    return sum(nbytes for name, nbytes in found.device_bytes.items() if name != "CPU")


def summary(model: str, machine: str) -> dict[str, Any]:
    found = plan(facts(model), MACHINES[machine], Wishes())
    return {
        "verdict": found.verdict,
        "gib": {name: round(nbytes / GIB, 2) for name, nbytes in found.device_bytes.items()},
        "kv_gib": round(found.kv_bytes / GIB, 3),
        "tokens_per_second": round(found.tokens_per_second, 1),
        "map": layer_map(facts(model), found.choice),
        "argv": " ".join(found.argv),
    }


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("model", MODELS)
def test_placements_are_the_golden_ones(model: str, machine: str) -> None:
    assert summary(model, machine) == json.loads(GOLDEN.read_text(encoding="utf-8"))[model][machine]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("model", MODELS)
def test_what_fits_has_room_everywhere(model: str, machine: str) -> None:
    here = MACHINES[machine]
    found = plan(facts(model), here, Wishes())
    if not found.fits:
        assert found.reason
        return
    for device in here.devices:
        assert found.device_bytes.get(device.name, 0) <= device.free_bytes
    pool = found.host_bytes + (on_devices(found) if here.unified else 0)
    assert pool - (found.pageable_bytes if found.verdict == "disk" else 0) <= here.ram_free_bytes


class TestFamilies:
    def test_a_model_that_fits_the_gpu_is_all_there(self) -> None:
        found = plan(facts("gemma-3-27b Q4_K_M"), MACHINES["desktop-24-64"], Wishes(n_ctx=8192))
        assert (found.verdict, found.choice.n_gpu_layers, found.choice.n_cpu_moe) == ("gpu", 63, 0)
        assert found.overrides == ()

    def test_experts_of_the_last_layers_stay_in_ram_first(self) -> None:
        found = plan(facts("llama-4-scout IQ2_XXS"), MACHINES["desktop-24-64"], Wishes(n_ctx=16384))
        assert found.verdict == "gpu+ram"
        assert found.choice.n_gpu_layers == 49
        where = residence(facts("llama-4-scout IQ2_XXS"), found.choice)
        n = found.choice.n_cpu_moe
        assert 0 < n < 48
        assert where.experts_in_ram == set(range(48 - n, 48))
        ((pattern, buffer),) = found.overrides
        tensors = [f"blk.{i}.ffn_{kind}_exps.weight" for i in range(48) for kind in ("up", "down", "gate")]
        tensors += [f"blk.{i}.ffn_up_shexp.weight" for i in range(48)]
        moved = {name for name in tensors if re.search(pattern, name)}
        assert buffer == "CPU"
        assert moved == {t for t in tensors if "_exps" in t and int(t.split(".")[1]) >= 48 - n}

    def test_one_more_layer_of_experts_would_not_have_fitted(self) -> None:
        model, machine = facts("llama-4-scout IQ2_XXS"), MACHINES["desktop-24-64"]
        found = plan(model, machine, Wishes(n_ctx=16384))
        greedier = placed(model, machine, replace(found.choice, n_cpu_moe=found.choice.n_cpu_moe - 1))
        device = machine.devices[0]
        assert greedier.device_bytes[device.name] > device.free_bytes - 0.02 * device.total_bytes

    def test_dense_models_leave_their_first_layers_in_ram(self) -> None:
        model = facts("gemma-3-27b Q4_K_M")
        found = plan(model, MACHINES["laptop-8-16"], Wishes(n_ctx=4096))
        where = residence(model, found.choice)
        assert 0 < found.choice.n_gpu_layers < 63
        assert where.layer_on == tuple(sorted(where.layer_on))
        assert where.layer_on[0] == CPU
        assert where.output_on == 0

    def test_experts_go_before_layers_where_a_small_gpu_holds_the_rest(self) -> None:
        found = plan(facts("gpt-oss-120b MXFP4_MOE"), MACHINES["laptop-8-16"], Wishes(n_ctx=8192))
        assert found.choice.n_gpu_layers == 37
        assert found.choice.n_cpu_moe > 30

    def test_without_gpus_nothing_is_offloaded(self) -> None:
        found = plan(facts("gemma-3-27b Q4_K_M"), MACHINES["cpu-only-64"], Wishes())
        assert found.verdict == "ram"
        assert not {"-ngl", "-ot", "-ts", "-dev"} & set(found.argv)

    def test_two_gpus_share_what_one_cannot_hold(self) -> None:
        model, machine = facts("gpt-oss-120b MXFP4_MOE"), MACHINES["two-gpus"]
        found = plan(model, machine, Wishes(n_ctx=8192))
        assert found.verdict == "gpu"
        assert sum(found.choice.layers_of) == 37
        assert all(found.choice.layers_of)
        split = found.argv[found.argv.index("-ts") + 1]
        assert split == ",".join(map(str, found.choice.layers_of))

    def test_one_of_two_gpus_is_enough_for_a_small_model(self) -> None:
        found = plan(facts("gemma-3-27b Q3_K_M"), MACHINES["two-gpus"], Wishes(n_ctx=8192))
        assert len(found.choice.devices) == 1
        assert found.argv[found.argv.index("-dev") + 1] == found.choice.devices[0]

    def test_unified_memory_is_one_pool(self) -> None:
        machine = MACHINES["mac-36"]
        found = plan(facts("gemma-3-27b Q6_K"), machine, Wishes(n_ctx=8192))
        assert found.verdict == "gpu"
        smaller = replace(machine, ram_free_bytes=20 * GIB)
        assert plan(facts("gemma-3-27b Q6_K"), smaller, Wishes(n_ctx=8192)).verdict in ("disk", "no")

    def test_a_cpu_that_repacks_reads_the_file_instead_of_mapping_it(self) -> None:
        machine = replace(MACHINES["cpu-only-64"], repacked=("Q4_K",))
        found = plan(facts("gemma-3-27b Q4_K_M"), machine, Wishes())
        assert found.argv[found.argv.index("-lm") + 1] == "none"
        assert found.pageable_bytes == 0
        mapped = placed(facts("gemma-3-27b Q4_K_M"), machine, replace(found.choice, load_mode="mmap"))
        assert found.weight_bytes - mapped.weight_bytes == facts("gemma-3-27b Q4_K_M").output_copy_bytes
        larger = plan(facts("deepseek-v3 Q4_K_M"), machine, Wishes())
        assert larger.verdict == "disk"
        assert "-nr" in larger.argv


class TestWishes:
    def test_the_context_is_the_longest_that_is_cheap(self) -> None:
        model = facts("llama-4-scout Q4_K_M")
        found = plan(model, MACHINES["desktop-24-64"], Wishes())
        fastest = max(plan(model, MACHINES["desktop-24-64"], Wishes(n_ctx=n)).tokens_per_second for n in (4096, 32768))
        assert found.tokens_per_second >= 0.75 * fastest

    def test_quantized_caches_take_less_and_turn_flash_attention_on(self) -> None:
        model, machine = facts("gemma-3-27b Q4_K_M"), MACHINES["cpu-only-64"]
        whole = plan(model, machine, Wishes(n_ctx=8192))
        half = plan(model, machine, Wishes(n_ctx=8192, type_k="q8_0", type_v="q8_0"))
        assert half.kv_bytes == whole.kv_bytes * 34 // 64
        assert {"-ctk", "-ctv", "-fa"} <= set(half.argv)

    def test_each_slot_has_the_context_that_is_wished(self) -> None:
        model, machine = facts("gemma-3-27b Q4_K_M"), MACHINES["cpu-only-64"]
        one, four = (plan(model, machine, Wishes(n_ctx=8192, parallel=n)) for n in (1, 4))
        assert four.argv[:4] == ("-c", "32768", "-np", "4")
        assert four.kv_bytes == 4 * one.kv_bytes

    def test_an_image_encoder_takes_its_room(self) -> None:
        model, machine = facts("gemma-3-27b Q4_K_M"), MACHINES["desktop-24-64"]
        without = plan(model, machine, Wishes(n_ctx=8192))
        found = plan(model, machine, Wishes(n_ctx=8192, mmproj=Path("mm.gguf"), mmproj_bytes=GIB))
        assert on_devices(found) - on_devices(without) >= GIB
        assert found.argv[-2:] == ("--mmproj", "mm.gguf")

    def test_the_prompt_cache_comes_out_of_what_is_left(self) -> None:
        model, machine = facts("gemma-3-27b Q4_K_M"), MACHINES["cpu-only-64"]
        assert plan(model, machine, Wishes(prompt_cache_bytes=0)).argv[-3:-2] != ("8192",)
        none = plan(model, machine, Wishes(n_ctx=4096, prompt_cache_bytes=0))
        some = plan(model, machine, Wishes(n_ctx=4096))
        assert some.host_bytes - none.host_bytes == some.choice.prompt_cache_mib << 20 > 0

    def test_an_unknown_cache_type_is_a_usage_error(self) -> None:
        with pytest.raises(UsageError, match="no KV cache type 'q3_0'"):
            plan(facts("gemma-3-27b Q4_K_M"), MACHINES["cpu-only-64"], Wishes(type_k="q3_0"))


class TestRetreat:
    def steps(self, model: str, machine: str, *, host: bool = False) -> list[Placement]:
        found: Placement | None = plan(facts(model), MACHINES[machine], Wishes(n_ctx=8192))
        steps = []
        while found is not None:
            steps.append(found)
            found = retreat(found, facts(model), MACHINES[machine], host=host)
            assert len(steps) < 100
        return steps

    def test_experts_then_layers_then_context(self) -> None:
        steps = self.steps("llama-4-scout IQ2_XXS", "desktop-24-64")
        for one, other in pairwise(steps):
            a, b = one.choice, other.choice
            assert b.n_cpu_moe >= a.n_cpu_moe
            assert b.n_gpu_layers <= a.n_gpu_layers
            assert b.n_ctx <= a.n_ctx
            assert b.n_gpu_layers == a.n_gpu_layers or b.n_cpu_moe == 48
            assert b.n_ctx == a.n_ctx or b.n_gpu_layers == 0
            assert on_devices(other) < on_devices(one) or b.n_ctx < a.n_ctx
        assert steps[-1].choice.n_gpu_layers == 0
        assert steps[-1].choice.n_ctx == 512

    def test_layers_of_the_fullest_device_go_first(self) -> None:
        steps = self.steps("gpt-oss-120b MXFP4_MOE", "two-gpus")
        assert steps[0].choice.n_cpu_moe == 0
        counts = [step.choice.layers_of for step in steps if step.choice.n_cpu_moe == 36 and step.choice.n_gpu_layers]
        assert all(sum(b) < sum(a) for a, b in pairwise(counts))

    def test_of_ram_the_prompt_cache_goes_first(self) -> None:
        steps = self.steps("gemma-3-27b Q4_K_M", "cpu-only-64", host=True)
        assert steps[0].choice.prompt_cache_mib > 0
        assert (steps[1].choice.prompt_cache_mib, steps[1].choice.n_ctx) == (0, 8192)
        assert steps[2].choice.n_ctx == 4096


@given(free=st.integers(0, 96 * GIB), more=st.integers(0, 32 * GIB), ram=st.integers(0, 256 * GIB), n_ctx=st.just(8192))
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_more_memory_is_never_slower_and_nothing_is_overfilled(free: int, more: int, ram: int, n_ctx: int) -> None:
    model = facts("gpt-oss-120b MXFP4_MOE")

    def on(free_bytes: int) -> Placement:
        device = Device("CUDA0", "GPU", 128 * GIB, free_bytes, 1e12)
        return plan(model, Machine("m", (device,), 256 * GIB, ram, 80e9, 16), Wishes(n_ctx=n_ctx))

    one, other = on(free), on(free + more)
    assert other.tokens_per_second >= one.tokens_per_second or (one.verdict == "disk" and other.verdict != "disk")
    for found, limit in ((one, free), (other, free + more)):
        if found.fits:
            assert on_devices(found) <= limit
            assert found.host_bytes - found.pageable_bytes <= ram


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any), n_layer=st.integers(1, 60))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_layers_lie_where_llama_cpp_puts_them_for_these_options(counts: list[int], n_layer: int) -> None:
    """llama_model::load_tensors of src/llama-model.cpp, with -ts of counts and -ngl of their sum."""
    model = facts("gemma-3-27b Q4_K_M")
    model = replace(model, layers=(model.layers * 2)[:n_layer])
    n_gpu_layers = min(sum(counts), n_layer + 1)
    counts[counts.index(max(counts))] -= sum(counts) - n_gpu_layers if sum(counts) > n_gpu_layers else 0
    if min(counts) < 0 or sum(counts) != n_gpu_layers:
        return
    where = residence(model, Choice(512, n_gpu_layers=n_gpu_layers, layers_of=tuple(counts)))
    splits = [total / n_gpu_layers for total in accumulate(counts)]
    start = n_layer + 1 - n_gpu_layers
    expected = [
        CPU if layer < start else bisect_right(splits, (layer - start) / n_gpu_layers) for layer in range(n_layer + 1)
    ]
    assert [*where.layer_on, where.output_on] == expected


def test_a_choice_is_remembered_whole() -> None:
    choice = Choice(
        8192, 2, "q8_0", "f16", 49, 7, (20, 29), ("CUDA0", "CUDA1"), Path("mm.gguf"), 7, False, 512, "mmap-plain"
    )
    for one in (choice, replace(choice, mmproj=None)):
        assert choice_from_json(json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.parametrize("data", [{}, {"n_ctx": 1, "wings": 2}, {"n_ctx": 1, "layers_of": ["x"]}])
def test_what_is_no_choice_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"no remembered placement.* — delete it; it is planned anew"):
        choice_from_json(data)


def test_the_command_begins_with_program_and_model() -> None:
    found = plan(facts("gemma-3-27b Q4_K_M"), MACHINES["cpu-only-64"], Wishes())
    assert command_line(found, "m.gguf")[:3] == ("llama-server", "-m", "m.gguf")
    assert ("--fit", "off") in set(pairwise(found.argv))


if __name__ == "__main__":
    whole = {model: {machine: summary(model, machine) for machine in MACHINES} for model in MODELS}
    GOLDEN.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
