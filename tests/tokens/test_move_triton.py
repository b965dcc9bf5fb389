"""The Triton kernels that gather, scatter, fuse and pool tokens compile for GPUs: they fit, and no
length recompiles."""

from __future__ import annotations

import torch
from triton_compiler import assert_fits

from tokenmill import registry

CASES = ("bfloat16:everything", "float32:plain")
KERNELS = {
    "gather_kernel",
    "places_kernel",
    "scatter_kernel",
    "copy_kernel",
    "fuse_kernel",
    "pool_kernel",
    "scales_kernel",
    "backward_kernel",
}


def call(case, tokens=600, channels=256):
    from tokenmill.triton_kernels.tokens.gather_fuse import gather_fuse, gather_fuse_backward
    from tokenmill.triton_kernels.tokens.gather_tokens import gather_tokens
    from tokenmill.triton_kernels.tokens.local_pool import local_pool, local_pool_backward
    from tokenmill.triton_kernels.tokens.scatter_tokens import scatter_tokens

    dtype, how = case.split(":")
    dtype, everything = getattr(torch, dtype), how == "everything"
    x = torch.zeros(2, tokens, channels, dtype=dtype)
    ids = torch.zeros(2, tokens // 3, dtype=torch.int32)
    y = torch.zeros(*ids.shape, channels, dtype=dtype)
    names = ("gather_tokens", "scatter_tokens", "gather_fuse", "local_pool")
    gather, scatter, fuse, pool = map(registry.get, names)
    maps = torch.zeros(2, tokens // 6, 6, channels, dtype=dtype)
    mask = torch.zeros(maps.shape[:3], dtype=torch.bool) if everything else None

    def run():
        gather_tokens(gather.record(x, ids))
        gather_tokens(gather.record(x, ids[0]))
        scatter_tokens(scatter.record(y, ids, x if everything else tokens))
        a = fuse.record(x, ids, ids, torch.zeros(2, tokens - 1), normalize=everything)
        out, weight_sum = gather_fuse(a)
        gather_fuse_backward(fuse.backward.record(out, out, weight_sum, *a))
        for mode in ("avg", "max"):
            a = pool.record(
                maps, 3, dilation=(1, 2), mode=mode, mask=mask, count_include_pad=everything,
                subtract_input=everything,
            )  # fmt: skip
            local_pool(a)
            local_pool_backward(pool.backward.record(maps, *a))

    return run


def test_kernels_fit(programs):
    assert {p["kernel"] for p in programs} == KERNELS
    for program in programs:
        assert_fits(program)


def test_no_length_compiles_anew(compiles_once):
    compiles_once({"float32:everything": ((6000,), (70014,), (2406,))})
