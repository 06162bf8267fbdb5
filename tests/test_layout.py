"""The repository: import order, contents of a wheel, documented commands, pins, version, CI."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import typer
from importlinter.cli import lint_imports
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it for Python 3.10

import mae_kernels
import sssd_fast
from benchmarks.__main__ import _parse as parse_benchmarks
from sssd_fast import cli
from sssd_fast.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Optional or slow to import: only in the functions that need them.
LATE = {
    *("matplotlib", "nibabel", "nvidia", "onnx", "onnxruntime", "onnxscript", "pydicom", "rich"),
    *("scipy", "sklearn", "tensorboard", "torchao", "transformers", "xformers"),
    *("mlflow", "wandb"),
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def tracked() -> list[Path]:
    """Files that git tracks or would track; in an unpacked sdist every file."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]
    hidden = {".venv", "runs"}
    return [path for path in ROOT.rglob("*") if path.is_file() and not hidden & set(path.parts)]


# ---- imports ---------------------------------------------------------------------------------


def test_import_order_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contracts in pyproject.toml; `make check` prints what breaks them."""
    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename="pyproject.toml", no_cache=True, is_debug_mode=False) == 0


def imported(folder: str) -> set[str]:
    """`a.b` for `import a.b`, `from a import b` and `a.b` of a module a, in all files."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "mae_kernels":
                found.add(f"mae_kernels.{node.attr}")
    return found


def test_ops_import_torch_triton_and_the_standard_library() -> None:
    found = {name.partition(".")[0] for name in imported("kernels")}
    assert {"torch", "triton"} <= found <= {"torch", "triton", *sys.stdlib_module_names}


def test_trainer_uses_only_public_names_of_the_ops() -> None:
    used = {name for name in imported("sssd_fast") if name.startswith("mae_kernels.")}
    assert used
    assert used <= {f"mae_kernels.{name}" for name in mae_kernels.__all__}


