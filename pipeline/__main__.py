"""`python -m pipeline`."""

import sys

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
