"""Which keys to attend to."""

from .topk_select import topk_select

__all__ = ["topk_select"]
