"""Logits of a model by transformers; executed by the conversion environment's Python, never imported by dynrun.

usage: logits_hf.py FOLDER TEXT.txt OUT.npz N_TOKENS

Writes the tokens of the text and their logits, computed in float32 on the CPU. Runs no code of the model's own.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer  # type: ignore[import-not-found]


def main() -> None:
    folder, text, out, n_tokens = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokens = tokenizer.encode(Path(text).read_text(encoding="utf-8"), add_special_tokens=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, torch_dtype=torch.float32)
    model.eval()
    with torch.inference_mode():
        logits = model(torch.tensor([tokens[: int(n_tokens)]])).logits[0]
    np.savez(out, tokens=np.asarray(tokens, dtype=np.int64), logits=logits.float().numpy())


if __name__ == "__main__":
    main()
