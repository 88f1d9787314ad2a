"""Scales, norms and biases of a written artifact learned against the full-precision model. The only room that
imports torch; no other imports it unless a recipe asks for learning."""
