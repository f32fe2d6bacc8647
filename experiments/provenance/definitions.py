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
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
                names = set()
            case ast.FunctionDef(name=defined) | ast.AsyncFunctionDef(name=defined) | ast.ClassDef(name=defined):
                names = {defined}
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
            case _:  # `if`, `try`, a call, ...: part of every name that it binds or mentions
                inside = list(ast.walk(node))
                names = {n.id for n in inside if isinstance(n, ast.Name)}
                names |= {n.name for n in inside if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        for defined in names:
            nodes.setdefault(defined, []).append(node)
    return _Module(nodes, _imports(ast.walk(tree), name))


def _imports(nodes: Iterable[ast.AST], module: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
            found |= dict.fromkeys((alias.name.split(".")[0] for alias in node.names if not alias.asname), "")
        elif isinstance(node, ast.ImportFrom):
            is_package = (_file(module) or "").endswith("__init__.py")
            parts = module.split(".")[: -node.level or None] if not is_package or node.level != 1 else [module]
            base = ".".join([*(parts if node.level else []), *([node.module] if node.module else [])])
            for alias in node.names:
                star = alias.name == "*" and _file(base) is not None
                names = list(_module(base).nodes) if star else [alias.name]
                found |= {(alias.asname or name): f"{base}.{name}" for name in names}
    return {name: dotted or name for name, dotted in found.items()}


class _Bare(ast.NodeTransformer):
    """Removes docstrings, annotations, messages of errors, registrations as a model, and imports from our packages."""

    _in_function = False

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
            case ast.AnnAssign() if self._in_function:
                if node.value is None:
                    return None
                node = ast.Assign([node.target], node.value, lineno=node.lineno)
            case ast.AnnAssign():
                node.annotation = ast.Constant(None)  # a dataclass field stays one
            case ast.Raise(exc=ast.Call() as call):
                call.args, call.keywords = [], []  # a message decides nothing
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                node.decorator_list = [d for d in node.decorator_list if "register" not in ast.unparse(d).split("(")[0]]
                if not isinstance(node, ast.ClassDef):
                    node.returns = None
        outside, self._in_function = self._in_function, self._in_function or isinstance(node, ast.FunctionDef)
        super().generic_visit(node)
        self._in_function = outside
        if getattr(node, "body", None) == []:
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node


@cache
def _text(definition: Definition) -> str:
    """Source of a definition without everything that decides no result."""
    found = _module(definition.module).nodes.get(definition.name)
    if found is None:
        raise LookupError(f"{definition.name} is not defined by a statement in {_file(definition.module)}")
    nodes = [ast.parse(ast.unparse(node)).body[0] for node in found]
    return "\n".join(ast.unparse(ast.fix_missing_locations(_Bare().visit(node))) for node in nodes)


@cache
def _uses(definition: Definition) -> list[tuple[str, Definition | str]]:
    """Names from outside that a definition uses: of ours with their definition, of others with their dotted name."""
    module = _module(definition.module)
    nodes = list(ast.walk(ast.parse(_text(definition))))
    dotted = {ast.unparse(n) for n in nodes if isinstance(n, ast.Attribute) and _is_chain(n)}
    dotted |= {n.id for n in nodes if isinstance(n, ast.Name)}
    found: dict[str, Definition | str] = {}
    for used in sorted(dotted):
        name, _, rest = used.partition(".")
        if name in module.nodes:
            found[name] = Definition(definition.module, name)
        elif name in module.imports:
            target = _resolve(".".join(filter(None, [module.imports[name], rest])))
            if isinstance(target, Definition) or not is_ours(target):
                found[used if isinstance(target, Definition) else name] = target
    return list(found.items())


def _is_chain(node: ast.expr) -> bool:
    """Whether an expression is a name with attributes, such as `models.resnet.ResidualBlock`."""
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and _is_chain(node.value))


def _resolve(dotted: str, seen: frozenset[str] = frozenset()) -> Definition | str:
    """Find the definition behind `package.module.name...`, through modules that only pass a name on."""
    parts = dotted.split(".")
    lengths = [length for length in range(len(parts), 0, -1) if _file(".".join(parts[:length]))]
    if not lengths or lengths[0] == len(parts) or dotted in seen:
        return dotted  # of another package, or a module itself
    module, name, rest = ".".join(parts[: lengths[0]]), parts[lengths[0]], parts[lengths[0] + 1 :]
    found = _module(module)
    if name in found.nodes:
        return Definition(module, name)
    return _resolve(".".join([found.imports[name], *rest]), seen | {dotted}) if name in found.imports else dotted
