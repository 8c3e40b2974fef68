"""What the files of a repository are, by their names; names as quantizers of the Hub give them."""

from __future__ import annotations

import pytest

from dynrun.errors import DynrunError, NotFoundError
from dynrun.hub.files import RemoteFile, Shelf
from dynrun.hub.variants import AmbiguousError, best_companion, choose, label_of_path, shelve


def shelf(*paths: str) -> Shelf:
    return shelve([RemoteFile("o/m", "c", path, 1000 - n, "e") for n, path in enumerate(paths)])


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("Llama-4-Scout-17B-16E-Instruct-UD-IQ2_XXS", "UD-IQ2_XXS"),
        ("model.Q4_K_M", "Q4_K_M"),
        ("gemma-3-27b-it-q4_0", "Q4_0"),
        ("some.i1-IQ2_M", "IQ2_M"),
        ("gpt-oss-20b-mxfp4", "MXFP4"),
        ("model-Q4_K_M_imat", "Q4_K_M"),
        ("model-Q4_0_4_4", "Q4_0_4_4"),
        ("Qwen2.5-7B-Instruct-fp16", "F16"),
        ("Q8-Chat-7B-IQ4_NL", "IQ4_NL"),
        ("BF16/GLM-4.5", "BF16"),
        ("Bonsai-8B-Q1_0", "Q1_0"),
        ("demo-4.5bpw", "4.5bpw"),
        ("TinyQ4_K_M", "TinyQ4_K_M"),
        ("Hy3-IQ1_M-mtp", "IQ1_M"),
    ],
)
def test_a_name_says_its_quant(path: str, label: str) -> None:
    assert label_of_path(path) == label


def test_shards_are_one_and_folders_are_understood() -> None:
    found = shelf(
        "UD-Q4_K_XL/m-UD-Q4_K_XL-00002-of-00002.gguf",
        "UD-Q4_K_XL/m-UD-Q4_K_XL-00001-of-00002.gguf",
        "Q8_0/m-00001-of-00001.gguf",
        "m-Q2_K.gguf",
        "README.md",
    )
    assert [variant.label for variant in found.quants] == ["Q2_K", "Q8_0", "UD-Q4_K_XL"]
    assert [file.path[-22:] for file in found.quants[2].files] == ["XL-00001-of-00002.gguf", "XL-00002-of-00002.gguf"]
    assert found.quants[2].size == 1999


def test_a_label_matches_exactly_then_with_the_prefix_and_never_in_part() -> None:
    found = shelf("m-UD-IQ2_XXS.gguf", "m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-IQ2_XS.gguf")
    assert choose(found, "Q4_K_M", "o/m").first.path == "m-Q4_K_M.gguf"
    assert choose(found, "ud-q4_k_m", "o/m").first.path == "m-UD-Q4_K_M.gguf"
    assert choose(found, "iq2_xxs", "o/m").first.path == "m-UD-IQ2_XXS.gguf"
    for part in ("Q4_K", "IQ2", "XXS", "Q2_XXS", "UD-IQ2_XS", "m"):
        with pytest.raises(NotFoundError, match=rf"no quant {part}.*IQ2_XS, Q4_K_S, UD-Q4_K_M, Q4_K_M, UD-IQ2_XXS"):
            choose(found, part, "o/m")


def test_several_are_not_guessed_between() -> None:
    found = shelf("a-Q4_K_M.gguf", "b-Q4_K_M.gguf", "a-Q8_0.gguf")
    with pytest.raises(AmbiguousError, match="has several: Q8_0, Q4_K_M — choose one with --quant"):
        choose(found, "", "o/m")
    with pytest.raises(AmbiguousError, match=r"has several: b-Q4_K_M.gguf, a-Q4_K_M.gguf — name the file"):
        choose(found, "Q4_K_M", "o/m")
    assert choose(found, "b-Q4_K_M.gguf", "o/m").first.path == "b-Q4_K_M.gguf"
    assert choose(shelf("m-Q8_0.gguf"), "", "o/m").label == "Q8_0"


def test_a_quant_that_lacks_a_shard_is_refused() -> None:
    found = shelf("m-Q8_0-00001-of-00003.gguf", "m-Q8_0-00003-of-00003.gguf")
    with pytest.raises(DynrunError, match="o/m lacks shards 2 of Q8_0"):
        choose(found, "Q8_0", "o/m")


def test_what_goes_beside_a_model_is_no_quant_of_it() -> None:
    found = shelf(
        "m-Q4_K_M.gguf", "mmproj-F32.gguf", "mmproj-BF16.gguf", "mmproj-F16.gguf", "mtp-Q8_0.gguf", "mtp-Q4_K_M.gguf",
        "m.imatrix.gguf", "m-MTP-Q8_0.gguf", "other/mmproj-model.gguf",
    )  # fmt: skip
    assert [variant.label for variant in found.quants] == ["Q8_0", "Q4_K_M"]
    model = choose(found, "Q4_K_M", "o/m")
    projector, draft = best_companion(found, "mmproj", model), best_companion(found, "mtp", model)
    assert projector is not None
    assert draft is not None
    assert (projector.first.path, draft.first.path) == ("mmproj-F16.gguf", "mtp-Q4_K_M.gguf")
    assert set(found.companions) == {"mmproj", "mtp", "imatrix"}
    assert best_companion(shelf("m-Q8_0.gguf", "other/mmproj-F16.gguf"), "mmproj", model) is None
