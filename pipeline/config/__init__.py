"""Typed configuration: every YAML file under `configs/`, frozen, with unknown keys refused.

One module per subject. Its `load_*` functions read one file and raise `ConfigError` naming the file, the key, the value
and, for a misspelt key, the nearest known one. Nothing here imports another module of ours except the error types. A
stage that imports one of these functions depends on what it reads, defaults included (`pipeline.keys`).
"""
