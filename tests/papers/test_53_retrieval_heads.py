"""Retrieval heads: share of a needle that a head's largest weights point at while it is copied.

Released code: nightdessert/Retrieval_Head at 3ac171a, retrieval_head_detection.py: the key with the
largest weight of each step counts if it is in the needle and has the token that the step generates,
1 / (tokens of the needle) each time. The paper (section 2) uses the share of the needle's tokens
that were copied, each counted once.
"""

from __future__ import annotations

import doctest

import pytest
import torch
from tensors import draw, every_backend

from tokenmill import policies

CONTEXT, NEEDLE, AT, H, HK, D = 80, 6, 23, 6, 3, 16
STEPS = NEEDLE + 14  # more than are in memory at once


def released(q, k, tokens, answer, begin=AT, end=AT + NEEDLE):
    """Score of one head in the released code; a token counts each time it is copied."""
    score = 0.0
    for step, token in enumerate(answer):
        seen = len(k) - len(answer) + step + 1
        weights = torch.softmax(k[:seen] @ q[step] * D**-0.5, 0)
        i = int(weights.topk(1).indices)
        if begin <= i < end and tokens[i] == token:
            score += 1 / (end - begin)
    return score


@every_backend
def test_score_of_each_head(backend):
    """Head 0 looks at the copied token, head 1 at every second one, head 2 at the needle but one
    token off, head 3 at other places with the same tokens, the other heads anywhere."""
    g = torch.Generator().manual_seed(0)
    k, q = (t.detach() for t in draw(backend, (2, CONTEXT, HK, D), (2, STEPS, H, D)))
    tokens = torch.stack([torch.randperm(200, generator=g)[:CONTEXT] for _ in range(2)])
    tokens[:, 5 : 5 + NEEDLE] = tokens[:, AT : AT + NEEDLE]
    answer = torch.randint(200, 300, (2, STEPS), generator=g)
    first = 7
    answer[:, first : first + NEEDLE] = tokens[:, AT : AT + NEEDLE]
    answer[1, first + 1] = 299  # the second request does not copy this token
    for i in range(NEEDLE):
        step = first + i
        for head, j in ((0, AT + i), (1, AT + i if i % 2 else 0), (2, AT + (i + 1) % NEEDLE),
                        (3, 5 + i)):  # fmt: skip
            q[:, step, head] = 30 * k[:, j, head // (H // HK)]
    want = [
        [released(q[b, :, h], k[b, :, h // (H // HK)], tokens[b], answer[b]) for h in range(H)]
        for b in range(2)
    ]
    got = policies.profile_retrieval_heads(
        q, k, tokens.to(q.device), answer.to(q.device), (AT, AT + NEEDLE), backend=backend
    )
    torch.testing.assert_close(got.cpu(), torch.tensor(want))
    assert want[0][:4] == pytest.approx([1, 0.5, 0, 0])
    assert want[1][:2] == pytest.approx([5 / 6, 2 / 6])


@every_backend
def test_a_token_that_is_copied_twice(backend):
    """A token copied twice counts once; in the released code it counts twice."""
    (k,) = (9 * t.detach() for t in draw(backend, (1, 6, 1, 16)))
    tokens = torch.tensor([[7, 5, 6, 7, 9, 9]], device=k.device)
    answer = torch.tensor([[5, 5, 6]], device=k.device)
    q = k[:, [1, 1, 0]]
    call = (q, k, tokens, answer, (1, 3))
    assert policies.profile_retrieval_heads(*call, backend=backend).tolist() == [[0.5]]
    got = policies.profile_retrieval_heads(*call, every_step=True, backend=backend)
    want = released(q[0, :, 0], k[0, :, 0], tokens[0], answer[0], 1, 3)
    assert got.tolist() == [[want]] == [[1.0]]


def test_heads_of_a_model_of_transformers():
    """Compares queries and keys from watch_attention with the weights of eager attention."""
    transformers = pytest.importorskip("transformers", minversion="5.24")
    integration = pytest.importorskip("tokenmill.integrations.transformers")
    config = transformers.LlamaConfig(
        vocab_size=12, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(12, (1, 30))
    answer, begin, end = ids[:, 21:], 5, 12
    found = {}

    def visit(layer, q, k, scoring):
        found[layer] = policies.profile_retrieval_heads(
            q[:, 20:29], k[:, :29], ids[:, :29], answer, (begin, end), every_step=True,
            scale=scoring["scale"],
        )  # fmt: skip

    with integration.watch_attention(model, visit), torch.no_grad():
        model(ids)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    for layer, p in enumerate(weights):
        want = torch.zeros(4)
        for step in range(9):
            for h in range(4):
                i = int(p[0, h, 20 + step].argmax())
                if begin <= i < end and ids[0, i] == answer[0, step]:
                    want[h] += 1 / (end - begin)
        torch.testing.assert_close(found[layer][0], want)
    assert any(x.sum() > 0 for x in found.values())
    rule = "watch_attention: visit: must be callable; got 3"
    with pytest.raises(RuntimeError, match=rule), integration.watch_attention(model, 3):
        pass


def test_wrong_calls_are_refused():
    q, k = torch.zeros(1, 2, 2, 4), torch.zeros(1, 6, 1, 4)
    ids, answer = torch.zeros(1, 6, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)
    profile, name = policies.profile_retrieval_heads, "policies.profile_retrieval_heads"
    for call, message in (
        ((q, k, ids, answer, (3, 3)), r"needle: must be \(begin, end\) with 0 <= begin < end <= 6"),
        ((q, k, ids, answer, 3), "needle: must be"),
        ((q, k, ids, ids, (1, 3)), r"answer: must have shape \[1, 2\]; got \[1, 6\]"),
        ((q, k, ids.float(), answer, (1, 3)), "tokens: must be int32 or int64; got float32"),
        ((q, k[:, :1], ids, answer, (1, 3)), "k: must have the keys of the 2 steps"),
    ):
        with pytest.raises(RuntimeError, match=f"^tokenmill.{name}: {message}"):
            profile(*call)


def test_examples_of_the_documentation():
    found = doctest.testmod(policies.retrieval)
    assert found.attempted > 0 and found.failed == 0
