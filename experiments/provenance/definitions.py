"""Digests of definitions: of a function or class, and of all that it uses in this repository.

A digest follows names from definition to definition through the syntax trees. It does not depend on comments,
docstrings, annotations, or the file in which a definition stands: renaming a file or moving a function changes nothing,
and a changed layer, constant or helper does. Names of other packages count as names.
"""

import ast
import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

from experiments.provenance.sources import PACKAGES, TEXTS

IGNORED_DECORATORS = {"register"}  # the name under which a model is registered decides nothing


class Definition(NamedTuple):
    """A top-level name of one of our modules."""

    module: str
    name: str


class _Module(NamedTuple):
    """A parsed module: definitions by name, and the origin of imported names."""

    nodes: dict[str, list[ast.stmt]]
    imports: dict[str, str]  # alias: "package.module" or "package.module.name"


def digest(
    roots: Iterable[Definition], is_boundary: Callable[[Definition], bool] = lambda definition: False
) -> tuple[str, set[str]]:
    """Digest definitions with all that they use; one for which `is_boundary` holds counts as a name only.

    Returns
    -------
    digest : str
        SHA-256, in hexadecimal.
    files : set of str
        Files that the definitions stand in, relative to the repository.
    """
    todo, seen, entries = list(roots), set(), set()
    while todo:
        definition = todo.pop()
        if definition in seen:
            continue
        seen.add(definition)
        uses = [use for use in _uses(definition) if not isinstance(use[1], Definition) or use[1] != definition]
        inside = [target for _, target in uses if isinstance(target, Definition) and not is_boundary(target)]
        todo += inside
        # with the text of each definition behind a name: two helpers of one name must not be taken for each other
        named = sorted(f"{name}={_text(t) if t in inside else _label(t)}" for name, t in uses)
        entries.add("\n".join([definition.name, _text(definition), *named]))
    total = hashlib.sha256("\0".join(sorted(entries)).encode()).hexdigest()
    return total, {_file(definition.module) for definition in seen}


def _label(target: "Definition | str") -> str:
    return target.name if isinstance(target, Definition) else target


@cache
def _file(module: str) -> str:
    path = module.replace(".", "/")
    return f"{path}.py" if f"{path}.py" in TEXTS else f"{path}/__init__.py"


@cache
def _module(name: str) -> _Module:
    """Parse a module of ours."""
    tree = ast.parse(TEXTS[_file(name)])
    nodes: dict[str, list[ast.stmt]] = {}
    for node in tree.body:
        for defined in _defined(node):
            nodes.setdefault(defined, []).append(node)
    return _Module(nodes, _imports(tree.body))


def _defined(node: ast.stmt) -> Iterator[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Assign(targets=targets):
            yield from (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.AugAssign(target=ast.Name(id=name)):
            yield name


def _imports(nodes: Iterable[ast.AST]) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {(alias.asname or alias.name.split(".")[0]): alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(alias.asname or alias.name): f"{node.module}.{alias.name}" for alias in node.names}
    return found


@cache
def _text(definition: Definition) -> str:
    """Source of a definition without comments, docstrings, annotations, and imports from our packages."""
    nodes = [ast.parse(ast.unparse(node)).body[0] for node in _module(definition.module).nodes[definition.name]]
    return "\n".join(ast.unparse(ast.fix_missing_locations(_Bare().visit(node))) for node in nodes)


class _Bare(ast.NodeTransformer):
    """Removes docstrings, annotations and imports from our packages."""

    def generic_visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.decorator_list = [d for d in node.decorator_list if not _is_ignored(d)]
            node.body = [statement for statement in node.body if not _is_text(statement)]
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.returns = None
        super().generic_visit(node)
        if hasattr(node, "body") and isinstance(node.body, list) and not node.body:
            node.body = [ast.Pass()]
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        self.generic_visit(node)
        node.annotation = ast.Constant(None)  # a dataclass field stays one
        return node

    def visit_Import(self, node: ast.Import) -> ast.stmt | None:
        return None if all(_is_ours(alias.name) for alias in node.names) else node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt | None:
        return None if _is_ours(node.module or "") else node


def _is_ignored(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(called, ast.Name) and called.id in IGNORED_DECORATORS


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in PACKAGES


@cache
def _uses(definition: Definition) -> list[tuple[str, Definition | str]]:
    """Names from outside that a definition uses: of ours with their definition, of others with their dotted name."""
    module = _module(definition.module)
    tree = ast.parse(_text(definition))
    original = [node for top in module.nodes[definition.name] for node in ast.walk(top)]
    imports = module.imports | _imports(original)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    found: list[tuple[str, Definition | str]] = []
    for name in sorted(names):
        if name in module.nodes:
            found.append((name, Definition(definition.module, name)))
        elif name in imports and not _is_ours(imports[name]):
            found.append((name, imports[name]))
        elif name in imports and _is_module(imports[name]):
            members = sorted(attribute for base, attribute in attributes if base == name)
            found += [(f"{name}.{member}", _resolve(f"{imports[name]}.{member}")) for member in members]
        elif name in imports:
            found.append((name, _resolve(imports[name])))
    return found


def _is_module(dotted: str) -> bool:
    path = dotted.replace(".", "/")
    return f"{path}.py" in TEXTS or f"{path}/__init__.py" in TEXTS


def _resolve(dotted: str) -> "Definition | str":
    """Find the definition behind `package.module.name`, through modules that only pass a name on."""
    module, _, name = dotted.rpartition(".")
    if not _is_module(module):
        return dotted
    found = _module(module)
    if name in found.nodes:
        return Definition(module, name)
    return _resolve(found.imports[name]) if name in found.imports else dotted
