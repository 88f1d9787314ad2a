"""Scales, norms and biases of a written artifact learned against the full-precision model. Besides the reference
exporter of `parity` the only room that imports torch; its stage loads it when a recipe asks for learning."""
