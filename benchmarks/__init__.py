"""Speed and memory, measured; see README.md here. Uses mae_kernels and sssd_fast; nothing imports it."""
