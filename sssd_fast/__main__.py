"""`python -m sssd_fast`, the same as the `sssd-fast` command."""

import sys

from sssd_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
