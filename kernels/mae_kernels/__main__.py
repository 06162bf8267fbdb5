"""`python -m mae_kernels`: which implementation of each op runs on this machine, and why."""

from __future__ import annotations

from . import info


def main() -> None:
    for op, reason in info().items():
        print(f"{op:28} {'triton' if reason is None else f'reference ({reason})'}")


if __name__ == "__main__":
    main()
