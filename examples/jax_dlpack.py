"""tokenmill from JAX, without copies: arrays go in and come out through DLPack."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokenmill import dlpack as tm


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 64, 4, 32)) for key in keys)
    out = tm.sigmoid_attention(q, k, v)
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) / jnp.sqrt(32) - jnp.log(64)
    want = jnp.einsum("bhij,bjhd->bihd", jax.nn.sigmoid(scores), v)
    print(f"shape {out.shape}, largest difference from JAX {abs(out - want).max():.1e}")


if __name__ == "__main__":
    main()
