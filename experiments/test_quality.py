"""Tests of quality.py: that it measures the method of sdp.py, and that it can be cut off."""

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import quality
import data
import model_llama as llama
import sdp


@pytest.mark.parametrize("row", [
    quality.Row(level="block", held=6),
    quality.Row(level="neuron", held=5),
    quality.Row(level="neuron", held=6, scaled=False),
    quality.Row(level="block", held=3, subnets=4),
    quality.Row(level="block", held=5, ends=True),
    quality.Row(level="neuron", held=4, draw="random"),
], ids=str)
def test_one_dense_pass_is_the_simulation(row):
    """Dense shares no code with sdp.Simulation, which cuts real subnetworks out and runs them one after another."""
    config = quality.config_of(replace(row, layers=3))
    layout, masks = llama.layout(config), quality.masks_of(row, llama.branches(config), 1, 0)
    rng = torch.Generator().manual_seed(0)
    batches = [tuple(torch.randint(256, (2, 2, 16), generator=rng)) for _ in range(8)]

    dense = quality.Dense(config, 8, seed=0)
    dense.use(masks, row.scaled)
    mean = dense.update(batches)

    with torch.device("meta"):
        modules = []
        for subnet in range(row.subnets):
            scales = sdp.branch_scales(masks, subnet) if row.scaled else None
            modules.append(llama.Llama(config, sdp.held_counts(masks, subnet), False, scales))
    value = sdp.fresh(layout, partial(llama.init, config), 0)
    simulation = sdp.Simulation(modules, masks, layout, value, 8)
    total = 0.0
    for worker, batch in enumerate(batches):
        loss = simulation.run(worker, *batch)
        loss.backward()
        total += float(loss.detach())
    simulation.finish()

    assert abs(mean - total / 8) < 1e-5
    for name, p in simulation.params.items():
        error = (dense.parameters[name].grad - p.grad).abs().max() / p.grad.abs().max()
        assert error < 1e-5, name                                    # measured: 1e-6


def test_search_finds_the_best_learning_rate():
    """From wherever the best one lies, and its neighbours are among those tried."""
    for best in range(-4, 5):
        done = {}
        while True:
            found, missing = quality.search(done, 0.004)
            if missing is None:
                break
            done[missing] = abs(round(math.log2(missing / 0.004)) - best)
        assert found == 0.004 * 2.0 ** best
        assert {found / 2, found * 2} <= done.keys()


def test_goes_on_where_it_was_cut_off(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "VAL_SEQUENCES", 8)
    monkeypatch.setitem(quality.FIRST_LR, "llama", 0.03)             # near the best for three updates
    path = tmp_path / "quality.jsonl"
    names = "ddp", "block-6-flops"
    command = [*names, "--updates", "3", "--search-updates", "3", "--seeds", "2", "--results", str(path)]
    quality.main(command)
    whole = path.read_text()
    runs = {(r["row"], r["seed"], r["lr"]): r for r in map(json.loads, whole.splitlines())}
    assert len(runs) == len(whole.splitlines())                      # nothing was done twice
    assert {(name, seed) for name, seed, _ in runs} == {(name, seed) for name in names for seed in (0, 1)}
    steps = {name: r["steps"] for (name, _, _), r in runs.items()}
    assert steps == {"ddp": 3, "block-6-flops": 4}                   # 3 / 0.76
    path.write_text(whole[:-40])                                     # cut off while it wrote its last line
    quality.main(command)
    again = {(r["row"], r["seed"], r["lr"]): r for r in quality.read(path)}
    assert {key: r["val_loss"] for key, r in again.items()} == {key: r["val_loss"] for key, r in runs.items()}
    capsys.readouterr()
    quality.main(command + ["--table"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(names)
    assert all("±" in line and "(2)" in line for line in lines[2:])


@pytest.mark.parametrize("name", ["backward-neuron-6", "block-6-redraw-1-flops", "stochastic-depth-6-flops"])
def test_other_rows_learn(name):
    """Backward masking, masks drawn anew, coins."""
    row = replace(quality.rows()[name], layers=2)
    text = data.load("stdlib", 2, quality.SEQ_LEN, 0)
    text.val_count = 8
    result = quality.train(row, 8, 0, 4e-3, text, print)
    assert result["val_loss"] < 5.2                                  # from log(256) = 5.55; measured: 4.7 to 4.9


def test_resnets_learn(monkeypatch):
    """The loss of the full model, with its own batch-norm statistics, falls below that of a guess, log(10)."""
    monkeypatch.setattr(quality, "CALIBRATION", 1)
    row = replace(quality.rows()["resnet-neuron-6-flops"], held=4)
    images = data.load("shapes", 8, None, 0)
    images.splits = {split: (x[:64], y[:64]) for split, (x, y) in images.splits.items()}
    result = quality.train(row, 12, 0, 0.03, images, print)          # always the same 64 images
    assert result["val_loss"] < 2.2


def test_a_row_that_does_not_exist():
    with pytest.raises(data.UserError, match="no row is called no-such-row"):
        quality.main(["ddp", "no-such-row"])
