"""The statements that a function needs, of a module that a model wrote: what prepares its data stays, examples go.

A statement stays if it binds a name that the function reads (`SQ = {}`), changes what such a name stands for (a loop
that fills `SQ`, `SQ.update(...)`, a call of a helper that does), or sets the interpreter up
(`sys.setrecursionlimit(10**6)`). Then it goes on with the names that those statements read. What runs the function
itself is an example, and goes, unless it binds or fills something that the function reads.

The text is hostile: it is parsed here, never run. Scopes are those of `symtable`, which is the compiler's own view.
"""

from __future__ import annotations

import ast
import builtins
import math
import symtable
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

Names = frozenset[str]
Parsed = TypeVar("Parsed")

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Calls with these names set the interpreter up: a function may need them without reading anything that they change.
_SETTINGS = {
    "filterwarnings", "getcontext", "seed", "set_int_max_str_digits", "setcontext", "setlocale", "setrecursionlimit",
    "simplefilter", "stack_size",
}  # fmt: skip
# Who calls these may read any name.
_DYNAMIC = {"eval", "exec", "globals", "locals", "vars"}
_CODE = (*_FUNCTIONS, ast.Import, ast.ImportFrom)
_DEFINING = (*_CODE, ast.ClassDef, ast.Assign, ast.AnnAssign)


@dataclass(frozen=True)
class Statement:
    """A statement of a module: its source, and names of the module.

    Attributes:
        node: its syntax tree.
        binds: what it binds, a loop's variables too.
        reads: what it reads when it runs.
        later: what the functions in it read when they are called.
        changes: what it changes in place when it runs: `x[0] = 1`, `x.y = 1`, `x.append(1)`, `fill(x)`.
        later_changes: what its functions change or bind when they are called.
        later_binds: what they bind, being declared `global` in them.
    """

    source: str
    node: ast.stmt
    binds: Names
    reads: Names
    later: Names
    changes: Names
    later_changes: Names
    later_binds: Names


def statements(code: str) -> list[Statement]:
    """The statements of a module; none where it cannot be parsed (or is made to exhaust a parser)."""
    tree = parse(code)
    # The worker compiles hints as text; an import from __future__ could not stand behind the prompt.
    found = [node for node in tree.body if not _is_future(node)] if tree else []
    return guarded(lambda: [_described(node, _source(code, node)) for node in found]) or []


def parse(code: str) -> ast.Module | None:
    """The syntax tree of hostile source, or None where it has none."""
    return guarded(lambda: ast.parse(code))


def error_line(code: str) -> int | None:
    """The line, counted from 0, where hostile source stops being Python; None where it is. What exhausts a parser
    stops at once."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except SyntaxError as error:
        return max((error.lineno or 1) - 1, 0)
    except (ValueError, RecursionError, MemoryError):
        return 0
    return None


def guarded(read: Callable[[], Parsed]) -> Parsed | None:
    """What a reader of hostile source finds, or None where the source is none or exhausts it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in strings
            return read()
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def needed(module: list[Statement], function: str) -> list[Statement]:
    """The statements of `module` that `function` needs, in their order."""
    effects, examples = _effects(module, function)
    # Name → the place until which its binding matters: functions read when they are called, after everything.
    wanted, kept, before = {function: math.inf}, set[int](), -1
    while before < len(kept):
        before = len(kept)
        defining = _DEFINING if _DYNAMIC & wanted.keys() else ()
        for place, statement in reversed([*enumerate(module)]):
            if place in kept or not (
                any(wanted.get(name, -1) > place for name in statement.binds)
                or not effects[place].isdisjoint(wanted)
                or (place not in examples and (isinstance(statement.node, defining) or _always(statement.node)))
            ):
                continue
            kept.add(place)
            wanted |= {name: max(wanted.get(name, -1), place) for name in statement.reads}
            wanted |= dict.fromkeys(statement.later, math.inf)
            wanted = dict.fromkeys(statement.binds, -1) | wanted  # another name of the same thing may change it
    return [module[place] for place in sorted(kept)]


def missing(module: list[Statement]) -> Names:
    """Names that the statements read, and neither bind nor find among Python's own."""
    read = frozenset[str]().union(*(statement.reads | statement.later for statement in module))
    return read.difference(*(statement.binds | statement.later_binds for statement in module), dir(builtins))


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _always(node: ast.stmt) -> bool:
    """Whether it binds what nobody can tell, or sets the interpreter up outside of functions."""
    if isinstance(node, ast.ImportFrom):
        return any(name.name == "*" for name in node.names)
    called = (item.func for item in _now(node) if isinstance(item, ast.Call))
    return any(getattr(item, "attr", getattr(item, "id", "")) in _SETTINGS for item in called)


