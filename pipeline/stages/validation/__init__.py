"""The sections of a validation: one module each, a function from a subject and its folder of items to metrics."""
