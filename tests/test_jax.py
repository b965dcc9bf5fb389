"""JAX functions give the results of PyTorch, under jit, grad and vmap."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch

import tokenmill as tm

jax = pytest.importorskip("jax")
library = pytest.importorskip("tokenmill.integrations.jax")
jnp = jax.numpy

QKV = [(2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6)]
SAME = [(2, 7, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6)]
CALLS = {
    "attention": (
        QKV,
        {"causal": True, "softcap": 2.0, "return_lse": True, "window": (3, 0)},
        {"bias": (1, 4, 5, 7), "sink": (4,)},
    ),
    "sigmoid_attention": (QKV, {}, {}),
    "linear_attention": (
        SAME,
        {"return_final_state": True},
        {"log_decay": (2, 7, 4), "initial_state": (2, 4, 8, 6)},
    ),
}


def draw(name, dtype="float32"):
    shapes, fixed, others = CALLS[name]
    random = np.random.default_rng(0)
    arrays = [random.standard_normal(shape).astype("float32") for shape in shapes]
    named = {key: random.standard_normal(shape).astype("float32") for key, shape in others.items()}
    if "log_decay" in named:
        named["log_decay"] = -abs(named["log_decay"])
    arrays = [jnp.asarray(x).astype(dtype) for x in arrays]
    return arrays, fixed, {key: jnp.asarray(x) for key, x in named.items()}


def to_torch(x):
    tensor = torch.from_numpy(np.array(x.astype("float32"))).to(getattr(torch, str(x.dtype)))
    return tensor.requires_grad_()


def values(out):
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(name):
    arrays, fixed, named = draw(name)
    function = getattr(library, name)

    def loss(arrays, named):
        out = values(function(*arrays, **named, **fixed))
        return sum((jnp.sin(x) * x).sum() for x in out), out

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, out), grads = both(arrays, named)
    tensors, others = [to_torch(x) for x in arrays], {k: to_torch(x) for k, x in named.items()}
    expected = values(getattr(tm, name)(*tensors, **others, **fixed))
    sum((x.sin() * x).sum() for x in expected).backward()
    for actual, want in zip(out, expected, strict=True):
        assert np.array_equal(np.array(actual), want.detach().numpy())
    for actual, x in zip(grads[0], tensors, strict=True):
        np.testing.assert_allclose(actual, x.grad, rtol=1e-4, atol=1e-5)
    for key, x in others.items():
        np.testing.assert_allclose(grads[1][key], x.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits(dtype):
    arrays, _, _ = draw("attention", dtype)
    tensors = [to_torch(x) for x in arrays]
    out, pull = jax.vjp(lambda *x: library.attention(*x, causal=True), *arrays)
    expected = tm.attention(*tensors, causal=True)
    assert str(out.dtype) == dtype
    assert np.array_equal(np.array(out.astype("float32")), expected.detach().float().numpy())
    grads = pull(jnp.ones_like(out))
    expected.backward(torch.ones_like(expected))
    for actual, x in zip(grads, tensors, strict=True):
        want = x.grad.float().numpy()
        np.testing.assert_array_equal(np.array(actual.astype("float32")), want)


def test_vmap_and_packed_sequences():
    q, k, v = draw("attention")[0]
    over = jax.vmap(lambda q, k, v: library.attention(q[None], k[None], v[None])[0])
    together = library.attention(q, k, v)
    np.testing.assert_allclose(over(q, k, v), together, rtol=1e-5, atol=1e-6)
    ends = [jnp.array([0, n, 2 * n], dtype=jnp.int32) for n in (5, 7)]
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]

    def loss(q):
        return library.attention(
            q, *flat[1:], cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], max_seqlen_q=5,
            max_seqlen_k=7,
        ).sum()  # fmt: skip

    whole = jax.grad(lambda q: library.attention(q, k, v).sum())(q)
    np.testing.assert_allclose(jax.grad(loss)(flat[0]), whole.reshape(-1, 4, 8), atol=1e-6)


def test_topk_select_has_no_gradient():
    scores = jnp.array([[1.0, 3.0, 2.0, 3.0], [0.0, -jnp.inf, jnp.nan, 5.0]])
    indices, counts, found = jax.jit(lambda s: library.topk_select(s, 2, return_values=True))(
        scores
    )
    assert indices.tolist() == [[1, 3], [0, 3]] and counts.tolist() == [2, 2]
    assert found.tolist() == [[3.0, 3.0], [0.0, 5.0]]

    def taken(scores):
        indices, _ = library.topk_select(scores, 2)
        return jnp.take_along_axis(scores, indices, 1).sum()

    grad = jax.grad(taken)(scores[:1])
    assert grad.tolist() == [[0.0, 1.0, 0.0, 1.0]]


def test_arrays_of_numpy_have_the_dtypes_of_jax():
    arrays = draw("attention")[0]
    out = library.attention(*(np.asarray(x, np.float64) for x in arrays))
    assert out.dtype == jnp.float32
    assert np.array_equal(out, library.attention(*arrays))


def test_wrong_arguments_are_refused_while_tracing():
    q, k, v = draw("attention")[0]
    with pytest.raises(RuntimeError, match=r"tokenmill.attention: k: "):
        jax.jit(library.attention)(q, k[:, :, :, :4], v)
    for options, rule in (
        ({"out": q}, r"out: must be None, as arrays are not written"),
        ({"mask": tm.masks.prefix(torch.ones(2).int())}, r"mask: must be an array, a number, a te"),
        ({"bias": np.zeros((1, 1, 5, 7), np.uint8)}, r"bias: must be one of float16, .*; got 'uin"),
    ):
        with pytest.raises(RuntimeError, match=r"tokenmill.integrations.jax.attention: " + rule):
            library.attention(q, k, v, **options)


def test_the_example_runs():
    (example,) = doctest.DocTestFinder(recurse=False).find(library)
    assert doctest.DocTestRunner().run(example).failed == 0
