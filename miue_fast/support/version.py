"""The version of the installed package, from its metadata."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("miue_fast")
except PackageNotFoundError:
    raise ImportError(
        "miue_fast is imported from a checkout that is not installed: run `pip install -e .` in it"
    ) from None
