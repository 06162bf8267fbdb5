"""Benchmarks of mae_kernels and of the trainer; see README.md in this folder.

Nothing imports this package: `sssd-fast bench` starts it from a checkout.
"""
