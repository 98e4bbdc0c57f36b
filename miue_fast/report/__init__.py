"""The evidence as one command: poisons, victims, defences and analysis of a configuration, kept
cell by cell, told in one report.
"""

from .config import Config, check, load, read
from .pages import render
from .runner import check_jobs, collect, run

__all__ = ["Config", "check", "check_jobs", "collect", "load", "read", "render", "run"]
