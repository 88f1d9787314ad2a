"""`python -m pipeline`."""

import os
import sys

# transformers renders chats and reads tokenizers here: without torch, which takes it 6 seconds to import.
os.environ.setdefault("USE_TORCH", "0")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

try:
    from pipeline.cli import main

    main()
except ModuleNotFoundError as error:
    if (error.name or "").startswith("pipeline"):
        raise
    sys.exit(
        f"error: {sys.executable} has no package {error.name!r}: it is not the pipeline's environment. `make shell` in "
        f"the project's folder makes that one and says how to activate it: source .venv/bin/activate"
    )
