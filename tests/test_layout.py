"""Which package and which room of experiments/ may import which, and whose `datasets` it is."""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import datasets
from tests.conftest import ROOT

PACKAGES = ("experiments", "datasets", "models", "tracking", "analysis")
ALLOWED = {
    "experiments": {"datasets", "models", "tracking", "analysis"},
    "analysis": {"tracking"},
    "datasets": set(),
    "models": set(),
    "tracking": set(),
}


# each room of experiments/ imports only rooms after it; rooms of one line do not import each other
ROOMS = (
    ("command_line",), ("run",), ("champion", "verification"), ("tuning",), ("jobs",), ("provenance",), ("training",)
)  # fmt: skip
FLAT = {"folder", "__init__", "__main__", "request", "task"}  # beside the scripts of the tasks


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        if path.name == "__main__.py":  # the command of a package may use all
            continue
        ours = imported(path) & set(PACKAGES) - {package}
        assert ours <= ALLOWED[package], path


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def sources() -> dict[str, Path]:
    """The files of the five packages by the names of their modules."""
    return {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports_of(path: Path, modules: dict[str, Path], at_import: bool = False) -> Iterator[str]:
    """Our modules that a file imports: everywhere in it but below TYPE_CHECKING, or only as it is imported itself."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif not (at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            todo += ast.iter_child_nodes(node)
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            # `from package import module` needs the module only; `from package import name` needs the package
            names = [name if name in modules else node.module for name in names]
        yield from (name for name in names if name in modules)


def room_of(module: str) -> int | None:
    """Number of the floor of a module of a room; None outside of them."""
    parts = module.split(".")
    floors = [floor for floor, rooms in enumerate(ROOMS) if parts[0] == "experiments" and {*parts[1:2]} & {*rooms}]
    return floors[0] if floors else None


def test_each_room_imports_only_rooms_below_it() -> None:
    modules = sources()
    rooms = {path.parent.name for path in (ROOT / "experiments").glob("*/*.py")}
    assert rooms == {room for floor in ROOMS for room in floor}
    for module, path in modules.items():
        if (floor := room_of(module)) is not None:
            for name in imports_of(path, modules):
                below, same_room = room_of(name), module.split(".")[:2] == name.split(".")[:2]
                assert below is None or below > floor or same_room, f"{module} imports {name}"
                assert name != "experiments", f"{module} imports the package that imports it"


def test_no_file_imports_itself_by_way_of_others() -> None:
    modules = sources()
    TopologicalSorter(
        {name: set(imports_of(path, modules, at_import=True)) for name, path in modules.items()}
    ).prepare()


def test_only_tasks_and_their_request_lie_flat_in_experiments() -> None:
    flat = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "experiments").glob("*.py")}
    tasks = {name for name, text in flat.items() if re.search(r"^TASK = Task\(", text, re.MULTILINE)}
    assert flat.keys() - tasks == FLAT and {"task1", "task2", "task3"} <= tasks


def test_only_known_places_import_by_name() -> None:
    # a task is found by its name, and models/ finds its own files
    dynamic = {name for name, path in sources().items() if "import_module(" in path.read_text(encoding="utf-8")}
    assert dynamic <= {"experiments.task", "models.library", "models.registry"}


def test_datasets_is_ours() -> None:
    assert datasets.__file__ == str(ROOT / "datasets" / "__init__.py")
    requirements = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-dev.txt").read_text()
    for name in ("datasets", "transformers", "evaluate"):
        assert f"\n{name}==" not in requirements


def test_every_requirement_is_imported_and_every_import_required() -> None:
    modules = {
        "markdown-it-py": "markdown_it",
        "pillow": "PIL",
        "scikit-learn": "sklearn",
        "huggingface-hub": "huggingface_hub",
    }
    required, cluster, tuning = (
        {modules.get(name, name) for name in re.findall(r"^([a-z0-9-]+)", (ROOT / file).read_text(), re.MULTILINE)}
        for file in ("requirements.txt", "requirements-cluster.txt", "requirements-tuning.txt")
    )
    found = set().union(*(imported(path) for package in PACKAGES for path in (ROOT / package).rglob("*.py")))
    third_party = found - {"decoding"} - set(PACKAGES) - set(sys.stdlib_module_names)
    assert third_party - required <= (cluster & {"ray"}) | (tuning & {"optuna"})  # without which everything else works
    assert required - third_party <= {"six"}  # kaggle imports it and does not say so


def test_pins_are_in_the_promised_ranges() -> None:
    pins, ranges = (
        {each.name: each.specifier for each in map(Requirement, re.findall(r"^\w.*$", (ROOT / file).read_text(), re.M))}
        for file in ("requirements.txt", "requirements-ranges.txt")
    )
    assert pins.keys() == ranges.keys()
    for name, specifier in ranges.items():
        (pin,) = pins[name]
        assert specifier.contains(pin.version), name
        assert [each.operator for each in specifier if each.operator != "<"] == [">="], name  # its end is tested


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is_for(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
