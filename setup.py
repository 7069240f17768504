"""What pyproject.toml cannot say: where the packages lie and that CMake builds the extension."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["disco_kernels", "disco_kernels.*"]),
        *find_packages("python", include=["disco", "disco.*"]),
    ],
    package_dir={"disco_kernels": "disco_kernels", "disco": "python/disco"},
    # Named, not found: a leftover extension of an editable install must not get into a wheel.
    include_package_data=False,
    package_data={"disco_kernels": ["py.typed", "*.pyi"], "disco": ["py.typed"]},
    cmake_source_dir=".",
)
