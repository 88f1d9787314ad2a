"""Measurements of the pipeline at full size, and the synthetic checkpoints that they run on."""
