"""Which package may import which, and whose `datasets` it is."""

import ast
import re
import sys

import pytest

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


def imported(path) -> set[str]:
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
        ours = imported(path) & set(PACKAGES) - {package}
        assert ours <= ALLOWED[package], path


def test_datasets_is_ours() -> None:
    assert datasets.__file__ == str(ROOT / "datasets" / "__init__.py")
    requirements = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-dev.txt").read_text()
    for name in ("datasets", "transformers", "evaluate"):
        assert f"\n{name}==" not in requirements


def test_every_requirement_is_imported_and_every_import_required() -> None:
    modules = {"markdown-it-py": "markdown_it", "pillow": "PIL", "scikit-learn": "sklearn"}
    required, optional = (
        {modules.get(name, name) for name in re.findall(r"^([a-z0-9-]+)", (ROOT / file).read_text(), re.MULTILINE)}
        for file in ("requirements.txt", "requirements-cluster.txt")
    )
    found = set().union(*(imported(path) for package in PACKAGES for path in (ROOT / package).rglob("*.py")))
    third_party = found - set(PACKAGES) - set(sys.stdlib_module_names)
    assert third_party - required <= optional & {"ray"}  # without which everything else works
    assert required - third_party <= {"six"}  # kaggle imports it and does not say so


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is_for(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
