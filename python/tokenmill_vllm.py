"""The plugin that registers the backend of :mod:`tokenmill.integrations.vllm` with vLLM.

vLLM calls it in each of its processes, whether the backend is chosen or not. It is outside the
package, whose import loads PyTorch and the kernels: it names the backend's class, and imports
nothing from the package.
"""

from __future__ import annotations

BACKEND = "tokenmill.integrations._vllm_backend.TokenmillBackend"


def register() -> None:
    """Makes tokenmill the backend CUSTOM of vLLM, in this process.

    The backend is only an import path until CUSTOM is requested. If vLLM has no backend registry,
    or another plugin has taken the name, it warns and changes nothing.

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
