"""From a folder of safetensors to a reference GGUF, by the vendored converter in an environment of its own."""
