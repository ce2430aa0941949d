"""
Tests of how good the masks are: balanced loads, found in little time.  test_sdp.py has what they must be.

    python -m pytest -q experiments/test_masks.py
"""

import itertools
import sys
import time
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import model_llama as llama
import model_resnet as resnet
import sdp
from plan import loads
from test_sdp import alone, family, masks_for, subnetwork


@pytest.mark.parametrize("level", ["block", "neuron"])
@pytest.mark.parametrize("blocks,subnets,held", [
    (4, 4, 3), (6, 4, 3), (6, 8, 5), (12, 8, 5), (18, 8, 6), (20, 8, 3), (8, 8, 3)])
def test_equal_blocks_are_dealt_as_evenly_as_whole_numbers_allow(blocks, subnets, held, level):
    branches = {str(b): (b, 4 * subnets, 1.0, 1.0) for b in range(blocks)}
    masks = (sdp.block_masks if level == "block" else sdp.neuron_masks)(branches, subnets, held)
    best = -(-blocks * held // subnets) / (blocks * held / subnets) if level == "block" else 1.0
    assert loads(masks, branches).max() == pytest.approx(best)


@pytest.mark.parametrize("layers,subnets,held", [(4, 4, 2), (4, 4, 1), (8, 8, 5), (8, 8, 3), (2, 4, 3)])
def test_with_the_ends_on_all_the_blocks_between_are_dealt_as_evenly_as_can_be(layers, subnets, held):
    branches = llama.branches(llama.LlamaConfig(num_hidden_layers=layers))
    masks = sdp.ends_masks(branches, subnets, held)
    assert list(masks) == list(branches)
    for name, mask in masks.items():
        block, neurons, *_ = branches[name]
        assert mask.shape == (neurons, subnets)
        assert (mask.sum(1) == (subnets if block in (0, layers - 1) else held)).all()
    assert loads(masks, branches).max() < 1.01              # of the mean worker


def test_a_kind_of_cost_that_is_nowhere_does_not_stop_the_balancing():
    costs = {str(b): (b, 1, 1.0 + 9 * (b % 2)) for b in range(8)}    # cheap and dear blocks in turn
    with_zero = {name: (*branch, 0.0) for name, branch in costs.items()}
    masks = sdp.block_masks(with_zero, 4, 2)
    assert sdp.check_masks(masks, with_zero) == []                   # connected
    assert loads(masks, costs).max() == pytest.approx(1)


def test_neuron_masks_balance_branches_smaller_than_the_number_of_subnets():
    branches = llama.branches(llama.LlamaConfig(num_hidden_layers=6, num_key_value_heads=2))
    for held in range(1, 9):
        masks = sdp.neuron_masks(branches, 8, held)
        load = {b: np.outer(m.sum(0), branches[b][2:]) for b, m in masks.items()}  # [subnets, kinds]
        head = np.array(branches["model.layers.0.self_attn"][2:]) / sum(load.values()).mean(0)
        # never two heads over the mean
        assert (loads(masks, branches).max(0) <= 1 + 2 * head + 1e-9).all()


def best_balance(cost, subnets, held, restarts):
    """Smallest largest load over the mean that a long search finds, over all sets of two blocks at a time."""
    rng = np.random.default_rng(0)
    sets = itertools.combinations(range(subnets), held)
    sets = np.array([[i in chosen for i in range(subnets)] for chosen in sets], float)  # [sets, subnets]
    cost = cost / cost.sum(0) * subnets / held
    best = np.inf
    for _ in range(restarts):
        pick = rng.integers(len(sets), size=len(cost))
        now = np.inf
        better = True
        while better:
            better = False
            for a, b in rng.permutation(list(itertools.combinations(range(len(cost)), 2))):
                others = [i for i in range(len(cost)) if i not in (a, b)]
                load = sum(np.outer(sets[pick[i]], cost[i]) for i in others)
                with_a = load + sets[:, :, None] * cost[a]  # [sets, subnets, kinds]
                tops = (with_a[:, None] + (sets[:, :, None] * cost[b])[None]).max((2, 3))
                if tops.min() < now - 1e-12:
                    now = tops.min()
                    better = True
                    pick[a], pick[b] = np.unravel_index(tops.argmin(), tops.shape)
        best = min(best, now)
    return best


@pytest.mark.parametrize("held", [3, 6])
def test_loads_of_resnet18_are_balanced_within_5_percent_of_the_best(held):
    branches = resnet.branches(resnet.PRESETS["resnet18"])  # 8 blocks: 8 subnets allow each its own set
    best = best_balance(np.array([[n * x for x in loads] for _, n, *loads in branches.values()]), 8, held, 25)
    for seed in range(3):
        masks = sdp.block_masks(branches, 8, held, seed)
        load = {name: np.outer(mask.sum(0), branches[name][2:]) for name, mask in masks.items()}
        load = sum(load.values()) / sum(load.values()).mean(0)  # [subnets, (bytes, FLOPs, activations)]
        assert load.max() <= 1.05 * best
        assert loads(sdp.neuron_masks(branches, 8, held, seed), branches).max() < 1.001


def test_masks_for_64_subnets_and_100_blocks_take_less_than_a_second():
    branches = {str(b): (b, 1, 1.0, 1.0, 1.0) for b in range(100)}
    seconds = []
    for held in (20, 40, 48):
        start = time.process_time()
        sdp.block_masks(branches, 64, held)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1, seconds


@pytest.mark.parametrize("model", ["llama-tiny", "resnet18"])
def test_no_worker_sends_more_than_ddp(model):
    """Blocks of unequal size make that hard: those with least to send refresh the others."""
    config = {**llama.PRESETS, **resnet.PRESETS}[model]
    layout = family(config)[0].layout(config)
    for workers, held, level in (8, 6, "block"), (8, 7, "block"), (8, 7, "neuron"), (4, 1, "block"):
        masks = masks_for(config, workers, held, level)
        ddp = 2 * (workers - 1) / workers * 4 * sum(shape.numel() for _, _, shape in layout.values())
        for rank in range(workers):
            with alone(rank, workers):
                module = subnetwork(config, masks, rank, True)
                for local, slot in sdp.find_slots(module, masks, layout, rank).items():
                    module.get_parameter(local).requires_grad_(slot.trains)
                sent = sdp.SubnetDataParallel(module, masks, layout, True).sent_bytes
            assert sent <= ddp, (held, level, rank)
