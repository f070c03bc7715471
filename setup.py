"""What pyproject.toml cannot say beside a search for packages: `configs` becomes `jaxseg.configs`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["jaxseg*"]), "jaxseg.configs"],
    package_dir={"jaxseg.configs": "configs"},
)
