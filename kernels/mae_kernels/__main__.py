"""`python -m mae_kernels`: which implementation of each op would run here."""

from __future__ import annotations

from . import info

if __name__ == "__main__":
    for name, implementation in info().items():
        print(f"{name:28} {implementation}")