def _effects(module: list[Statement], function: str) -> tuple[list[Names], set[int]]:
    """What each statement changes, by the functions that it calls too; and the places of the examples, which run
    `function`: they count for what they fill themselves."""
    binders: dict[str, list[Statement]] = {}
    for statement in module:
        for name in statement.binds:
            binders.setdefault(name, []).append(statement)
    # Reading a function or a module changes neither.
    code = vars(builtins).keys() - binders.keys() | {function}
    code |= {name for item in module if isinstance(item.node, _CODE) for name in item.binds}
    effects, examples = list[Names](), set[int]()
    for place, statement in enumerate(module):
        node, called = statement.node, _reached(statement, binders)
        changed = statement.changes.union(*(item.later_changes for name in called for item in binders.get(name, ())))
        if function in called:
            examples.add(place)
            changed = statement.changes - statement.binds
        elif statement.changes & statement.binds or statement.changes - statement.reads:
            changed |= statement.reads  # changed under another name, such as a loop's variable: it may be any of these
        shown = isinstance(node, ast.Assert) or (isinstance(node, ast.Expr) and _called(node.value) == "print")
        effects.append(frozenset() if shown else changed - code | _stored(node))
    return effects, examples


def _reached(statement: Statement, binders: dict[str, list[Statement]]) -> set[str]:
    """The names that a statement reads when it runs, and those that the functions among them read."""
    reached, left = set[str](), [*statement.reads]
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            for other in binders.get(name, ()):
                called = isinstance(other.node, (*_FUNCTIONS, ast.ClassDef))
                left += other.later if called else other.reads if other is not statement else ()
    return reached


# --- one statement ---------------------------------------------------------------------------------------------------


def _source(code: str, node: ast.stmt) -> str:
    """The text of one statement; others may share its lines."""
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
    lines = [line.encode() for line in lines_of(code)[first - 1 : node.end_lineno]]
    lines[-1] = lines[-1][: node.end_col_offset]
    lines[0] = lines[0][node.col_offset if first == node.lineno else 0 :]
    return b"\n".join(lines).decode()


def lines_of(code: str) -> list[str]:
    """Lines as Python counts them: form feeds and Unicode's separators end none."""
    return code.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _described(node: ast.stmt, source: str) -> Statement:
    table = symtable.symtable(source, "<answer>", "exec")
    binds = {item.get_name() for item in table.get_symbols() if item.is_assigned() or item.is_imported()}
    reads = {item.get_name() for item in table.get_symbols() if item.is_referenced()}
    now, later, bound = [*_now(node)], set[str](), set[str]()
    for scope, called in _scopes(table, {item.name for item in now if isinstance(item, _FUNCTIONS)}):
        outer = [item for item in scope.get_symbols() if item.is_global()]
        (later if called else reads).update(item.get_name() for item in outer if item.is_referenced())
        bound |= {item.get_name() for item in outer if item.is_assigned()}
    added = {item.target.id for item in now if isinstance(item, ast.AugAssign) and isinstance(item.target, ast.Name)}
    inside = {id(item) for item in now}
    changed = _changes(item for item in ast.walk(node) if id(item) not in inside)
    return Statement(
        source, node, frozenset(binds), frozenset(reads | added), frozenset(later | bound),
        frozenset(_changes(now) | added), frozenset(bound | (later if changed - later else changed)), frozenset(bound),
    )  # fmt: skip


def _scopes(
    table: symtable.SymbolTable, functions: set[str], called: bool = False
) -> Iterator[tuple[symtable.SymbolTable, bool]]:
    """The scopes inside one, and whether they run when one of `functions` is called. Lambdas and comprehensions count
    as run at once."""
    for child in table.get_children():
        within = called or (child.get_type() == "function" and child.get_name() in functions)
        yield child, within
        yield from _scopes(child, functions, within)


def _now(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a statement that run with it: not what lies inside functions."""
    yield node
    body = getattr(node, "body", []) if isinstance(node, _FUNCTIONS) else []
    for child in ast.iter_child_nodes(node):
        if child not in body:
            yield from _now(child)


def _changes(nodes: Iterable[ast.AST]) -> set[str]:
    """Names of what assignments to parts, methods and arguments may change."""
    found = set[str]()
    for node in nodes:
        if isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load):
            found.add(_root(node))
        elif isinstance(node, ast.Call):
            given = [*node.args, *(item.value for item in node.keywords)]
            plain = _called(node) in vars(builtins)  # these change nothing, but may call a method that they are given
            found |= {_root(item) for item in given if isinstance(item, ast.Attribute) or not plain}
            if isinstance(node.func, ast.Attribute):
                found.add(_root(node.func))
    return found - {""}


def _stored(node: ast.AST) -> Names:
    """Names of what a statement assigns a part of, or calls a part's method of: `f.memo = {}`, `f.memo.clear()`."""
    found = set[str]()
    for item in _now(node):
        if isinstance(item, ast.Subscript | ast.Attribute) and not isinstance(item.ctx, ast.Load):
            found.add(_root(item))
        elif isinstance(item, ast.Call) and isinstance(item.func, ast.Attribute):
            found |= {_root(item.func)} if isinstance(item.func.value, ast.Subscript | ast.Attribute) else set()
    return frozenset(found)


def _root(node: ast.AST) -> str:
    """`x` of `x`, `x.y`, `x[0].y()`; "" of anything else."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call | ast.Starred):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _called(node: ast.AST) -> str:
    """The plain name that a call calls."""
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
