"""The `sssd-fast` command, also `python -m sssd_fast`."""

import sys


def main() -> int:
    try:
        from sssd_fast.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("sssd_fast", "mae_kernels")):
            raise
        hint = "install the trainer's packages: pip install 'sssd-fast[train]'"
        print(f"error: the package {error.name} is missing; {hint}", file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
