"""The shortest correct PyTorch text of every op: fallback, oracle and documentation. Imports torch
and nothing else.
"""
