"""`python -m mae_kernels`: which implementation of each op would run here. `--lint`: compile all kernels and judge them."""

from __future__ import annotations

import argparse

from . import info


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mae_kernels", description=__doc__)
    parser.add_argument(
        "--lint",
        action="store_true",
        help="compile every kernel for every architecture; no GPU needed",
    )
    if parser.parse_args().lint:
        from .lint import table

        print(table())
        return
    for op, reason in info().items():
        print(f"{op:28} {'triton' if reason is None else f'reference ({reason})'}")


if __name__ == "__main__":
    main()