def test_packages_import_only_what_they_need(tmp_path: Path) -> None:
    """In one process, in this order: the ops alone, the package, every module."""
    code = """
import importlib, json, pkgutil, sys
def loaded():
    return sorted({name.partition(".")[0] for name in sys.modules})
import mae_kernels
steps = [mae_kernels.__file__, loaded()]
sys.path.insert(0, sys.argv[1])
import sssd_fast
steps.append("sssd_fast.api" in sys.modules)
for module in pkgutil.walk_packages(sssd_fast.__path__, "sssd_fast."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(json.dumps([*steps, loaded()]))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, "-c", code, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    where, ops, api, everything = json.loads(done.stdout)
    assert Path(where).parent == ROOT / "kernels" / "mae_kernels"
    trainer = {"sssd_fast", "benchmarks", "tests", "PIL", "pydantic", "omegaconf", "safetensors"}
    assert set(ops) & (trainer | LATE) == set()
    assert api is False
    assert set(everything) & (LATE | {"benchmarks", "torchvision", "timm"}) == set()


# ---- packaging -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from the unpacked sdist of a copy of the tree."""
    folder = tmp_path_factory.mktemp("build")
    copy, unpacked = folder / "copy", folder / "unpacked"
    for name in ("sssd_fast", "kernels", "benchmarks"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    code = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"

    def build(kind: str, where: Path) -> Path:
        command = [sys.executable, "-c", code, f"build_{kind}", str(folder / "dist")]
        done = subprocess.run(command, cwd=where, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return folder / "dist" / done.stdout.splitlines()[-1]

    safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(build("sdist", copy)) as archive:
        archive.extractall(unpacked, **safe)
    return zipfile.ZipFile(build("wheel", next(unpacked.iterdir())))


def test_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    packaged = {name for name in names if ".dist-info/" not in name}
    kept = (".py", ".yaml", ".j2", ".txt", ".typed")
    files = {path.relative_to(ROOT) for path in tracked() if path.suffix in kept}
    trainer = {str(path) for path in files if path.parts[0] == "sssd_fast"}
    ops = {str(path.relative_to("kernels")) for path in files if path.parts[0] == "kernels"}
    bench = {str("sssd_fast/_bench" / p) for p in files if p.parent == Path("benchmarks")}
    assert packaged == trainer | ops | bench
    assert {"sssd_fast/py.typed", "mae_kernels/py.typed", "sssd_fast/configs/8gb.yaml"} <= packaged
    # as a package it would overwrite Hugging Face's package of that name
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_metadata_is_that_of_pyproject(wheel: zipfile.ZipFile) -> None:
    info = next(name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    meta = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    newest = re.findall(r"^## \[(\d[^\]]*)\]", read("CHANGELOG.md"), re.MULTILINE)[0]
    assert meta["Version"] == sssd_fast.__version__ == newest
    assert meta["License-Expression"] == "MIT"
    needed = [Requirement(text) for text in meta.get_all("Requires-Dist") if "extra ==" not in text]
    assert sorted(requirement.name for requirement in needed) == ["numpy", "torch"]
    scripts = wheel.read(f"{info}/entry_points.txt").decode()
    assert "sssd-fast = sssd_fast.__main__:main" in scripts
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


# extras that `make setup` does not install and constraints.txt does not pin
LEFT_OUT = ("all", "dali-cu12", "mlflow", "wandb")


def requirements() -> dict[str, list[Requirement]]:
    """Dependencies by extra; "" = those of every installation."""
    found = {"": PROJECT["project"]["dependencies"], **PROJECT["project"]["optional-dependencies"]}
    return {name: [Requirement(text) for text in texts] for name, texts in found.items()}


def test_dependencies_are_bounded_and_all_in_one_extra() -> None:
    extras = requirements()
    (everything,) = extras.pop("all")
    assert everything.extras == set(extras) - {"", *LEFT_OUT}
    every = [requirement for found in extras.values() for requirement in found]
    bounded = [any(s.operator in ("<", "==", "~=") for s in r.specifier) for r in every]
    assert {r.name for r, ok in zip(every, bounded, strict=True) if not ok} == {"setuptools"}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_pin_every_direct_dependency_within_its_range(python: str) -> None:
    machine = {"sys_platform": "linux", "platform_machine": "x86_64"}
    here = {"python_version": python, "python_full_version": f"{python}.5", **machine}
    pins: dict[str, str] = {}
    for line in read("constraints.txt").splitlines():
        pin = None if line.startswith("#") else Requirement(line)
        if pin is None or not (pin.marker is None or pin.marker.evaluate(here)):
            continue
        assert re.fullmatch(r"==[^,*]+", str(pin.specifier)), f"not one exact version: {line}"
        name = canonicalize_name(pin.name)
        assert name not in pins, f"two pins for {name} on Python {python}"
        pins[name] = str(pin.specifier)[2:]
    wanted = [r for n, found in requirements().items() if n not in LEFT_OUT for r in found]
    outside = [
        r.name for r in wanted if pins.get(canonicalize_name(r.name), "none") not in r.specifier
    ]
    assert outside == []
    assert pins["torch"] == "2.13.0"


# ---- documents, make and CI ------------------------------------------------------------------

DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_only_targets_extras_and_files_that_exist(name: str) -> None:
    text = read(name)
    code = "".join(re.findall(r"`[^`\n]*`|^```.*?^```", text, re.DOTALL | re.MULTILINE))
    targets = re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z-]+)\b(?=[` \n])", code)) <= set(targets)
    named = {
        extra for group in re.findall(r"'\.\[([a-z0-9,-]+)\]'", text) for extra in group.split(",")
    }
    assert named <= set(requirements())
    links = set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text))
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []


def test_documented_commands_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sssd-fast command in the documents goes through the real parser and settings."""
    calls: list[dict[str, Any]] = []
    tree = typer.main.get_command(cli.app)

    def record(command: Any) -> None:
        for sub in getattr(command, "commands", {}).values():
            record(sub)
        if not hasattr(command, "commands"):
            command.callback = lambda **given: calls.append(given)

    record(tree)
    monkeypatch.setattr(typer.main, "get_command", lambda app: tree)
    lines = []
    for name in DOCUMENTS:
        blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", read(name), re.DOTALL | re.MULTILINE))
        commands = re.findall(
            r"^(?:\.venv/bin/|torchrun .*-m )?sssd[-_]fast (.*)$", blocks.replace("\\\n", " "), re.M
        )
        lines += [f"{name}: {line}" for line in commands]
    assert len(lines) > 8
    for line in lines:
        words = shlex.split(line.partition(": ")[2], comments=True)
        if words[0] == "bench":
            parse_benchmarks(words[1:])
            continue
        calls.clear()
        assert cli.main(words) == 0, line
        (given,) = calls
        config = given.get("config")
        config = None if str(config).endswith(".yaml") else config  # the reader's own file
        load_config(config, [word for word in given.get("settings") or () if "=" in word])


@pytest.mark.parametrize(
    ("prints", "code", "last", "status"),
    [
        ("3 passed, 1 warning in 1.25s", 0, "3 passed, 1 warning in 1.25s", 0),
        ("1 failed, 2 passed in 9.10s\nmake: *** Error 1", 2, "1 failed, 2 passed in 9.10s", 2),
        ("Found 1 error.\nmake: *** Error 1", 2, "no pytest summary: the tests did not run", 2),
        ("nothing", 0, "no pytest summary: the tests did not run", 1),
    ],
    ids=["passes", "fails", "lint fails", "no tests"],
)
def test_ci_ends_with_the_summary_and_fails_if_anything_failed(
    tmp_path: Path, prints: str, code: int, last: str, status: int
) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    fake = tmp_path / "bin" / "make"
    fake.parent.mkdir()
    fake.write_text(
        f"#!/bin/sh\necho \"$@\" $SECRET $https_proxy\ncat <<'END'\n{prints}\nEND\nexit {code}\n"
    )
    fake.chmod(0o755)
    path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "SECRET": "leaked", "https_proxy": "kept"}
    done = subprocess.run([tmp_path / ".ci" / "run"], env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == "check test SLOW=1 kept"
    assert done.stdout.splitlines()[-1] == last
    assert done.returncode == status


def test_repository_holds_no_large_file_no_image_data_and_no_local_path() -> None:
    local = re.compile(r"(?<![\w.~-])/(?:home|root|Users|tmp|work|mnt|opt)/\w")
    index = re.compile(r"pypi\.org|pythonhosted|download\.pytorch|index[-_]url|--find-links", re.I)
    weights = (".pt", ".pth", ".safetensors", ".onnx", ".dcm", ".npy")
    found = []
    for path in tracked():
        if path.suffix in weights or path.stat().st_size > 512 * 1024:
            found.append(str(path))
        elif path != Path(__file__) and path.suffix != ".png":
            lines = enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
            found += [
                f"{path}:{n}" for n, line in lines if local.search(line) or index.search(line)
            ]
    assert found == []
