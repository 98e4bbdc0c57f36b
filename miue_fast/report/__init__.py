"""The evidence as one command: poisons, victims, defences and analysis of a configuration, kept cell by cell, told in one report."""

from .config import Config, check, load, read
from .pages import render
from .runner import collect, run

__all__ = ["Config", "check", "collect", "load", "read", "render", "run"]
