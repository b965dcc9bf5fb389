"""Operators on tensors that lie on several devices."""

from __future__ import annotations

from .sharding import register_sharding

register_sharding()

__all__ = ["register_sharding"]
