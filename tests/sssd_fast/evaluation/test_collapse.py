"""The monitor of a collapsing distillation against values known by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sssd_fast.evaluation.collapse import (
    collapse_warning,
    effective_rank,
    evenly,
    information,
    mean_entropy,
    monitor,
)


def test_effective_rank_of_matrices_with_known_singular_values() -> None:
    rotation, _ = torch.linalg.qr(torch.randn(7, 7))
    assert effective_rank(rotation) == pytest.approx(7, rel=1e-5)
    constant = torch.randn(1, 5).expand(20, 5)
    assert effective_rank(constant) == pytest.approx(1, abs=1e-4)
    two = torch.diag(torch.tensor([3.0, 1.0]))
    want = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(two) == pytest.approx(want)
    assert math.isnan(effective_rank(torch.full((2, 2), math.nan)))


def test_rows_are_evenly_spaced() -> None:
    x = torch.arange(10.0)[:, None]
    assert evenly(x, 4).flatten().tolist() == [0, 3, 6, 9]
    assert torch.equal(evenly(x, 10), x) and torch.equal(evenly(x, 99), x)


def test_entropy_and_information_of_known_assignments() -> None:
    one, each = torch.eye(8)[:1].expand(16, 8), torch.eye(8).repeat(2, 1)
    uniform = torch.full((16, 8), 1 / 8)
    half = torch.eye(8)[[0, 1] * 8]
    for assigned, entropy, shared in (
        (one, 0, 0),
        (each, 1, 1),
        (uniform, 1, 0),
        (half, 1 / 3, 1 / 3),
    ):
        assert mean_entropy(assigned) == pytest.approx(entropy, abs=1e-6)
        assert information(assigned) == pytest.approx(shared, abs=1e-6)


def test_warning_names_what_collapsed() -> None:
    student, teacher = torch.randn(40, 16), torch.ones(40, 16)
    assigned = torch.eye(16)[:1].expand(40, 16)
    found = monitor(student, teacher, assigned)
    assert found["rank_student"] > 10 and found["rank_teacher"] == pytest.approx(1, abs=1e-4)
    warning = collapse_warning(found) or ""
    assert "teacher's outputs" in warning and "one prototype" in warning
    assert "student's" not in warning
    assert collapse_warning(monitor(student, torch.randn(40, 16))) is None
