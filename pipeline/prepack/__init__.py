"""Mapped weights without a peak: a model is prepacked slice by slice, on the machine that will run it."""
