"""Models in GGUF files, computed by the llama.cpp library."""
