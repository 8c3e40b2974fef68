"""dynrun: make, prove and run the best GGUF quantization of a model for a given size."""

__version__ = "0.1.0"
