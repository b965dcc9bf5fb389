"""The plugin by which vLLM knows the backend of :mod:`tokenmill.integrations.vllm`.

vLLM calls it in each of its processes, chosen or not. It stands outside of the package, whose
import loads PyTorch and the kernels: it names the backend's class, and imports nothing of ours.
"""

from __future__ import annotations

BACKEND = "tokenmill.integrations._vllm_backend.TokenmillBackend"


def register() -> None:
    """Makes tokenmill the backend CUSTOM of vLLM, in this process.

    The backend is a path until vLLM is asked for CUSTOM. Where vLLM has no registry of backends, or
    another plugin has taken the name, a warning says so and nothing changes.

    Raises:
        ModuleNotFoundError: without vLLM.
    """
    try:
        import vllm  # noqa: F401
    except ModuleNotFoundError as missing:
        text = "tokenmill.integrations.vllm needs vllm: pip install 'tokenmill[vllm]'"
        raise ModuleNotFoundError(f"{text}; got {missing}", name=missing.name) from missing
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
    import warnings

    warnings.warn(f"tokenmill vllm: {notice}", stacklevel=3)
