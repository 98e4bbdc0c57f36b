"""`miue-fast`, also `python -m miue_fast`: one command per job."""

from .commands import main

__all__ = ["main"]
