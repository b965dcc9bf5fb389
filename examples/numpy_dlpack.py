"""tokenmill from NumPy, without copies: arrays go in and come out through DLPack.

The operators are torch.ops.tokenmill.*; whatever speaks DLPack (NumPy, JAX, CuPy) can call them.
"""

from __future__ import annotations

import numpy as np
import torch

import tokenmill as tm


def sigmoid_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """q [B, Sq, H, D], k and v [B, Sk, Hk, D], float32 -> [B, Sq, H, D]."""
    with torch.inference_mode():
        out = tm.sigmoid_attention(*(torch.from_dlpack(x) for x in (q, k, v)))
    return np.from_dlpack(out)


def main() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 64, 4, 32), dtype=np.float32) for _ in range(3))
    out = sigmoid_attention(q, k, v)
    scores = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(32) - np.log(64)
    want = np.einsum("bhij,bjhd->bihd", 1 / (1 + np.exp(-scores)), v)
    print(f"shape {out.shape}, largest difference from NumPy {abs(out - want).max():.1e}")


if __name__ == "__main__":
    main()
