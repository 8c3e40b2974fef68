"""Run the vendored convert_hf_to_gguf.py; executed by the conversion environment's Python, never imported by dynrun.

usage: run_converter.py VENDOR refuse|trust [arguments of convert_hf_to_gguf.py]

Many converters ask transformers to run code of the model's own folder (trust_remote_code=True). With `refuse` that
ends in an error before any of it is copied or imported.
"""

import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn


def refuse_code() -> None:
    """Have transformers import nothing of a model's own: all ways there go through these two."""
    from transformers import dynamic_module_utils  # type: ignore[import-not-found]

    def refused(*_: Any, **__: Any) -> NoReturn:
        raise PermissionError("DYNRUN-REFUSED-CODE")

    for name in ("get_cached_module_file", "get_class_in_module"):
        if not hasattr(dynamic_module_utils, name):
            raise SystemExit(f"transformers has no {name}: it cannot be kept from running the model's code")
        setattr(dynamic_module_utils, name, refused)


def trust_code() -> None:
    """Have transformers run a model's own where a converter does not ask for it: somebody has decided."""
    from transformers import dynamic_module_utils

    resolve = dynamic_module_utils.resolve_trust_remote_code

    def trusting(_: Any, *arguments: Any, **others: Any) -> Any:
        return resolve(True, *arguments, **others)

    # The auto classes are imported later, and take this one.
    dynamic_module_utils.resolve_trust_remote_code = trusting


def main() -> None:
    vendor, policy, *arguments = sys.argv[1:]
    sys.path.insert(0, vendor)
    trust_code() if policy == "trust" else refuse_code()
    sys.argv = [str(Path(vendor) / "convert_hf_to_gguf.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
