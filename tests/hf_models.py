"""Make models by transformers; run by the conversion environment's Python (tests/conversion.py), never imported.

usage: hf_models.py demo GGUF OUT       the GGUF's own weights and tokenizer, as transformers saves them
       hf_models.py tiny TOKENIZER OUT  tiny random models of several architectures, and their logits for some tokens
       hf_models.py parts TOKENIZER OUT tiny random models: gemma3 with its image encoder; glm4_moe, for an MTP head
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

TOKENS = [1, 4093, 198, 504, 260, 5024, 17, 2, 300, 28, 411, 7, 1000, 999, 44, 61]
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 49152,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
MOE = {
    "norm_topk_prob": True,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
}
MLA = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
V3 = {
    **MLA,
    "head_dim": 16,
    "n_routed_experts": 4,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
ARCHITECTURES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "llama": ("LlamaConfig", torch.bfloat16, {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", torch.float16, {"head_dim": 16}),
    "qwen3": ("Qwen3Config", torch.bfloat16, {}),
    "qwen3_moe": ("Qwen3MoeConfig", torch.bfloat16, MOE),
    "gemma3": (
        "Gemma3TextConfig",
        torch.bfloat16,
        {"sliding_window": 8, "vocab_size": 512, "query_pre_attn_scalar": 32},
    ),
    "mixtral": ("MixtralConfig", torch.float16, {"num_local_experts": 4, "head_dim": None}),
    "deepseek_v3": ("DeepseekV3Config", torch.float32, {**V3, **MOE, "n_shared_experts": 1}),
}


def demo(gguf: Path, out: Path) -> None:
    """What the GGUF holds, as a repository of safetensors in shards."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    weights = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    model.half().save_pretrained(out, max_shard_size="100MB")
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    (out / "tokenizer.model").unlink(missing_ok=True)
    restore_digits(out)


def restore_digits(folder: Path) -> None:
    """transformers drops the splitting of digits on the way from a GGUF; without it the tokenizer is another one."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_]}
    tokenizer |= {"normalizer": None, "post_processor": None, "decoder": bytes_}
    path.write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def tiny(tokenizer: Path, out: Path) -> None:
    """Each architecture in a folder of its own, with the logits after each of TOKENS beside it."""
    for name, (config_class, dtype, changes) in ARCHITECTURES.items():
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**{**SMALL, **changes})
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                # As they come they are so small that every token is as likely as any other.
                parameter.mul_(4 if parameter.dim() > 1 else 1)
        model.save_pretrained(out / name)
        add_tokenizer(name, tokenizer, out / name)
        tokens = [token % config.vocab_size for token in TOKENS]
        with torch.inference_mode():
            logits = model.float()(torch.tensor([tokens])).logits[0]
        np.savez(out / f"{name}.npz", tokens=np.asarray(tokens), logits=logits.numpy())


def add_tokenizer(name: str, known: Path, folder: Path) -> None:
    if name != "gemma3":
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(known / file, folder / file)
        return
    import sentencepiece

    text = (known / "tokenizer.json").read_text()[:200_000]
    (folder / "text").write_text("\n".join(text[i : i + 100] for i in range(0, len(text), 100)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=500, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "text").unlink()
    (folder / "tokenizer.vocab").unlink()


GLM = {
    **MOE,
    "vocab_size": 49160,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "attention_bias": True,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "vision_use_head": False,
}


def parts(tokenizer: Path, out: Path) -> None:
    """What has more than a language model, or can be given more."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Glm4MoeConfig(**{**SMALL, **GLM}))
    model.to(torch.bfloat16).save_pretrained(out / "glm4_moe")
    add_tokenizer("glm4_moe", tokenizer, out / "glm4_moe")
    path = out / "glm4_moe" / "tokenizer.json"
    settings = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for i, text in enumerate(("[gMASK]", "<|user|>", "<|observation|>")):
        settings["added_tokens"].append({"id": 49152 + i, "content": text, "special": True, **flags})
    path.write_text(json.dumps(settings))
    text = {**SMALL, **ARCHITECTURES["gemma3"][2]}
    tokens = {"boi_token_index": 400, "eoi_token_index": 401, "image_token_index": 402}
    config = transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, **tokens)
    transformers.Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(out / "gemma3")
    add_tokenizer("gemma3", tokenizer, out / "gemma3")
    processor = {"image_seq_length": 4, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (out / "gemma3" / "preprocessor_config.json").write_text(json.dumps(processor))
    template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (out / "gemma3" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


if __name__ == "__main__":
    {"demo": demo, "tiny": tiny, "parts": parts}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
