"""Documentation is executed: the shell blocks of README and docs run as written, page by page, in a copied tree.

A tiny model stands in SmolLM2's place, and places under /tmp lie in the test's own folder; nothing else is changed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.documented import Block, blocks

pytest_plugins = ["tests.dvc_project"]
