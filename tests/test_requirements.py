"""pyproject.toml names the versions that may work; the requirements files pin those tested."""

import ast
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gtpo

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Imported in gtpo/, and installed by the dependency that requires it.
COMES_WITH = {
    "huggingface-hub": "transformers",
    "numpy": "transformers",
    "safetensors": "transformers",
    "tqdm": "transformers",
    "sympy": "torch",
    "httpx": "datasets",
    "pyarrow": "datasets",
}


def ranges(requirements: list[str]) -> dict[str, Requirement]:
    """Each requirement by the canonical name of its package."""
    parsed = [Requirement(text) for text in requirements]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def pins(name: str, optional: bool = False) -> dict[str, str]:
    """The versions pinned in a requirements file; with `optional`, those commented out."""
    pattern = r"^# ([\w.-]+)==(\S+)" if optional else r"^([\w.-]+)==(\S+)"
    lines = re.findall(pattern, (ROOT / name).read_text(), re.MULTILINE)
    return {canonicalize_name(package): version for package, version in lines}


FILES = {path.name: pins(path.name) for path in sorted(ROOT.glob("requirements*.txt"))}
CORE = ranges(PROJECT["dependencies"])
ALL = CORE | ranges([text for extra in EXTRAS.values() for text in extra])


def test_every_line_of_a_requirements_file_is_an_exact_pin_with_a_reason():
    for name in FILES:
        for line in (ROOT / name).read_text().splitlines():
            assert re.fullmatch(r"#.*|[\w.-]+==[\w.]+( +# \S.*)?", line), (name, line)


@pytest.mark.parametrize("name", FILES)
def test_every_pin_lies_in_the_range_of_pyproject(name):
    for package, version in (FILES[name] | pins(name, optional=True)).items():
        # This file also lists what Unsloth imports.
        if package in ALL or name != "requirements-unsloth-cpu.txt":
            assert ALL[package].specifier.contains(version), (package, version)


def test_a_package_has_one_version_in_all_files():
    versions = {}
    for name, pinned in FILES.items():
        for package, version in pinned.items():
            assert versions.setdefault(package, version) == version, (name, package)


def test_every_dependency_of_pyproject_is_pinned_where_it_is_installed():
    gpu, cpu = FILES["requirements.txt"], FILES["requirements-cpu.txt"]
    assert set(cpu) == set(CORE | ranges(EXTRAS["cpu"]))
    assert set(gpu) == set(CORE | ranges(EXTRAS["unsloth"]))
    dev = FILES["requirements-dev.txt"] | FILES["requirements-docs.txt"]
    assert set(dev) == set(ranges(EXTRAS["dev"]))
    assert set(ranges(EXTRAS["vllm"])) == set(pins("requirements.txt", optional=True))
    assert set(FILES["requirements-unsloth-cpu.txt"]) >= {"unsloth", "unsloth-zoo"}


def imported_packages(path: Path) -> set[str]:
    """The top-level names that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.slow  # thousands of pairs, or seconds of work
def test_what_gtpo_imports_is_a_dependency_or_comes_with_one():
    files = [*(ROOT / "gtpo").rglob("*.py"), *(ROOT / "custom_trainer").glob("*.py")]
    imported = set().union(*map(imported_packages, files))
    known = ALL.keys() | COMES_WITH.keys() | {"gtpo"}
    for module, packages in importlib.metadata.packages_distributions().items():
        if module in imported:
            assert {canonicalize_name(package) for package in packages} & known, module


@pytest.mark.parametrize("package, parent", COMES_WITH.items())
def test_what_comes_with_a_dependency_is_required_by_it(package, parent):
    required = ranges(importlib.metadata.requires(parent))
    assert package in required and parent in CORE


def test_the_version_has_one_home():
    assert "version" in PROJECT["dynamic"] and re.fullmatch(r"\d+\.\d+\.\d+", gtpo.__version__)
