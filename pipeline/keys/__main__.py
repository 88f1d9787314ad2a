"""`python -m pipeline.keys`: write the records of all selected stages. DVC's hook runs it."""

import sys

from pipeline.errors import PipelineError
from pipeline.keys import refresh

if __name__ == "__main__":
    try:
        refresh()
    except PipelineError as error:
        sys.exit(f"error: {error}")
