"""The layout's promises: who may import what, what a wheel holds, and that README, Makefile, pins and version agree with the tree."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it for Python 3.10

import mae_kernels
import sssd_fast
from sssd_fast import cli
from sssd_fast.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
STANDARD = sys.stdlib_module_names
# Optional or slow to import: only inside the function that needs them.
LATE = {
    "matplotlib", "nibabel", "nvidia", "onnx", "onnxruntime", "onnxscript", "pydicom", "rich", "scipy", "sklearn",
    "tensorboard", "torchao", "transformers", "triton", "xformers",
}  # fmt: skip


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """(module, names) of every absolute import; names is empty for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module), [alias.name for alias in node.names]


def import_time(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """Those of `imports` that run when the module is imported: outside functions and `if TYPE_CHECKING`."""

    class Outer(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    yield from imports(Outer().visit(ast.parse(ast.unparse(tree))))


def violations(package: str, code: str) -> list[str]:
    """What in one file's code breaks the import rules of `package`."""
    tree = ast.parse(code)
    found = []
    for module, names in imports(tree):
        top = module.partition(".")[0]
        if top in ("tests", "benchmarks") or (top == "conftest"):
            found.append(f"imports {module}: nothing imports benchmarks or tests")
        if top in ("torchvision", "timm"):
            found.append(f"imports {module}: the project does not depend on it")
        if package == "mae_kernels" and top not in {"torch", "triton", *STANDARD}:
            found.append(
                f"imports {module}: the ops need torch, triton and the standard library, and import each other relatively"
            )
        if package == "sssd_fast" and top == "mae_kernels":
            if module != "mae_kernels":
                found.append(f"imports {module}: only the public names of mae_kernels itself")
            found += [
                f"imports mae_kernels.{name}, which is not in __all__"
                for name in names
                if name not in mae_kernels.__all__
            ]
    if package == "sssd_fast":
        for node in ast.walk(tree):
            private = isinstance(node, ast.Attribute) and node.attr not in mae_kernels.__all__
            if private and isinstance(node.value, ast.Name) and node.value.id == "mae_kernels":
                found.append(f"uses mae_kernels.{node.attr}, which is not in __all__")
        found += [
            f"imports {m} when it is imported itself"
            for m, _ in import_time(tree)
            if m.partition(".")[0] in LATE
        ]
    return found


@pytest.mark.parametrize("package", ["mae_kernels", "sssd_fast"])
def test_the_import_rules_hold(package: str) -> None:
    files = sources("kernels" if package == "mae_kernels" else package)
    assert files
    found = {
        str(path.relative_to(ROOT)): violations(package, path.read_text(encoding="utf-8"))
        for path in files
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("mae_kernels", "import numpy as np"),
        ("mae_kernels", "def f():\n    from sssd_fast.errors import SssdError"),
        ("mae_kernels", "from mae_kernels.masking import random_masking"),
        ("sssd_fast", "from mae_kernels import _checks"),
        ("sssd_fast", "from mae_kernels.masking import random_masking"),
        ("sssd_fast", "import mae_kernels.masking"),
        ("sssd_fast", "import mae_kernels\nmae_kernels._checks.positive(1)"),
        ("sssd_fast", "def f():\n    import benchmarks.run"),
        ("sssd_fast", "import os, matplotlib.pyplot as plt"),
        (
            "sssd_fast",
            "try:\n    from rich.console import Console\nexcept ImportError:\n    Console = None",
        ),
        ("sssd_fast", "def f():\n    import torchvision"),
    ],
)
def test_the_import_rules_see_what_breaks_them(package: str, code: str) -> None:
    assert violations(package, code)


def test_the_import_rules_let_late_and_typing_imports_pass() -> None:
    code = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rich.console import Console\ndef f():\n    import sklearn"
    assert violations("sssd_fast", code) == []


def test_kernels_is_a_source_root_and_no_package() -> None:
    """As a package it would shadow, and when installed overwrite, Hugging Face's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "mae_kernels" / "py.typed").exists()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wheel, sdist, and the wheel built from the unpacked sdist, all from a copy of the tree."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "copy"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("sssd_fast", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    build = "import sys, setuptools.build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"

    def run(kind: str, where: Path, out: str) -> Path:
        command = [sys.executable, "-c", build, kind, str(folder / out)]
        done = subprocess.run(command, cwd=where, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return folder / out / done.stdout.splitlines()[-1]

    sdist = run("sdist", copy, "first")
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            archive.extract(
                member,
                folder / "unpacked",
                **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}),
            )
    unpacked = next((folder / "unpacked").iterdir())
    return {
        "wheel": run("wheel", copy, "first"),
        "sdist": sdist,
        "again": run("wheel", unpacked, "second"),
    }


def test_the_wheel_holds_every_module_and_nothing_else(built: dict[str, Path]) -> None:
    names = set(zipfile.ZipFile(built["wheel"]).namelist())
    packaged = {name for name in names if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in sources("sssd_fast")}
    modules |= {str(path.relative_to(ROOT / "kernels")) for path in sources("kernels")}
    assert {name for name in packaged if name.endswith(".py")} == modules
    assert {name.partition("/")[0] for name in packaged} == {"sssd_fast", "mae_kernels"}
    configs = {
        f"sssd_fast/configs/{path.name}" for path in (ROOT / "sssd_fast" / "configs").glob("*.yaml")
    }
    assert configs
    assert packaged >= configs | {"sssd_fast/py.typed", "mae_kernels/py.typed"}
    assert set(zipfile.ZipFile(built["again"]).namelist()) == names, (
        "a wheel built from the sdist differs"
    )


def test_the_wheel_says_what_pyproject_says(built: dict[str, Path]) -> None:
    archive = zipfile.ZipFile(built["wheel"])
    info = next(name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    meta = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert meta["Version"] == sssd_fast.__version__
    assert meta["License-Expression"] == "MIT"
    base = [
        Requirement(text).name for text in meta.get_all("Requires-Dist") if "extra ==" not in text
    ]
    assert sorted(base) == ["numpy", "torch"]
    assert "sssd-fast = sssd_fast.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in archive.namelist()
    with tarfile.open(built["sdist"]) as sdist:
        assert any(name.endswith("/kernels/mae_kernels/__init__.py") for name in sdist.getnames())


def test_one_version_everywhere() -> None:
    version = sssd_fast.__version__
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "sssd_fast.__version__"}
    newest = re.search(
        r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert newest is not None
    assert newest.group(1) == version
    assert getattr(mae_kernels, "__version__", version) == version


def extras() -> dict[str, list[Requirement]]:
    found: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
    return {name: [Requirement(text) for text in texts] for name, texts in found.items()}


def test_all_is_every_extra_but_the_conflicting_one() -> None:
    (everything,) = extras()["all"]
    assert everything.extras == set(extras()) - {"all", "dali-cu12"}


def test_every_dependency_is_bounded() -> None:
    unbounded = [
        str(r)
        for r in [
            *map(Requirement, PROJECT["project"]["dependencies"]),
            *(r for rs in extras().values() for r in rs),
        ]
        if not r.extras
        and r.name != "setuptools"
        and not any(s.operator in ("<", "<=", "==", "~=") for s in r.specifier)
    ]
    assert unbounded == []


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_pin_every_direct_dependency_within_its_range(python: str) -> None:
    """For each Python exactly one version; transitive packages were resolved with them."""
    here = {
        "python_version": python,
        "python_full_version": f"{python}.5",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        assert re.fullmatch(r"==[^,*]+", str(pin.specifier)), f"not one exact version: {line}"
        assert pin.url is None
        if pin.marker is None or pin.marker.evaluate(here):
            name = canonicalize_name(pin.name)
            assert name not in pins, f"two pins for {name} on Python {python}"
            pins[name] = str(pin.specifier)[2:]
    wanted = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
    wanted += [r for name, rs in extras().items() if name not in ("all", "dali-cu12") for r in rs]
    outside = [
        str(r)
        for r in wanted
        if canonicalize_name(r.name) not in pins
        or pins[canonicalize_name(r.name)] not in r.specifier
    ]
    assert outside == []
    assert pins["torch"] == "2.13.0"


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_names_only_targets_extras_and_files_that_exist() -> None:
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    named = set(
        re.findall(
            r"\bmake ([a-z-]+)\b(?=[` \n])",
            "".join(re.findall(r"`[^`]*`|^```.*?^```", readme(), re.DOTALL | re.M)),
        )
    )
    assert {"setup", "demo", "test", "check"} <= named
    assert named <= targets
    asked = {
        extra
        for group in re.findall(r"\.?\[([a-z0-9,-]+)\]'", readme())
        for extra in group.split(",")
    }
    assert asked
    assert asked <= set(extras())
    links = set(re.findall(r"\]\(([^)#:]+)\)", readme()))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_commands_are_accepted_as_they_stand() -> None:
    """Every command, configuration and key=value in the README's code blocks goes through the real parser and the real settings."""
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", readme(), re.DOTALL | re.MULTILINE))
    lines = [
        line.partition("  #")[0]
        for line in blocks.splitlines()
        if re.match(r"sssd-fast |torchrun .*-m sssd_fast ", line)
    ]
    assert len(lines) > 8
    for line in lines:
        args = cli._parser().parse_args(
            shlex.split(re.sub(r"^.*?(sssd-fast|-m sssd_fast) ", "", line))
        )
        load_config(getattr(args, "config", None), getattr(args, "overrides", []))


def test_readme_shows_the_tree_as_it_is() -> None:
    """Every path that the file tree names exists, and no module of the trainer is missing from it."""
    block = re.search(r"^## Files\n+```\n(.*?)^```", readme(), re.DOTALL | re.MULTILINE)
    assert block is not None
    named, folder = set(), ""
    for line in block.group(1).splitlines():
        paths = line.strip().split("  ")[0].split(", ")
        if not line.startswith(" "):
            folder, paths = paths[0], [""]
        named |= {str(Path(folder + path)) for path in paths}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    modules = {
        path.relative_to(ROOT) for path in sources("sssd_fast") if not path.name.startswith("__")
    }
    shown = {str(m) for m in modules if {str(m), *map(str, list(m.parents)[:-2])} & named}
    assert {str(m) for m in modules} - shown == set()


def test_make_says_what_it_needs_when_there_is_no_suitable_python(tmp_path: Path) -> None:
    """In a path with spaces, with a Python that is too old: one message with what to do, and no half-made .venv."""
    clone, old = tmp_path / "a clone", tmp_path / "old python"
    clone.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, clone / name)
    old.write_text('#!/bin/sh\nexit 1  # as `python -c "...sys.exit(version < 3.10)"` would\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"PYTHON={old}"], cwd=clone, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "needs Python 3.10 or newer" in done.stderr
    assert f"tried: {old}" in done.stderr
    assert "make setup PYTHON=" in done.stderr
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize(
    ("prints", "code", "last", "status"),
    [
        ("all good\n3 passed, 1 warning in 1.25s", 0, "3 passed, 1 warning in 1.25s", 0),
        ("FAILED a\n1 failed, 2 passed in 9.10s (0:00:09)\nmake: *** Error 1", 2, "1 failed, 2 passed in 9.10s (0:00:09)", 2),
        ("no tests ran in 0.01s\nmake: *** Error 5", 2, "no tests ran in 0.01s", 2),
        ("Found 1 error.\nmake: *** Error 1", 2, "no pytest summary: the tests did not run", 2),
        ("nothing", 0, "no pytest summary: the tests did not run", 1),
    ],
    ids=["passes", "fails", "no test", "lint fails", "tests silently left out"],
)  # fmt: skip
def test_ci_ends_with_the_summary_and_fails_when_anything_failed(
    tmp_path: Path, prints: str, code: int, last: str, status: int
) -> None:
    clone = tmp_path / "a clone"
    (clone / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", clone / ".ci" / "run")
    fake = tmp_path / "bin" / "make"
    fake.parent.mkdir()
    fake.write_text(
        f"#!/bin/sh\necho asked for \"$@\"\necho secret=$SECRET proxy=$https_proxy\ncat <<'END'\n{prints}\nEND\nexit {code}\n"
    )
    fake.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}",
        "SECRET": "leaked",
        "https_proxy": "kept",
    }
    done = subprocess.run(
        [clone / ".ci" / "run"], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[:2] == ["asked for check test SLOW=1", "secret= proxy=kept"]
    assert done.stdout.splitlines()[-1] == last
    assert done.returncode == status


def tracked() -> list[Path]:
    """Files that git tracks or would; every file in an unpacked sdist."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    if (ROOT / ".git").exists():
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(
            "\0"
        )
        return [ROOT / name for name in names if name and (ROOT / name).is_file()]
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not {".venv", "runs"} & set(path.parts)
    ]


def test_no_large_file_and_no_image_data() -> None:
    """The default data is generated; real images and checkpoints never enter the repository."""
    assert [str(p.relative_to(ROOT)) for p in tracked() if p.stat().st_size > 512 * 1024] == []
    assert [
        str(p.relative_to(ROOT))
        for p in tracked()
        if p.suffix in (".pt", ".pth", ".safetensors", ".onnx", ".dcm", ".npy")
    ] == []


def test_nothing_names_a_local_path_or_a_package_index() -> None:
    """Commands must work elsewhere, and where packages come from is the reader's own setting."""
    local = re.compile(r"(?<![\w.~-])/(?:home|root|Users|tmp|work|mnt|opt)/\w")
    index = re.compile(
        r"pypi\.org|pythonhosted|download\.pytorch|index[-_]url|trusted-host|--find-links",
        re.IGNORECASE,
    )
    found = []
    for path in tracked():
        if path == Path(__file__):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lines = enumerate(text.splitlines(), 1)
        found += [
            f"{path.relative_to(ROOT)}:{n}: {line.strip()[:80]}"
            for n, line in lines
            if local.search(line) or index.search(line)
        ]
    assert found == []
