"""Recipes that stay as they are while those of configs/recipes are tuned: rules alone, no calibration text.

q4 is one format, q4_k_m follows a layer rule, q3 splits every matrix, q4_kv8 has an int8 cache,
q4_rotated rotates all that can be.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.config.recipes import RecipeConfig
from pipeline.config.typed_yaml import load

FOLDER = Path(__file__).parent


def load_recipe(name: str) -> RecipeConfig:
    """tests/recipes/<name>.yaml"""
    return load(RecipeConfig, FOLDER / f"{name}.yaml")
