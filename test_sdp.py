"""
Tests of Subnetwork Data Parallelism, against oracles that share no code with it: transformers' LlamaForCausalLM and
torchvision's ResNet with explicit 0/1 masks on full-size weights, torch's DistributedDataParallel, a naive all-reduce,
torch's fake process group.

    python -m pytest -q
"""

import functools
import gc
import hashlib
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import warnings
import weakref
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model_llama as llama
import model_resnet as resnet
import sdp
import train

torch.set_num_threads(1)
HERE = Path(__file__).parent
with warnings.catch_warnings():                                      # pytest would like to know the mark from a file of its own
    warnings.simplefilter("ignore")
    slow = pytest.mark.slow
only_when_asked = pytest.mark.skipif("slow" not in sys.argv, reason="a measurement of many minutes: python -m pytest -m slow")

# Grouped-query attention (3 KV heads, 6 query heads) and sizes that no S divides evenly
TINY = llama.LlamaConfig(vocab_size=61, hidden_size=24, intermediate_size=21, num_hidden_layers=3, num_attention_heads=6,
                         num_key_value_heads=3, max_position_embeddings=16)
# Eight blocks, three of them with a convolution in the shortcut, and widths that no S divides evenly
TINY_RESNET = resnet.ResNetConfig(num_classes=5, image_size=16, widths=(6, 7, 9, 10))


# ---------------------------------------------------------------------------------------------------------------------
# Real processes: eight workers are started once; a test runs a function on the first few of them, over gloo
# ---------------------------------------------------------------------------------------------------------------------

def _worker(pipe):
    torch.set_num_threads(1)
    while True:
        try:
            rank, world, store, function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:                                             # the tests are over
            return
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world,
                                    timeout=timedelta(seconds=60))
            result = True, function(*args)
            if dist.is_initialized():                                # gloo: whoever still connects fails when a peer ends the group
                dist.barrier()
        except BaseException:
            result = False, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            gc.collect()                                             # or the groups live on in cycles, each with its threads
        pipe.send_bytes(pickle.dumps(result))


@pytest.fixture(scope="session")
def run_on():
    """run_on(world, function, *args) -> [function's result on rank 0, on rank 1, ...]"""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_sdp"])
    pipes = []
    for _ in range(8):
        mine, its = context.Pipe()
        context.Process(target=_worker, args=(its,), daemon=True).start()
        pipes.append(mine)

    def run(world, function, *args):
        with tempfile.TemporaryDirectory() as folder:
            for rank, pipe in enumerate(pipes[:world]):
                pipe.send_bytes(pickle.dumps((rank, world, f"{folder}/store", function, args)))
            results = []
            for pipe in pipes[:world]:
                results.append(pickle.loads(pipe.recv_bytes()) if pipe.poll(100) else (False, "hangs"))
        failed = [f"rank {rank}: {what}" for rank, (fine, what) in enumerate(results) if not fine]
        assert not failed, "\n".join(failed)
        return [what for _, what in results]
    return run


def family(config):
    return (resnet, resnet.ResNet) if isinstance(config, resnet.ResNetConfig) else (llama, llama.Llama)


def masks_for(config, subnets, held, level, seed=0):
    make = sdp.block_masks if level == "block" else sdp.neuron_masks
    return make(family(config)[0].branches(config), subnets, held, seed)


def subnetwork(config, masks, subnet, backward):
    with torch.device("meta"):
        return family(config)[1](config, sdp.held_counts(masks, subnet), backward)


def tokens_for(step, worker, config=TINY, batch=2, length=9):
    rng = np.random.default_rng([step, worker])
    x = torch.from_numpy(rng.integers(config.vocab_size, size=(batch, length + 1)))
    return x[:, :-1], x[:, 1:]


def images_for(step, worker, config=TINY_RESNET, batch=4):
    rng = np.random.default_rng([step, worker])
    y = torch.from_numpy(rng.integers(config.num_classes, size=batch))
    return torch.from_numpy(rng.normal(size=(batch, 3, 16, 16))) + y.view(-1, 1, 1, 1) / 5, y       # float64


def batch_for(config):
    return images_for if family(config)[0] is resnet else tokens_for


def optimizer_for(config, params):
    if family(config)[0] is resnet:
        return torch.optim.SGD(params, lr=0.03, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1)


def first_value(config, seed=3):
    """LLaMA in float32.  ResNet in float64: batch norm over few images lets rounding grow fast in float32."""
    kind = family(config)[0]
    value = sdp.fresh(kind.layout(config), functools.partial(kind.init, config), seed)
    return value if kind is llama else lambda name: value(name).double()


def make_sync(config, masks, backward, simulated=None, **options):
    """The distributed sync of this rank or, with simulated=W, all W workers in one process."""
    layout, value = family(config)[0].layout(config), first_value(config)
    if simulated:
        subnets = next(iter(masks.values())).shape[1]
        modules = [subnetwork(config, masks, s, backward) for s in range(subnets)]
        return sdp.Simulation(modules, masks, layout, value, simulated)
    subnet = dist.get_rank() % next(iter(masks.values())).shape[1]
    module = sdp.materialize(subnetwork(config, masks, subnet, backward), masks, layout, subnet, value)
    return sdp.SubnetDataParallel(module, masks, layout, backward, **options)


def train_steps(config, masks, backward, simulated=None, steps=20, accum=1, batches=None, clip=0.5, **options):
    """-> losses [steps, this process's workers], gradient norms [steps], the full model at the end, bytes sent in an update"""
    sync, loss_of = make_sync(config, masks, backward, simulated, **options), family(config)[0].loss
    optimizer, batches = optimizer_for(config, sync.trained().values()), batches or batch_for(config)
    losses, norms = [], []
    for step in range(steps):
        losses.append([])
        for worker in sync.workers:
            for micro in range(accum):
                x, y = batches(step * accum + micro, worker)
                with sync.no_sync() if micro < accum - 1 else nullcontext():
                    loss = loss_of(sync.run(worker, x), y)
                    (loss / accum).backward()
                losses[-1].append(loss.item())
        sync.finish()
        norms.append(float(sync.clip_grad_norm(clip)))
        optimizer.step()
        optimizer.zero_grad()
        sync.refresh()
    if not simulated:
        sync.check_replicas()
    full = {name: t.clone() for name, t in sync.gather(sync.trained())}
    return np.array(losses), np.array(norms), full, sync.sent_bytes


class DenseLlama(nn.Module):
    """transformers' LLaMA; and what a subnet holds of each of its parameters, case by case, from the names alone."""

    def __init__(self, config):
        from transformers import LlamaConfig, LlamaForCausalLM
        super().__init__()
        self.config, self.net = config, LlamaForCausalLM(LlamaConfig(**asdict(config), attn_implementation="eager")).float()

    def forward(self, x):
        return self.net(x).logits.transpose(1, 2)                    # [B, V, T], as cross_entropy wants it

    def held(self, name, masks, s):
        """1 where subnet s holds the entry of parameter `name`; broadcasts to its shape."""
        c, group = self.config, self.config.num_attention_heads // self.config.num_key_value_heads
        if "layers" not in name:
            return torch.ones(())
        layer = name.split(".")[2]
        heads, units = masks[f"model.layers.{layer}.self_attn"][:, s], masks[f"model.layers.{layer}.mlp"][:, s]
        if "input_layernorm" in name:
            return heads.any()
        if "post_attention_layernorm" in name:
            return units.any()
        if "q_proj" in name:
            return heads.repeat_interleave(group * c.head_dim)[:, None]
        if "k_proj" in name or "v_proj" in name:
            return heads.repeat_interleave(c.head_dim)[:, None]
        if "o_proj" in name:
            return heads.repeat_interleave(group * c.head_dim)[None, :]
        return units[None, :] if "down_proj" in name else units[:, None]


