"""Tests of what teaches: own_model.py, exercises.py, and the snippets of the README."""

import re
import runpy
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import data
import exercises
import own_model
import sdp
from test_sdp import run_on


def masks_of(level, held, n_subnets=4):
    return sdp.MASKS[level](own_model.BRANCHES, n_subnets, held)


# -- own_model.py --------------------------------------------------------------------------------------------

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
    """The oracle is the fused model at full size.  It multiplies the outputs of missing neurons by 0."""
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
    """Backward masking does with one batch on all workers.  At coverage 1 everything does, with any batch."""
    one_batch = held < 4
    dense, losses = own_model.train_dense(5, 4, one_batch)
    model, same = own_model.train_sdp(5, masks_of(level, held), backward, one_batch)
    assert same == pytest.approx(losses, abs=2e-5)
    assert own_model.full_loss(model) == pytest.approx(own_model.full_loss(dense), abs=2e-5)


def test_forward_masking_does_not():
    _, losses = own_model.train_dense(5, 4, one_batch=True)
    _, other = own_model.train_sdp(5, masks_of("neuron", 3), False, one_batch=True)
    assert max(abs(a - b) for a, b in zip(losses, other)) > 1e-3


def _trained(masks, backward):
    model, losses = own_model.train_sdp(5, masks, backward)
    return [*losses, own_model.full_loss(model)]


@pytest.mark.parametrize("level, backward", [("neuron", False), ("block", True)])
def test_real_workers_do_what_the_simulation_does(level, backward):
    masks = masks_of(level, 1, 2)
    assert run_on(2, _trained, masks, backward)[0] == pytest.approx(_trained(masks, backward), abs=2e-5)


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
    (lambda gpt: setattr(gpt.lm_head, "weight", nn.Parameter(gpt.wte.weight.detach().clone())),
     "lm_head.weight is not in the layout"),
])
def test_sdp_refuses(wrong, message):
    gpt = own_model.GPT()
    wrong(gpt)
    with pytest.raises(ValueError, match=message):
        sdp.find_slots(gpt, masks_of("block", 4), own_model.layout(), 0)


# -- exercises.py --------------------------------------------------------------------------------------------

RIGHT = '''
import torch
averages = [4.5, 3, 2, 4]
shares = [76.4, 52.9]
bytes_sent = {"forward": [0, 0.5, 1, 1.5], "backward": [0.75, 1, 1.25, 1.5]}
offsets = (0, 1, 3)
def updates(steps, shared, coverage):
    return int(steps / (shared + coverage * (1 - shared)) + 1e-9)
equal_to_dense = {
    "forward, coverage 1, own batches": True,
    "forward, coverage 3/4, one batch for all": False,
    "backward, coverage 3/4, one batch for all": True,
    "backward, coverage 3/4, own batches": False,
}
def masks(branches, n_subnets, held, seed=0):
    out = {}
    for name, (block, neurons, *_) in branches.items():
        row = torch.zeros(n_subnets, dtype=torch.bool)
        for i in range(held):
            row[(block // 2 * held + i) % n_subnets] = True
        out[name] = (row | (block % 2 == 0)).repeat(neurons, 1)
    return out
def contribution(parts):
    return sum(float((gradient ** 2).sum()) / h for h, gradient in parts)
def all_reduce(grad, mask, groups, rank, send):
    for holders, group in groups.items():
        if rank in holders:
            row = torch.zeros(mask.shape[1], dtype=torch.bool)
            row[list(holders)] = True
            neurons = (mask == row).all(1)
            message = grad[neurons] / len(holders)
            send(message, group)
            grad[neurons] = message
hang = {0: ["01", "02"], 1: ["12", "01"], 2: ["02", "12"]}
'''

WRONG = [
    (1, "averages = [4.5, 3, 2, 3]", "number 4"),
    (1, "averages = [4.5]", "4 numbers"),
    (2, "shares = [75, 50]", "number 1"),
    (3, "bytes_sent = {'forward': [0, 0.5, 1, 1.5], 'backward': [0, 0.5, 1, 1.5]}", "backward: number 1"),
    (4, "offsets = (0, 1, 2)", "gap of 0.352"),
    (1, "averages = ['4.5', 3, 2, 4]", "number 1"),
    (4, "offsets = (0, 4)", "three different"),
    (4, "offsets = (0, 1, 2.5)", "three different"),
    (5, "def updates(steps, shared, coverage): return int(steps / coverage)", r"updates\(250"),
    (5, "def updates(steps, shared, coverage): return round(steps / (shared + coverage * (1 - shared)))",
     r"updates\(100, 0.1, 0.5\) gives 182"),
    (6, "equal_to_dense = {}", "four keys"),
    (6, RIGHT.replace('all": False', 'all": True'), "not right: .'forward, coverage 3/4, one batch"),
    (7, "import sdp\nmasks = sdp.block_masks", "subnets hold block 0"),
    (7, "import sdp\nmasks = sdp.neuron_masks", "different rows"),
    (7, "def masks(branches, n_subnets, held, seed=0): return {}", "not of this model"),
    (8, "def contribution(parts): return sum(float((g ** 2).sum()) for h, g in parts)", "how often does it"),
    (8, "def contribution(parts): pass", "None is not a number"),
    (9, "def all_reduce(grad, mask, groups, rank, send): pass", "has not the averages"),
    (9, RIGHT.replace("message = grad[neurons] / len(holders)", "message = grad[neurons].clone()"),
     "not the averages"),
    (9, RIGHT.replace("groups.items()", "sorted(groups.items(), reverse=rank == 0)"), "it hangs"),
    (9, "def all_reduce(grad, mask, groups, rank, send):\n    send(grad, None)\n"
        "    grad /= mask.sum(1, keepdim=True)\n    grad *= mask[:, rank, None]", "1 messages"),
    (10, "hang = {0: ['01', '02'], 1: ['01', '12'], 2: ['02', '12']}", "does not hang"),
    (10, "hang = {0: ['01'], 1: ['01', '12'], 2: ['02', '12']}", "worker 0"),
    (10, "", "no answer yet"),
]


