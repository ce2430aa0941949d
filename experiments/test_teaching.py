"""Tests of what teaches: own_model.py, exercises.py, and the snippets of the README."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import own_model
import sdp


def masks_of(level, held, n_subnets=4):
    return sdp.MASKS[level](own_model.BRANCHES, n_subnets, held)


# -- own_model.py ------------------------------------------------------------------------------------------------------

def test_the_split_model_is_the_original():
    original = own_model.first_model()
    for p in original.parameters():                                  # biases begin at 0 or 1: make them count
        nn.init.normal_(p, std=0.2)
    split = own_model.GPT()
    split.load_state_dict(own_model.from_original(original.state_dict()))
    tokens, targets = own_model.batch(0, 0)
    torch.testing.assert_close(split(tokens, targets), original(tokens, targets), rtol=1e-6, atol=1e-6)
    again = own_model.Original()
    own_model.load_into_original(again, dict(split.named_parameters()))
    for name, p in original.state_dict().items():
        assert torch.equal(again.state_dict()[name], p), name


@pytest.mark.parametrize("level", ["block", "neuron"])
def test_a_subnetwork_is_the_original_without_the_other_neurons(level):
    """The oracle is the fused model at full size, in which the outputs of the missing neurons are multiplied by 0."""
    masks, layout = masks_of(level, 3), own_model.layout()
    original = own_model.first_model().double()
    for p in original.parameters():
        nn.init.normal_(p, std=0.2)
    weights = own_model.from_original(original.state_dict())
    tokens = own_model.batch(0, 0)[0]
    for subnet in range(4):
        module = own_model.GPT(sdp.held_counts(masks, subnet), scales=sdp.branch_scales(masks, subnet))
        sdp.materialize(module, masks, layout, subnet, weights.__getitem__)
        dense = own_model.Original().double()
        dense.load_state_dict(original.state_dict())
        for i, block in enumerate(dense.h):
            for branch, proj in ("attn", block.attn_proj), ("mlp", block.mlp_proj):
                mask = masks[f"h.{i}.{branch}"]
                held = mask[:, subnet].repeat_interleave(proj.in_features // len(mask))
                proj.weight.data *= held * 4 / 3                     # 1/C
                proj.bias.data *= held.any()
        torch.testing.assert_close(module(tokens), dense(tokens))


@pytest.mark.parametrize("level, backward, held", [
    ("block", True, 2), ("neuron", True, 3), ("block", False, 4), ("neuron", False, 4),
])
def test_it_trains_as_its_dense_self(level, backward, held):
    """Backward masking does with one batch on all workers, and everything at coverage 1 does with any batches."""
    one_batch = held < 4
    dense, losses = own_model.train_dense(5, 4, one_batch)
    model, same = own_model.train_sdp(5, masks_of(level, held), backward, one_batch)
    assert same == pytest.approx(losses, abs=2e-5)
    assert own_model.full_loss(model) == pytest.approx(own_model.full_loss(dense), abs=2e-5)


def test_forward_masking_does_not():
    _, losses = own_model.train_dense(5, 4, one_batch=True)
    _, other = own_model.train_sdp(5, masks_of("neuron", 3), False, one_batch=True)
    assert max(abs(a - b) for a, b in zip(losses, other)) > 1e-3


@pytest.mark.parametrize("level, backward", [("neuron", False), ("block", True)])
def test_real_workers_do_what_the_simulation_does(level, backward, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import own_model, sdp, torch
torch.distributed.init_process_group("gloo")
masks = sdp.MASKS[{level!r}](own_model.BRANCHES, 2, 1)
model, losses = own_model.train_sdp(5, masks, {backward})
if torch.distributed.get_rank() == 0:
    print(*losses, own_model.full_loss(model))
torch.distributed.destroy_process_group()
""")
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script],
                         capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout
    model, losses = own_model.train_sdp(5, masks_of(level, 1, 2), backward)
    assert [float(x) for x in out.split()] == pytest.approx([*losses, own_model.full_loss(model)], abs=2e-5)


def test_check_layout():
    tokens = own_model.batch(0, 0)[0]
    layout = own_model.layout()
    own_model.check_layout(own_model.GPT(), own_model.BRANCHES, layout, tokens)
    for name, wrong in {
        "h.1.attn.part.q.bias": ("h.1.attn", None, (32,)),           # not cut
        "h.1.attn.part.k.weight": (None, None, (32, 32)),            # not in the branch
        "h.1.attn.part.proj.weight": ("h.1.attn", 0, (32, 32)),      # the wrong dimension
    }.items():
        with pytest.raises(ValueError, match="layout of branch h.1.attn is not true"):
            own_model.check_layout(own_model.GPT(), own_model.BRANCHES, {**layout, name: wrong}, tokens)


def test_check_layout_finds_a_fused_qkv():
    branches = {f"h.{i}": (i, 4) for i in range(4)}                  # four heads a block
    dims = {"c_attn.weight": 0, "c_attn.bias": 0, "attn_proj.weight": 1}
    original = own_model.Original()
    layout = {}
    for name, p in original.named_parameters():
        leaf = ".".join(name.split(".")[2:])
        layout[name] = (name[:3], dims[leaf], p.shape) if leaf in dims else (None, None, p.shape)
    state = {name: p.clone() for name, p in original.state_dict().items()}
    with pytest.raises(ValueError, match="layout of branch h.0 is not true"):
        own_model.check_layout(original, branches, layout, own_model.batch(0, 0)[0])
    for name, p in original.state_dict().items():
        assert torch.equal(p, state[name])                           # it was left as it was


@pytest.mark.parametrize("wrong, message", [
    (lambda gpt: gpt.register_buffer("constant", torch.zeros(1)), "persistent=False"),
    (lambda gpt: setattr(gpt.lm_head, "weight", nn.Parameter(gpt.wte.weight.detach().clone())), "lm_head.weight is not in the layout"),
])
def test_sdp_refuses(wrong, message):
    gpt = own_model.GPT()
    wrong(gpt)
    with pytest.raises(ValueError, match=message):
        sdp.slots(gpt, masks_of("block", 4), own_model.layout(), 0)
