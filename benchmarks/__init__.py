"""Speed and memory, measured; see README.md here. Uses mae_kernels and sssd_fast; nothing imports it."""

import os

# Before torch is loaded, as `sssd-fast` does: torch's CPU threads then sleep while they wait for each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