@pytest.fixture(autouse=True)
def processes_that_are_copies(monkeypatch):
    """Exercise 9 starts four processes.  Here they need not import torch, which takes each some seconds."""
    monkeypatch.setattr(exercises.mp, "spawn", partial(exercises.mp.start_processes, start_method="fork"))
    monkeypatch.setattr(exercises, "PATIENCE", 6)


def check(number, answers, folder):
    (folder / "answers.py").write_text(answers)
    return exercises.check(number, runpy.run_path(folder / "answers.py"))


@pytest.mark.parametrize("number", range(1, 11))
def test_right_answers_pass(number, tmp_path):
    assert check(number, RIGHT, tmp_path) == "right"


@pytest.mark.parametrize("number, answers, missing", WRONG, ids=range(len(WRONG)))
def test_wrong_answers_fail(number, answers, missing, tmp_path):
    said = check(number, answers, tmp_path)
    assert said.startswith("no") and re.search(missing, said), said


def test_exercises_from_the_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def main(*args):
        monkeypatch.setattr(sys, "argv", ["exercises.py", *args])
        return exercises.main(), *capsys.readouterr()

    code, text, _ = main()
    assert code == 0 and all(f"{n}. " in text for n in range(1, 11))
    assert main("11")[::2] == (2, "error: wanted one number from 1 to 10\n")
    code, text, _ = main("1")
    assert code == 1 and f"there is no answers.py in {tmp_path}" in text
    Path("answers.py").write_text(RIGHT)
    code, text, _ = main("1")
    assert code == 0 and text.endswith("\nright\n")


# -- README.md -----------------------------------------------------------------------------------------------

CHECKS = """
parts = []

def remember():
    for moment in "exp_avg", "exp_avg_sq":
        states = [optimizer.state[piece.param][moment] for piece in sync.pieces]
        parts.append({n: t.clone() for n, t in sync.gather(states)})
    parts.append({n: t.clone() for n, t in sync.gather()})

remember()
wire = sync
def same():
    remember()
    for old, new in zip(parts[-6:-3], parts[-3:]):
        assert old.keys() == new.keys() == layout.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)
"""
LAST_CHECKS = """
assert not any(torch.equal(sync.masks[b], wire.masks[b]) for b in branches)
assert optimizer.state[sync.pieces[0].param]["step"] == 15
for branch, mask in wire.masks.items():
    assert mask.float().mean() == (1 if branch.endswith("attn") else 0.5)
"""


def _little_text():
    text = np.frombuffer(Path(sdp.__file__).read_bytes(), np.uint8)
    return {"train": [text], "val": [text]}


def _run_script(path):
    """A script on a worker of the pool, which has its process group already.  -> tensors compared"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "init_process_group", len)               # "gloo", and nothing happens
        patch.setattr(sdp, "MASKS", dict(sdp.MASKS))
        patch.setattr(data, "stdlib_splits", _little_text)
        return len(runpy.run_path(path)["parts"])


@pytest.mark.parametrize("backward", [False, True])
def test_the_snippets_of_the_readme_are_a_script(tmp_path, backward):
    """As they are printed, on four workers, in both regimes.  Only what checks them is added."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE.parent / "README.md").read_text(), re.S)
    mask, use, again = blocks
    assert use.count("backward = False ") == 1
    use = use.replace("backward = False ", f"backward = {backward} ")
    again = again.replace("    train(sync", "    same()\n    train(sync")
    again = again.replace("seed + 5))", "seed + 5))\n    remember()")
    script = tmp_path / "mine.py"
    script.write_text("\n".join([mask, use, CHECKS, again, LAST_CHECKS]))
    assert run_on(4, _run_script, str(script)) == [15] * 4           # 3, and 6 at each redrawing


def test_the_readme_is_short_and_the_test_it_names_exists():
    readme = (HERE.parent / "README.md").read_text()
    name, = re.findall(r"pytest -q test_sdp.py -k (\w+)", readme)
    assert re.search(rf"def test_\w*{name}", (HERE.parent / "test_sdp.py").read_text())
    lines = readme.splitlines()
    assert len(lines) <= 230 and sum(len(line.split()) for line in lines) <= 2500
    assert max(map(len, lines)) <= 120
