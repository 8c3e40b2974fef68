"""Images in a question: a real llama-server with a tiny random image encoder."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from dynrun.cli.app import main
from tests.tiny import write_tiny_llama
from tests.tiny_mmproj import write_png, write_tiny_mmproj

pytestmark = pytest.mark.native


def test_an_image_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens of it are in the prompt, and another image gives another answer."""
    model = write_tiny_llama(tmp_path / "tiny.gguf", n_ctx_train=1024)
    write_tiny_mmproj(tmp_path / "mmproj-tiny-F32.gguf")
    images = [write_png(tmp_path / "red.png", (255, 0, 0)), write_png(tmp_path / "blue.png", (0, 0, 255))]
    given = []
    for arguments in ([], ["--image", str(images[0])], ["--image", str(images[1])]):
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        common = ["run", str(model), "-p", "What is it?", "-n", "12", "--temp", "0", "--ctx", "512", "--json"]
        assert main([*common, *arguments]) == 0
        out, err = capsys.readouterr()
        given.append(json.loads(out))
        assert ("mmproj-tiny-F32.gguf" in err) == bool(arguments)
    tokens = [one["timings"]["prompt_n"] for one in given]
    assert tokens[1] == tokens[2] > tokens[0]
    assert len({one["text"] for one in given}) == 3
    assert given[1]["placement"]["mmproj"] == str(tmp_path / "mmproj-tiny-F32.gguf")


def test_an_image_for_a_model_without_a_template_is_refused_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    model = write_tiny_llama(tmp_path / "tiny.gguf", chat_template=None)
    write_tiny_mmproj(tmp_path / "mmproj-tiny-F32.gguf")
    image = write_png(tmp_path / "red.png", (255, 0, 0))
    assert main(["run", str(model), "-p", "What is it?", "--image", str(image), "--ctx", "256"]) == 2
    assert "the model has no chat template, which would say where an image goes" in capsys.readouterr().err
