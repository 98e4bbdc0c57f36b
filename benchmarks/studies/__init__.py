"""Experiments behind single decisions."""
