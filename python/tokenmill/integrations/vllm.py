"""The attention of vLLM on :func:`tokenmill.attention` over pages and :func:`kv_cache_append`.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins``, and its backend by the name
CUSTOM: ``vllm serve MODEL --attention-backend CUSTOM``. The entry point is in every process of
vLLM, and names a module of its own, ``tokenmill_vllm``: this package is imported where CUSTOM is
asked for.

Written for the signatures of ``vllm.v1.attention.backend`` in vLLM 0.22, and tested with a stand-in
of that module and of the engine: it has not been run inside vLLM yet.
"""

from __future__ import annotations

from tokenmill_vllm import register

__all__ = ["register"]
