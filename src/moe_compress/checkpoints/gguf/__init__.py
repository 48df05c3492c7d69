"""GGUF files of llama.cpp: read as byte ranges, cut without touching a quantized block, imatrix files written."""
