"""Digests of definitions: of a function or class, and of everything that it uses in this repository.

A digest follows names from definition to definition through the syntax trees. It does not depend on comments,
docstrings, annotations, or the file in which a definition stands: renaming a file or moving a function changes nothing,
and a changed layer, constant or helper does. Names of other packages count as names.
"""

import ast
import hashlib
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

from experiments.provenance.sources import PACKAGES, TEXTS


class Definition(NamedTuple):
    """A top-level name of one of our modules."""

    module: str
    name: str


class _Module(NamedTuple):
    nodes: dict[str, list[ast.stmt]]  # the statements that define each name
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
        lines = []
        for name, target in _uses(definition):
            if isinstance(target, str):
                lines.append(f"{name}={target}")
            elif is_boundary(target):
                lines.append(f"{name}={target.name}")
            elif target != definition:
                todo.append(target)
                lines.append(f"{name}={_text(target)}")  # two helpers of one name must not be taken for each other
        entries.add("\n".join([definition.name, _text(definition), *sorted(lines)]))
    total = hashlib.sha256("\0".join(sorted(entries)).encode()).hexdigest()
    return total, {_file(definition.module) or "" for definition in seen}


def is_ours(module: str) -> bool:
    """Whether a module, by its dotted name, belongs to this repository."""
    return module.split(".")[0] in PACKAGES


@cache
def _file(module: str) -> str | None:
    """The file of a module, relative to the repository; None if it is none of ours."""
    path = module.replace(".", "/")
    return next((file for file in (f"{path}.py", f"{path}/__init__.py") if file in TEXTS), None)


@cache
def _module(name: str) -> _Module:
    tree = ast.parse(TEXTS[_file(name) or name])
    nodes: dict[str, list[ast.stmt]] = {}
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=defined) | ast.AsyncFunctionDef(name=defined) | ast.ClassDef(name=defined):
                names = [defined]
            case ast.Assign(targets=targets):
                names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=defined)) | ast.AugAssign(target=ast.Name(id=defined)):
                names = [defined]
            case _:
                names = []
        for defined in names:
            nodes.setdefault(defined, []).append(node)
    return _Module(nodes, _imports(tree.body))


def _imports(nodes: Iterable[ast.AST]) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {(alias.asname or alias.name.split(".")[0]): alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(alias.asname or alias.name): f"{node.module}.{alias.name}" for alias in node.names}
    return found


class _Bare(ast.NodeTransformer):
    """Removes docstrings, annotations, registrations as a model, and imports from our packages."""

    def generic_visit(self, node: ast.AST) -> Any:
        match node:
            case ast.Import() if all(is_ours(alias.name) for alias in node.names):
                return None
            case ast.ImportFrom() if is_ours(node.module or ""):
                return None
            case ast.Expr(value=ast.Constant()):
                return None
            case ast.arg():
                node.annotation = None
            case ast.AnnAssign():
                node.annotation = ast.Constant(None)  # a dataclass field stays one
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                node.decorator_list = [d for d in node.decorator_list if "register" not in ast.unparse(d).split("(")[0]]
                if not isinstance(node, ast.ClassDef):
                    node.returns = None
        super().generic_visit(node)
        if getattr(node, "body", None) == []:
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node


@cache
def _text(definition: Definition) -> str:
    """Source of a definition without everything that decides no result."""
    nodes = [ast.parse(ast.unparse(node)).body[0] for node in _module(definition.module).nodes[definition.name]]
    return "\n".join(ast.unparse(ast.fix_missing_locations(_Bare().visit(node))) for node in nodes)


@cache
def _uses(definition: Definition) -> list[tuple[str, Definition | str]]:
    """Names from outside that a definition uses: of ours with their definition, of others with their dotted name."""
    module = _module(definition.module)
    nodes = list(ast.walk(ast.parse(_text(definition))))
    imports = module.imports | _imports(node for top in module.nodes[definition.name] for node in ast.walk(top))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    found: list[tuple[str, Definition | str]] = []
    for name in sorted(names):
        if name in module.nodes:
            found.append((name, Definition(definition.module, name)))
        elif name in imports and _file(imports[name]):  # a module of ours: its members count
            of_module = (n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name))
            members = sorted({n.attr for n in of_module if n.value.id == name})  # type: ignore[attr-defined]
            found += [(f"{name}.{member}", _resolve(f"{imports[name]}.{member}")) for member in members]
        elif name in imports:
            found.append((name, _resolve(imports[name])))
    return found


def _resolve(dotted: str) -> Definition | str:
    """Find the definition behind `package.module.name`, through modules that only pass a name on."""
    module, _, name = dotted.rpartition(".")
    if _file(module) is None:
        return dotted
    found = _module(module)
    if name in found.nodes:
        return Definition(module, name)
    return _resolve(found.imports[name]) if name in found.imports else dotted
