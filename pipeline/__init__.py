"""Release line for language models on phones: download, export, quantize, validate, bundle, sign."""

__version__ = "0.1.0"
