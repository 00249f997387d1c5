"""Reinforcement learning from human feedback as pure JAX functions."""

__version__ = "0.1.0"
