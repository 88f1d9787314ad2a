"""Scales, norms and biases of a written artifact learned against the full-precision model. It imports
torch; its stage loads it when a recipe asks for learning."""
