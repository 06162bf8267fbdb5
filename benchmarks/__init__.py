"""Benchmarks of mae_kernels and the trainer (README.md here), started by `sssd-fast bench`."""
