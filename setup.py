"""All metadata is in pyproject.toml; this file holds the one thing that is decided at build time: the packages."""

from setuptools import setup

# The kernels lie beside the package and are installed inside it: `triton_kernels` is taken as a top-level name.
setup(package_dir={"jaguar": "jaguar", "jaguar.triton_kernels": "triton_kernels"})