class DenseResNet(nn.Module):
    """The same of a ResNet made of torchvision's blocks, with batch norm by the worker's own batch."""

    def __init__(self, config):
        from torchvision.models.resnet import BasicBlock
        super().__init__()
        norm, planes = functools.partial(nn.BatchNorm2d, track_running_stats=False), config.widths[0]
        net = {"conv1": nn.Conv2d(3, planes, 3, 1, 1, bias=False), "bn1": norm(planes), "relu": nn.ReLU()}
        for i, wide in enumerate(config.widths):
            shortcut = nn.Sequential(nn.Conv2d(planes, wide, 1, 2, bias=False), norm(wide)) if i else None
            net[f"layer{i + 1}"] = nn.Sequential(BasicBlock(planes, wide, 2 if i else 1, shortcut, norm_layer=norm),
                                                 BasicBlock(wide, wide, norm_layer=norm))
            planes = wide
        self.net = nn.ModuleDict({**net, "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(planes, config.num_classes)})

    def forward(self, x):
        for module in self.net.values():
            x = module(x)
        return x

    def held(self, name, masks, s):
        block = ".".join(name.split(".")[:2])
        if block not in masks or "downsample" in name:
            return torch.ones(())
        mine = masks[block][:, s]
        return {"conv1": mine[:, None, None, None], "bn1": mine, "conv2": mine[None, :, None, None], "bn2": mine.any()}[name.split(".")[2]]


def dense_model(config):
    return DenseResNet(config) if family(config)[0] is resnet else DenseLlama(config)


def dense_masked_model(config, masks, workers, backward, steps=20, accum=1, batches=None, clip=0.5):
    """The oracle: another library's model at full size; worker i sees weights times its 0/1 mask; gradients are summed over
    workers and divided by counts.  Backward masking: all weights are seen, the masked ones without a gradient."""
    batches, model, value = batches or batch_for(config), dense_model(config), first_value(config)
    weights = {name.removeprefix("net."): nn.Parameter(value(name.removeprefix("net."))) for name, _ in model.named_parameters()}
    subnets = next(iter(masks.values())).shape[1]
    masked = [{name: torch.ones_like(w) * model.held(name, masks, s) for name, w in weights.items()} for s in range(subnets)]
    optimizer = optimizer_for(config, weights.values())
    losses, norms = [], []
    for step in range(steps):
        losses.append([])
        for worker in range(workers):
            m = masked[worker % subnets]
            for micro in range(accum):
                x, y = batches(step * accum + micro, worker)
                seen = {f"net.{n}": w * m[n] + (w * (1 - m[n])).detach() * backward for n, w in weights.items()}
                loss = nn.functional.cross_entropy(functional_call(model, seen, (x,)), y)
                (loss / accum).backward()
                losses[-1].append(loss.item())
        for name, w in weights.items():
            w.grad /= sum(masked[worker % subnets][name] for worker in range(workers))
        norms.append(float(nn.utils.clip_grad_norm_(weights.values(), clip)))
        optimizer.step()
        optimizer.zero_grad()
    return np.array(losses), np.array(norms), {n: w.detach() for n, w in weights.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------

def random_branches(rng, blocks):
    """Blocks of one to three branches with unequal neurons and unequal loads of three kinds."""
    return {f"{b}.{i}": (b, int(rng.integers(1, 40)), *rng.uniform(0.5, 5, 3)) for b in range(blocks)
            for i in range(rng.integers(1, 4))}


@pytest.mark.parametrize("level", ["block", "neuron"])
def test_masks_have_exactly_k_holders_few_sets_and_one_component(level):
    rng = np.random.default_rng(0)
    for trial in range(15):
        subnets = int(rng.integers(1, 12))
        held, blocks = int(rng.integers(1, subnets + 1)), int(rng.integers(1, 15))
        branches = random_branches(rng, blocks)
        make = sdp.block_masks if level == "block" else sdp.neuron_masks
        masks = make(branches, subnets, held, seed=trial)
        assert list(masks) == list(branches)
        for name, mask in masks.items():
            assert mask.shape == (branches[name][1], subnets) and mask.dtype == torch.bool
            assert (mask.sum(1) == held).all()
            if level == "block":
                assert all((m == mask[0]).all() for b, m in masks.items() if branches[b][0] == branches[name][0])
            else:                                                    # holder sets get equal parts of every branch
                sizes = mask.unique(dim=0, return_counts=True)[1]
                assert sizes.max() - sizes.min() <= 1
        rows = {tuple(row.tolist()) for mask in masks.values() for row in mask}
        assert len(rows) <= subnets
        items = blocks if level == "block" else sum(b[1] for b in branches.values())
        parts = components([set(np.flatnonzero(row)) for row in rows], subnets)
        assert parts == 1 or items * (held - 1) < subnets - 1, (trial, subnets, held, items)
        again = make(branches, subnets, held, seed=trial)
        assert all(torch.equal(masks[b], again[b]) for b in masks)


def components(sets, subnets):
    """Union-find, to be independent of the eigenvalues in sdp.py."""
    parent = list(range(subnets))

    def root(i):
        return i if parent[i] == i else root(parent[i])
    for s in sets:
        first, *others = s
        for i in others:
            parent[root(i)] = root(first)
    return len({root(i) for i in range(subnets)})


@pytest.mark.parametrize("level", ["block", "neuron"])
@pytest.mark.parametrize("blocks,subnets,held", [(4, 4, 3), (6, 4, 3), (6, 8, 5), (12, 8, 5), (18, 8, 6), (20, 8, 3), (8, 8, 3)])
def test_equal_blocks_are_dealt_as_evenly_as_whole_numbers_allow(blocks, subnets, held, level):
    branches = {str(b): (b, 4 * subnets, 1.0, 1.0) for b in range(blocks)}
    masks = (sdp.block_masks if level == "block" else sdp.neuron_masks)(branches, subnets, held)
    best = -(-blocks * held // subnets) / (blocks * held / subnets) if level == "block" else 1.0
    assert sdp.loads(masks, branches).max() == pytest.approx(best)


def test_neuron_masks_balance_branches_smaller_than_the_number_of_subnets():
    branches = llama.branches(llama.LlamaConfig(num_hidden_layers=6, num_key_value_heads=2))
    for held in range(1, 9):
        masks = sdp.neuron_masks(branches, 8, held)
        load = {b: np.outer(m.sum(0), branches[b][2:]) for b, m in masks.items()}        # [subnets, kinds]
        head = np.array(branches["model.layers.0.self_attn"][2:]) / sum(load.values()).mean(0)
        assert (sdp.loads(masks, branches).max(0) <= 1 + head + 1e-9).all()                     # never a whole head over the mean


def test_spectral_gap_of_known_masks():
    def translates(base):
        return np.array([[(j - i) % 8 in base for j in range(8)] for i in range(8)])
    assert sdp.spectral_gap(translates({0, 1, 2}), np.ones(8)) == (pytest.approx(0.352, abs=5e-4), 1)
    assert sdp.spectral_gap(translates({0, 1, 3}), np.ones(8)) == (pytest.approx(0.667, abs=5e-4), 1)
    assert sdp.spectral_gap(translates({0, 4}), np.ones(8)) == (0, 4)
    # The walk's transition matrix, written as the random walk it is
    rng = np.random.default_rng(1)
    rows, weight = rng.random((9, 5)) < 0.6, rng.integers(1, 9, 9)
    rows[:, 0] = True
    walk = (rows * weight[:, None] / (rows * weight[:, None]).sum(0)).T @ (rows / rows.sum(1, keepdims=True))
    assert sdp.spectral_gap(rows, weight)[0] == pytest.approx(1 - sorted(np.linalg.eigvals(walk).real)[-2])
    # Our search finds the best gap known for this case
    branches = {str(b): (b, 1, 1.0) for b in range(8)}
    assert sdp.spectral_gap(*sdp.rows_of(sdp.block_masks(branches, 8, 3)))[0] > 0.66


def best_balance(cost, subnets, held, restarts):
    """Smallest largest load over the mean that a long search finds: for each pair of blocks, all pairs of holder sets."""
    rng, sets = np.random.default_rng(0), itertools.combinations(range(subnets), held)
    sets = np.array([[i in chosen for i in range(subnets)] for chosen in sets], float)             # [sets, subnets]
    cost, best = cost / cost.sum(0) * subnets / held, np.inf
    for _ in range(restarts):
        pick, now, better = rng.integers(len(sets), size=len(cost)), np.inf, True
        while better:
            better = False
            for a, b in rng.permutation(list(itertools.combinations(range(len(cost)), 2))):
                others = sum(np.outer(sets[p], c) for i, (p, c) in enumerate(zip(pick, cost)) if i not in (a, b))
                tops = (others + (sets[:, :, None] * cost[a])[:, None] + (sets[:, :, None] * cost[b])[None]).max((2, 3))
                if tops.min() < now - 1e-12:
                    now, better = tops.min(), True
                    pick[a], pick[b] = np.unravel_index(tops.argmin(), tops.shape)
        best = min(best, now)
    return best


@pytest.mark.parametrize("held", [3, 4, 5, 6])
def test_loads_of_resnet18_are_balanced_within_5_percent_of_the_best(held):
    branches = resnet.branches(resnet.PRESETS["resnet18"])           # 8 blocks, so 8 subnets allow each block its own set
    best = best_balance(np.array([[n * x for x in loads] for _, n, *loads in branches.values()]), 8, held, 25)
    for seed in range(3):
        masks = sdp.block_masks(branches, 8, held, seed)
        load = {name: np.outer(mask.sum(0), branches[name][2:]) for name, mask in masks.items()}
        load = sum(load.values()) / sum(load.values()).mean(0)       # [subnets, (bytes, FLOPs, activations)]
        assert load.max() <= 1.05 * best
        assert sdp.loads(sdp.neuron_masks(branches, 8, held, seed), branches).max() < 1.001


def test_masks_for_64_subnets_and_100_blocks_take_less_than_a_second():
    branches = {str(b): (b, 1, 1.0, 1.0, 1.0) for b in range(100)}
    seconds = []
    for held in (20, 40, 48):
        start = time.process_time()
        sdp.block_masks(branches, 64, held)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1, seconds


def test_bad_masks_are_refused_and_odd_ones_warned_of():
    branches = llama.branches(TINY)
    good = sdp.neuron_masks(branches, 4, 3)
    assert sdp.check_masks(good, branches) == []
    name = next(iter(good))
    for bad, message in [(good[name].clone().fill_(False), "no subnet holds neuron 0"), (good[name][:-1], "wanted bool"),
                         (good[name].float(), "wanted bool"), (good[name][:, :3], "wanted bool")]:
        with pytest.raises(ValueError, match=message):
            sdp.check_masks({**good, name: bad}, branches)
    with pytest.raises(ValueError, match="not of this model"):
        sdp.check_masks({b: m for b, m in good.items() if b != name}, branches)
    uneven = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert any("from 1 to 4 holders" in w for w in sdp.check_masks({**good, name: uneven}, branches))
    assert any("process groups" in w for w in sdp.check_masks({**good, name: uneven}, branches))
    assert any("separate groups" in w for w in sdp.check_masks(sdp.neuron_masks(branches, 4, 1), branches))
    unheld = {**good, name: good[name].clone().fill_(False)}         # refused wherever masks come in
    with pytest.raises(ValueError, match="no subnet holds neuron 0"):
        make_sync(TINY, unheld, True, simulated=4)
    for held in (0, 5):
        with pytest.raises(ValueError, match="held must be"):
            sdp.block_masks(branches, 4, held)


def test_the_mask_function_in_the_readme_works():
    code = (HERE / "README.md").read_text().split("```python\n")[1].split("```")[0]
    space = {"torch": torch}
    exec(code, space)
    masks = space["my_masks"](llama.branches(TINY), 4, 3, 0)
    assert sdp.check_masks(masks, llama.branches(TINY)) == [] and all((m.sum(1) == 3).all() for m in masks.values())


def test_picture_shows_the_masks():
    branches = {"a": (0, 2, 1.0), "b": (1, 2, 1.0)}
    whole = torch.tensor([[True, False], [True, False]])
    assert sdp.picture({"a": whole, "b": ~whole}, branches) == "  block 0  ██ ··\n  block 1  ·· ██"
    assert sdp.picture({"a": whole, "b": torch.eye(2).bool()}, branches).splitlines()[1] == "  b        █· ·█"


# ---------------------------------------------------------------------------------------------------------------------
# Exactness, over real processes
# ---------------------------------------------------------------------------------------------------------------------

def _worked_example():
    mine = [[1, 1, 1, 0], [0, 1, 1, 1]][dist.get_rank()]
    grad = torch.tensor([[2.0, 4, 1, 0], [0, 6, 3, 8]])[dist.get_rank()]
    return sdp.naive_masked_average(grad, torch.tensor(mine, dtype=torch.bool)).tolist()


def test_worked_example_at_the_top_of_sdp(run_on):
    assert run_on(2, _worked_example) == [[2, 5, 2, 8]] * 2


ALL = [(level, masking) for level in ("block", "neuron") for masking in ("forward", "backward")]
CASES = [  # subnets, held, workers, accumulation steps: all four combinations, then two that differ in both
    *[(case, *both) for case in [(2, 1, 2, 1), (3, 2, 3, 2), (4, 3, 4, 1), (2, 1, 4, 2)] for both in ALL],
    *[(case, *both) for case in [(1, 1, 1, 1), (2, 2, 2, 1), (3, 1, 6, 1)] for both in (ALL[0], ALL[3])],
    *[(case, *both) for case in [(4, 1, 4, 1), (8, 5, 8, 1)] for both in (ALL[1], ALL[2])],
]


RESNET_CASES = [
    *[((3, 2, 3, 2), *both) for both in ALL],
    *[(case, *both) for case in [(2, 1, 4, 1), (1, 1, 1, 1)] for both in (ALL[0], ALL[3])],
    *[(case, *both) for case in [(4, 1, 4, 1), (8, 5, 8, 1)] for both in (ALL[1], ALL[2])],
]


@pytest.mark.parametrize("config,case,level,masking", [(TINY, *c) for c in CASES] + [(TINY_RESNET, *c) for c in RESNET_CASES],
                         ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)) if isinstance(v, tuple) else
                         family(v)[1].__name__)
def test_distributed_equals_simulated_equals_dense_masked_model(run_on, config, case, level, masking):
    subnets, held, workers, accum = case
    masks, backward = masks_for(config, subnets, held, level), masking == "backward"
    ranks = run_on(workers, functools.partial(train_steps, accum=accum, bucket_bytes=10000), config, masks, backward)
    losses = np.concatenate([r[0] for r in ranks], axis=1)
    simulated = train_steps(config, masks, backward, workers, accum=accum)
    dense = dense_masked_model(config, masks, workers, backward, accum=accum)
    assert dense[1].min() > 0.5                                      # clipping was at work in every step
    for other in (simulated, dense):
        np.testing.assert_allclose(losses, other[0], rtol=1e-5)
        np.testing.assert_allclose(ranks[0][1], other[1], rtol=1e-4)
        for name, w in other[2].items():
            torch.testing.assert_close(ranks[0][2][name], w, rtol=0, atol=2e-4 if config is TINY else 1e-6, msg=name)
    for rank in ranks:                                               # the same full model and norms, bit for bit
        assert (rank[1] == ranks[0][1]).all() and all(torch.equal(w, ranks[0][2][n]) for n, w in rank[2].items())
    first, start = ranks[0][2], first_value(config)
    assert max((first[n] - start(n)).abs().max() for n in first) > 0.02      # and it did train


def _ddp_losses(config, steps):
    """torch's DistributedDataParallel on another library's model, the same batches and optimizer; bytes from its buckets."""
    model, value, sent = dense_model(config), first_value(config), [0]
    model.to(value(next(iter(family(config)[0].layout(config)))).dtype)
    model.net.load_state_dict({name: value(name) for name in model.net.state_dict()})
    ddp = nn.parallel.DistributedDataParallel(model)

    def hook(_, bucket):
        sent[0] += bucket.buffer().nbytes * 2 * (dist.get_world_size() - 1) / dist.get_world_size()
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
        return work.then(lambda f: f.value()[0])
    ddp.register_comm_hook(None, hook)
    optimizer, losses = optimizer_for(config, model.parameters()), []
    for step in range(steps):
        x, y = batch_for(config)(step, dist.get_rank())
        loss = nn.functional.cross_entropy(ddp(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, sent[0] / steps


@pytest.mark.parametrize("config", [TINY, TINY_RESNET], ids=["Llama", "ResNet"])
@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_coverage_1_is_torch_ddp_with_the_same_bytes(run_on, config, masking):
    ddp = run_on(4, _ddp_losses, config, 20)
    for level in ("block", "neuron"):
        ours = run_on(4, train_steps, config, masks_for(config, 4, 4, level), masking == "backward")
        np.testing.assert_allclose(np.concatenate([r[0] for r in ours], 1), np.array([r[0] for r in ddp]).T, rtol=1e-5)
        assert [r[3] for r in ours] == [pytest.approx(r[1], rel=1e-12) for r in ddp]


@pytest.mark.parametrize("config", [TINY, TINY_RESNET], ids=["Llama", "ResNet"])
@pytest.mark.parametrize("level", ["block", "neuron"])
def test_backward_masking_on_one_batch_is_unmasked_training_whatever_the_masks(run_on, config, level):
    same = functools.partial(_same_batch, config)
    whole = dense_masked_model(config, masks_for(config, 1, 1, level), 1, False, batches=same)
    for subnets, held in (4, 1), (4, 3), (3, 2):
        ranks = run_on(subnets, functools.partial(train_steps, batches=same), config, masks_for(config, subnets, held, level), True)
        for rank in ranks:
            np.testing.assert_allclose(rank[0], whole[0], rtol=1e-5)
            np.testing.assert_allclose(rank[1], whole[1], rtol=1e-4)     # the full gradient's norm, before clipping


def _same_batch(config, step, worker):
    return batch_for(config)(step, 0)


def odd_masks(config=TINY):
    """A user's own masks: unequal holders, more sets than subnets, a worker with nothing of a branch, or of any block."""
    rng = np.random.default_rng(5)
    masks = {name: torch.from_numpy(rng.random((neurons, 4)) < 0.5)
             for name, (_, neurons, *_) in family(config)[0].branches(config).items()}
    for mask in masks.values():
        mask[:, 3] = False                                           # worker 3 holds only what is shared
        mask[~mask.any(1), 1] = True
    masks[list(masks)[2]][:] = torch.tensor([True, False, False, False])
    return masks


@pytest.mark.parametrize("config", [TINY, TINY_RESNET], ids=["Llama", "ResNet"])
@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_masks_of_the_users_own_are_exact_too(run_on, config, masking):
    masks, backward = odd_masks(config), masking == "backward"
    assert len(sdp.check_masks(masks, family(config)[0].branches(config))) == 3      # uneven, many groups, worker 3 apart
    ranks = run_on(4, train_steps, config, masks, backward)
    dense = dense_masked_model(config, masks, 4, backward)
    np.testing.assert_allclose(np.concatenate([r[0] for r in ranks], 1), dense[0], rtol=1e-5)
    np.testing.assert_allclose(ranks[0][1], dense[1], rtol=1e-4)


def _perturb(masks, backward):
    sync = make_sync(TINY, masks, backward)
    sync.check_replicas()
    caught = []
    for local, slot in sync.slots.items():
        p = sync.params[local]
        if dist.get_rank() == 1:                                     # one bit of one number of one replica
            with torch.no_grad():
                p.view(torch.int32).view(-1)[-1] ^= 1
        dist.barrier()
        names = [None] * dist.get_world_size()
        dist.all_gather_object(names, (local, slot.full))
        try:
            sync.check_replicas()
        except RuntimeError as e:
            caught.append(names[1][1] in str(e))
        if dist.get_rank() == 1:
            with torch.no_grad():
                p.view(torch.int32).view(-1)[-1] ^= 1
    sync.check_replicas()
    return len(caught), sum(caught), len(sync.slots)


def test_checksums_find_one_flipped_bit_in_one_replica(run_on):
    for backward in (False, True):
        masks = {name: torch.ones(neurons, 2, dtype=torch.bool) for name, (_, neurons, *_) in llama.branches(TINY).items()}
        masks["model.layers.0.mlp"][:, 1] = ~backward                # backward: worker 1 runs this branch frozen
        assert run_on(2, _perturb, masks, backward) == [(3 + 9 * 3,) * 3] * 2


def _dropped(masks):
    sync = make_sync(TINY, masks, True)
    llama.loss(sync.run(0, tokens_for(0, 0)[0]), tokens_for(0, 0)[1]).backward()
    sync.finish()
    model, sync = weakref.ref(sync.module), weakref.ref(sync)
    gc.collect()
    return sync() is None, model() is None


def test_a_dropped_sync_is_freed_with_its_model(run_on):
    assert run_on(2, _dropped, masks_for(TINY, 2, 1, "neuron")) == [(True, True)] * 2


def _groups_while_open_and_closed(masks):
    alive = [len(dist.distributed_c10d._world.pg_map)]
    sync = make_sync(TINY, masks, True)
    alive.append(len(dist.distributed_c10d._world.pg_map))
    sync.close()
    return [*alive, len(dist.distributed_c10d._world.pg_map)]


def test_close_ends_the_process_groups(run_on):
    for before, between, after in run_on(4, _groups_while_open_and_closed, masks_for(TINY, 4, 3, "neuron")):
        assert before == after == 1 < between


def _own_mlp(held, masks):
    """SDP on a model this project has never seen, used as the docstring says; two optimizers take turns."""
    class Net(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.inside, self.stem, self.head = nn.Module(), nn.Linear(3, 4), nn.Linear(4, 2)
            self.inside.up, self.inside.down = nn.Linear(4, n), nn.Linear(n, 4, bias=False)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.inside.down(self.inside.up(x).relu()))
    layout = {"stem.weight": (None, None, torch.Size([4, 3])), "stem.bias": (None, None, torch.Size([4])),
              "inside.up.weight": ("inside", 0, torch.Size([6, 4])), "inside.up.bias": ("inside", 0, torch.Size([6])),
              "inside.down.weight": ("inside", 1, torch.Size([4, 6])),
              "head.weight": (None, None, torch.Size([2, 4])), "head.bias": (None, None, torch.Size([2]))}
    value = sdp.fresh(layout, lambda name, t, g: t.normal_(generator=g), 0)
    rank = dist.get_rank()
    with torch.device("meta"):
        net = Net(held[rank])
    sync = sdp.SubnetDataParallel(sdp.materialize(net, masks, layout, rank, value), masks, layout)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(rank))
    net.zero_grad()                                                  # plain zero_grad between backward and backward
    net(x).square().mean().backward()
    sync.finish()
    full = {n: g.clone() for n, g in sync.gather({n: p.grad for n, p in sync.trained().items()})}
    # The formula, with full-size tensors and nothing from sdp
    mine = masks["inside"][:, rank]
    w = {n: value(n).requires_grad_() for n in layout}
    h = x @ w["stem.weight"].T + w["stem.bias"]
    u = ((h @ w["inside.up.weight"].T + w["inside.up.bias"]) * mine).relu()
    ((h + u @ w["inside.down.weight"].T) @ w["head.weight"].T + w["head.bias"]).square().mean().backward()
    count = masks["inside"].sum(1)
    for n, p in w.items():
        dist.all_reduce(p.grad)
        p.grad /= {0: dist.get_world_size(), 1: count[:, None] if "up.w" in n else count}["inside" in n]
        torch.testing.assert_close(full[n], p.grad, rtol=1e-5, atol=1e-6)
    return True


def test_a_model_of_the_users_own(run_on):
    masks = {"inside": torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 1], [1, 0, 1]], dtype=torch.bool)}
    assert all(run_on(3, _own_mlp, sdp_counts := masks["inside"].sum(0).tolist(), masks)), sdp_counts


def _block_that_is_never_called(masks, arrive):
    """Backward masking of a model in which `inside` is a mere container, so that no hook of it can wait for frozen weights."""
    class Net(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.inside, self.inside.rest = nn.Module(), nn.Module()
            for part, n in (self.inside, n), (self.inside.rest, 6 - n):
                part.up, part.down = nn.Linear(4, n, bias=False), nn.Linear(n, 4, bias=False)

        def forward(self, x):
            return x + sum(part.down(part.up(x)) for part in (self.inside, self.inside.rest))
    layout = {"inside.up.weight": ("inside", 0, torch.Size([6, 4])), "inside.down.weight": ("inside", 1, torch.Size([4, 6]))}
    rank = dist.get_rank()
    with torch.device("meta"):
        net = Net(int(masks["inside"][:, rank].sum()))
    sdp.materialize(net, masks, layout, rank, sdp.fresh(layout, lambda name, t, g: t.normal_(generator=g), 0))
    sync = sdp.SubnetDataParallel(net, masks, layout, backward=True)
    optimizer = torch.optim.SGD(sync.trained().values(), lr=0.1)
    for step in range(2):
        if arrive:
            sync.arrive()
        net(torch.randn(5, 4, generator=torch.Generator().manual_seed(rank))).square().mean().backward()
        try:
            sync.finish()
        except RuntimeError as e:
            return step, str(e)
        optimizer.step()
        optimizer.zero_grad()
        sync.refresh()
    sync.arrive()
    for full, weight in sync.gather(sync.params):
        assert torch.equal(net.get_parameter(full.replace("inside.", "inside.rest.")), sdp.cut(weight, sync.slots[full.replace("inside.", "inside.rest.")]))


def test_frozen_weights_are_never_used_before_they_have_arrived(run_on):
    masks = {"inside": torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1], [0, 1], [1, 1]], dtype=torch.bool)}
    for step, message in run_on(2, _block_that_is_never_called, masks, False):
        assert step == 1 and "was used before it had arrived" in message
    assert run_on(2, _block_that_is_never_called, masks, True) == [None, None]


def _messages_of_a_refresh_before_and_after_the_forward_pass(masks):
    sync, (x, y) = make_sync(TINY, masks, True), tokens_for(0, 0)
    llama.loss(sync.run(0, x), y).backward()
    sync.finish()
    sync.refresh()
    before = len(sync._coming)
    sync.run(0, x)
    return before, len(sync._coming)


def test_after_the_forward_pass_nothing_of_a_refresh_is_in_memory(run_on):
    masks = masks_for(TINY, 4, 3, "block")                           # 3 blocks: one worker holds all of them, and waits for none
    assert any(all(sdp.held_counts(masks, s).values()) for s in range(4))
    counts = run_on(4, _messages_of_a_refresh_before_and_after_the_forward_pass, masks)
    assert sum(before for before, _ in counts) > 0 and all(after == 0 for _, after in counts), counts


