"""One YAML file as a frozen, typed object: unknown and repeated keys are errors, and errors say what was meant."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from pipeline.errors import ConfigError

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=40)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Frozen(BaseModel):
    """Base of all configuration: immutable, and unknown keys are errors rather than silently ignored options."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    read_by_name: ClassVar[bool] = False  # whether code reads its fields by names that it computes


CONFIGS = Path("configs")

T = TypeVar("T", bound=BaseModel)


def load(model: type[T], path: Path) -> T:
    """Read one YAML file into `model`.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not validate; every problem is listed.
    """
    return check(model, read(path), path)


def check(model: type[T], data: Any, where: object) -> T:
    """Plain data as a `model`. Raises ConfigError, which begins with `where` and lists every problem."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(_explain(model, item) for item in error.errors())
        raise ConfigError(f"{where}: {problems}") from None


def read(path: Path) -> Any:
    """The content of one YAML file. Raises ConfigError, which names the nearest file for one that is missing."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        others = sorted(file.stem for file in path.parent.glob("*.yaml"))
        hint = _did_you_mean(path.stem, others)
        raise ConfigError(f"{path}: no such file.{hint} Known here: {', '.join(others) or 'nothing'}.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def _explain(model: type[BaseModel], error: Any) -> str:
    location = error["loc"]
    where = ".".join(map(str, location)) or "(top level)"
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        return f"{where}: unknown key; " + (f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("value_error", "missing"):
        return f"{where}: {message}"
    near = difflib.get_close_matches(str(error["input"]), re.findall(r"'([^']*)'", message), n=1)
    return f"{where}: {message} (got {reprlib.repr(error['input'])}{f'; did you mean {near[0]!r}?' if near else ''})"


def _known_keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Names of the fields at `path` inside `model`, as far as the path can be followed through nested classes."""

    def classes(annotation: Any) -> list[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return [annotation]
        return [found for argument in get_args(annotation) for found in classes(argument)]

    current = [model]
    for step in path:
        fields = [candidate.model_fields[step] for candidate in current if step in candidate.model_fields]
        current = [found for field in fields for found in classes(field.annotation)] or current
    return sorted({name for candidate in current for name in candidate.model_fields})


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):
    """YAML in which a key written twice is an error: PyYAML would keep the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is written twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    value: int = loader.construct_yaml_int(node)
    if abs(value) > _LARGEST:
        raise yaml.constructor.ConstructorError(None, None, f"{value} is beyond 2 ** 53", node.start_mark)
    return value


_LARGEST = 2**53  # that JSON's readers on phones, and float64 here, hold exactly
_Loader.add_constructor("tag:yaml.org,2002:int", _whole)


def known_name(name: str, known: Iterable[str], what: str, where: str) -> None:
    """Raise ConfigError, with the nearest, for a name that is not among those in `where`."""
    names = list(known)
    if name not in names:
        hint = _did_you_mean(name, names)
        raise ConfigError(f"{what}: {name!r} is not in {where}.{hint} There: {', '.join(names) or 'nothing'}.")


def _did_you_mean(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
