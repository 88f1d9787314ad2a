"""Quantization quality side by side: ours and the peers' written files, measured alike on the same held-out text."""