def test_fused_adamw_rounds_alike_wherever_a_neuron_lies():
    """What make_optimizer relies on: in tensors of whole vectors a neuron's place does not matter."""
    torch.manual_seed(0)
    for turn in range(50):
        n, cols, first = int(torch.randint(2, 200, ())), 16 * int(torch.randint(1, 9, ())), int(torch.randint(0, 2, ()))
        whole, grads = torch.randn(n, cols), torch.randn(3, n, cols)

        def trained(rows):                                           # rows along dimension 1 in every second turn
            way = (lambda t: t[rows].t().contiguous()) if turn % 2 else (lambda t: t[rows].contiguous())
            p = nn.Parameter(way(whole))
            optimizer = train.make_optimizer([p], 1e-3, False)
            assert optimizer.defaults["fused"]
            for g in grads:
                p.grad = way(g)
                optimizer.step()
            return p.detach().t() if turn % 2 else p.detach()
        rows = slice(n // 3 + first, None)
        assert torch.equal(trained(slice(None))[rows], trained(rows))
    assert not train.make_optimizer([nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(17))], 1e-3, False).defaults["fused"]


# ---------------------------------------------------------------------------------------------------------------------
# Real savings
# ---------------------------------------------------------------------------------------------------------------------

BIG = llama.LlamaConfig(vocab_size=50, hidden_size=80, intermediate_size=112, num_hidden_layers=4, num_attention_heads=8,
                        num_key_value_heads=4, max_position_embeddings=32)


class SizesCreated(TorchDispatchMode):
    """Records the element count of every tensor an operation returns."""
    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.shapes.add(tuple(t.shape))
        return out


BIG_RESNET = resnet.ResNetConfig(num_classes=5, image_size=16, widths=(12, 20, 28, 36))


def saved_bytes(module, loss_of, x, y):
    """Bytes of the distinct storages autograd saves for the backward pass, weights left out."""
    weights, saved = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(module(x), y)
    kept = sum(n for n, _ in saved.values())
    loss.backward()
    return kept


def _sizes(config, masks, backward):
    sync, loss_of = make_sync(config, masks, backward), family(config)[0].loss
    optimizer = torch.optim.AdamW(sync.trained().values(), lr=1e-3)
    x, y = batch_for(config)(0, 0, config)
    with SizesCreated() as created:
        loss_of(sync.run(0, x), y).backward()
        sync.finish()
        sync.clip_grad_norm(1.0)
        optimizer.step()
        sync.refresh()
    params = sum(p.numel() for p in sync.params.values())
    grads = sum(p.grad.numel() for p in sync.params.values() if p.grad is not None)
    state = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())
    optimizer.zero_grad()
    return params, grads, state, created.shapes, saved_bytes(sync.module, loss_of, x, y)


@pytest.mark.parametrize("config", [BIG, BIG_RESNET], ids=["Llama", "ResNet"])
@pytest.mark.parametrize("level", ["block", "neuron"])
def test_a_worker_has_its_subnetwork_s_size(run_on, config, level):
    kind, Model = family(config)
    masks, layout, branches = masks_for(config, 4, 3, level), kind.layout(config), kind.branches(config)
    full = sum(shape.numel() for _, _, shape in layout.values())
    x, y = batch_for(config)(0, 0, config)

    def saved_by(held):
        model = Model(config, held).to(first_value(config)(next(iter(layout))).dtype)
        for p in model.parameters():
            nn.init.ones_(p)
        return saved_bytes(model, kind.loss, x, y)
    all_saved = saved_by({name: neurons for name, (_, neurons, *_) in branches.items()})

    def held(s):                                                     # by the masks alone
        total = 0
        for branch, dim, shape in layout.values():
            part = 1.0 if branch is None else masks[branch][:, s].float().mean() if dim is not None else masks[branch][:, s].any()
            total += round(shape.numel() * float(part))
        return total

    for s, (params, grads, state, created, saved) in enumerate(run_on(4, _sizes, config, masks, False)):
        assert params == grads == held(s) and state == 2 * held(s)
        branch_shapes = {tuple(shape) for branch, dim, shape in layout.values() if dim is not None and len(shape) > 1}
        if level == "neuron":                                        # nothing of a full branch parameter's size, ever
            assert not branch_shapes & created
        assert saved == saved_by(sdp.held_counts(masks, s)) < all_saved      # the residual stream stays whole
    for s, (params, grads, state, created, saved) in enumerate(run_on(4, _sizes, config, masks, True)):
        assert params == full and grads == held(s) and state == 2 * held(s)
        if kind is llama:     # no input is saved for a frozen weight: down_proj's, [B, T, units], is needed for nothing else
            frozen = sum(int((~masks[f"model.layers.{i}.mlp"][:, s]).sum()) for i in range(4))
            assert saved <= all_saved - frozen * x.numel() * 4
        else:                 # nor for a frozen convolution: conv2's is [B, n, side, side].  held + rest may cost a sum
            frozen = sum(int((~masks[name][:, s]).sum()) * side ** 2 for name, (_, _, _, side) in resnet.blocks(config).items())
            assert saved <= all_saved - frozen * len(x) * 8 + 8 * 2 * 2 * sum(n for _, n, *_ in branches.values())


# ---------------------------------------------------------------------------------------------------------------------
# Synchronisation: order, bytes, overlap
# ---------------------------------------------------------------------------------------------------------------------

def replay(masks, backward, rank, workers, bucket_bytes, monkeypatch, config=TINY):
    """One step of one rank on torch's fake process group -> its collectives [(ranks, kind, elements, root)], its sync."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    calls, everyone = [], tuple(range(workers))

    def ranks(group):
        return everyone if group in (None, dist.group.WORLD) else tuple(dist.get_process_group_ranks(group))
    dist.init_process_group("fake", rank=rank, world_size=workers, store=FakeStore())
    try:
        real_reduce, real_broadcast, real_group, groups = dist.all_reduce, dist.broadcast, dist.new_group, [dist.group.WORLD]
        with monkeypatch.context() as m:
            m.setattr(dist, "new_group", lambda *a, **k: (groups.append(a), real_group(*a, **k))[1])
            sync = make_sync(config, masks, backward, bucket_bytes=bucket_bytes)
            m.setattr(dist, "all_reduce", lambda t, op=dist.ReduceOp.SUM, group=None, async_op=False: (
                calls.append((ranks(group), "reduce", t.numel(), None)), real_reduce(t, op, group, async_op))[1])
            m.setattr(dist, "broadcast", lambda t, src, group=None, async_op=False: (
                calls.append((ranks(group), "broadcast", t.numel(), src)), real_broadcast(t, src, group, async_op))[1])
            x, y = tokens_for(0, rank, config)
            llama.loss(sync.run(rank, x), y).backward()
            sync.finish()
            sync.refresh()
        return calls, sync.sent_bytes, len(groups)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("masking", ["forward", "backward"])
@pytest.mark.parametrize("subnets,held,workers,level", [(4, 3, 4, "neuron"), (8, 5, 16, "block"), (8, 3, 64, "neuron"), (0, 0, 4, "odd")])
def test_every_pair_of_ranks_agrees_on_its_collectives_and_bytes_are_optimal(subnets, held, workers, level, masking, monkeypatch):
    masks = masks_for(TINY, subnets, held, level) if subnets else odd_masks()
    subnets, backward = next(iter(masks.values())).shape[1], masking == "backward"
    runs = [replay(masks, backward, rank, workers, 3000, monkeypatch) for rank in range(workers)]
    for a in range(workers):
        for b in range(a):
            shared = [[call for call in runs[r][0] if a in call[0] and b in call[0]] for r in (a, b)]
            assert shared[0] == shared[1], (a, b)
        assert all(a in call[0] for call in runs[a][0])              # nobody calls a collective of others
    # Bytes, from the calls: 2 (h-1)/h per byte of an all-reduce, (n-1)/n of a broadcast
    for calls, sent, groups in runs:
        issued = sum(4 * n * (2 if kind == "reduce" else 1) * (len(who) - 1) / len(who) for who, kind, n, _ in calls)
        assert sent == pytest.approx(issued, rel=1e-12)
        assert level == "odd" or groups <= 2 * subnets + 1
    # and from the masks: the optimum derived in sdp.py
    world, replicas, total, ddp = workers, workers // subnets, 0, 0
    for branch, dim, shape in llama.layout(TINY).values():
        size = 4 * shape.numel()
        ddp += size * 2 * (world - 1) / world * world
        if branch is None:
            total += size * 2 * (world - 1)
        elif dim is None:                                            # the norms: over the world where no group fits
            who = masks[branch].any(0)
            fits = any((row == who).all() for m in masks.values() for row in m)
            total += size * (2 * (int(who.sum()) * replicas - 1) if fits else 2 * (world - 1))
            total += backward * size * ((world - int(who.sum()) * replicas) if fits else (world - 1) * (not who.all()))
        else:
            for row in masks[branch]:
                h = int(row.sum()) * replicas
                total += size / len(masks[branch]) * (2 * (h - 1) + backward * (world - h))
    assert sum(sent for _, sent, _ in runs) == pytest.approx(total, rel=1e-9)
    if level == "neuron":                                            # on average over workers never above DDP's
        assert total <= ddp
        assert max(sent for _, sent, _ in runs) <= ddp / world * 1.02


@pytest.mark.parametrize("model", ["llama-tiny", "llama-1b", "resnet18"])
def test_no_worker_sends_more_than_ddp(model):
    """Backward masking: the roots of refreshes are those who have less to send.  Blocks of unequal size make that hard."""
    config = {**llama.PRESETS, **resnet.PRESETS}[model]
    for workers, held, level in (8, 6, "block"), (8, 7, "block"), (8, 7, "neuron"), (4, 1, "block"), (16, 7, "block"):
        subnets = min(workers, 8)
        args = train.parse(["--model", model, "--subnets", str(subnets), "--coverage", f"{held}/{subnets}", "--level", level, "--masking", "backward"])
        design, ddp = train.Design(args, config), 2 * (workers - 1) / workers * 4 * sum(
            shape.numel() for _, _, shape in family(config)[0].layout(config).values())
        for rank in range(workers):
            with train.alone(rank, workers):
                assert design.wrap(design.model(rank % subnets)).sent_bytes <= ddp, (workers, held, level, rank)


@pytest.mark.parametrize("level", ["block", "neuron"])
def test_refreshes_stay_on_one_host_and_no_worker_sends_two(level, monkeypatch):
    config = replace(TINY, num_hidden_layers=4)
    masks, roots = masks_for(config, 4, 3, level), set()
    for rank in range(4):
        calls = [(who, root) for who, kind, _, root in replay(masks, True, rank, 4, 2**20, monkeypatch, config)[0] if kind == "broadcast"]
        assert {who[0] // 2 for who, _ in calls} == {who[-1] // 2 for who, _ in calls} == {rank // 2}     # hosts of two ranks
        roots |= {root for _, root in calls if root == rank}
    assert len(roots) == len(sdp.holder_sets(masks)[0])


def test_1024_workers_need_no_more_groups_than_8(monkeypatch):
    masks = masks_for(TINY, 8, 6, "block")
    start = time.process_time()
    groups = replay(masks, True, 1000, 1024, 25 * 2**20, monkeypatch)[2]
    assert groups == replay(masks, True, 0, 8, 25 * 2**20, monkeypatch)[2] <= 17
    assert time.process_time() - start < 30


@pytest.mark.parametrize("level", ["block", "neuron"])
def test_buckets_are_full_but_towards_the_end(level, monkeypatch):
    """One set of holders has `full` bytes in the first window; what no backward pass hides, each set's last bucket, is short."""
    config = replace(TINY, num_hidden_layers=40)
    masks, layout = masks_for(config, 4, 3, level), llama.layout(config)
    largest = 4 * max(shape.numel() for branch, _, shape in layout.values() if branch)
    full = 16 * largest
    calls = [(who, 4 * n) for who, kind, n, _ in replay(masks, False, 0, 4, full, monkeypatch, config)[0] if len(who) == 3]
    sizes = {group: [size for who, size in calls if who == group] for group, _ in calls}
    assert len(sizes) == 3 and full <= max(s[0] for s in sizes.values())
    for s in sizes.values():
        assert max(s) < full + largest and s[-1] <= full / 4 + largest
        assert len(s) <= sum(s) / full + 4                           # and few: 4 MiB throughout would be four times as many


def test_all_reduces_start_while_backward_still_runs(monkeypatch):
    from torch.testing._internal.distributed.fake_pg import FakeStore
    masks, missing = masks_for(TINY, 4, 3, "block"), []
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        sync, real = make_sync(TINY, masks, False, bucket_bytes=3000), dist.all_reduce
        monkeypatch.setattr(dist, "all_reduce", lambda *a, **k: (
            missing.append(sum(p.grad is None for p in sync.trained().values())), real(*a, **k))[1])
        x, y = tokens_for(0, 0)
        llama.loss(sync.run(0, x), y).backward()
        assert missing == sorted(missing, reverse=True) and missing[0] > len(sync.params) / 2 and missing[-1] == 0
        count = len(missing)
        sync.finish()
        assert len(missing) == count                                 # every bucket left during backward
        grads = [p.grad for p in sync.trained().values()]            # and the gradients lie in the buckets
        assert len({g.untyped_storage().data_ptr() for g in grads}) == count
        with sync.no_sync():
            llama.loss(sync.run(0, x), y).backward()
        assert len(missing) == count
        llama.loss(sync.run(0, x), y).backward()
        with pytest.raises(RuntimeError, match="put all but the last one under no_sync"):
            llama.loss(sync.run(0, x), y).backward()
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Initialisation, the full model, checkpoints
# ---------------------------------------------------------------------------------------------------------------------

def _start(masks, backward):
    sync = make_sync(TINY, masks, backward)
    full = {name: t.clone() for name, t in sync.gather(sync.params if not backward else sync.trained())}
    with torch.device("meta"):
        model = llama.Llama(TINY)
    inputs = [tokens_for(s, 0)[0] for s in range(3)] if dist.get_rank() == 0 else [tokens_for(9, 9)[0]]
    return full, list(sdp.stream(sync, model, inputs))


@pytest.mark.parametrize("masking", ["forward", "backward"])
@pytest.mark.parametrize("level", ["block", "neuron"])
def test_the_full_model_starts_the_same_everywhere_and_streams_as_an_ordinary_one(run_on, level, masking):
    value = first_value(TINY)
    model = llama.Llama(TINY)
    model.load_state_dict({name: value(name) for name in llama.layout(TINY)})
    for subnets, held, workers in (1, 1, 1), (2, 1, 4), (3, 2, 3), (4, 4, 4):
        for full, outputs in run_on(workers, _start, masks_for(TINY, subnets, held, level), masking == "backward"):
            assert full.keys() == set(llama.layout(TINY)) and all(torch.equal(t, value(n)) for n, t in full.items())
        outputs = run_on(workers, _start, masks_for(TINY, subnets, held, level), masking == "backward")[0][1]
        for step, logits in enumerate(outputs):
            torch.testing.assert_close(logits, model(tokens_for(step, 0)[0]))


def test_init_is_a_function_of_seed_and_name():
    a, b, c = first_value(TINY, 0), first_value(TINY, 0), first_value(TINY, 1)
    names = [n for n in llama.layout(TINY) if "norm" not in n]
    assert all(torch.equal(a(n), b(n)) and not torch.equal(a(n), c(n)) for n in names)
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(a(first), a(second)) and a(first).std() == pytest.approx(0.02, rel=0.2)


# ---------------------------------------------------------------------------------------------------------------------
# Batch norm
# ---------------------------------------------------------------------------------------------------------------------

def test_activations_that_a_worker_of_resnet18_keeps_are_as_the_readme_says():
    config, (x, y) = resnet.PRESETS["resnet18"], (torch.randn(1, 3, 32, 32), torch.tensor([3]))
    full = {name: neurons for name, (_, neurons, *_) in resnet.branches(config).items()}

    def kept(part, backward=False):
        module = resnet.ResNet(config, {name: round(n * part) for name, n in full.items()}, backward)
        for name, p in module.named_parameters():
            p.requires_grad_(".rest." not in name)
        return saved_bytes(module, resnet.loss, x, y)
    whole = kept(1)
    assert whole == pytest.approx(4.7e6, rel=0.01)
    for part, forward, backward in (1 / 2, 0.79, 0.90), (3 / 4, 0.90, 0.95):
        assert kept(part) / whole == pytest.approx(forward, abs=0.01) and kept(part, True) / whole == pytest.approx(backward, abs=0.01)


def averaged_statistics(config, masks, weights, dataset, workers, steps):
    """What re-estimation replaces: each subnetwork's own batch statistics, averaged over those who hold the channel."""
    total, holders = {}, {}
    for worker in range(workers):
        subnet = worker % next(iter(masks.values())).shape[1]
        with torch.device("meta"):
            module = resnet.ResNet(config, sdp.held_counts(masks, subnet))
        sdp.materialize(module, masks, resnet.layout(config), subnet, weights.__getitem__)
        rows = {slot.full: slot.rows for slot in sdp.slots(module, masks, resnet.layout(config), subnet).values()}

        def see(name, norm, inputs):
            x, which = inputs[0], rows[name + ".weight"]
            for key, value in ("running_mean", x.mean((0, 2, 3))), ("running_var", x.var((0, 2, 3))):
                key, which = f"{name}.{key}", slice(None) if which is None else which
                shape = weights[name + ".weight"].shape
                total.setdefault(key, torch.zeros(shape))[which] += value
                holders.setdefault(key, torch.zeros(shape))[which] += 1
        for name, m in module.named_modules():
            if isinstance(m, nn.BatchNorm2d):
                m.register_forward_pre_hook(functools.partial(see, name))
        with torch.no_grad():
            for i in range(steps):
                module(dataset.batch("train", i, worker, workers)[0])
    return {key: value / holders[key] for key, value in total.items()}


