"""A Hugging Face model whose sequence is sharded over four ranks gives the logits, loss and
gradients of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import tokenmill.distributed as tmd

LENGTH = 70


def model_of(window):
    from transformers import MistralConfig, MistralForCausalLM

    from tokenmill.integrations.transformers import register

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=61, sliding_window=window, attention_dropout=0.0,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    model.set_attn_implementation(register())
    return model


def train_on_a_rank(window, order, schedule):
    draw = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 61, (2, LENGTH + 1), generator=draw)
    inputs, labels, places = ids[:, :-1], ids[:, 1:], torch.arange(LENGTH)[None]

    def loss_of(logits, labels):
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="sum"
        )

    model = model_of(window)
    logits = model(inputs, use_cache=False).logits
    loss = loss_of(logits, labels)
    loss.backward()
    want = {name: p.grad for name, p in model.named_parameters()}

    model = model_of(window)
    cut = [tmd.shard_sequence(x, order=order) for x in (inputs, labels, places)]
    with tmd.context_parallel(order=order, schedule=schedule, length=LENGTH):
        found = model(cut[0], position_ids=cut[2], use_cache=False).logits
    part = loss_of(found, cut[1])
    part.backward()
    total = part.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(found, tmd.shard_sequence(logits, order=order), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total, loss.detach(), rtol=1e-6, atol=0)
    for name, p in model.named_parameters():
        dist.all_reduce(p.grad)
        torch.testing.assert_close(p.grad, want[name], rtol=1e-4, atol=1e-4)


def masks_are_refused_on_a_rank():
    model = model_of(None)
    ids = torch.zeros(1, 8, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with tmd.context_parallel(), pytest.raises(RuntimeError, match="attention_mask: must be None"):
        model(ids, attention_mask=mask)


@pytest.mark.parametrize(
    ("window", "order", "schedule"), [(None, "zigzag", "ring"), (9, "contiguous", "allgather")]
)
def test_a_model_of_one_process(ranks, window, order, schedule):
    pytest.importorskip("transformers")
    ranks(4).run(train_on_a_rank, window, order, schedule)


def test_masks_are_refused(ranks):
    pytest.importorskip("transformers")
    ranks(2).run(masks_are_refused_on_a_rank)


def test_the_example_repeats_the_losses_of_one_process():
    """This includes decoding from a cache sharded over all ranks."""
    import re
    import subprocess
    import sys
    from pathlib import Path

    example = Path(__file__).parents[2] / "examples" / "long_context_parallel.py"
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")
    done = subprocess.run(
        [sys.executable, *launch, example, "--quick"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.e+-]+)$", done.stdout, re.M)
    assert [row[0] for row in rows] == ["1", "10"] * 2
    assert all(float(row[3]) < 1e-5 for row in rows)
    assert float(rows[1][1]) < float(rows[0][1]) and float(rows[3][1]) < float(rows[2][1])
    assert "the same alone: True" in done.stdout
