"""Release line for language models on phones: download, export, quantize, validate, bundle, sign."""

import os

__version__ = "0.1.0"

# ONNX Runtime 1.29 and later report usage by default; a build and its release keys are nobody else's business.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
