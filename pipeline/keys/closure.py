"""What a module imports: modules of ours wherever the import stands, their files, and the libraries beneath.

Read from the source, so nothing runs. Besides imports these count: a module's name in a string (what is run as
`python -m`), a file's name in a string when it lies beside the module (a template), and all modules beside a call of
`pkgutil.iter_modules`.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import packages_distributions, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# They say what decides, how far work is and who does it; no result depends on them.
_NEUTRAL = ("pipeline.keys", "pipeline.progress", "pipeline.engine")
_BENEATH = {"onnxruntime_genai": ("onnxruntime",), "numba": ("llvmlite",)}  # decide, and are imported by the library


@dataclass(frozen=True)
class Source:
    """One module's source, as far as keys need it.

    Attributes:
        imports: dotted names that it may import: `from a import b` may mean a.b.
        reached: those of our modules that it may import, or names in a string.
        attributes: names read as attributes anywhere in it.
        strings: string constants.
        siblings: whether it imports all modules beside it.
    """

    path: Path
    imports: frozenset[str]
    reached: frozenset[str]
    attributes: frozenset[str]
    strings: frozenset[str]
    siblings: bool

    @property
    def package(self) -> str:
        """The dotted name of the package that it is in, or is."""
        return ".".join(self.path.parent.relative_to(PACKAGE.parent).parts)

    @property
    def files(self) -> list[Path]:
        """The module, and the files beside it that it names."""
        beside = self.path.parent.iterdir()
        return [self.path, *(file for file in beside if file.suffix not in ("", ".py") and file.name in self.strings)]


@cache
def modules() -> Mapping[str, Path]:
    """Paths of our modules by dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def source_of(name: str) -> Source:
    """Parse one of our modules."""
    path = modules()[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [node for part in tree.body if not _for_types(part) for node in ast.walk(part)]
    imports: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    attributes = frozenset(node.attr for node in nodes if isinstance(node, ast.Attribute))
    texts = frozenset(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    reached = frozenset((imports | texts) & modules().keys())
    return Source(path, frozenset(imports), reached, attributes, texts, "iter_modules" in attributes)


def _for_types(node: ast.stmt) -> bool:
    """Whether only a type checker reads a statement."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@dataclass(frozen=True)
class Closure:
    """Modules of ours by name: some roots, and all that they import."""

    sources: Mapping[str, Source]

    @classmethod
    def of(cls, *roots: str) -> Closure:
        """Of these modules and the packages around them."""
        found: dict[str, Source] = {}
        left = list(roots)
        while left:
            name = left.pop()
            if name in found or name.startswith(_NEUTRAL) or name not in modules():
                continue
            found[name] = source = source_of(name)
            left += [name.rpartition(".")[0], *source.reached]
            if source.siblings:
                left += [other for other in modules() if other.rpartition(".")[0] == source.package]
        return cls(dict(sorted(found.items())))

    def hashes(self) -> dict[str, str]:
        """SHA-256 by path, of modules and of the files that they name. Of configuration the values count instead."""
        files = {file for name, source in self.sources.items() if not _configures(name) for file in source.files}
        return {file.relative_to(PACKAGE.parent).as_posix(): _hash(file) for file in sorted(files)}

    def libraries(self) -> dict[str, str]:
        """Versions of the distributions that the modules import."""
        tops = {name.split(".")[0] for source in self.sources.values() for name in source.imports}
        tops |= {below for top in tops for below in _BENEATH.get(top, ())}
        names = {distribution for top in tops for distribution in _distributions().get(top, ())}
        return {name: _version(name) for name in sorted(names)}

    @cached_property
    def names(self) -> frozenset[str]:
        """Dotted names that are imported anywhere in it."""
        return frozenset().union(*(source.imports for source in self.sources.values()))

    @cached_property
    def strings(self) -> frozenset[str]:
        """String constants of the modules outside the configuration."""
        return frozenset().union(*(source.strings for name, source in self.sources.items() if not _configures(name)))

    @cached_property
    def attributes(self) -> frozenset[str]:
        """Attributes that the code reads; those that a property or method of a configuration class reads count only
        where that one is read itself."""
        found = set().union(*(source.attributes for name, source in self.sources.items() if not _configures(name)))
        inner = {name: read for name, (read, _) in self._methods().items()}
        while more := set().union(*(inner[name] for name in found & inner.keys())) - found:
            found |= more
        return frozenset(found)

    def methods(self) -> dict[str, str]:
        """Source text of the configuration's own properties and methods that the code reads, by name."""
        return {name: text for name, (_, text) in self._methods().items() if name in self.attributes}

    def _methods(self) -> dict[str, tuple[frozenset[str], str]]:
        return dict(method for name in self.sources if _configures(name) for method in _functions(name))


def _configures(name: str) -> bool:
    return name.startswith("pipeline.config")


@cache
def _functions(name: str) -> tuple[tuple[str, tuple[frozenset[str], str]], ...]:
    """Methods of a module's classes: name, attributes that each reads, source text."""
    classes = (node for node in ast.parse(modules()[name].read_text()).body if isinstance(node, ast.ClassDef))
    return tuple(
        (node.name, (frozenset(n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)), ast.unparse(node)))
        for found in classes
        for node in found.body
        if isinstance(node, ast.FunctionDef)
    )


@cache
def _version(distribution: str) -> str:
    return version(distribution).partition("+")[0]  # a build for another device is no other version: records name it


@cache
def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@cache
def _distributions() -> Mapping[str, list[str]]:
    """Distributions by the modules that they install; half a second of reading."""
    return packages_distributions()
