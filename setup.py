from setuptools import setup
setup()  # the metadata is declared once, in pyproject.toml
