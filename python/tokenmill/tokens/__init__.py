"""Tokens chosen, gathered, merged, scattered and pooled."""

__all__: list[str] = []
