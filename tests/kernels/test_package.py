"""The package as a whole: what it needs to import, how the backend is chosen, what info returns."""

from __future__ import annotations

import doctest
import functools
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mae_kernels
from mae_kernels import _runtime, backend

# what the ops must not need; numpy is missing because torch itself imports it
BLOCKED = ["triton", "sssd_fast", "benchmarks", "tests", "tools", "PIL", "pydantic", "yaml", "rich"]
ALONE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import torch, mae_kernels as mk
assert mk.__file__.startswith(FOLDER)
m = mk.random_masking(torch.rand(2, 4), 2)
pred, images = torch.zeros(2, 2, 48, requires_grad=True), torch.rand(2, 3, 8, 8)
mk.masked_reconstruction_loss(pred, images, ids=m.ids_masked, patch_size=4).backward()
assert pred.grad.abs().sum() > 0
mk.attention(torch.rand(1, 5, 3, 2, 16, requires_grad=True)).sum().backward()
x = torch.rand(3, 8, requires_grad=True)
mk.gelu_linear(x, torch.rand(8), torch.rand(2, 8), None).sum().backward()
image = torch.arange(12, dtype=torch.uint8)
one = mk.crop_resize(image, *map(torch.tensor, ([0], [[3, 4]], [[1, 1, 2, 2]], [True])), (2, 2))
assert one.tolist() == [[[[6, 5], [10, 9]]]]
assert set(mk.info().values()) == {"triton is not installed"}
assert not set(BLOCKED) & set(sys.modules), set(BLOCKED) & set(sys.modules)
"""


def test_folder_alone_works_with_torch_only(tmp_path: Path) -> None:
    """A copy of the folder, without triton and without anything else of this repository."""
    shutil.copytree(Path(mae_kernels.__file__).parent, tmp_path / "mae_kernels")
    code = f"BLOCKED = {BLOCKED}\nFOLDER = {str(tmp_path)!r}\n{ALONE}"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "MAE_KERNELS_"))}
    command = [sys.executable, "-c", code]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120}
    env["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(command, cwd=tmp_path, env=env, **options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_import_loads_no_compiler() -> None:
    """torch.library.triton_op would: it doubles the time of `import torch`."""
    code = (
        "import sys, torch; before = set(sys.modules); import mae_kernels\n"
        "print(*{m for m in set(sys.modules) - before if m.startswith(('torch._inductor', "
        "'torch._dynamo', 'sympy'))})"
    )
    folder = str(Path(mae_kernels.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": folder}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_backend_is_checked_and_ends_with_its_block() -> None:
    needs = "needs one of auto, triton, reference, registered"
    with pytest.raises(ValueError, match=f"backend: got 'cuda', {needs}"), backend("cuda"):
        pass
    for name in ("auto", "triton"):
        assert _runtime._checked("MAE_KERNELS_BACKEND", name) == name
    with pytest.raises(ValueError, match=f"MAE_KERNELS_BACKEND: got 'cuda', {needs}"):
        _runtime._checked("MAE_KERNELS_BACKEND", "cuda")
    refusal = pytest.raises(RuntimeError, match=r"random_masking: .* requested, but the tensors")
    with backend("triton"), refusal:
        mae_kernels.random_masking(torch.rand(1, 4), 2)
    mae_kernels.random_masking(torch.rand(1, 4), 2)


def test_info_covers_every_op_and_the_command_prints_it(monkeypatch, capsys) -> None:
    reasons = mae_kernels.info()
    assert set(reasons) == {sample.op for sample in mae_kernels.samples()} <= {*mae_kernels.__all__}
    assert "sssd_loss" in reasons
    monkeypatch.setattr(sys, "argv", ["mae_kernels"])
    runpy.run_module("mae_kernels", run_name="__main__")
    assert capsys.readouterr().out.splitlines() == [
        f"{name:28} {'triton' if reason is None else f'reference ({reason})'}"
        for name, reason in reasons.items()
    ]


@pytest.mark.parametrize("op", mae_kernels.info())
def test_example_in_the_docstring_runs(op: str) -> None:
    function = getattr(mae_kernels, op)
    names = {"torch": torch, **{n: getattr(mae_kernels, n) for n in mae_kernels.__all__}}
    (test,) = doctest.DocTestFinder(recurse=False).find(function, op, globs=names)
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0


SMALL = [s for s in mae_kernels.samples() if s.size == "small" and len(s.gradients) > 1]


@pytest.mark.parametrize("sample", SMALL, ids=str)
def test_one_gradient_alone_equals_that_among_all(sample: mae_kernels.Sample) -> None:
    """Frozen parameters change nothing for the others."""

    def gradients(*names: str) -> tuple[torch.Tensor, ...]:
        draw = mae_kernels.Draw(generator=torch.Generator().manual_seed(0))
        tensors, options = sample.make(draw)
        leaves = [tensors[name].requires_grad_() for name in names]
        with backend("registered"):
            out = sample.function(**tensors, **options)
        first = out if isinstance(out, torch.Tensor) else out[0]
        return torch.autograd.grad(first.sum(), leaves)

    for name, want in zip(sample.gradients, gradients(*sample.gradients), strict=True):
        torch.testing.assert_close(gradients(name)[0], want, rtol=1e-5, atol=1e-7, msg=name)


def test_debug_checks_find_a_repeated_id() -> None:
    ids, width = torch.tensor([[0, 1, 1]]), torch.zeros(4)
    call = functools.partial(
        mae_kernels.restore_tokens, torch.zeros(1, 2, 4), ids, width, torch.zeros(3, 4), prefix=0
    )
    call()
    mae_kernels.debug_checks(True)
    try:
        with pytest.raises(ValueError, match="ids_restore: got an id more than once in one row, n"):
            call()
        mae_kernels.gather_patches(torch.zeros(1, 1, 4, 4), ids, 2)  # a patch may be listed twice
    finally:
        mae_kernels.debug_checks(False)
