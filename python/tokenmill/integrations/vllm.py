"""A vLLM attention backend on :func:`tokenmill.attention` over pages and :func:`kv_cache_append`.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins``, and its backend by the name
CUSTOM: ``vllm serve MODEL --attention-backend CUSTOM``. The entry point runs in every process of
vLLM, and names a separate module, ``tokenmill_vllm``: this package is only imported where CUSTOM is
requested.

Written for the signatures of ``vllm.v1.attention.backend`` in vLLM 0.22, and tested with a stand-in
of that module and of the engine: it has not been run inside vLLM yet.
"""

from __future__ import annotations

from tokenmill_vllm import register

__all__ = ["register"]
