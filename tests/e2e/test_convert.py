"""From safetensors to a GGUF that is the same model: a real one, tiny ones of seven architectures, hostile ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from dynrun.artifacts import sha256_file
from dynrun.calibration.dataset import builtin
from dynrun.convert.dequantize import dequantized
from dynrun.demo.builtin import original
from dynrun.gguf.header import read_header
from dynrun.llamacpp import tools
from dynrun.llamacpp.engine import Engine
from dynrun.llamacpp.vocabulary import Vocabulary
from dynrun.paths import repository_root
from dynrun.scoring.divergence import divergence
from tests.commands import ARGV, dynrun
from tests.conftest import in_users_cache
from tests.conversion import share_environment, users_environment
from tests.safetensors_files import write_llama_folder

pytestmark = pytest.mark.e2e
TYPES = {"qwen2": "F16", "mixtral": "F16", "deepseek_v3": "F32"}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3", "mixtral", "deepseek_v3")


@pytest.fixture(autouse=True)
def shared_environment(private_cache: Path) -> None:
    users_environment()
    share_environment(private_cache)


def greedy(path: Path, prompt: str, n: int = 40) -> str:
    with Engine.open(path, n_ctx=128, n_threads=2, n_gpu_layers=0) as engine:
        tokens = engine.tokenize(prompt)
        begin = len(tokens)
        for _ in range(n):
            tokens.append(int(np.argmax(engine.logits(tokens, [len(tokens) - 1])[0])))
        return b"".join(engine.piece(token) for token in tokens[begin:]).decode("utf-8", "replace")


def mean_kld(one: Path, other: Path, tokens: list[int]) -> float:
    found = []
    for path in (one, other):
        with Engine.open(path, n_ctx=len(tokens), n_threads=2, n_gpu_layers=0) as engine:
            found.append(engine.logits(tokens))
    return float(np.mean(divergence(*found).kld))


def test_a_real_model_comes_back_as_it_was(smollm: Path) -> None:
    ran = dynrun("convert", smollm, "--check", "--json")
    assert ran.exit_code == 0, ran.stderr
    assert ran.json["type"] == "F16"
    assert ran.json["findings"] == []
    assert ran.json["check"]["kld"] < 1e-4
    assert ran.json["check"]["same_top_p"] == 1.0
    assert abs(ran.json["size_bytes"] - ran.json["planned"]["result_bytes"]) < 0.01 * ran.json["size_bytes"]
    made = Path(ran.json["path"])
    assert made.name == "SmolLM2-135M-Instruct-F16.gguf"
    with in_users_cache():
        before = dequantized(original(), print)
    texts = [str(m["content"]) for c in builtin().conversations for m in c.messages if m.get("content")]
    with Vocabulary.load(made) as new, Vocabulary.load(before) as old:
        assert sum(len(text) for text in texts) > 500_000
        assert [text for text in texts if new.tokenize(text) != old.tokenize(text)] == []
        tokens = old.tokenize("\n".join(texts[:40]))[:512]
    assert mean_kld(before, made, tokens) < 1e-4
    prompt = "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
    assert greedy(made, prompt) == greedy(before, prompt)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_tiny_model_of_each_architecture_is_converted_quantized_and_run(
    tiny: Path, name: str, tmp_path: Path
) -> None:
    ran = dynrun("convert", tiny / name, "--json")
    assert ran.exit_code == 0, ran.stderr
    assert ran.json["type"] == TYPES.get(name, "BF16")
    assert ran.json["findings"] == []
    made = Path(ran.json["path"])
    with np.load(tiny / f"{name}.npz") as theirs, Engine.open(made, n_ctx=64, n_threads=2, n_gpu_layers=0) as engine:
        ours = engine.logits([int(token) for token in theirs["tokens"]])
        width = min(ours.shape[1], theirs["logits"].shape[1])
        logits = theirs["logits"][:, :width]
        assert np.std(logits, axis=1).min() > 0.1
        assert np.mean(divergence(logits, ours[:, :width]).kld) < 1e-3
    tools.quantize(made, "small.gguf", "Q8_0", folder=tmp_path, n_threads=2)
    with Engine.open(tmp_path / "small.gguf", n_ctx=64, n_threads=2, n_gpu_layers=0) as engine:
        assert np.isfinite(engine.logits([1, 2, 3])).all()


# -- what the folder's makers may have in mind -------------------------------------------------------------------------


def with_code(folder: Path, canary: Path) -> Path:
    """A tokenizer of the model's own, which tells when it is imported."""
    lines = (f"open({str(canary)!r}, 'w').close()", "from transformers import GPT2TokenizerFast")
    (folder / "own.py").write_text("\n".join((*lines, "class Own(GPT2TokenizerFast): pass")) + "\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def own_code(tiny: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    for path in (tiny / "qwen2").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return with_code(folder, tmp_path / "canary")


def test_the_models_own_code_runs_only_where_it_is_trusted(own_code: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for command in (("convert", own_code), ("make", own_code, "--quant", "Q8_0"), ("show", own_code)):
        ran = dynrun(*command)
        assert ran.exit_code == 2
        assert "names code of the model's own (own.Own); nothing was run" in ran.error.replace(
            "[None, 'own.Own']", "own.Own"
        )
        assert not canary.exists()
    # Without the auto_map nothing says what an Own is: GPT2's tokenizer is not it, and it is not guessed.
    assert dynrun("convert", own_code, "--no-trust-remote-code").exit_code in (0, 1)
    assert not canary.exists()
    ran = dynrun("convert", own_code, "--trust-remote-code")
    assert ran.exit_code == 0, ran.stderr
    assert canary.exists()


def test_transformers_itself_is_kept_from_the_models_code(own_code: Path, tmp_path: Path) -> None:
    """The second wall, for converters that ask for such code: a folder that nobody has looked at."""
    environment = users_environment()
    script = repository_root() / "dynrun" / "convert" / "run_converter.py"
    code = (
        f"import runpy; runpy.run_path({str(script)!r})[%r]()\n"
        "from transformers import AutoTokenizer\n"
        f"AutoTokenizer.from_pretrained({str(own_code)!r}, trust_remote_code=True)\n"
    )
    for wall, ran in (("refuse_code", False), ("trust_code", True)):
        argv = [str(environment.python), "-P", "-s", "-c", code % wall]
        variables = environment.variables(tmp_path)
        done = subprocess.run(argv, env=variables, capture_output=True, text=True, check=False)
        assert ("DYNRUN-REFUSED-CODE" in done.stderr) is not ran
        assert (tmp_path / "canary").exists() is ran


def test_an_unknown_architecture_and_a_missing_tokenizer_are_told_in_the_converters_words(tmp_path: Path) -> None:
    odd = write_llama_folder(tmp_path / "odd", architectures=["OddForCausalLM"])
    ran = dynrun("make", odd, "--quant", "Q8_0")
    assert ran.exit_code == 1
    assert "llama.cpp's converter does not know the architecture (Model OddForCausalLM is not supported)" in ran.error
    bare = write_llama_folder(tmp_path / "bare")
    ran = dynrun("convert", bare)
    assert ran.exit_code == 1
    assert "was not converted: " in ran.error
    assert not list(tmp_path.rglob("*.gguf"))


# -- killed ------------------------------------------------------------------------------------------------------------


def killed_while_it_writes(model: Path, cache: Path) -> bool:
    """Convert in a cache of its own, and SIGKILL it in the midst; False where it was at its end before it was seen to
    write. No child outlives it."""
    share_environment(cache)
    environment = {**os.environ, "DYNRUN_CACHE": str(cache)}
    with subprocess.Popen([*ARGV, "convert", str(model)], env=environment, stderr=subprocess.DEVNULL) as child:
        while not any(size(path) > 1 << 24 for path in cache.rglob("work.part/*.gguf")):
            if child.poll() is not None:
                return False
        child.send_signal(signal.SIGSTOP)
        children = psutil.Process(child.pid).children(recursive=True)
        child.send_signal(signal.SIGKILL)
    psutil.wait_procs(children, timeout=20)
    assert not any(one.is_running() for one in children)
    return bool(children) and not list(cache.rglob("*-F16.gguf"))


def size(path: Path) -> int:
    """0 of what is gone meanwhile."""
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def test_killed_while_it_writes_and_run_again_it_ends_with_the_same_bytes(
    smollm: Path, private_cache: Path, tmp_path: Path
) -> None:
    whole = dynrun("convert", smollm, "--json").json
    caches = (tmp_path / f"killed-{number}" for number in range(5))
    cache = next(cache for cache in caches if killed_while_it_writes(smollm, cache))
    again = dynrun("convert", smollm, "--json", env={"DYNRUN_CACHE": str(cache)}).json
    assert not again["cached"]
    assert again["sha256"] == whole["sha256"] == sha256_file(Path(again["path"]))
    assert not list(cache.rglob("work.part"))
    assert read_header(Path(again["path"])).architecture == "llama"
