"""Names that a data set's test code binds, reads, calls and imports, read from its syntax tree."""

from __future__ import annotations

import ast
import builtins
import importlib
import symtable
import sys
from collections.abc import Mapping, Sequence

from ..syntax import syntax_tree

_MODEL_MODULES = {
    *(
        "solution",
        "solutions",
        "main",
        "answer",
        "submission",
        "candidate",
        "program",
        "code_solution",
        "my_module",
    ),
    *(
        "your_module",
        "your_solution",
        "your_code",
        "your_module_name",
        "module_name",
        "module",
        "user_solution",
    ),
}
"""Names under which tests import the model's code."""
BUILT_IN = frozenset(dir(builtins)) | {"__file__"}


def called_names(tree: ast.AST) -> set[str]:
    """The names that code calls, passes as arguments or uses as decorators."""
    called: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for each in (node.func, *node.args, *(keyword.value for keyword in node.keywords)):
                called |= {each.id} if isinstance(each, ast.Name) else set()
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            called |= {each.id for each in node.decorator_list if isinstance(each, ast.Name)}
    return called


def parsed(source: str, what: str) -> ast.Module:
    """The syntax tree of a column's code. Raises ValueError if it is not Python."""
    try:
        return syntax_tree(source)
    # the parser raises the last two for code that is nested too deeply
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the column {what!r} is no Python: {error}") from None


def parses(source: str) -> bool:
    try:
        syntax_tree(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def free_names(source: str) -> set[str]:
    """The global names that code reads and does not bind, built-in ones included."""
    top = symtable.symtable(source, "<test>", "exec")
    read: set[str] = set()
    tables = [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        read |= {
            s.get_name()
            for s in table.get_symbols()
            if s.is_referenced() and (table is top or s.is_global())
        }
    return read - bound(syntax_tree(source))


def bound(tree: ast.Module) -> set[str]:
    """The names that a module's code binds at its top level."""
    names: set[str] = set()
    symbols = symtable.symtable(ast.unparse(tree), "<test>", "exec").get_symbols()
    names |= {
        s.get_name() for s in symbols if s.is_assigned() or s.is_imported() or s.is_namespace()
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module in sys.stdlib_module_names
            and node.names[0].name == "*"
        ):
            # only the module itself knows what `*` binds
            module = importlib.import_module(node.module)
            names |= set(getattr(module, "__all__", ())) or {
                name for name in dir(module) if name[:1] != "_"
            }
    return names


def imported(tree: ast.AST) -> list[tuple[str, list[str]]]:
    """The modules that code imports, with the names imported from each (none for `import
    module`)."""
    imports: list[tuple[str, list[str]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports.append((node.module or "", [alias.name for alias in node.names]))
    return imports


def packages_of(source: str) -> tuple[str, ...]:
    """The modules outside the standard library that code imports."""
    roots = {name.partition(".")[0] for name, _ in imported(syntax_tree(source))}
    return tuple(sorted(roots - set(sys.stdlib_module_names) - {"", "pytest"}))


class Imports:
    """The imports of a test: packages, modules that stand for the model's code, and names from
    these."""

    def __init__(self, tree: ast.Module, defined: frozenset[str]) -> None:
        self.packages: set[str] = set()
        self.modules: set[str] = set()
        self.names: set[str] = set()
        self.pytest = False
        for module, names in imported(tree):
            root = module.partition(".")[0]
            if root == "pytest":
                self.pytest = True
            elif root in sys.stdlib_module_names:
                continue
            # a module whose names the row's own solution defines is the model's, whatever it is
            # called
            elif root in _MODEL_MODULES or root == "" or (names and set(names) <= defined):
                self.modules.add(module or "solution")
                self.names |= set(names) - {"*"}
                self.names |= _attributes(tree, module) if not names else set()
            else:
                self.packages.add(root)


def _attributes(tree: ast.Module, module: str) -> set[str]:
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == module
    }
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in aliases
    }


def asked_names(
    tree: ast.Module,
    source: str,
    imports: Imports,
    setup: Sequence[str],
    hints: set[str],
    defined: frozenset[str],
    aliases: Mapping[str, str],
) -> tuple[set[str], set[str]]:
    """Returns the names that a test needs from the model's code, and the standard modules that it
    uses without importing them. Raises ValueError for a name that nobody defines."""
    given = {name for part in setup for name in bound(parsed(part, "test_setup_code"))}
    free = free_names(ast.unparse(tree))
    modules = {name for name in free - given - defined if name in sys.stdlib_module_names}
    names = (free - given - BUILT_IN - modules) | (free & defined - given) | imports.names | hints
    names -= aliases.keys()
    called = called_names(tree) | imports.names | hints | defined
    if unknown := {name for name in names - called if not name[:1].isupper()}:
        raise ValueError(
            f"the tests use {', '.join(sorted(unknown))}, which nobody defines: {source[:200]!r}"
        )
    if not names and not aliases:
        raise ValueError(
            f"the tests call no function that they do not define: {source[:200]!r}; give"
            " entry_point"
        )
    return names, modules
