"""A choice as llama-server's options.

Takes facts, a machine and a choice; gives arguments without the program, the model, and where it listens. Follows
common/arg.cpp of the pinned llama.cpp.
"""

from __future__ import annotations

from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.runtime.machine import Machine
from dynrun.runtime.memory import n_checkpoints
from dynrun.runtime.model_facts import EXPERTS, ModelFacts
from dynrun.runtime.placement import Choice, Placement
from dynrun.runtime.residence import CPU, residence, runs

_LOAD_OPTIONS = {"mmap": ("-lm", "mmap"), "read": ("-lm", "none"), "mmap-plain": ("-lm", "mmap", "-nr")}


def argv_of(facts: ModelFacts, machine: Machine, choice: Choice) -> tuple[str, ...]:
    """llama-server's options. Of its own fitting nothing is left: it must not be mixed with a given placement."""
    # -c is divided among the slots, which do not share one cache where -np is given.
    argv = ["-c", str(choice.n_ctx * choice.parallel), "-np", str(choice.parallel), "--fit", "off"]
    if (choice.type_k, choice.type_v) != ("f16", "f16"):
        argv += ["-ctk", choice.type_k, "-ctv", choice.type_v]
    if TENSOR_TYPES[choice.type_v.upper()].block_size > 1:
        argv += ["-fa", "on"]
    argv += _device_options(machine, choice)
    for pattern, buffer in overrides_of(facts, choice):
        argv += ["-ot", f"{pattern}={buffer}"]
    argv += [*_LOAD_OPTIONS[choice.load_mode], "--cache-ram", str(choice.prompt_cache_mib)]
    if n := n_checkpoints(facts, choice):
        argv += ["-ctxcp", str(n // choice.parallel)]
    if choice.mmproj is not None:
        argv += ["--mmproj", str(choice.mmproj)]
        if not choice.mmproj_on_gpu or not choice.devices:
            argv.append("--no-mmproj-offload")
    return tuple(argv)


def _device_options(machine: Machine, choice: Choice) -> list[str]:
    if not machine.devices:
        # -ngl would only bring a warning.
        return []
    if not choice.n_gpu_layers:
        return ["-dev", "none"]
    options = ["-ngl", str(choice.n_gpu_layers)]
    if len(choice.devices) < len(machine.devices):
        options += ["-dev", ",".join(choice.devices)]
    if len(choice.devices) > 1:
        options += ["-ts", ",".join(map(str, choice.layers_of))]
    return options


def overrides_of(facts: ModelFacts, choice: Choice) -> tuple[tuple[str, str], ...]:
    """Pairs of pattern and buffer, as of -ot: the experts that stay in RAM."""
    if not choice.n_cpu_moe or not choice.n_gpu_layers:
        return ()
    if choice.n_cpu_moe >= len(facts.moe_layers):
        return ((EXPERTS.pattern, "CPU"),)
    numbers = "|".join(map(str, facts.moe_layers[-choice.n_cpu_moe :]))
    return ((rf"blk\.({numbers}){EXPERTS.pattern}", "CPU"),)


def layer_map(facts: ModelFacts, choice: Choice) -> list[str]:
    """Where what lies, for people: a line for each memory, and one for experts that are elsewhere than their layer."""
    where = residence(facts, choice)
    lines = []
    for first, last, device in runs(where):
        name = "RAM" if device == CPU else choice.devices[device]
        output = " and the output" if last == facts.n_layer - 1 and where.output_on == device else ""
        lines.append(f"{name}: layers {first}–{last}{output}")
    if where.layer_on[-1] != where.output_on:
        lines.append(f"{'RAM' if where.output_on == CPU else choice.devices[where.output_on]}: the output")
    if where.experts_in_ram:
        lines.append(f"RAM: the experts of layers {min(where.experts_in_ram)}–{max(where.experts_in_ram)}")
    return lines


def command_line(placement: Placement, model: str) -> tuple[str, ...]:
    """The whole command, to print."""
    return ("llama-server", "-m", model, *placement.argv)
