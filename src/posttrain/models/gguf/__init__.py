"""A model directory as one GGUF file, the format of llama.cpp, and such a file as a model again."""
