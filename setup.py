"""Which packages a wheel holds; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

# A package named benchmarks would shadow those of other projects: it is installed inside
# sssd_fast, where `sssd-fast bench` finds it. kernels/ is a source root, not a package.
BENCH = "sssd_fast._bench.benchmarks"

setup(
    packages=[
        *find_packages(include=["sssd_fast*"]),
        *find_packages("kernels", include=["mae_kernels*"]),
        BENCH,
    ],
    package_dir={"mae_kernels": "kernels/mae_kernels", BENCH: "benchmarks"},
)
