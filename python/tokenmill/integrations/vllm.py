"""The attention of vLLM on :func:`tokenmill.attention` over pages and :func:`kv_cache_append`.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` of this package, and its
backend by the name CUSTOM: ``vllm serve MODEL --attention-backend CUSTOM``. Nothing here imports
vLLM before it calls.

Written for the signatures of ``vllm.v1.attention.backend`` in vLLM 0.22, and tested with a stand-in
of that module and of the engine: it has not been run inside vLLM yet.
"""

from __future__ import annotations

import warnings

from ._needs import needs

__all__ = ["register"]

BACKEND = "tokenmill.integrations._vllm_backend.TokenmillBackend"


def register() -> None:
    """Makes tokenmill the backend CUSTOM of vLLM, in this process.

    vLLM calls it in each of its processes. Where vLLM has no registry of backends, or another
    plugin has taken the name, a warning says so and nothing changes.

    Raises:
        ModuleNotFoundError: without vLLM.
    """
    try:
        import vllm  # noqa: F401
    except ModuleNotFoundError as missing:
        raise needs("vllm", missing) from missing
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        _say(f"the backend needs vLLM 0.22 or later; {error}")
        return
    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != BACKEND:
        _say(f"the backend CUSTOM is taken by {custom.get_path()}")
        return
    register_backend(custom, BACKEND)


def _say(notice: str) -> None:
    warnings.warn(f"tokenmill vllm: {notice}", stacklevel=3)