def accuracies(folder, dataset, workers=4):
    """-> accuracy of the checkpoint's model with its own statistics, and with those averaged over subnetworks; all of these."""
    saved = torch.load(folder / "ckpt.pt", weights_only=True)
    config = resnet.ResNetConfig(**{k: saved["config"][k] for k in asdict(resnet.ResNetConfig())})
    model = resnet.ResNet(config)
    averaged = averaged_statistics(config, saved["masks"], saved["model"], dataset, workers, -(-1024 // (dataset.batch_size * workers)))
    out = []
    for statistics in ({}, averaged):
        model.load_state_dict({**saved["model"], **statistics})
        model.eval()
        with torch.no_grad():
            right = [(model(x).argmax(1) == y) for x, y in (dataset.batch("val", i, 0, 1) for i in range(dataset.val_steps(1)))]
        out.append(torch.cat(right).float().mean().item())
    return *out, saved["model"], averaged


@slow
@only_when_asked
@pytest.mark.parametrize("level", ["block", "neuron"])
@pytest.mark.parametrize("coverage", ["1/2", "3/4"])
@pytest.mark.parametrize("seed", range(3))
def test_statistics_of_the_full_model_against_averaged_ones(tmp_path, level, coverage, seed):
    train.main(["--model", "resnet18", "--data", "shapes", "--level", level, "--coverage", coverage, "--seed", str(seed),
                "--steps", "150", "--eval-every", "1000", "--device", "cpu", "--out-dir", str(tmp_path)])
    estimated, averaged, *_ = accuracies(tmp_path, data.load("shapes", 16, None, seed))
    assert estimated == pytest.approx(metrics(tmp_path, ".")[-1]["val_acc"])
    with open(HERE / "assets" / "batch_norm.jsonl", "a") as f:
        f.write(json.dumps({"level": level, "coverage": coverage, "seed": seed, "re-estimated": estimated, "averaged": averaged}) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

def text_bin(folder, name="text", count=6000, vocab=256):
    """A shard of real text (this project's), or of random tokens where the vocabulary is not bytes."""
    text = np.frombuffer((HERE / "sdp.py").read_bytes()[:count], np.uint8)
    path = folder / f"{name}.bin"
    data.write_bin(path, text if vocab == 256 else np.random.default_rng(0).integers(vocab, size=count), vocab)
    return path


def test_bin_shards_are_llm_c_s(tmp_path):
    tokens = np.array([5, 50256, 0, 7], np.uint16)
    data.write_bin(tmp_path / "a.bin", tokens, 50257)
    raw = (tmp_path / "a.bin").read_bytes()                          # as llm.c's data/data_common.py writes it
    assert raw == np.array([20240520, 1, 4, 0] + [0] * 252, "<i4").tobytes() + tokens.astype("<u2").tobytes()
    read, vocab = data.read_bin(tmp_path / "a.bin")
    assert vocab == 50257 and (read[:] == tokens).all() and not list(tmp_path.glob("*.part"))


def test_bin_reader_refuses_every_cut_and_every_flipped_header(tmp_path):
    path = text_bin(tmp_path, count=40)
    raw = path.read_bytes()
    for end in [0, 1, 7, 1023, 1024, 1025, len(raw) - 1]:
        path.write_bytes(raw[:end])
        with pytest.raises(data.UserError):
            data.read_bin(path)
    for byte in range(16):                                           # magic, version, count, vocabulary
        path.write_bytes(raw[:byte] + bytes([raw[byte] ^ 0x41]) + raw[byte + 1:])
        try:
            assert data.read_bin(path)[1] != 256                     # another vocabulary is no damage anyone could see
        except data.UserError:
            pass
    with pytest.raises(data.UserError, match="vocabulary is 100"):
        data.write_bin(path, [5, 100], 100)
        data.read_bin(path)
    with pytest.raises(data.UserError, match="cannot read"):
        data.read_bin(tmp_path / "none.bin")


def test_bin_reader_survives_random_damage(tmp_path):
    path, rng = text_bin(tmp_path, count=500), np.random.default_rng(0)
    raw = path.read_bytes()
    for _ in range(300):
        broken = bytearray(raw)
        for _ in range(rng.integers(1, 4)):
            broken[rng.integers(len(raw)) if rng.random() < 0.5 else rng.integers(16)] ^= 1 << rng.integers(8)
        path.write_bytes(broken[:rng.integers(len(raw))] if rng.random() < 0.2 else broken)
        try:
            tokens, vocab = data.read_bin(path)
            assert len(tokens) == 500 and tokens[:].max() < vocab
        except data.UserError as e:
            assert "\n" not in str(e)


def test_batches_are_a_pure_function_and_differ_among_steps_and_workers(tmp_path):
    a, b = (data.load(str(text_bin(tmp_path)), 4, 16, seed) for seed in (0, 1))
    x, y = a.batch("train", 3, 1, 4)
    assert x.shape == y.shape == (4, 16) and torch.equal(x[:, 1:], y[:, :-1]) and x.dtype == torch.int64
    assert torch.equal(x, a.batch("train", 3, 1, 4)[0])
    for other in (a.batch("train", 4, 1, 4), a.batch("train", 3, 2, 4), a.batch("train", 3, 1, 8), b.batch("train", 3, 1, 4)):
        assert not torch.equal(x, other[0])


def test_all_workers_together_validate_on_the_same_sequences_once(tmp_path):
    dataset = data.load(str(text_bin(tmp_path)), 3, 16, 0)
    seen = []
    for workers in (1, 2, 5):
        batches = [dataset.batch("val", i, w, workers)[0] for w in range(workers) for i in range(dataset.val_steps(workers))]
        rows = sorted(map(tuple, torch.cat(batches).tolist()))
        seen.append(rows)
        assert len(rows) == dataset.val_count == len(set(rows))
    assert seen[0] == seen[1] == seen[2]


def test_training_windows_cover_all_shards_evenly():
    a, b = np.arange(0, 300, dtype=np.uint16), np.arange(300, 400, dtype=np.uint16)
    dataset = data.Tokens({"train": [a, b], "val": [a]}, 400, 10, 20, 0)
    starts = torch.cat([dataset.batch("train", i, 0, 1)[0][:, 0] for i in range(400)])
    assert set(starts.tolist()) == set(range(280)) | set(range(300, 380))
    assert (starts >= 300).float().mean() == pytest.approx(80 / 360, abs=0.03)


def test_stdlib_is_read_as_bytes_and_split_by_file():
    splits = data.stdlib_splits()
    text = bytes(splits["train"][0]) + bytes(splits["val"][0])
    assert len(text) > 5e6 and 0.03 < len(splits["val"][0]) / len(text) < 0.2
    assert (Path(os.__file__).read_bytes() in text) and data.byte_encoding().decode(list(b"d\xc3\xa9f")) == "d\u00e9f"


def test_text_command_writes_train_and_val(tmp_path, monkeypatch, capsys):
    source = tmp_path / "a.txt"
    source.write_text("h\u00e9llo " * 100)
    monkeypatch.setattr(sys, "argv", ["data.py", "text", str(source), "--out", str(tmp_path / "b" / "mine")])
    data.main()
    dataset = data.load(str(tmp_path / "b" / "mine_train.bin"), 1, 8, 0)
    assert bytes(np.concatenate([dataset.splits["train"][0][:], dataset.splits["val"][0][:]]).astype(np.uint8)) == source.read_bytes()
    assert len(dataset.splits["val"][0]) == 70
    monkeypatch.setattr(sys, "argv", ["data.py", "text", str(tmp_path / "none.txt")])
    with pytest.raises(SystemExit) as stop:
        data.main()
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


class Server(http.server.BaseHTTPRequestHandler):
    """A loopback stand-in for the hub: honours Range, and can break off, send everything again, or lie about where it begins."""
    body, breaks, requests, replays, lies = b"", 0, [], False, False

    def do_GET(self):
        type(self).requests.append((self.path, self.headers.get("Range")))
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        start = 0 if self.replays else start
        if start >= len(self.body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        start = 0 if self.lies else start
        self.send_header("Content-Length", str(len(self.body) - start))
        self.end_headers()
        end = len(self.body)
        if type(self).breaks:
            type(self).breaks -= 1
            end = start + (end - start) // 2
        self.wfile.write(self.body[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    Server.replays = Server.lies = False
    Server.requests, Server.breaks, Server.body = [], 0, text_bin(tmp_path, "source", 1500, 50257).read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(data, "FOLDER", tmp_path / "shards")
    yield Server
    server.shutdown()


def test_fineweb_is_fetched_broken_transfers_resumed(hub, tmp_path):
    hub.breaks = 3
    data.fetch_fineweb(2)
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert sorted(p.name for p in (tmp_path / "shards").iterdir()) == sorted(names)
    assert all((tmp_path / "shards" / n).read_bytes() == hub.body for n in names)
    assert hub.requests[0] == ("/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_val_000000.bin", None)
    assert hub.requests[1][1] == f"bytes={len(hub.body) // 2}-" and len(hub.requests) == 6
    data.fetch_fineweb(2)                                            # nothing left to do
    assert len(hub.requests) == 6
    assert data.load("fineweb", 2, 16, 0).vocab_size == 50257


def shapes_data(batch_size=7, seed=0):
    return data.Images("shapes", {"train": data.shapes(50, data.seeded("t")), "val": data.shapes(20, data.seeded("v"))}, batch_size, seed)


def test_an_epoch_shows_every_image_once_whatever_the_workers(monkeypatch):
    monkeypatch.setattr(data, "shift_and_mirror", lambda x, rng: x)
    dataset = shapes_data()
    images = [bytes(x.numpy()) for x in dataset.splits["train"][0]]
    assert len(set(images)) == 50
    for workers in (1, 2, 5):
        steps = -(-3 * 50 // (7 * workers))                          # three epochs; batches reach over their edges
        seen = [(step * workers + worker, (x * dataset.std + dataset.mean) * 255, y) for step in range(steps) for worker in range(workers)
                for x, y in [dataset.batch("train", step, worker, workers)]]
        x = torch.cat([x for _, x, _ in seen])[:150].round().to(torch.uint8)
        order = [images.index(bytes(image.contiguous().numpy())) for image in x]
        for epoch in range(3):
            assert sorted(order[50 * epoch:50 * epoch + 50]) == list(range(50))
        assert order[:50] != order[50:100]
        labels = dataset.splits["train"][1]
        assert torch.equal(torch.cat([y for _, _, y in seen])[:150], labels[order])
        val = torch.cat([dataset.batch("val", i, w, workers)[1] for i in range(dataset.val_steps(workers)) for w in range(workers)])
        assert torch.equal(val, dataset.splits["val"][1])


def test_image_batches_are_a_pure_function_and_differ_among_steps_workers_and_seeds():
    a, b = shapes_data(), shapes_data(seed=1)
    x, y = a.batch("train", 3, 1, 4)
    assert x.shape == (7, 3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert torch.equal(x, shapes_data().batch("train", 3, 1, 4)[0])
    for other in (a.batch("train", 4, 1, 4), a.batch("train", 3, 2, 4), a.batch("train", 3, 1, 8), b.batch("train", 3, 1, 4)):
        assert not torch.equal(x, other[0])


def test_images_are_shifted_and_mirrored():
    """Each is one of the 9 x 9 x 2 pictures that numpy cuts out of the padded image; and all of those occur."""
    x = torch.arange(3 * 8 * 8).view(1, 3, 8, 8).to(torch.uint8) + 1
    padded = np.pad(x[0].numpy(), ((0, 0), (4, 4), (4, 4)))
    cuts = {bytes(np.ascontiguousarray(p)): (i, j, k) for i in range(9) for j in range(9)
            for k, p in enumerate((padded[:, i:i + 8, j:j + 8], padded[:, i:i + 8, j:j + 8][:, :, ::-1]))}
    seen = {cuts[bytes(image.contiguous().numpy())] for image in data.shift_and_mirror(x.expand(3000, -1, -1, -1), data.seeded(0))}
    assert len(seen) == 162


def test_shapes_are_deterministic_balanced_and_beyond_a_linear_classifier():
    (x, y), (vx, vy) = data.shapes(4000, data.seeded("a")), data.shapes(1000, data.seeded("b"))
    again = data.shapes(4000, data.seeded("a"))
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and x.dtype == torch.uint8 and x.shape == (4000, 3, 32, 32)
    assert np.bincount(y).min() > 300
    f, vf = (torch.cat([t.flatten(1).double() / 255, torch.ones(len(t), 1)], 1) for t in (x, vx))
    best = 0                                                         # ridge regression, the best of several penalties
    for penalty in (1, 10, 100, 1000):
        w = torch.linalg.solve(f.T @ f + penalty * torch.eye(f.shape[1]), f.T @ nn.functional.one_hot(y, 10).double())
        best = max(best, ((vf @ w).argmax(1) == vy).float().mean().item())
    assert 0.2 < best < 0.6


def cifar_archive(folder, name, monkeypatch, per_file=6, shape=(3, 32, 32), classes=None):
    """An archive in the format of the real one, served from this machine; torchvision checks its (own) checksums."""
    kind, classes = {"cifar10": data.CIFAR10, "cifar100": data.CIFAR100}[name], classes or data.IMAGES[name][0]
    rng, key, files = np.random.default_rng(0), "labels" if name == "cifar10" else "fine_labels", {}
    for file, _ in kind.train_list + kind.test_list:
        rows = rng.integers(256, size=(per_file, int(np.prod(shape))), dtype=np.uint8)
        files[file] = pickle.dumps({"data": rows, key: [int(v) for v in rng.integers(classes, size=per_file)]})
    files[kind.meta["filename"]] = pickle.dumps({kind.meta["key"]: [f"class {i}" for i in range(data.IMAGES[name][0])]})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for file, content in files.items():
            info = tarfile.TarInfo(f"{kind.base_folder}/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    md5 = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    for attribute in "train_list", "test_list":
        monkeypatch.setattr(kind, attribute, [[file, md5[file]] for file, _ in getattr(kind, attribute)])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5[kind.meta["filename"]]})
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(buffer.getvalue()).hexdigest())
    monkeypatch.setattr(kind, "url", f"{os.environ['HF_ENDPOINT']}/{kind.filename}")
    Server.body, Server.requests = buffer.getvalue(), []
    return files


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_once_and_read_through_torchvision(hub, tmp_path, monkeypatch, name):
    files = cifar_archive(tmp_path, name, monkeypatch)
    data.download_images(name)
    requests = len(Server.requests)
    data.download_images(name)
    assert len(Server.requests) == requests > 0
    dataset = data.load(name, 4, None, 0)
    first = pickle.loads(files["data_batch_1" if name == "cifar10" else "train"])
    images, labels = dataset.splits["train"]
    assert bytes(images[0].contiguous().numpy()) == bytes(first["data"][0])      # red, green, blue plane, row by row
    assert labels[:6].tolist() == first["labels" if name == "cifar10" else "fine_labels"]
    assert len(labels) == (30 if name == "cifar10" else 6) and len(dataset.splits["val"][1]) == 6
    assert dataset.batch("train", 0, 0, 1)[0].shape == (4, 3, 32, 32) and dataset.num_classes == data.IMAGES[name][0]


def test_bad_cifar_is_one_clear_line(hub, tmp_path, monkeypatch):
    folder = data.FOLDER
    cifar_archive(tmp_path, "cifar10", monkeypatch)
    Server.body = Server.body[:1000] + b"x" + Server.body[1001:]
    with pytest.raises(data.UserError, match="cannot fetch and read cifar10.*--data shapes needs no network"):
        data.download_images("cifar10")
    assert not (folder / data.CIFAR10.filename).exists()             # nothing half-written stays
    monkeypatch.setattr(data.CIFAR10, "url", "http://127.0.0.1:9/none")                    # no network
    with pytest.raises(data.UserError, match="cannot fetch and read cifar10.*--data shapes needs no network") as caught:
        data.download_images("cifar10")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("odd,message", [(dict(shape=(3, 16, 16)), "wanted are 32x32 colour images"), (dict(per_file=0), "wanted are"),
                                         (dict(classes=57), "labels of cifar10 go from"), (dict(shape=(3, 30, 30)), "cannot reshape")])
def test_cifar_with_wrong_images_or_labels_is_refused(hub, tmp_path, monkeypatch, odd, message):
    cifar_archive(tmp_path, "cifar10", monkeypatch, **{"per_file": 16, **odd})
    with pytest.raises(data.UserError, match=message) as caught:
        data.download_images("cifar10")
        data.load("cifar10", 4, None, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("body,message", [(b"<html>" * 500, "header"), (None, "bytes")])
def test_fineweb_wrong_header_and_short_file_are_refused(hub, tmp_path, body, message):
    hub.body = body or hub.body[:-200]
    with pytest.raises(data.UserError, match=message):
        data.fetch_fineweb(1)
    assert not list((tmp_path / "shards").iterdir())                 # nothing half-written stays


def test_fineweb_from_a_server_that_sends_everything_again_or_the_wrong_part(hub, tmp_path):
    hub.breaks, hub.replays = 1, True                                # it ignores Range: 200, from the beginning
    data.fetch_fineweb(1)
    assert all(path.read_bytes() == hub.body for path in (tmp_path / "shards").iterdir())
    for path in (tmp_path / "shards").iterdir():
        path.unlink()
    hub.breaks, hub.replays, hub.lies = 1, False, True               # it says 206, and sends the beginning
    with pytest.raises(data.UserError, match="sent something else than a whole token shard"):
        data.fetch_fineweb(1)
    assert not list((tmp_path / "shards").iterdir())


def test_fineweb_gives_up_with_one_line(hub, tmp_path):
    hub.breaks = 100
    with pytest.raises(data.UserError, match="5 tries.*go on from here"):
        data.fetch_fineweb(1)
    part, = (tmp_path / "shards").iterdir()
    assert part.suffix == ".part"
    hub.breaks = 0
    data.fetch_fineweb(1)                                            # and goes on
    assert len(list((tmp_path / "shards").glob("*.bin"))) == 2


# ---------------------------------------------------------------------------------------------------------------------
# train.py
# ---------------------------------------------------------------------------------------------------------------------

def flags(folder, *more, out="out", steps=6):
    bin_ = folder / "text.bin"
    if not bin_.exists():
        text_bin(folder)
    return ["--data", str(bin_), "--batch-size", "2", "--seq-len", "12", "--steps", str(steps), "--save-every", "3",
            "--eval-every", "4", "--log-every", "1", "--out-dir", str(folder / out), "--device", "cpu", *map(str, more)]


def metrics(folder, out="out"):
    return [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]


def torchrun(ranks, arguments, code=0, timeout=120, script="train.py"):
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
                          script, *arguments], cwd=HERE, capture_output=True, text=True, timeout=timeout,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (run.returncode == 0) == (code == 0), run.stdout + run.stderr
    return run.stdout, run.stderr


def _train_on_pool(arguments, prepare=None):
    """train.main in a process of the pool, as a rank of torchrun's would run it -> None or what it refused.

    prepare() changes something there, and returns what undoes it.
    """
    train.DISTRIBUTED, train.RANK, train.WORLD, train.STOP = True, dist.get_rank(), dist.get_world_size(), False
    train.start_processes, train.say = lambda *a: torch.device("cpu"), lambda *a: None
    here = os.getcwd()
    try:
        undo = prepare() if prepare else None
        train.main(arguments)
    except data.UserError as e:
        return str(e)
    finally:
        os.chdir(here)
        if prepare and undo:
            undo()


SMALL_IMAGES = """
import data, model_resnet as resnet, train
real_shapes = data.shapes
data.shapes = lambda count, rng: real_shapes(count // 40, rng)       # 250 images to train on, 50 to validate
train.STATISTICS_IMAGES = 32
resnet.PRESETS["resnet18"] = resnet.ResNetConfig(widths=(6, 7, 9, 10))
"""


@pytest.fixture
def small_images(monkeypatch):
    """A narrow ResNet and few images, here and (the fixture's value) as a script for torchrun."""
    monkeypatch.setattr(data, "shapes", data.shapes)                 # all three are put back after the test
    monkeypatch.setattr(train, "STATISTICS_IMAGES", 0)
    monkeypatch.setitem(resnet.PRESETS, "resnet18", None)
    exec(SMALL_IMAGES, {})
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "small.py"
        script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n{SMALL_IMAGES}\ntrain.main(sys.argv[1:])")
        yield str(script)


def _small_images_on_pool():
    saved = data.shapes, train.STATISTICS_IMAGES, resnet.PRESETS["resnet18"]
    exec(SMALL_IMAGES, {})

    def undo():
        data.shapes, train.STATISTICS_IMAGES, resnet.PRESETS["resnet18"] = saved
    return undo


def image_flags(folder, *more, out="out", steps=6):
    return ["--model", "resnet18", "--data", "shapes", "--batch-size", "4", "--steps", str(steps), "--save-every", "3",
            "--eval-every", "4", "--log-every", "1", "--out-dir", str(folder / out), "--device", "cpu", *map(str, more)]


def test_checkpoint_is_an_ordinary_llama(tmp_path, capsys):
    """transformers loads it unchanged, gives the same logits, and the validation loss that the stream measured."""
    from transformers import LlamaConfig, LlamaForCausalLM
    train.main(flags(tmp_path, "--level", "neuron", "--masking", "backward"))
    shown = capsys.readouterr().out
    assert "bits per byte" in shown and "optimizer state" in shown and "█" in shown
    saved = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert set(saved) == {"model", "optimizer", "step", "config", "masks"} and saved["step"] == 6
    fields = {k: saved["config"][k] for k in asdict(llama.LlamaConfig())}
    assert fields["num_key_value_heads"] < fields["num_attention_heads"]                  # grouped-query attention
    theirs = LlamaForCausalLM(LlamaConfig(**fields))
    theirs.load_state_dict(saved["model"])
    ours = llama.Llama(llama.LlamaConfig(**fields))
    ours.load_state_dict(saved["model"])
    x = torch.randint(256, (2, 50))
    torch.testing.assert_close(theirs(x).logits, ours(x), rtol=1e-4, atol=1e-4)
    dataset = data.load(str(tmp_path / "text.bin"), 300, 12, 0)
    x, y = dataset.batch("val", 0, 0, 1)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()
    assert metrics(tmp_path)[-1]["val_loss"] == pytest.approx(loss, rel=1e-5)
    for name, state in saved["optimizer"].items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == saved["model"][name].shape and state["step"] == 6
    train.main(["--resume", "--out-dir", str(tmp_path / "out"), "--sample", "def ", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("def ")


def test_torchrun_equals_plain_python_and_writes_the_contract_s_metrics(tmp_path):
    more = ["--level", "neuron", "--grad-accum", 2, "--lr", 1e-3]    # Adam makes much of rounding in steep updates, less in small ones
    torchrun(4, flags(tmp_path, *more, out="many"))
    train.main(flags(tmp_path, *more, "--subnets", 4, out="one"))
    many, one = metrics(tmp_path, "many"), metrics(tmp_path, "one")
    assert [m["step"] for m in many] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(many, one):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["sent_bytes"] > 0 == b["sent_bytes"] and a["peak_mem_bytes"] is None
        assert {"lr", "step_ms", "tokens_per_s"} <= a.keys()
    assert [m["step"] for m in many if "val_loss" in m] == [4, 6]
    assert many[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-5)
    masks = [torch.load(tmp_path / out / "ckpt.pt", weights_only=True)["masks"] for out in ("many", "one")]
    assert all(torch.equal(m, masks[1][b]) for b, m in masks[0].items())


@pytest.mark.parametrize("level,masking", ALL)
def test_resnet_on_real_workers_equals_plain_python(run_on, tmp_path, small_images, capsys, level, masking):
    more = ["--level", level, "--masking", masking, "--coverage", "1/2"]
    many = image_flags(tmp_path, *more, *(["--checkpoint-activations"] if level == "block" else []), out="many")
    if (level, masking) == ALL[0]:
        torchrun(2, many, script=small_images)
    else:
        assert run_on(2, _train_on_pool, many, _small_images_on_pool) == [None, None]
    train.main(image_flags(tmp_path, *more, "--subnets", 2, out="one"))
    assert "resnet18 on shapes (synthetic)" in capsys.readouterr().out
    many, one = metrics(tmp_path, "many"), metrics(tmp_path, "one")
    for a, b in zip(many, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and a["images_per_s"] > 0
    assert many[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert [m["step"] for m in many if "val_acc" in m] == [4, 6] and {"val_loss", "val_acc"} <= many[-1].keys()
    many, one = (torch.load(tmp_path / out / "ckpt.pt", weights_only=True)["model"] for out in ("many", "one"))
    assert many.keys() == one.keys()
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_checkpoint_is_torchvision_s_resnet18(tmp_path, small_images, stem):
    """torchvision loads it and gives the same logits and the same validation loss; its batch norm statistics are those of
    torch's own update_bn over the same batches."""
    from torchvision.models import resnet18
    resnet.PRESETS["resnet18"] = resnet.ResNetConfig(stem=stem)
    train.main(image_flags(tmp_path, "--level", "neuron", "--subnets", 2, "--coverage", "1/2", steps=2))
    saved = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    ours, theirs = resnet.ResNet(resnet.PRESETS["resnet18"]), resnet18(num_classes=10)
    if stem == "cifar":
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    for model in (ours, theirs):
        model.load_state_dict(saved["model"])
        model.eval()
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    dataset = data.load("shapes", 4, None, 0)
    with torch.no_grad():
        val = [(theirs(x), y) for x, y in (dataset.batch("val", i, 0, 1) for i in range(dataset.val_steps(1)))]
    outputs, y = torch.cat([o for o, _ in val]), torch.cat([y for _, y in val])
    last = metrics(tmp_path)[-1]
    assert last["val_loss"] == pytest.approx(nn.functional.cross_entropy(outputs, y).item(), rel=1e-4)
    assert last["val_acc"] == pytest.approx((outputs.argmax(1) == y).float().mean().item())
    torch.optim.swa_utils.update_bn([dataset.batch("train", i, w, 2)[0] for i in range(4) for w in range(2)], theirs)
    for name, b in theirs.named_buffers():
        torch.testing.assert_close(saved["model"][name], b, rtol=1e-4, atol=1e-5)
    state = saved["optimizer"]["layer1.0.conv1.weight"]
    assert state["momentum_buffer"].shape == (64, 64, 3, 3) and state["step"] == 2


def test_resnet18_has_the_known_sizes_and_torchvision_s_names():
    from torchvision.models import resnet18
    count = {}
    for stem, classes in ("cifar", 10), ("imagenet", 1000):
        config = resnet.ResNetConfig(num_classes=classes, stem=stem)
        count[stem] = sum(shape.numel() for _, _, shape in resnet.layout(config).values())
    assert count == {"cifar": 11_173_962, "imagenet": 11_689_512}
    theirs = {name: p.shape for name, p in resnet18().named_parameters()}
    assert [(name, shape) for name, (_, _, shape) in resnet.layout(config).items()] == list(theirs.items())


def test_averaged_statistics_are_right_only_where_every_worker_has_the_full_model(tmp_path, small_images):
    """At coverage 1 they are the re-estimated ones, which checks both; otherwise they are far from them."""
    dataset, far = data.load("shapes", 4, None, 0), {}
    for coverage in "1", "1/2":
        train.main(image_flags(tmp_path, "--coverage", coverage, "--overwrite"))
        dataset.seed, steps = 0, 2                                   # 32 images, as small_images says
        saved = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
        averaged = averaged_statistics(resnet.PRESETS["resnet18"], saved["masks"], saved["model"], dataset, 4, steps)
        far[coverage] = max(float(((saved["model"][name] - a) / a).abs().max()) for name, a in averaged.items() if "var" in name)
    assert far["1"] < 1e-4 and far["1/2"] > 0.1


@pytest.mark.parametrize("ranks,more", [(2, ["--masking", "backward"]), (1, []), (2, ["--parallel", "ddp"])])
def test_resume_gives_the_uninterrupted_run_bit_for_bit(run_on, tmp_path, ranks, more):
    def go(out, *extra):
        arguments = flags(tmp_path, "--coverage", "1/2" if ranks == 2 else "3/4", *more, *extra, out=out)
        assert run_on(ranks, _train_on_pool, arguments) == [None] * ranks if ranks > 1 else train.main(arguments) is None
    go("whole")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "ckpt.pt").write_bytes((tmp_path / "whole" / "ckpt.prev.pt").read_bytes())        # step 3
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines(True)
    (tmp_path / "cut" / "metrics.jsonl").write_text("".join(lines[:5]))      # two lines beyond the checkpoint
    go("cut", "--resume")
    a, b = (torch.load(tmp_path / out / "ckpt.pt", weights_only=True) for out in ("whole", "cut"))
    assert all(torch.equal(w, b["model"][n]) for n, w in a["model"].items())
    assert all(torch.equal(s["exp_avg_sq"], b["optimizer"][n]["exp_avg_sq"]) for n, s in a["optimizer"].items())
    for x, y in zip(metrics(tmp_path, "whole"), metrics(tmp_path, "cut"), strict=True):
        assert all(x.get(k) == y.get(k) for k in ("step", "loss", "lr", "grad_norm", "val_loss"))


def test_checkpoint_resumes_under_any_other_layout(tmp_path):
    """ddp -> forward block -> backward neuron with another S: the loss goes on where it was, steps and state included."""
    train.main(flags(tmp_path, "--parallel", "ddp", steps=3))
    for steps, more in (6, ["--subnets", 4]), (9, ["--subnets", 3, "--masking", "backward", "--level", "neuron", "--coverage", "2/3"]):
        train.main(flags(tmp_path, "--resume", *more, steps=steps))
    assert [m["step"] for m in metrics(tmp_path)] == list(range(1, 10))
    saved = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert all(s["step"] == 9 for s in saved["optimizer"].values()) and saved["config"]["subnets"] == 3
    assert metrics(tmp_path)[-1]["val_loss"] < metrics(tmp_path)[2]["val_loss"]


def test_resnet_resumes_bit_for_bit_and_under_any_other_layout(tmp_path, small_images):
    train.main(image_flags(tmp_path, "--level", "neuron", out="whole"))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "ckpt.pt").write_bytes((tmp_path / "whole" / "ckpt.prev.pt").read_bytes())        # step 3
    train.main(image_flags(tmp_path, "--level", "neuron", "--resume", out="cut"))
    a, b = (torch.load(tmp_path / out / "ckpt.pt", weights_only=True) for out in ("whole", "cut"))
    assert all(torch.equal(w, b["model"][n]) for n, w in a["model"].items())
    assert all(torch.equal(s["momentum_buffer"], b["optimizer"][n]["momentum_buffer"]) for n, s in a["optimizer"].items())
    for steps, more in (9, ["--parallel", "ddp"]), (12, ["--masking", "backward", "--level", "neuron", "--subnets", 3, "--coverage", "1/3"]):
        train.main(image_flags(tmp_path, "--resume", *more, steps=steps, out="cut"))
    assert [m["step"] for m in metrics(tmp_path, "cut")] == list(range(4, 13))
    saved = torch.load(tmp_path / "cut" / "ckpt.pt", weights_only=True)
    assert all(s["step"] == 12 for s in saved["optimizer"].values())
    torch.save({**saved, "config": {**saved["config"], "num_classes": 7}}, tmp_path / "cut" / "ckpt.pt")
    with pytest.raises(data.UserError, match="shapes now has num_classes 10, the checkpoint in .* 7"):
        train.main(image_flags(tmp_path, "--resume", out="cut"))
    with pytest.raises(data.UserError, match="--sample prints text"):
        train.main(["--resume", "--out-dir", str(tmp_path / "cut"), "--sample", "x", "--device", "cpu"])


def test_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    train.main(flags(tmp_path))
    path = tmp_path / "out" / "ckpt.pt"
    raw = path.read_bytes()
    for damaged in (raw[:-1000], raw[:len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1:]):
        path.write_bytes(damaged)
        assert train.find_checkpoint(tmp_path / "out").name == "ckpt.prev.pt"
        assert "is damaged" in capsys.readouterr().out


def test_random_damage_is_always_noticed(tmp_path):
    train.main(flags(tmp_path, steps=1))
    path, rng = tmp_path / "out" / "ckpt.pt", np.random.default_rng(0)
    raw = path.read_bytes()
    for _ in range(60):
        broken = bytearray(raw)
        if rng.random() < 0.3:
            del broken[rng.integers(len(raw)):]
        else:                                                        # in the weights, or in the archive's own tables
            broken[rng.integers(len(raw)) if rng.random() < 0.5 else -rng.integers(1, 9000)] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        try:
            found = train.find_checkpoint(tmp_path / "out")
            same = torch.load(found, weights_only=True)              # a flip in a comment or time stamp does no harm
            assert all(torch.equal(w, same["model"][n]) for n, w in torch.load(io.BytesIO(raw))["model"].items())
        except data.UserError as e:
            assert "is damaged" in str(e)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(data.UserError, match="not a checkpoint of this program"):
        train.main(flags(tmp_path, "--resume"))


def test_a_vocabulary_without_tokenizer_trains_to_the_end_and_changing_it_is_refused(tmp_path, capsys):
    data.write_bin(tmp_path / "text.bin", np.arange(6000) % 900, 1000)
    train.main(flags(tmp_path, steps=2))
    assert "(none: no tokenizer is known for a vocabulary of 1000" in capsys.readouterr().out
    data.write_bin(tmp_path / "text.bin", np.arange(6000) % 900, 901)
    with pytest.raises(data.UserError, match="now has vocab_size 901"):
        train.main(flags(tmp_path, "--resume", steps=3))


def test_flop_match_lengthens_the_run(tmp_path):
    train.main(flags(tmp_path, "--coverage", "1/2", "--flop-match", "--subnets", 4))
    assert 9 <= metrics(tmp_path)[-1]["step"] <= 12                  # half of the branches, all of embedding and head


@pytest.mark.parametrize("masking,more", [("forward", ["--checkpoint-activations"]), ("forward", ["--compile"]), ("backward", ["--compile"]),
                                          ("forward", ["--dtype", "bf16"])])
def test_the_same_losses_with_another_way_to_compute(run_on, tmp_path, masking, more):
    same = ["--coverage", "1/2", "--masking", masking]
    train.main(flags(tmp_path, "--subnets", 2, *same, out="plain", steps=4))
    assert run_on(2, _train_on_pool, flags(tmp_path, *same, *more, steps=4)) == [None, None]
    tolerance = 0.02 if "bf16" in more else 1e-4
    for a, b in zip(metrics(tmp_path, "plain"), metrics(tmp_path), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# --plan and --bench
# ---------------------------------------------------------------------------------------------------------------------

def settled(*arguments):
    """The flags as train.py completes them, and the model's sizes."""
    args = train.parse(["--plan", "--subnets", "4", *map(str, arguments)])
    train.settle(args, None)
    return args, {**llama.PRESETS, **resnet.PRESETS}[args.model]


def batch_of(args, config):
    if args.model == "resnet18":
        return torch.randn(args.batch_size, 3, 32, 32), torch.randint(10, (args.batch_size,))
    return torch.randint(config.vocab_size, (2, args.batch_size, args.seq_len)).unbind()


def measured(design, rank, fake=False, batch=None):
    """first_update of worker `rank` -> memory, bytes sent, what it has made."""
    args, mode = design.args, FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    batch = batch or batch_of(args, design.config)
    with mode:
        batch = [torch.empty(t.shape, dtype=t.dtype) for t in batch] if fake else batch
    model = design.model(rank, "cpu", mode) if fake else design.initial(rank, "cpu")
    sync, optimizer, memory, sent = train.first_update(design, model, lambda *_: batch, train.autocast_of(args, torch.device("cpu")), mode)
    return memory, sent, sync, optimizer


def cpu_allocator_peak(work, *alive):
    """Bytes in use at most while work() runs, counted by torch's profiler in the allocator itself, on top of `alive`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = [e for e in json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"] if e["name"] == "[memory]"]
    now = most = sum(t.nbytes for t in alive)
    for e in sorted(events, key=lambda e: e["ts"]):
        now += e["args"]["Bytes"]
        most = max(most, now)
    return most


@pytest.mark.parametrize("more", [[], ["--grad-accum", 2], ["--model", "resnet18", "--data", "shapes"]], ids=["llama", "accumulating", "resnet"])
@pytest.mark.parametrize("name", train.VARIANTS)
def test_the_plan_is_what_the_tracker_sees_on_real_tensors_and_what_the_allocator_says(name, more):
    args, config = settled("--batch-size", 8, *more)
    design = train.designs(args, config)[name]
    batch = batch_of(args, config)
    for rank in train.largest(design, 4):
        with train.alone(rank, 4):
            planned, sent, *_ = measured(design, rank, fake=True)
            real, really_sent, sync, optimizer = measured(design, rank, batch=batch)
            assert planned["peak"] == pytest.approx(real["peak"], rel=0.02)
            assert sum(planned.values()) == 2 * planned["peak"] and min(planned.values()) >= 0
            assert sent == really_sent and (name.startswith("fsdp") or sent == pytest.approx(sync.sent_bytes, abs=1))
            if name.startswith("fsdp"):
                continue                                             # the allocator's count of its own start is not known
            # The next updates have no tracker, but the allocator's own count.  DDP's buckets are there throughout, made anew in the second
            alive = [*sync.params.values(), *(t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))]
            alive += sync.params.values() if design.args.parallel == "ddp" else []
            autocast = train.autocast_of(args, torch.device("cpu"))
            again = lambda: train.update(sync, optimizer, lambda *_: batch, design.args, autocast)
            again()
            sync.arrive()                                            # or what is on its way would be freed, but not counted before
            peak = cpu_allocator_peak(lambda: [again(), again()], *alive)        # the second with what the first refreshes
            # It also sees what a kernel uses inside, such as a convolution's weight in another order
            assert -0.02 * peak < peak - planned["peak"] < 0.02 * peak + max(p.nbytes for p in sync.params.values())


@pytest.mark.parametrize("more", [["--subnets", 8, "--coverage", "5/8"], ["--model", "resnet18", "--data", "shapes", "--subnets", 8, "--coverage", "3/8"]],
                         ids=["llama", "resnet"])
def test_no_worker_needs_more_than_the_ones_that_are_planned(more):
    args, config = settled(*more)
    for name, design in train.designs(args, config).items():
        if design.masks:
            peaks = []
            for rank in range(8):
                with train.alone(rank, 8):
                    peaks.append(measured(design, rank, fake=True)[0]["peak"])
            assert max(peaks) == pytest.approx(max(peaks[rank] for rank in train.largest(design, 8)), rel=0.003), name


@pytest.mark.parametrize("more", [[], ["--model", "resnet18", "--data", "shapes"]], ids=["llama", "resnet"])
@pytest.mark.parametrize("level", ["block", "neuron"])
def test_a_worker_needs_no_more_than_ddp_on_a_model_of_its_size(level, more):
    """At most 1.02 times, says the plan; in fact less, since DDP's buckets outlive the update."""
    args, config = settled(*more)
    design = train.designs(args, config)[f"sdp-forward-{level}"]
    for rank in train.largest(design, 4):
        with train.alone(rank, 4):
            dense = train.designs(args, config)["ddp"]
            dense.model, dense.layout = design.model, {name: (None, None, p.shape) for name, p in design.model(rank).named_parameters()}
            ours, theirs = (measured(d, rank, fake=True)[0] for d in (design, dense))
            assert ours["parameters"] == theirs["parameters"]
            assert ours["peak"] <= 1.02 * theirs["peak"]


def test_plan_writes_its_rows_and_says_where_28_percent_are_saved(tmp_path, capsys):
    train.main(["--plan", "--subnets", "4", "--batch-size", "2", "--out-dir", str(tmp_path / "out")])
    said, rows = capsys.readouterr().out, json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [r["variant"] for r in rows] == [*train.VARIANTS, *(f"sdp-forward-block at {k}/4" for k in range(1, 5))]
    by_name = {r["variant"]: r for r in rows}
    for r in rows:
        assert set(r) == {"variant", "params", "flops", "memory", "sent_bytes"}
        assert set(r["memory"]) == {"parameters", "gradients", "optimizer", "activations", "temporary", "peak"}
    whole = sum(shape.numel() for _, _, shape in llama.layout(replace(llama.PRESETS["llama-tiny"], vocab_size=32000)).values())
    assert by_name["ddp"]["params"] == whole and by_name["fsdp"]["params"] == -(-whole // 4)
    assert by_name["fsdp"]["memory"]["optimizer"] == pytest.approx(by_name["ddp"]["memory"]["optimizer"] / 4, rel=0.01)
    assert by_name["ddp"]["sent_bytes"] == round(4 * whole * 2 * 3 / 4)
    assert by_name["ddp-checkpoint"]["memory"]["peak"] < by_name["ddp"]["memory"]["peak"]
    assert by_name["ddp-checkpoint"]["flops"] > by_name["ddp"]["flops"] > by_name["sdp-backward-block"]["flops"] > by_name["sdp-forward-block"]["flops"]
    assert by_name["sdp-forward-block at 4/4"]["flops"] == by_name["ddp"]["flops"]
    assert "block 0  " in said and "spectral gap" in said and "28% less: at" in said and "60% less: at" in said
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@slow
@only_when_asked
def test_plan_of_the_1b_model_takes_less_than_two_minutes_and_2_gib(tmp_path):
    start = time.time()
    run = subprocess.run([sys.executable, "-c", "import resource, sys, train; train.main(sys.argv[1:]); "
                          "print('KIB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)", "--model", "llama-1b", "--subnets", "8", "--plan",
                          "--out-dir", str(tmp_path)], cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0 and time.time() - start < 120, run.stderr
    assert int(run.stdout.split("KIB")[1]) < 2 * 2**20


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_freed_memory_is_kept_for_the_next_update():
    """Once touched, 128 MiB that come and go cost no new pages; without the setting they cost 32,768 each time, or 64 huge ones."""
    faults = """if True:
        import resource, torch, train
        def come_and_go():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            buckets = [torch.zeros(4 * 2**20) for _ in range(8)]
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(come_and_go(), come_and_go())
        train.keep_freed_memory()
        print(come_and_go(), come_and_go())
    """
    run = subprocess.run([sys.executable, "-c", faults], cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, again, kept_first, kept_again = map(int, run.stdout.split())
    assert 10 * kept_again < min(first, again, kept_first) and kept_again < 100


@pytest.mark.parametrize("more", [[], ["--dtype", "bf16", "--model", "resnet18", "--data", "shapes"]], ids=["llama", "resnet-bf16"])
def test_bench_on_real_workers(run_on, tmp_path, small_images, more):
    arguments = ["--bench", 4, "--batch-size", 2, "--subnets", 2, "--coverage", "1/2", "--out-dir", tmp_path / "out", "--device", "cpu", *more]
    if not more:
        arguments += ["--seq-len", 16]
    prepare = _small_images_on_pool if more else None
    assert run_on(4, _train_on_pool, list(map(str, arguments)), prepare) == [None] * 4
    rows = {r["variant"]: r for r in json.loads((tmp_path / "out" / "bench.json").read_text())}
    assert list(rows) == list(train.VARIANTS) and rows["ddp"]["step_ratio"] == 1
    assert all(0 < r["step_ms_range"][0] <= r["step_ms"] <= r["step_ms_range"][1] for r in rows.values())
    assert all(r["memory"]["peak"] > 0 < r["flops"] for r in rows.values())
    # two subnetworks with two replicas each, half of every branch in each of them
    args, config = settled("--subnets", 2, "--coverage", "1/2", *more)
    branch = whole = 0
    for where, _, shape in family(config)[0].layout(config).values():
        whole += 4 * shape.numel()
        branch += 4 * shape.numel() * (where is not None)
    assert rows["ddp"]["sent_bytes"] == pytest.approx(whole * 2 * 3 / 4, rel=1e-6)
    assert rows["fsdp"]["sent_bytes"] > rows["fsdp-zero2"]["sent_bytes"] >= whole * 2 * 3 / 4        # it pads the first dimension
    if not more:                                                     # equal blocks: h = 2 holders of half the branch bytes
        assert rows["sdp-forward-block"]["sent_bytes"] == pytest.approx((whole - branch) * 2 * 3 / 4 + branch / 2, rel=1e-6)
    for r in rows:
        trace = json.loads((tmp_path / "out" / f"trace-{r}.json").read_text())["traceEvents"]
        assert any(e["name"] == "gloo:all_reduce" for e in trace)


def test_bench_alone(tmp_path, capsys):
    train.main(["--bench", "1", "--subnets", "2", "--batch-size", "2", "--seq-len", "16", "--out-dir", str(tmp_path), "--compile", "--device", "cpu"])
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert [r["variant"] for r in rows] == list(train.VARIANTS) and "of which one at a time is here, without communication" in capsys.readouterr().out


@pytest.mark.parametrize("name", train.VARIANTS)
def test_a_variant_that_was_torn_down_leaves_nothing(name):
    def alive():
        gc.collect()
        return sum(o.untyped_storage().nbytes() for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and o.device.type == "cpu")
    args, config = settled("--batch-size", 2, "--seq-len", 8)
    design, batch = train.designs(args, config)[name], batch_of(args, config)
    before = alive()
    with train.alone(0, 4):
        train.take_turn(design, lambda *_: batch, torch.device("cpu"), 1, None)
    assert alive() < before + 50_000                                 # of the model's 7 MB


def test_blocks_of_one_size_are_compiled_once():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = llama.Llama(TINY, {name: neurons for name, (_, neurons, *_) in llama.branches(TINY).items()})
    train.compile_blocks(model)
    model(*tokens_for(0, 0)).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 < len(train.blocks_of(model))


def test_a_loss_that_holds_few_logits_at_a_time_is_the_same(monkeypatch):
    torch.manual_seed(0)
    model, (x, y) = llama.Llama(TINY), tokens_for(0, 0, batch=3, length=11)

    def run():
        model.zero_grad()
        loss = model(x, y)
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters()]
    whole, grads = run()
    assert whole == pytest.approx(llama.loss(model(x), y).item(), rel=1e-6)
    for rows in (1, 5, 32, 33):                                      # 33 tokens
        monkeypatch.setattr(llama, "LOGITS", rows * TINY.vocab_size)
        loss, parts = run()
        assert loss == pytest.approx(whole, rel=1e-6)
        for a, b in zip(parts, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    monkeypatch.setattr(llama, "LOGITS", 5 * TINY.vocab_size)
    with SizesCreated() as seen:
        run()
    assert (5, TINY.vocab_size) in seen.shapes and (33, TINY.vocab_size) not in seen.shapes


def readme_tables():
    """The lines of the README's tables of --plan and --bench, made from the result files."""
    def rows(name):
        text = (HERE / "assets" / name).read_text()
        return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]

    def of_ddp(row, get, first):
        return f"{get(row) / get(first):.0%}"

    peak, sent, flops = lambda r: r["memory"]["peak"], lambda r: r["sent_bytes"], lambda r: r["flops"]
    plan = [r for r in rows("plan_llama-1b.json") if " at " not in r["variant"]]
    for r in plan:
        parts = " + ".join(f"{r['memory'][kind] / 1e9:.1f}" for kind in ("parameters", "gradients", "optimizer", "activations", "temporary"))
        yield (f"| {r['variant']} | {train.si(r['params']).replace(' ', '')} | {train.si(flops(r)).replace(' ', '')}, {of_ddp(r, flops, plan[0])} | "
               f"{peak(r) / 1e9:.1f} GB, {of_ddp(r, peak, plan[0])} | {parts} | {sent(r) / 1e9:.2f} GB, {of_ddp(r, sent, plan[0])} |")
    savings = defaultdict(list)                                      # (model, level) -> at coverage 1/8, 2/8, ...
    for r in rows("coverage.jsonl"):
        savings[r["model"], r["level"]].append(r["saved"])
    models = list(dict.fromkeys(model for model, _ in savings))
    for part, level in itertools.product((0.28, 0.6), ("block", "neuron")):
        most = [sum(saved >= part for saved in savings[model, level]) for model in models]
        yield f"| {part:.0%} less, {level} level | {' | '.join(f'{n}/8' if n else 'none' for n in most)} |"
    all_held = [f"{savings[model, 'block'][-1]:.0%}" for model in models]
    yield f"| less at coverage 1 already, for the buckets | {' | '.join(all_held)} |"
    for name in "bench_compute.json", "bench_communication.json":
        bench = rows(name)
        for r in bench:
            yield (f"| {r['variant']} | {of_ddp(r, flops, bench[0])} | {peak(r) / 1e6:.0f} MB, {of_ddp(r, peak, bench[0])} | "
                   f"{sent(r) / 1e6:.1f} MB, {of_ddp(r, sent, bench[0])} | {r['step_ms']:.0f} ({r['step_ms_range'][0]:.0f} – "
                   f"{r['step_ms_range'][1]:.0f}) | {r['step_ratio']:.1%} |")
    link = rows("slow_link.jsonl")
    for a, b in zip(link[:len(link) // 2], link[len(link) // 2:], strict=True):
        cells = [f"{r['step_ms']:.0f} ms, {r['step_ratio']:.0%} | " + (f"{r['overlap']:.0%} | {r['after_backward_ms']:.0f} ms" if "overlap" in r else "– | –")
                 for r in (a, b)]
        yield f"| {a['variant']} | {' | '.join(cells)} | {of_ddp(a, sent, link[0])} |"
    for r in rows("compile.jsonl"):
        yield f"| {r['variant']} | {r['eager_ms']:.0f} | {r['compiled_ms']:.0f} | {r['ratio']:.2f} ({r['quartiles'][0]:.2f} – {r['quartiles'][1]:.2f}) |"
    gpu = {(r["model"], r["dtype"], r["compile"], r["variant"]): r for r in rows("gpu.jsonl")}
    for name in train.VARIANTS:
        cells = []
        for model in "llama-134m", "llama-500m", "llama-1b":
            r = gpu[model, "fp32", False, name]
            cells += [f"{r['planned_peak'] / 1e9:.2f}, {r['peak'] / 1e9:.2f}", f"{r['step_ms']:.0f}, {r['step_ratio']:.0%}"]
        yield f"| {name} | {' | '.join(cells)} |"
    for name in train.VARIANTS:
        cells = [gpu["llama-134m", dtype, compiled, name] for dtype, compiled in (("fp32", False), ("bf16", False), ("bf16", True))]
        yield f"| {name} | " + " | ".join(f"{r['step_ms']:.0f} ({r['step_ms_range'][0]:.0f} – {r['step_ms_range'][1]:.0f})" for r in cells) + " |"
    for r in rows("quality.jsonl"):
        loss = np.array(r["val_loss"])
        yield f"| {r['variant']} | {r['workers']} | {', '.join(f'{v:.3f}' for v in loss)} | {loss.mean():.3f} ± {loss.std(ddof=1):.3f} |"
    for r in rows("bf16.jsonl"):
        yield (f"| {r['variant']} | {r['mean_difference']:+.2%} | {r['largest_difference']:.2%} | {r['largest_of_one_update']:.2%} | "
               f"{r['val_loss']['fp32']:.3f} | {r['val_loss']['bf16']:.3f} |")


def test_tables_in_the_readme_are_those_of_the_result_files():
    readme = (HERE / "README.md").read_text()
    assert [line for line in readme_tables() if line not in readme] == []


# ---------------------------------------------------------------------------------------------------------------------
# Measurements for the README, each of some minutes on a quiet machine:  python -m pytest -q -m slow -k NAME
# ---------------------------------------------------------------------------------------------------------------------

def write_result(name, rows):
    (HERE / "assets" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _all_reduce_times(held, sizes, repeats):
    """ms of reducing `size` bytes: in one all-reduce over the world, in S of a S-th over the world, in those of S groups of `held`."""
    rank, world = dist.get_rank(), dist.get_world_size()
    members = [sorted((s + i) % world for i in range(held)) for s in range(world)]
    groups = [(dist.new_group(m), m) for m in members]
    mine, out = [g for g, m in groups if rank in m], {}
    for size in sizes:
        flat, times = torch.zeros(size // 4), {"world": [], "split": [], "groups": []}
        part = flat[:max(1, len(flat) // world)]
        ways = {"world": [(flat, None)], "split": [(part.clone(), None) for _ in range(world)], "groups": [(part.clone(), g) for g in mine]}
        for _ in range(repeats + 1):
            for way, todo in ways.items():
                dist.barrier()
                start = time.perf_counter()
                for work in [dist.all_reduce(t, group=g, async_op=True) for t, g in todo]:
                    work.wait()
                times[way].append((time.perf_counter() - start) * 1000)
        out[size] = {way: ms[1:] for way, ms in times.items()}
    return out


@slow
@only_when_asked
def test_all_reduces_over_subgroups_against_one_over_the_world(run_on):
    rows, fits = [], []
    for subnets, held in (4, 3), (8, 6):
        sizes = [4096 * 8**i for i in range(6)]                      # 4 KiB to 128 MiB
        ranks = run_on(subnets, _all_reduce_times, held, sizes, 15)
        seconds = []
        for size in sizes:
            ms = {way: np.max([r[size][way] for r in ranks], 0) for way in ("world", "split", "groups")}     # done when all are
            ratio = ms["groups"] / ms["world"]                       # in pairs
            rows.append({"subnets": subnets, "held": held, "bytes": size, **{f"{way}_ms": float(np.median(t)) for way, t in ms.items()},
                         "groups_over_world": float(np.median(ratio)), "quartiles": np.quantile(ratio, [0.25, 0.75]).tolist(),
                         "bytes_ratio": (held - 1) / (subnets - 1)})
            seconds.append(np.median(ms["world"]) / 1000)
        # t = 2 (h-1) latency + 2 (h-1)/h bytes / bandwidth, by least squares of relative errors
        a = np.array([[2 * (subnets - 1), 2 * (subnets - 1) / subnets * size] for size in sizes]) / np.array(seconds)[:, None]
        latency, per_byte = np.linalg.lstsq(a, np.ones(len(sizes)), rcond=None)[0]
        fits.append({"subnets": subnets, "latency_us": latency * 1e6, "bandwidth_MB_per_s": 1e-6 / per_byte})
    write_result("subgroups.jsonl", rows + fits)


def all_reduces(path):
    """Of a trace of --bench, in ms since backward began: its duration, and the (begin, end) of the all-reduces in order."""
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    backward = [e for e in events if e["name"].startswith("autograd::engine::evaluate_function")]
    start = min(e["ts"] for e in backward)
    end = max(e["ts"] + e["dur"] for e in backward)
    spans = sorted((e["ts"] - start, e["ts"] + e["dur"] - start) for e in events if e["name"] == "gloo:all_reduce")
    return (end - start) / 1000, [(a / 1000, b / 1000) for a, b in spans]


def covered(spans, end=math.inf):
    """How much of the time before `end` lies in at least one of the spans, which are in order."""
    total, until = 0.0, -math.inf
    for a, b in spans:
        total, until = total + max(0.0, min(b, end) - max(a, until)), max(until, min(b, end))
    return total


def overlap(backward, spans):
    """Part of the communication that could run beside backward, and does: of all of it, or, where that takes longer than from
    the first message to the end of backward, of this time."""
    return covered(spans, backward) / min(covered(spans), backward - spans[0][0])


def test_overlap_by_hand():
    assert covered([(1, 3), (2, 4), (6, 8)]) == 5 and covered([(1, 3), (2, 4), (6, 8)], 7) == 4 and covered([(1, 9), (2, 3)], 5) == 4
    assert overlap(10, [(8, 12)]) == 1                               # it took all the time there was
    assert overlap(10, [(0, 4), (12, 14)]) == pytest.approx(4 / 6)
    assert overlap(10, [(4, 6), (12, 20)]) == pytest.approx(2 / 6)


@slow
@only_when_asked
def test_step_times_and_overlap_over_a_slow_link(tmp_path):
    rows, timeline = [], {}
    for name, more in ("compute", ["--batch-size", "2", "--seq-len", "256"]), ("communication", ["--batch-size", "1", "--seq-len", "64"]):
        with two_hosts("1gbit") as run:
            run(["--model", "llama-134m", "--bench", "6", "--device", "cpu", "--out-dir", str(tmp_path / name), *more], timeout=3000)
        for row in json.loads((tmp_path / name / "bench.json").read_text()):
            if not row["variant"].startswith("fsdp"):                # on gloo its collectives block: nothing runs beside them
                backward, spans = all_reduces(tmp_path / name / f"trace-{row['variant']}.json")
                spans = spans[:-1] if row["variant"].startswith("sdp") else spans         # the last is one number, for clipping
                row |= {"overlap": overlap(backward, spans), "backward_ms": backward, "after_backward_ms": max(0, spans[-1][1] - backward)}
                if row["variant"] in ("ddp", "sdp-forward-block", "sdp-backward-neuron"):
                    timeline.setdefault(name, {})[row["variant"]] = {"backward_ms": backward, "all_reduces_ms": spans}
            rows.append({"setting": name, **row})
    write_result("slow_link.jsonl", rows)
    (HERE / "assets" / "timeline.json").write_text(json.dumps(timeline) + "\n")
    assert all(row.get("overlap", 1) >= 0.7 for row in rows)


@slow
@only_when_asked
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of 40 GB")
def test_the_plan_agrees_with_a_gpu_s_allocator(tmp_path):
    """To 5 %, every variant, S = 8, the batch of each model; and how long an update takes there, without communication."""
    rows, text = [], text_bin(tmp_path, count=200_000, vocab=32000)
    for model, dtype, more in [("llama-134m", "fp32", []), ("llama-500m", "fp32", []), ("llama-1b", "fp32", []),
                               ("llama-134m", "bf16", []), ("llama-134m", "bf16", ["--compile"])]:
        command = [sys.executable, HERE / "train.py", "--model", model, "--subnets", "8", "--data", text, "--dtype", dtype,
                   "--device", "cuda", "--out-dir", tmp_path]
        subprocess.run([*command, "--bench", "3", *more], check=True)
        planned = {}
        if dtype == "fp32":
            subprocess.run([*command, "--plan"], check=True)
            planned = {row["variant"]: row["memory"]["peak"] for row in json.loads((tmp_path / "plan.json").read_text())}
        for row in json.loads((tmp_path / "bench.json").read_text()):
            rows.append({"model": model, "dtype": dtype, "compile": bool(more), "variant": row["variant"], "peak": row["memory"]["peak"],
                         **{key: row[key] for key in ("step_ms", "step_ms_range", "step_ratio")}})
            if planned:
                rows[-1]["planned_peak"] = planned[row["variant"]]
    write_result("gpu.jsonl", rows)
    for row in rows:
        assert row["peak"] == pytest.approx(row.get("planned_peak", row["peak"]), rel=0.05), row


@slow
@only_when_asked
def test_coverages_at_which_forward_masking_saves(tmp_path):
    rows = []
    for model, level in itertools.product(("llama-134m", "llama-500m", "llama-1b", "resnet18"), ("block", "neuron")):
        more = ["--data", "cifar10"] if model == "resnet18" else []
        subprocess.run([sys.executable, HERE / "train.py", "--model", model, "--level", level, "--subnets", "8", "--plan",
                        "--device", "cpu", "--out-dir", tmp_path, *more], check=True)
        plan = {row["variant"]: row["memory"]["peak"] for row in json.loads((tmp_path / "plan.json").read_text())}
        name = f"sdp-forward-{level}"
        for held in range(1, 9):
            peak = plan[f"{name} at {held}/8"]
            rows.append({"model": model, "level": level, "coverage": f"{held}/8", "peak": peak, "ddp_peak": plan["ddp"],
                         "saved": round(1 - peak / plan["ddp"], 4)})
        if (model, level) == ("llama-1b", "block"):
            shutil.copy(tmp_path / "plan.json", HERE / "assets/plan_llama-1b.json")
    write_result("coverage.jsonl", rows)


@slow
@only_when_asked
def test_what_compile_gains(tmp_path):
    """Benches of a worker alone, with and without --compile in turns, so that both see the same weather."""
    ms = defaultdict(list)
    for turn in range(4):
        for way in ([], ["--compile"])[::1 if turn % 2 else -1]:
            subprocess.run([sys.executable, HERE / "train.py", "--bench", "3", "--device", "cpu", "--out-dir", tmp_path, *way],
                           check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            for row in json.loads((tmp_path / "bench.json").read_text()):
                ms[row["variant"], bool(way)].append(row["step_ms"])
    rows = []
    for name in train.VARIANTS:
        eager, compiled = np.array(ms[name, False]), np.array(ms[name, True])
        rows.append({"variant": name, "eager_ms": float(np.median(eager)), "compiled_ms": float(np.median(compiled)),
                     "ratio": float(np.median(compiled / eager)), "quartiles": np.quantile(compiled / eager, [0.25, 0.75]).tolist()})
    write_result("compile.jsonl", rows)


@slow
@only_when_asked
def test_quality_beside_ddp(tmp_path):
    """The main command, and DDP on as many workers, and on 3/4 of them, which together hold about as many parameters as SDP's."""
    rows = []
    for name, workers in ("sdp-forward-block", 4), ("ddp", 4), ("ddp", 3):
        losses = []
        for seed in range(3):
            out = tmp_path / f"{name}-{workers}" / str(seed)
            torchrun(workers, [f"--{flag}={value}" for flag, value in train.VARIANTS[name].items()]
                     + ["--seed", str(seed), "--out-dir", str(out), "--device", "cpu"], timeout=900)
            losses.append(metrics(out.parent, out.name)[-1]["val_loss"])
            if name == "sdp-forward-block":
                shutil.copy(out / "metrics.jsonl", HERE / "assets" / f"main_seed{seed}.jsonl")
        rows.append({"variant": name, "workers": workers, "val_loss": losses})
    write_result("quality.jsonl", rows)


@slow
@only_when_asked
def test_losses_in_bf16_are_those_in_float32(tmp_path):
    rows = []
    for name, flags_of in train.VARIANTS.items():
        if name.startswith("fsdp") or name == "ddp-checkpoint":      # not in training; recomputing changes nothing
            continue
        losses, val = {}, {}
        for dtype in ("fp32", "bf16"):
            torchrun(4, [f"--{flag}={value}" for flag, value in flags_of.items()] + ["--dtype", dtype, "--steps", "200", "--log-every", "1",
                        "--eval-every", "1000", "--out-dir", str(tmp_path / name / dtype), "--device", "cpu"], timeout=900)
            lines = metrics(tmp_path / name, dtype)
            losses[dtype], val[dtype] = np.array([line["loss"] for line in lines]), lines[-1]["val_loss"]
        single = np.abs(losses["bf16"] / losses["fp32"] - 1).max()
        fp32, bf16 = (losses[dtype].reshape(20, 10).mean(1) for dtype in ("fp32", "bf16"))       # means over ten updates
        rows.append({"variant": name, "fp32": fp32.tolist(), "bf16": bf16.tolist(), "mean_difference": (bf16 / fp32 - 1).mean(),
                     "largest_difference": np.abs(bf16 / fp32 - 1).max(), "largest_of_one_update": single, "val_loss": val})
    write_result("bf16.jsonl", rows)
    assert all(row["largest_difference"] < 0.02 for row in rows)


BAD = [
    (["--coverage", "0.7", "--subnets", "4"], r"--coverage 0.7 is not a multiple of 1/4.*2/4 and 3/4"),
    (["--coverage", "0"], "more than 0 and at most 1"),
    (["--coverage", "9/8"], "more than 0 and at most 1"),
    (["--coverage=-1/2"], "more than 0 and at most 1"),
    (["--coverage", "1e9"], "more than 0 and at most 1"),
    (["--coverage", "1/0"], "neither a number nor a fraction"),
    (["--coverage", "nan"], "neither a number nor a fraction"),
    (["--coverage", "inf"], "neither a number nor a fraction"),
    (["--coverage", ""], "neither a number nor a fraction"),
    (["--coverage", "half"], "neither a number nor a fraction"),
    (["--coverage", "0.0002"], "not a multiple of 1/4.*nearest are 1/4"),
    (["--coverage"], "--coverage: expected one argument"),
    (["--subnets", "two"], "--subnets: invalid"),
    (["--model", "gpt5"], "invalid choice: 'gpt5'"),
    (["--data", "none.bin"], "cannot read none.bin"),
    (["--data", "wikipedia"], "unknown --data wikipedia"),
    (["--data", ""], "unknown --data"),
    (["--data", "fineweb"], "no FineWeb shards.*data.py fineweb"),
    (["--seq-len", "4096"], "--seq-len 4096 is longer than the context of llama-tiny, 256"),
    (["--batch-size", "9999"], "too short for one batch"),
    *[([f"--{flag}", value], f"--{flag}: must be at least 1") for flag in
      ("subnets", "steps", "batch-size", "seq-len", "grad-accum", "eval-every", "save-every", "log-every", "timeout", "bench") for value in ("0", "-1")],
    *[([f"--{flag}", "1.5"], f"--{flag}: invalid") for flag in ("seed", "steps", "batch-size", "grad-accum", "timeout")],
    (["--seed", "-1"], "--seed: must be at least 0"),
    *[(["--lr", value], "--lr must be a positive number") for value in ("nan", "inf", "0", "-1", "1e38")],
    (["--lr", "fast"], "--lr: invalid float"),
    *[(["--device", value], f"--device {value} is not cpu or cuda") for value in ("tpu", "mps", "gpu", "cpu:x")],
    (["--device", "cuda"], "no CUDA device"),
    (["--resume", "--overwrite"], "contradict"),
    (["--sample", "x"], "--sample needs --resume"),
    (["--resume", "--sample", "x"], "--sample needs --resume and a checkpoint"),
    (["--compile"], "--compile needs real workers"),
    (["--checkpoint-activations"], "--checkpoint-activations needs real workers"),
    (["--plan", "--bench", "3"], "--plan goes together with none of"),
    (["--plan", "--resume"], "--plan goes together with none of"),
    (["--bench", "3", "--overwrite"], "--bench goes together with none of"),
    (["--plan", "--coverage", "0.7", "--subnets", "4"], "--coverage 0.7 is not a multiple of 1/4"),
    (["--bench", "3", "--device", "cuda"], "no CUDA device"),
    (["--frobnicate"], "unrecognized arguments"),
    (["train"], "unrecognized arguments"),
    *[([f"--{flag}", "sideways"], "invalid choice") for flag in ("masking", "level", "parallel", "dtype")],
    (["--model", "resnet18"], "resnet18 reads images: --data can be cifar10, cifar100, shapes, not /"),
    (["--data", "cifar10"], "--data cifar10 holds images, and llama-tiny reads text: use --model resnet18"),
    (["--data", "shapes", "--model", "resnet18"], "--seq-len is for text, and resnet18 reads images"),
]
HEAD = [20240520, 1, 6000, 256]
BAD_SHARDS = [  # header, number of tokens, a token
    (HEAD[:1], 6000, 5), ([20240521] + HEAD[1:], 6000, 5), (HEAD[:1] + [2] + HEAD[2:], 6000, 5), (HEAD, 5999, 5), (HEAD, 6001, 5), (HEAD, 0, 5),
    (HEAD[:2] + [-1, 256], 0, 5), (HEAD[:2] + [0, 256], 0, 5), (HEAD[:2] + [20, 256], 20, 5), (HEAD[:3] + [-1], 6000, 5), (HEAD[:3] + [70000], 6000, 5),
    (HEAD, 6000, 256), (HEAD[:3] + [4], 6000, 5), (HEAD[:3] + [0], 6000, 50257),
]
BAD_CHECKPOINTS = {
    "empty": b"", "text": b"not a checkpoint", "zip of nothing": b"PK\x05\x06" + bytes(18),
    "pickle": pickle.dumps({"model": 1}), "list": [1, 2], "half": {"model": {}, "step": 3}, "tensor": torch.zeros(3),
    "malicious": type("Evil", (), {"__reduce__": lambda self: (os.system, ('touch "$EVIL"',))})(),
}


def refused(folder, message, *arguments, out="out"):
    """train.main says one line, and has left no out-dir behind."""
    with pytest.raises(data.UserError, match=message) as caught:
        train.main(flags(folder, *arguments, out=out))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("more,message", BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_input_is_one_clear_line_before_anything_happens(tmp_path, more, message):
    if more[-2:] == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    refused(tmp_path, message, *more)
    assert not (tmp_path / "out").exists()


def test_bad_shards_are_one_clear_line(tmp_path):
    for header, count, token in BAD_SHARDS:
        raw = np.array(header + [0] * (256 - len(header)), "<i4").tobytes() + np.full(count, token, "<u2").tobytes()
        (tmp_path / "text.bin").write_bytes(raw)
        refused(tmp_path, "text.bin|too short for one batch")
        assert not (tmp_path / "out").exists()
    data.write_bin(tmp_path / "text.bin", [5, 300] * 3000, 256)
    refused(tmp_path, "token 300, but its vocabulary is 256")
    (tmp_path / "text.bin").unlink()
    (tmp_path / "text.bin").mkdir()
    refused(tmp_path, "cannot read .*text.bin")


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_one_clear_line_and_nothing_in_them_is_run(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil-was-here"))
    (tmp_path / "out").mkdir()
    path, content = tmp_path / "out" / "ckpt.pt", BAD_CHECKPOINTS[kind]
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif kind == "malicious":
        torch.save({"model": content}, path)
    else:
        torch.save(content, path)
    before = path.read_bytes()
    for more in ([], ["--sample", "x"]):
        refused(tmp_path, "is damaged|not a checkpoint of this program", "--resume", *more)
    assert path.read_bytes() == before and os.listdir(tmp_path / "out") == ["ckpt.pt"]
    assert not (tmp_path / "evil-was-here").exists()
    if kind == "malicious":                                          # it would have worked
        torch.load(path, weights_only=False)
        assert (tmp_path / "evil-was-here").exists()


@pytest.mark.parametrize("arguments,message", [([], "required"), (["text"], "required"), (["text", "none.txt"], "cannot read none.txt"),
                                               (["fineweb", "--shards", "0"], "from 1 to 103"), (["fineweb", "--shards", "x"], "invalid int"),
                                               (["text", "none.txt", "--encoding", "morse"], "invalid choice"), (["imagenet"], "invalid choice")])
def test_bad_commands_of_data_py(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        data.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error and not list(tmp_path.iterdir())


def test_an_out_dir_with_a_run_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text("precious")
    with pytest.raises(data.UserError, match="already holds a run"):
        train.main(flags(tmp_path))
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == "precious"
    (tmp_path / "file").write_text("")
    for out in "file", "file/out":
        refused(tmp_path, "cannot write to --out-dir", out=out)


def test_resume_refuses_another_model_or_data(tmp_path):
    train.main(flags(tmp_path, steps=1))
    for more in (["--model", "llama-134m"], ["--data", "stdlib"]):
        with pytest.raises(data.UserError, match="contradicts the checkpoint"):
            train.main(flags(tmp_path, "--resume", *more))


@pytest.mark.parametrize("ranks,more,message", [
    (3, ["--subnets", "2"], "--subnets 2 does not divide the number of workers, 3"),
    (2, ["--coverage", "0.7"], "the nearest are 1/2 and 2/2"),
    (2, ["--frobnicate"], "unrecognized arguments"),
    (2, ["--data", "none.bin"], "cannot read none.bin"),
    (2, ["--data", "shapes"], "--data shapes holds images"),
    (2, ["--out-dir", "/dev/null/out"], "cannot write to --out-dir"),
])
def test_bad_input_under_torchrun_is_one_line_from_one_rank(tmp_path, ranks, more, message):
    start = time.monotonic()
    out, err = torchrun(ranks, flags(tmp_path, *more), code=1, timeout=60)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and time.monotonic() - start < 40
    assert 'train.py", line' not in err and "exitcode  : 2" in err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# A run is never lost
# ---------------------------------------------------------------------------------------------------------------------

def _optimizers_stand_still():
    steps = {kind: kind.step for kind in (torch.optim.AdamW, torch.optim.SGD)}
    for kind in steps:
        kind.step = lambda self: None
    return lambda: [setattr(kind, "step", step) for kind, step in steps.items()]


LAYOUTS = [(4, ["--parallel", "ddp"]), (4, ["--coverage", "3/4"]), (3, ["--masking", "backward", "--level", "neuron", "--coverage", "2/3"]),
           (4, ["--masking", "backward", "--subnets", "2", "--coverage", "1/2"]), (1, [])]


@pytest.mark.parametrize("make_flags", [flags, image_flags], ids=["Llama", "ResNet"])
def test_a_checkpoint_resumes_bit_for_bit_under_any_layout(run_on, tmp_path, make_flags):
    """A run is resumed under five layouts in a row.  The first time it takes no step, only saves: the full model and the
    optimizer are the saved ones, bit for bit.  Then it trains on, and the loss stays sane."""
    if make_flags is image_flags:
        more = ["--data", "shapes", "--batch-size", "2"]
        prepare = _small_images_on_pool
    else:
        more, prepare = [], None
    step, path = 0, tmp_path / "out" / "ckpt.pt"
    for workers, layout in LAYOUTS:
        if step:                                                     # one update that changes nothing, then back to the step before
            before = torch.load(path, weights_only=True)
            raw = path.read_bytes()
            still = functools.partial(_both, prepare, _optimizers_stand_still)
            assert run_on(workers, _train_on_pool, make_flags(tmp_path, "--resume", *layout, *more, steps=step + 1), still) == [None] * workers
            after = torch.load(path, weights_only=True)
            parameters = before["optimizer"].keys()
            assert all(torch.equal(before["model"][n], after["model"][n]) for n in parameters)
            for name, state in before["optimizer"].items():
                assert all(torch.equal(value, after["optimizer"][name][key]) for key, value in state.items() if torch.is_tensor(value))
            path.write_bytes(raw)
        step += 3
        assert run_on(workers, _train_on_pool, make_flags(tmp_path, "--resume", *layout, *more, steps=step), prepare) == [None] * workers
        saved = torch.load(path, weights_only=True)
        assert saved["step"] == step and all(s["step"] == step for s in saved["optimizer"].values())
    losses = [m["loss"] for m in metrics(tmp_path)]
    assert len(losses) == 15 and max(losses) < 1.3 * losses[0]
    if make_flags is flags:
        assert losses[-1] < losses[0] - 0.3


def _both(first, second):
    undo = [prepare() for prepare in (first, second) if prepare]
    return lambda: [u() for u in undo if u]


def _differs(what, folder):
    """Rank 1 is started otherwise than rank 0."""
    if dist.get_rank() == 1:
        if what == "data":
            os.chdir(folder / "other")
        if what == "code":
            train.__file__, was = str(folder / "other" / "train.py"), train.__file__
            return lambda: setattr(train, "__file__", was)


def _on_rank_1(arguments, *more, **options):
    return _train_on_pool(arguments + (list(more) if dist.get_rank() == 1 else []), **options)


def test_ranks_that_were_started_differently_are_told_apart(run_on, tmp_path):
    for folder in (tmp_path, tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        text_bin(folder)
    (tmp_path / "other" / "train.py").write_text("print('another version')")
    arguments = flags(tmp_path)
    for more in ["--lr", "0.1"], ["--seed", "7"], ["--masking", "backward"], ["--batch-size", "3"]:
        said = run_on(2, _on_rank_1, arguments, *more)
        assert said[0] == said[1] and f"rank 1 has {more[0]} {more[1]}, but rank 0 has" in said[0]
    data.write_bin(tmp_path / "other" / "text.bin", np.arange(6000) % 200, 256)
    relative = ["text.bin" if a.endswith("text.bin") else a for a in arguments]
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for what in "data", "code":
            said = run_on(2, functools.partial(_on_rank_1, prepare=functools.partial(_at, tmp_path, what)), relative)
            assert said[0] == said[1] and f"rank 1 has {what}" in said[0]
    finally:
        os.chdir(here)
    assert not (tmp_path / "out").exists()


def _at(folder, what):
    os.chdir(folder)
    return _differs(what, folder)


def _loss_is_nan_at(rank, steps):
    real, calls = llama.loss, [0]

    def loss(*args):
        trains = args[0].requires_grad and args[0].device.type == "cpu"      # FLOPs are counted on the meta device
        calls[0] += trains
        return real(*args) * (math.nan if trains and calls[0] in steps and dist.get_rank() == rank else 1)
    llama.loss = loss
    return lambda: setattr(llama, "loss", real)


def test_an_update_that_is_not_finite_is_skipped_by_all_and_ten_end_the_run(run_on, tmp_path):
    prepare = functools.partial(_loss_is_nan_at, 1, [2, 4])
    assert run_on(2, _train_on_pool, flags(tmp_path, "--coverage", "1/2"), prepare) == [None, None]
    assert [m["skipped"] for m in metrics(tmp_path)] == [0, 1, 1, 2, 2, 2]
    saved = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert all(t.isfinite().all() for t in saved["model"].values()) and {s["step"] for s in saved["optimizer"].values()} == {4}
    prepare = functools.partial(_loss_is_nan_at, 1, range(4, 99))
    said = run_on(2, _train_on_pool, flags(tmp_path, "--coverage", "1/2", steps=20, out="lost"), prepare)
    assert said[0] == said[1] and "ten updates in a row, up to step 13" in said[0]
    assert torch.load(tmp_path / "lost" / "ckpt.pt", weights_only=True)["step"] == 12


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: [p.data.fill_(math.inf) for p in self.param_groups[0]["params"]])
    refused(tmp_path, "after step 3 the weights are not finite any more, and were not saved")
    assert not (tmp_path / "out" / "ckpt.pt").exists()


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    (tmp_path / "small").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", tmp_path / "small"], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:                                                             # a checkpoint has 21 MB: two fit, a third does not
        refused(tmp_path, "cannot write .*ckpt.pt .*make room and go on with --resume", out="small/out", *["--steps", "12"])
        assert sorted(os.listdir(tmp_path / "small" / "out")) == ["ckpt.prev.pt", "ckpt.pt", "metrics.jsonl"]
        assert torch.load(tmp_path / "small" / "out" / "ckpt.pt", weights_only=True)["step"] == 6
        (tmp_path / "small" / "out" / "ckpt.prev.pt").unlink()
        train.main(flags(tmp_path, "--resume", out="small/out", steps=7))
    finally:
        subprocess.run(["umount", tmp_path / "small"])


def test_a_shard_that_shrinks_under_a_run_ends_it_with_one_line(tmp_path, monkeypatch):
    path, real = text_bin(tmp_path), data.Tokens.batch

    def batch(self, split, step, *more):
        if split == "train" and step == 3:
            os.truncate(path, 1100)
        return real(self, split, step, *more)
    monkeypatch.setattr(data.Tokens, "batch", batch)
    refused(tmp_path, "text.bin became shorter while it was in use")
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] == 3


class Torchrun:
    """A running torchrun, whose workers can be killed."""

    def __init__(self, ranks, arguments, restarts=0):
        self.process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
                                         f"--max-restarts={restarts}", "train.py", *arguments], cwd=HERE, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def workers(self):
        """The processes that still live; Z is one that has ended and whose parent has not looked yet."""
        out = subprocess.run(["ps", "-o", "pid=,stat=", "--ppid", str(self.process.pid)], capture_output=True, text=True).stdout
        return [int(line.split()[0]) for line in out.splitlines() if "Z" not in line.split()[1]]

    def wait_for_line(self, path, count, seconds=90):
        end = time.monotonic() + seconds
        while not path.exists() or len(path.read_text().splitlines()) < count:
            assert time.monotonic() < end and self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)

    def end(self, seconds=120):
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err


def same_checkpoint(a, b):
    a, b = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in (a, b))
    return a["step"] == b["step"] and all(torch.equal(w, b["model"][n]) for n, w in a["model"].items()) and all(
        torch.equal(s["exp_avg_sq"], b["optimizer"][n]["exp_avg_sq"]) for n, s in a["optimizer"].items())


def kill_and_finish(run_on, folder, kills, seed):
    rng, path = np.random.default_rng(seed), folder / "killed" / "metrics.jsonl"
    more = ["--coverage", "1/2", "--save-every", "2", "--eval-every", "3"]
    assert run_on(2, _train_on_pool, flags(folder, *more, out="whole", steps=6 + 3 * kills)) == [None, None]
    run = Torchrun(2, flags(folder, *more, "--resume", out="killed", steps=6 + 3 * kills), restarts=kills)
    for kill in range(kills):                                        # in the midst of a step, an evaluation or a save
        run.wait_for_line(path, 2 + 3 * kill)
        time.sleep(rng.uniform(0, 0.5))
        victims = run.workers()
        if victims:
            os.kill(int(rng.choice(victims)), signal.SIGKILL)
        while set(run.workers()) & set(victims) and run.process.poll() is None:
            time.sleep(0.02)
    code, out, err = run.end()
    assert code == 0, out + err
    assert same_checkpoint(folder / "whole", folder / "killed")
    whole, killed = metrics(folder, "whole"), metrics(folder, "killed")
    assert [m["step"] for m in whole] == [m["step"] for m in killed] and whole[-1]["val_loss"] == killed[-1]["val_loss"]


def test_killed_workers_come_back_and_the_result_is_the_same(run_on, tmp_path):
    kill_and_finish(run_on, tmp_path, 3, 0)


@slow
@only_when_asked
def test_twenty_kills(run_on, tmp_path):
    kill_and_finish(run_on, tmp_path, 20, 1)


def test_sigterm_saves_and_the_run_goes_on_from_there(run_on, tmp_path):
    assert run_on(2, _train_on_pool, flags(tmp_path, "--coverage", "1/2", out="whole", steps=40)) == [None, None]
    lines, saved = 4, 0
    for target in "worker", "torchrun":                              # one worker is told, or, as a cluster does it, torchrun, which tells all
        run = Torchrun(2, flags(tmp_path, "--coverage", "1/2", "--resume", steps=40))
        run.wait_for_line(tmp_path / "out" / "metrics.jsonl", lines)
        os.kill(run.workers()[1] if target == "worker" else run.process.pid, signal.SIGTERM)
        code, out, err = run.end()
        assert "told to stop (SIGTERM): saved after step" in out and "error:" not in err, err
        assert code == 0 or target == "torchrun"                     # torchrun itself says that it was interrupted
        saved, before = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"], saved
        assert before < saved < 40
        lines = saved + 2
    assert run_on(2, _train_on_pool, flags(tmp_path, "--coverage", "1/2", "--resume", steps=40)) == [None, None]
    assert same_checkpoint(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_rank_that_dies_or_hangs_ends_the_others_with_a_line(tmp_path, how):
    run = Torchrun(3, flags(tmp_path, "--coverage", "2/3", "--timeout", "5", steps=5000))
    run.wait_for_line(tmp_path / "out" / "metrics.jsonl", 2)
    workers = run.workers()
    os.kill(workers[1], how)
    start, left = time.monotonic(), workers
    while len(set(left) & set(workers)) > 1 and time.monotonic() < start + 30:     # torchrun itself waits for the stopped one
        left = run.workers()
        time.sleep(0.1)
    seconds = time.monotonic() - start
    if how == signal.SIGSTOP:
        os.kill(workers[1], signal.SIGKILL)
    code, out, err = run.end()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code and seconds < 20 and lines and all("waited for the other workers in" in line for line in lines), err
    assert 'train.py", line' not in err


@contextmanager
def two_hosts(rate=None):
    """Two network namespaces joined by a cable, of `rate` (in tc's words: "1gbit"), with half of the cores each.

    Yields torchrun(arguments), two ranks on each.
    """
    def run(*words):
        return subprocess.run(words, capture_output=True).returncode == 0

    hosts = [f"sdp{os.getpid()}{i}" for i in (0, 1)]
    if not all([run("ip", "netns", "add", host) for host in hosts]):
        pytest.skip("network namespaces are not allowed here")

    def torchrun_on_both(arguments, timeout=240):
        runs, cores = [], sorted(os.sched_getaffinity(0))
        try:
            for i, host in enumerate(hosts):                         # hosts do not share cores
                os.sched_setaffinity(0, cores[i::2] or cores)        # a process begins with its parent's
                runs.append(subprocess.Popen(["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                                              "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29400",
                                              f"--rdzv-conf=is_host={1 - i}", f"--local-addr=10.77.0.{i + 1}", "train.py", *arguments],
                                             cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                             env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"sdp{i}"}))
        finally:
            os.sched_setaffinity(0, cores)
        said = [run.communicate(timeout=timeout)[0] for run in runs]
        assert all(run.returncode == 0 for run in runs), said
        return said[0] + said[1]
    try:
        assert run("ip", "link", "add", "sdp0", "netns", hosts[0], "type", "veth", "peer", "name", "sdp1", "netns", hosts[1])
        for i, host in enumerate(hosts):
            assert run("ip", "-n", host, "addr", "add", f"10.77.0.{i + 1}/24", "dev", f"sdp{i}")
            assert run("ip", "-n", host, "link", "set", f"sdp{i}", "up") and run("ip", "-n", host, "link", "set", "lo", "up")
            if rate and not run("ip", "netns", "exec", host, "tc", "qdisc", "add", "dev", f"sdp{i}", "root", "tbf", "rate", rate,
                                "burst", "256kb", "latency", "50ms"):
                pytest.skip("links cannot be made slow here")
        yield torchrun_on_both
    finally:
        for host in hosts:
            run("ip", "netns", "del", host)


def test_two_hosts_give_the_losses_of_one(tmp_path):
    """The README's command for several machines, the machines being two network namespaces joined by a cable."""
    more = ["--level", "neuron", "--masking", "backward"]
    with two_hosts() as run:
        assert "4 workers, cpu" in run(flags(tmp_path, *more, out="two"))
    train.main(flags(tmp_path, *more, "--subnets", "4", out="one"))
    for two, one in zip(metrics(tmp_path, "two"), metrics(tmp_path, "one"), strict=True):
        assert all(two[key] == pytest.approx(one[key], rel=1e-5) for key in ("loss", "val_loss") if key in one)
