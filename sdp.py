"""
Subnetwork Data Parallelism (SDP): data parallelism in which each worker trains only a part of the model.

W workers, each on its own data.  The model's residual branches are sums over *neurons* (see model_llama.py), and a mask
says which of S subnetworks holds which neuron; worker r trains subnetwork r mod S.  A subnetwork is an ordinary,
smaller model.  After each backward pass a parameter's gradient is averaged among the workers that hold it:

    g_j  =  1/|H_j|  *  sum over workers i in H_j of  g_ij            H_j: the workers that hold parameter j

No activations are exchanged.  Besides gradients there is one scalar a step, for clipping, and where workers also run the
neurons they do not train (backward masking), updated weights.  Worked by hand, four neurons and two workers, neuron 0 only
on worker 0, neuron 3 only on worker 1, neurons 1 and 2 on both:

    mask [neurons, subnets]     gradient on worker 0     on worker 1        averaged
        1  0                            2                     -                 2
        1  1                            4                     6                 5
        1  1                            1                     3                 2
        0  1                            -                     8                 8

The method in its naive form is the function below: full-size tensors, zeros from those who do not hold, one all-reduce of
the sum and one of the number of holders.  The rest of this file does the same with real subnetworks, so that memory, FLOPs
and bytes fall with the part that is held: masks; cutting and pasting; all workers simulated in one process, which states
the method most clearly; real workers; and last how to choose balanced masks.
"""

import hashlib
import math
import os
import weakref
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.func import functional_call


def naive_masked_average(grad, held):
    """grad [neurons, ...] of this worker, held bool [neurons]: which of them it holds -> the average of the formula."""
    held = held.to(grad.dtype).view(-1, *[1] * (grad.dim() - 1))
    total, holders = grad * held, held.clone()
    dist.all_reduce(total)                                           # sum over i in H_j of g_ij
    dist.all_reduce(holders)                                         # |H_j|
    return total / holders


# ---------------------------------------------------------------------------------------------------------------------
# Masks: {branch: bool tensor [neurons, subnets]}.  This dict is the whole description of an SDP run
# ---------------------------------------------------------------------------------------------------------------------
# `branches` is what a model tells us: branch name -> (block, neurons, *loads of one neuron), the loads being of any
# kinds: here bytes, FLOPs and activations.  A mask function of your own only has to return such a dict.

def block_masks(branches, subnets, held, seed=0):
    """Every block is held or skipped whole, by exactly `held` of the `subnets`."""
    blocks = list(dict.fromkeys(block for block, *_ in branches.values()))
    cost, size = np.zeros((len(blocks), len(_load(branches)[0]))), np.zeros(len(blocks))
    for (block, neurons, *_), load in zip(branches.values(), _load(branches)):
        cost[blocks.index(block)] += load * neurons
        size[blocks.index(block)] += neurons
    rows = dict(zip(blocks, torch.from_numpy(_balanced_sets(cost, size, subnets, held, seed))))     # at the end of this file
    return {name: rows[block].repeat(neurons, 1) for name, (block, neurons, *_) in branches.items()}


def neuron_masks(branches, subnets, held, seed=0):
    """Every branch is dealt out in equal runs of neurons, run i to the i-th of at most `subnets` holder sets."""
    load = _load(branches)
    total = sum(neurons for _, neurons, *_ in branches.values())
    ones = np.ones((min(subnets, total), 1))
    sets = _balanced_sets(ones, ones[:, 0], subnets, held, seed)     # bool [sets, subnets]
    count = {name: np.full(len(sets), neurons // len(sets)) for name, (_, neurons, *_) in branches.items()}
    burden = sum((sets.T @ count[name])[:, None] * cost for name, cost in zip(branches, load))  # [subnets, kinds]
    # The neurons left over, dearest first, each to the set whose members carry least so far
    for cost, name in sorted(zip(map(tuple, load), branches), reverse=True):
        left = branches[name][1] - count[name].sum()
        for _ in range(left):
            worse = [((burden[members] + cost) ** 2).sum() + 1e9 * (count[name][i] > count[name].min())
                     for i, members in enumerate(sets)]
            i = int(np.argmin(worse))
            count[name][i] += 1
            burden[sets[i]] += cost
    return {name: torch.from_numpy(np.repeat(sets, count[name], axis=0)) for name in branches}


def _load(branches):
    """[branches, kinds]: one neuron's load of each kind, as a fraction of the whole model's."""
    cost = np.array([loads for _, _, *loads in branches.values()], float)
    total = (cost * np.array([[neurons] for _, neurons, *_ in branches.values()])).sum(0)
    return cost / total


def spectral_gap(rows, neurons):
    """Spectral gap 1 - lambda_2 of the random walk subnet -> neuron -> subnet, and the number of connected components.

    rows [n, subnets]: who holds item n; neurons [n]: how many neurons it stands for.  Gap 0: news from some subnet
    never reaches some other through shared neurons.  Gap 1: one step of averaging mixes everybody.
    """
    rows = np.asarray(rows, float)
    walk = (rows * (neurons / rows.sum(1))[:, None]).T @ rows        # [subnets, subnets]
    degree = walk.sum(1)
    walk[degree == 0, degree == 0] = degree[degree == 0] = 1         # a subnet that holds nothing stays where it is
    eigenvalues = np.linalg.eigvalsh(walk / np.sqrt(np.outer(degree, degree)))
    gap = 1 - eigenvalues[-2] if len(eigenvalues) > 1 else 1.0
    return max(0.0, round(gap, 9)), int((eigenvalues > 1 - 1e-9).sum())


def check_masks(masks, branches):
    """Raises ValueError for masks that cannot be trained; returns warnings for masks that can but perhaps should not."""
    if masks.keys() != branches.keys():
        raise ValueError(f"the masks are not of this model: branches {sorted(masks.keys() ^ branches.keys())[:3]} differ")
    subnets, counts = {m.shape[-1] for m in masks.values()}, set()
    for name, mask in masks.items():
        if len(mask) != branches[name][1] or len(subnets) != 1:
            raise ValueError(f"mask of {name}: wanted bool [{branches[name][1]} neurons, subnets], with as many subnets "
                             f"as the other masks, got {mask.dtype} {list(mask.shape)}")
        counts |= set(mask.sum(1).tolist())
    sets, warnings = holder_sets(masks)[0], []
    if len(counts) > 1:
        warnings.append(f"neurons have from {min(counts)} to {max(counts)} holders, so coverage is uneven")
    if len(sets) > subnets.pop():
        warnings.append(f"the masks need {len(sets)} process groups, more than there are subnets")
    if spectral_gap(*rows_of(masks))[1] > 1:
        warnings.append("the subnets fall into separate groups that share no neuron of any branch")
    return warnings


def rows_of(masks):
    """Distinct rows of all masks [n, subnets], and how many neurons have each."""
    rows, neurons = torch.cat(list(masks.values())).unique(dim=0, return_counts=True)
    return rows.numpy(), neurons.numpy()


def loads(masks, branches):
    """[subnets, kinds]: what each subnet carries of the branches, over the mean subnet."""
    load = sum(np.outer(mask.sum(0).numpy(), cost) for mask, cost in zip(masks.values(), _load(branches)))
    return load / load.mean(0)


def picture(masks, branches):
    """The masks as text: branches down (one line for a block that is held whole), subnets across."""
    lines, seen = [], set()
    for name, mask in masks.items():
        block = branches[name][0]
        whole = all(bool((m == mask[0]).all()) for b, m in masks.items() if branches[b][0] == block)
        if whole and block in seen:
            continue
        seen.add(block)
        part = [r.float().mean(0) for r in mask.tensor_split(1 if whole else min(8, len(mask)))]   # each [subnets]
        cells = ["".join("·░▒▓█"[math.ceil(4 * float(p[s]))] for p in part) for s in range(mask.shape[1])]
        lines.append((f"block {block}" if whole else name, " ".join(c * 2 if whole else c for c in cells)))
    margin = max(len(label) for label, _ in lines)
    return "\n".join(f"  {label:{margin}}  {cells}" for label, cells in lines)


# ---------------------------------------------------------------------------------------------------------------------
# Cutting a subnetwork out of the full model, and pasting it back
# ---------------------------------------------------------------------------------------------------------------------
# `layout` is the other thing a model tells us: full parameter name -> (branch or None, dim or None, shape).  Neuron n
# of a branch owns shape[dim] / neurons consecutive rows (or columns) along dim.  dim None: the parameter belongs to the
# branch as a whole (the norm before it).  Branch None: shared, every subnetwork holds it.
#
# A subnet keeps its neurons sorted by holder set (their order inside a branch does not matter: it is a sum), so that
# what it shares with one set of peers is one run of rows of each parameter.  Under backward masking the neurons it does
# not hold are kept likewise, in modules whose path has the part `rest`: a.rest.b.weight is cut from the full a.b.weight.

def holder_sets(masks):
    """All different sets of subnets that hold some neuron, as sorted tuples, and {branch: set number of each neuron}."""
    sets, which = {}, {}
    for name, mask in masks.items():
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise ValueError(f"mask of {name}: wanted bool [neurons, subnets], got {mask.dtype} {list(mask.shape)}")
        if not mask.any(1).all():
            raise ValueError(f"mask of {name}: no subnet holds neuron {int((~mask.any(1)).nonzero()[0])}")
        rows, inverse = mask.unique(dim=0, return_inverse=True)
        number = [sets.setdefault(tuple(row.nonzero().flatten().tolist()), len(sets)) for row in rows]
        which[name] = torch.tensor(number)[inverse]
    return list(sets), which


def held_counts(masks, subnet):
    """{branch: number of neurons the subnet holds}: the sizes to build its model with."""
    return {name: int(mask[:, subnet].sum()) for name, mask in masks.items()}


def branch_scales(masks, subnet):
    """{branch: the number that forward masking multiplies this subnet's branch by}: 1/C where the coverage is C.

    A subnetwork's branch is a part of a sum, and the full model adds up the whole.  Times S/|H_n|, where |H_n| of the S
    subnets hold neuron n, the mean over all subnetworks is the full branch: each neuron is in |H_n| of them, and
    |H_n| * S/|H_n| / S = 1.  Dropout and stochastic depth (arXiv 1603.09382) scale for the same reason.  A branch has one
    number; where its neurons have different numbers of holders, it is the mean over those held here.
    """
    scales = {}
    for branch, mask in masks.items():
        holders = mask.sum(1)[mask[:, subnet]].double()              # of each neuron this subnet holds
        scales[branch] = mask.shape[1] * float((1 / holders).mean()) if len(holders) else 1.0
    return scales


class Slot(NamedTuple):
    """Where a parameter of a subnetwork lies in the full model."""
    full: str                       # name of the full parameter
    dim: int | None                 # dimension that was cut, None: the parameter is whole
    rows: torch.Tensor | None       # its rows in the full parameter along dim
    trains: bool                    # False: frozen here (backward masking), refreshed from a holder


def slots(module, masks, layout, subnet):
    """{parameter name in the subnetwork `module`: Slot}; freezes the parameters that do not train.

    Raises ValueError where module, masks and layout disagree.
    """
    which, out = holder_sets(masks)[1], {}
    for local, p in module.named_parameters():
        full = local.replace(".rest.", ".")
        if full not in layout:
            raise ValueError(f"parameter {full} is not in the layout")
        branch, dim, shape = layout[full]
        if dim is None:
            out[local] = Slot(full, None, None, branch is None or bool(masks[branch][:, subnet].any()))
        else:
            if shape[dim] % len(masks[branch]):
                raise ValueError(f"parameter {full} has {shape[dim]} rows, which {len(masks[branch])} neurons cannot share equally")
            per, frozen = shape[dim] // len(masks[branch]), ".rest." in local
            neurons = which[branch].argsort(stable=True)             # sorted by holder set; of them those held here,
            neurons = neurons[masks[branch][neurons, subnet] != frozen]      # or, for `rest`, those not held
            rows = (neurons[:, None] * per + torch.arange(per)).flatten()
            out[local] = Slot(full, dim, rows, not frozen)
            shape = (*shape[:dim], len(rows), *shape[dim + 1:])
        p.requires_grad_(out[local].trains)
        if p.shape != torch.Size(shape):
            raise ValueError(f"parameter {local} has shape {list(p.shape)}, but by the masks it should be {list(shape)}")
    return out


def cut(full, slot):
    """The part of a full tensor that belongs into `slot`.  Differentiable: its gradient is pasted back."""
    return full if slot.rows is None else full.index_select(slot.dim, slot.rows.to(full.device))


def seeded(*what):
    """A CPU random generator that is a function of `what` alone, on any machine and in any process."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fresh(layout, init, seed):
    """full name -> its initial value.  Depends on (seed, name) alone, so every layout of workers starts from one model."""
    def value(name):
        tensor = torch.empty(layout[name][2])
        with torch.no_grad():
            init(name, tensor, seeded(seed, name))
        return tensor
    return value


def materialize(module, masks, layout, subnet, value, device="cpu"):
    """Gives a subnetwork built on the meta device its weights: value(full name) -> full tensor, one at a time, cut."""
    for local, slot in slots(module, masks, layout, subnet).items():
        put(module, local, cut(value(slot.full), slot).to(device, copy=True), slot.trains)
    return module


def put(module, name, tensor, trains):
    """Makes `tensor` the parameter called `name`."""
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=trains))


# ---------------------------------------------------------------------------------------------------------------------
# One process: the same mathematics without communication, the clearest statement of the method
# ---------------------------------------------------------------------------------------------------------------------

class Simulation:
    """All workers, one after another, in one process: what SubnetDataParallel computes, with its interface.

    modules: the S subnetworks, on the meta device.  value(full name) -> the full parameter's first value.
    """

    def __init__(self, modules, masks, layout, value, workers=None, device="cpu"):
        self.layout, self.masks, self.subnets = layout, masks, len(modules)
        self.size = workers or self.subnets
        self.workers, self.device, self.sent_bytes = list(range(self.size)), torch.device(device), 0
        self.modules, self.slots = modules, [slots(m, masks, layout, s) for s, m in enumerate(modules)]
        self.params = {name: nn.Parameter(value(name).to(device, copy=True)) for name in layout}

    def trained(self):
        return self.params

    def cut(self, local, value):
        return value(local)                                          # parameters are full here

    def run(self, worker, *inputs):
        """Forward pass of one worker.  Its module is a mere shape, run with weights cut from the full ones; in the backward
        pass autograd pastes the gradients back, and adds up those of all workers in the full parameter's .grad."""
        s = worker % self.subnets
        weights = {local: cut(self.params[slot.full] if slot.trains else self.params[slot.full].detach(), slot)
                   for local, slot in self.slots[s].items()}
        return functional_call(self.modules[s], weights, inputs)

    no_sync = nullcontext

    @torch.no_grad()
    def finish(self):
        """Now each gradient is a sum over the workers that hold the parameter: divides it by their number."""
        for name, (branch, dim, shape) in self.layout.items():
            p = self.params[name]
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if branch is None:
                holders = torch.tensor(self.subnets)
            elif dim is None:
                holders = self.masks[branch].any(0).sum()
            else:
                holders = self.masks[branch].sum(1).repeat_interleave(shape[dim] // len(self.masks[branch]))
                holders = holders.view([-1 if d == dim else 1 for d in range(len(shape))])
            p.grad /= (holders * (self.size // self.subnets)).to(self.device)

    def clip_grad_norm(self, max_norm):
        return nn.utils.clip_grad_norm_(self.params.values(), max_norm)

    def refresh(self):
        pass                                                         # frozen weights are cut afresh in every run

    def gather(self, tensors, under=""):
        yield from ((name, tensors[name].detach()) for name in self.layout if name.startswith(under))


# ---------------------------------------------------------------------------------------------------------------------
# Many processes: one subnetwork in each, synchronised by masked all-reduces
# ---------------------------------------------------------------------------------------------------------------------
#
# One step:  backward   buckets of gradients are all-reduced as they become complete, while the rest is still computed
#            finish     waits for the last bucket
#            clip       one scalar over the world
#            step       local: AdamW, or any optimizer that treats every number by itself
#            refresh    backward masking only: new weights, from one holder of each set to those that run them frozen,
#                       which arrive while the next forward pass runs (on gloo)
#
# Bytes.  A ring all-reduce among h workers sends 2 (h-1)/h bytes per byte and worker, which is optimal.  For W = S and
# coverage k/S, per branch byte and worker: a worker holds k/S of it, and sends 2 (k-1)/k for each of them: 2 (k-1)/S.  A
# refresh brings each weight to S-k others, spread over S workers: (S-k)/S.  So forward masking sends 2 (k-1)/S, backward
# masking 2 (k-1)/S + (S-k)/S = (k+S-2)/S, and plain data parallelism 2 (S-1)/S.
#
# Order.  Two workers may share several groups.  If they issued those groups' collectives in different orders, both could
# wait for ever.  So every worker sends its buckets in one global order, and a bucket that is complete early waits its turn.

class Piece(NamedTuple):
    """The rows of one full parameter that one set of subnets holds together, and where this worker has them."""
    full: str
    holders: tuple                  # subnets
    share: float                    # 1/|H_j|
    numel: int
    held: bool                      # does this worker train it?
    local: str | None               # if so, its parameter; else, under backward masking, the frozen one; else None
    dim: int | None = None          # rows start to start + length along dim of it; None: all of it
    start: int = 0
    length: int = 0


class SubnetDataParallel:
    """Wraps the subnetwork of this process, much as DistributedDataParallel wraps a model.

        sync = SubnetDataParallel(subnet, masks, layout)
        loss.backward(); sync.finish(); sync.clip_grad_norm(1.0); optimizer.step(); optimizer.zero_grad(); sync.refresh()

    module: the subnetwork (rank mod S), its weights equal to the other holders' (see `materialize`).  masks and layout as
    above; masks {} is plain data parallelism.  backward: the masking is backward masking.  All of them the same on every
    rank.  bucket_bytes: there is one bucket for each holder set, and once one has so many bytes (or, towards the end, from a
    quarter of it on, as many as its set has yet to send), new ones are begun.  reduce False: leave gradients alone (somebody
    else averages them).  timeout: of the process groups, a timedelta.
    The loss must be the mean over this worker's batch.  Any elementwise optimizer works (SGD, Adam), over `self.trained()`.
    `sent_bytes` is what this worker sends in one update.
    """

    def __init__(self, module, masks, layout, backward=False, bucket_bytes=16 * 2**20, reduce=True, timeout=None):
        self.module, self.layout, self.masks = module, layout, masks
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.subnets = next(iter(masks.values())).shape[1] if masks else 1
        if self.size % self.subnets:
            raise ValueError(f"the number of subnets ({self.subnets}) must divide the number of workers ({self.size})")
        self.subnet, self.workers = self.rank % self.subnets, [self.rank]
        self.slots = slots(module, masks, layout, self.subnet)
        self.params = dict(module.named_parameters())
        # (full name, does it train here?) -> local name: in backward masking a full parameter has a part of each kind
        self._local = {(slot.full, slot.trains): local for local, slot in self.slots.items()}
        self.device, self.dtype = next((p.device, p.dtype) for p in self.params.values())
        if any(p.dtype != self.dtype for p in self.params.values()):
            raise ValueError("all parameters must have one dtype, since they share buckets")
        # Every rank makes the same plan, from masks and layout alone
        self._everyone, (self._sets, self._which) = tuple(range(self.subnets)), holder_sets(masks)
        self._plan_buckets(bucket_bytes)
        self._plan_groups(backward, timeout)
        self.sent_bytes = self._bytes_per_update()
        # NCCL: collectives are issued inside one side stream, so that those of overlapping groups keep their order
        nccl = self.device.type == "cuda" and "nccl" in dist.get_backend_config()
        self._stream = torch.cuda.Stream(self.device) if nccl else None
        self._synchronise, self._coming = reduce, []                 # the latter: messages of a refresh under way
        self._restart()
        ready = weakref.WeakMethod(self._ready)                      # a hook that held self would keep model and groups for ever
        for local, p in self.trained().items():
            p.register_post_accumulate_grad_hook(lambda _, full=self.slots[local].full: ready() and ready()(full))
        self._wait_in_forward()

    def trained(self):
        """{name in the subnetwork: parameter} of what this worker trains."""
        return {local: self.params[local] for local, slot in self.slots.items() if slot.trains}

    def cut(self, local, value):
        """What belongs into the parameter `local`, or its optimizer state: cut from value(full name), a full tensor."""
        return cut(value(self.slots[local].full), self.slots[local])

    def _workers_of(self, subnets):
        return [r for r in range(self.size) if r % self.subnets in subnets]

    def _count(self, subnets):                                       # |H_j|
        return len(subnets) * self.size // self.subnets

    def _pieces(self, full):
        """The pieces of a full parameter: one for each set of subnets that hold some of its rows together."""
        branch, dim, shape = self.layout[full]
        if dim is None:                                              # all who hold a neuron of the branch hold it
            who = self._everyone if branch is None else tuple(self.masks[branch].any(0).nonzero().flatten().tolist())
            sizes = {who: 1}
        else:
            sizes = dict(zip(self._sets, self._which[branch].bincount(minlength=len(self._sets)).tolist()))      # in neurons
        pieces, before = [], {True: 0, False: 0}                     # rows that lie before it in this worker's parameter,
        for who, neurons in sizes.items():                           # where the held ones have one and the frozen ones another
            if neurons:
                held = self.subnet in who
                local = self._local.get((full, held))
                rows = 0 if dim is None else shape[dim] // len(self.masks[branch]) * neurons
                numel = shape.numel() if dim is None else shape.numel() // shape[dim] * rows
                whole = dim is None or local is None or rows == self.params[local].shape[dim]
                pieces.append(Piece(full, who, 1 / self._count(who), numel, held, local, None if whole else dim, before[held], rows))
                before[held] += rows
        return pieces

    def _plan_buckets(self, bucket_bytes):
        """self.buckets: [(set of subnets, its pieces)], all there are, in the order of sending."""
        # A norm is held by all who hold a neuron of its branch.  Where that is none of the holder sets, there is no group for it:
        # the whole world takes part, the others with zeros
        turns = [[(p.holders if p.holders in self._sets else self._everyone, p, p.numel * self.dtype.itemsize)
                  for p in self._pieces(full)] for full in reversed(self.layout)]
        left = Counter()                                             # bytes still to come, of each set of holders
        for group, _, size in chain(*turns):
            left[group] += size
        # Go through the parameters in the order of the backward pass, until one bucket is full; then begin new ones of all sets.
        # (If each waited until it is full itself, the network would idle at first, and have too much to do in the end.)  A bucket is
        # sent when the last of its gradients is there.  The last ones are smaller: little of the backward pass is left to hide them
        window, filled, self.buckets = defaultdict(list), Counter(), []
        for turn, pieces in enumerate(turns):
            for group, piece, size in pieces:
                window[group].append((turn, piece))
                filled[group] += size
                left[group] -= size
            is_full = lambda group: filled[group] >= min(bucket_bytes, max(bucket_bytes / 4, left[group]))
            if any(map(is_full, filled)) or turn == len(turns) - 1:
                ready = sorted(window.items(), key=lambda bucket: bucket[1][-1][0])          # by the turn of their last piece
                self.buckets += [(group, [piece for _, piece in pieces]) for group, pieces in ready]
                window, filled = defaultdict(list), Counter()
        self._mine = [(group, pieces) for group, pieces in self.buckets if self.subnet in group]
        self._places = defaultdict(list)                             # full name -> numbers of my buckets, and of its piece in each
        parts = defaultdict(list)
        for i, (_, pieces) in enumerate(self._mine):
            for j, p in enumerate(pieces):
                if p.held:
                    self._places[p.full].append((i, j))
                    parts[p.local].append(p)
        # For each of my buckets the parameters of which it has the last rows, others having come before
        self._completed = [[] for _ in self._mine]
        for places in self._places.values():
            i, j = places[-1]
            if self._mine[i][1][j].dim is not None:
                self._completed[i].append(self._mine[i][1][j].local)
        # For the norm: of each parameter its pieces, or if all of them have equally many holders, all of it at once
        self._normed = [p for pieces in parts.values() for p in
                        (pieces if len({p.share for p in pieces}) > 1 else [pieces[0]._replace(dim=None)])]

    def _plan_groups(self, backward, timeout):
        """A process group for each holder set and, for backward masking, one of a holder (the root) and all non-holders."""
        # Making a group is itself collective: all ranks make all groups, in the same order
        self._groups, others = {self._everyone: dist.group.WORLD}, {self._everyone: dist.group.WORLD}
        for s in self._sets:
            if s != self._everyone and self._count(s) > 1:
                self._groups[s] = dist.new_group(self._workers_of(s), timeout=timeout)
        roots = self._choose_roots() if backward else {}
        self._refreshes = []                                         # (root, group, pieces) this worker takes part in
        for group, pieces in self.buckets if backward else ():
            # One set of holders, but in buckets of the whole world, where those of norms without a group differ
            for who in dict.fromkeys(p.holders for p in pieces if p.holders != self._everyone):
                members = sorted({roots[who]} | set(range(self.size)) - set(self._workers_of(who)))
                if group not in others:
                    others[group] = dist.new_group(members, timeout=timeout)
                if group == self._everyone or self.rank in members:
                    self._refreshes.append((roots[who], others[group], [p for p in pieces if p.holders == who]))
        self._made = [g for g in (*self._groups.values(), *others.values()) if g is not dist.group.WORLD]

    def _choose_roots(self):
        """{set of holders: the one of its workers that sends the others new weights}."""
        size = Counter()                                             # of all that a set holds, in numbers
        for _, pieces in self.buckets:
            for p in pieces:
                size[p.holders] += p.numel
        refreshed = lambda who: size[who] * (1 - 1 / (self.size - self._count(who) + 1))         # sent by each one in its group
        sends = [sum(size[who] * (2 - 2 / self._count(who)) if r % self.subnets in who else refreshed(who) for who in size)
                 for r in range(self.size)]                          # by each worker, before it is a root
        roots = {}
        for who in sorted(size, key=size.get, reverse=True):
            holders = self._workers_of(who)
            rest, least = set(range(self.size)) - set(holders), min(sends[r] for r in holders)
            # One that has least to send, within 2 %, and of these the nearest to the non-holders: on one host ranks r and n differ
            # in their last bits, so r ^ n is small, and links between hosts are slow
            roots[who] = min((r for r in holders if sends[r] <= 1.02 * least), key=lambda r: sum(r ^ n for n in rest))
            sends[roots[who]] += refreshed(who)
        return roots

    def _bytes_per_update(self):
        """What this worker sends in one update, by the two formulas above: of all-reduces and of refreshes."""
        size = lambda pieces: sum(p.numel for p in pieces) * self.dtype.itemsize
        return (sum(size(pieces) * 2 * (1 - 1 / self._count(group)) for group, pieces in self._mine)
                + sum(size(pieces) * (1 - 1 / dist.get_world_size(group)) for _, group, pieces in self._refreshes))

    def close(self):
        """Ends the process groups that were made for this wrapper.  Collective."""
        self.arrive()
        dist.barrier()                                               # or gloo fails a rank that still connects to a group that ends
        for group in self._made:
            dist.destroy_process_group(group)

    # -- gradients ---------------------------------------------------------------------------------------------------

    @contextmanager
    def no_sync(self):
        """Inside, backward passes only accumulate; the one after synchronises the sum (gradient accumulation)."""
        before, self._synchronise = self._synchronise, False         # not True after: with reduce=False it stays off
        try:
            yield
        finally:
            self._synchronise = before

    def _restart(self):
        self._waiting = {self.slots[local].full for local in self.trained()}     # parameters without a complete gradient
        self._missing = [sum(p.held for p in pieces) for _, pieces in self._mine]    # pieces that each bucket waits for
        self._filling, self._next, self._flying = {}, 0, []          # buckets begun; the next to send; messages under way
        self._rows = {}                                              # gradients in several buckets: local name -> [(piece, view)]

    @torch.no_grad()
    def _ready(self, full):
        """Called by autograd when a parameter's gradient is complete: moves it to its buckets, sends those whose turn has come."""
        if self._synchronise:
            if full not in self._waiting:
                raise RuntimeError("a second backward pass before finish(): put all but the last one under no_sync()")
            self._collect(full)
            while self._next < len(self._mine) and self._missing[self._next] == 0:
                self._send()

    def _collect(self, full):
        self._waiting.remove(full)
        for i, j in self._places[full]:
            if i not in self._filling:
                self._filling[i] = self._bucket(self._mine[i][1])
            piece, new = self._filling[i][1][j]
            part, p = self._part(piece, lambda p: p.grad), self.params[piece.local]
            new = torch.mul(part, piece.share, out=new.view(part.shape))     # 1/|H_j| * g_ij
            self._missing[i] -= 1
            if piece.dim is None:
                p.grad = new                                         # from now on it lives in the bucket
            else:
                self._rows.setdefault(piece.local, []).append((piece, new))
        if piece.dim is not None:                                    # it lives in several; until finish() it is a mere shape
            p.grad = p.new_zeros(()).expand_as(p)

    def _send(self):
        group, pieces = self._mine[self._next]
        flat, views = self._filling.pop(self._next, None) or self._bucket(pieces)
        self._next += 1
        for p, new in views:
            if not p.held:                                           # a norm whose holders have no group: nothing to add
                new.zero_()
        work = None
        if self._count(group) > 1:
            with self._side_stream():
                work = dist.all_reduce(flat, group=self._groups[group], async_op=not self._stream)
        self._flying.append((work, flat))

    @torch.no_grad()
    def finish(self):
        """Waits until every gradient is the average over its holders.  Call it after backward.

        Raises RuntimeError if the forward pass has not waited for the frozen weights that `refresh` asked for.
        """
        late = [piece.full for *_, frozen in self._coming for piece, _ in frozen]
        if late:
            raise RuntimeError(f"{late[0]} was used before it had arrived: the module around it was never called as one, so call "
                               f"arrive() before the forward pass")
        if self._synchronise:
            for local, p in self.trained().items():
                if p.grad is None:                                   # took no part in this step's loss
                    p.grad = torch.zeros_like(p)
                if self.slots[local].full in self._waiting:
                    self._collect(self.slots[local].full)
            while self._next < len(self._mine):
                self._send()
            self._join()
            for completed in self._completed:                        # while the later ones are still under way
                work, _ = self._flying.pop(0)
                if work:                                             # None: nothing to wait for, or the side stream does
                    work.wait()
                for local in completed:
                    views = sorted(self._rows.pop(local), key=lambda view: view[0].start)
                    self.params[local].grad = torch.cat([new for _, new in views], views[0][0].dim)
            self._restart()

    @torch.no_grad()
    def clip_grad_norm(self, max_norm):
        """Scales the gradients so that the *full* model's gradient has at most this norm.  Returns the norm before.

        Each parameter counts once: every one of its h holders adds 1/h of its square, and the world adds up.
        """
        parts = defaultdict(list)                                    # 1/h -> gradients of what h workers hold
        for piece in self._normed:
            parts[piece.share].append(self._part(piece, lambda p: p.grad))
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        for share, grads in parts.items():
            square += nn.utils.get_total_norm(grads).double() ** 2 * share
        dist.all_reduce(square)
        norm = square.sqrt().to(self.dtype)
        nn.utils.clip_grads_with_norm_(self.trained().values(), max_norm, norm)
        return norm

    # -- backward masking: new weights for the frozen neurons --------------------------------------------------------

    @torch.no_grad()
    def refresh(self):
        """Backward masking: asks for the weights that were updated elsewhere.  Forward masking: nothing to do.

        They arrive beside the next forward pass, in which each block waits for its own.  With NCCL all is waited for at once:
        a collective of somebody else's could otherwise meet them in another order on another rank.
        """
        self.arrive()
        with self._side_stream():
            for root, group, pieces in reversed(self._refreshes):    # the first blocks will need theirs first
                flat, views = self._bucket(pieces)
                if self.rank == root:
                    for piece, new in views:
                        part = self._part(piece, lambda p: p.data)
                        new.view(part.shape).copy_(part)
                work = dist.broadcast(flat, root, group, async_op=not self._stream)
                self._coming.append((work, flat, [(p, new) for p, new in views if not p.held]))
                if self._stream:
                    self.arrive()
        self._join()

    @torch.no_grad()
    def arrive(self, left=0):
        """Waits for the weights asked for by `refresh`, until at most `left` messages are still to come."""
        while len(self._coming) > left:
            work, _, frozen = self._coming.pop(0)
            if work:                                                 # None: the side stream keeps the order
                work.wait()
            for piece, new in frozen:
                part = self._part(piece, lambda p: p.data)
                part.copy_(new.view(part.shape))

    def _wait_in_forward(self):
        """Lets every block wait for its frozen weights: the module, that is, which has all of a branch's parameters inside."""
        paths = defaultdict(list)                                    # branch -> [path of a parameter's module, in parts]
        for local, slot in self.slots.items():
            paths[self.layout[slot.full][0]].append(local.split(".")[:-1])
        last = {}                                                    # path of a block -> the last message it needs
        for i, (_, _, pieces) in enumerate(reversed(self._refreshes)):
            for p in pieces:
                if p.local and not p.held:
                    last[".".join(os.path.commonprefix(paths[self.layout[p.full][0]]))] = i
        if self._refreshes:        # what this worker only sends takes memory too: the last block that waits (or the model) waits for all
            last[max(last, key=last.get, default="")] = len(self._refreshes) - 1
        arrive = weakref.WeakMethod(self.arrive)
        for path, i in last.items():
            wait = lambda *_, left=len(self._refreshes) - 1 - i: arrive() and arrive()(left)
            self.module.get_submodule(path).register_forward_pre_hook(wait)

    # -- between parameters and flat buffers -------------------------------------------------------------------------

    def _part(self, piece, of):
        """The piece as a view into this worker's weight or gradient; None if it has no such thing."""
        tensor = piece.local and of(self.params[piece.local])
        return tensor if tensor is None or piece.dim is None else tensor.narrow(piece.dim, piece.start, piece.length)

    def _bucket(self, pieces):
        """A flat tensor, and pairs of a piece and its place in there."""
        flat = torch.empty(sum(p.numel for p in pieces), dtype=self.dtype, device=self.device)
        return flat, list(zip(pieces, flat.split([p.numel for p in pieces])))

    def _side_stream(self):
        if not self._stream:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    def _join(self):
        if self._stream:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    # -- the full model ----------------------------------------------------------------------------------------------

    def run(self, worker, *inputs):
        """Forward pass of worker `worker`, here always this process's; Simulation has the same method."""
        return self.module(*inputs)

    @torch.no_grad()
    def gather(self, tensors, under=""):
        """Yields (full name, full tensor) of the full parameters whose names begin with `under`, one at a time.

        tensors: {name in the subnetwork: tensor of the parameter's shape}: the weights, or optimizer state.  Collective:
        all ranks must call it and exhaust it.  Every holder pastes its rows, the others have zero bytes there, and all
        holders have the same bits, so the maximum over bytes is exactly those bits.
        """
        for full, (branch, dim, shape) in self.layout.items():
            if not full.startswith(under):
                continue
            local = self._local.get((full, True))
            if branch is None:                                       # everybody has it
                yield full, tensors[local].detach()
                continue
            whole = torch.zeros(shape, dtype=self.dtype, device=self.device)
            if local:
                slot = self.slots[local]
                where = ... if dim is None else (slice(None),) * dim + (slot.rows.to(self.device),)
                whole[where] = tensors[local]
            dist.all_reduce(whole.view(torch.uint8), op=dist.ReduceOp.MAX)
            yield full, whole

    @torch.no_grad()
    def check_replicas(self):
        """Raises RuntimeError on every rank unless all holders of each piece of the weights have the same bits."""
        self.arrive()
        # A rank without a piece leaves +2^62 and -2^62, which never win the minimum or the maximum
        low = torch.full((sum(len(p) for _, p in self.buckets),), 2**62, dtype=torch.int64, device=self.device)
        high, pieces = -low, [piece for _, pieces in self.buckets for piece in pieces]
        for i, piece in enumerate(pieces):
            part = self._part(piece, lambda p: p)
            if part is not None:                                     # 62 bits of a sum in which position counts
                total = 0
                for j, some in enumerate(part.contiguous().view(torch.uint8).flatten().split(2**20)):
                    total += (2 * j + 1) * int((some.long() * torch.arange(1, len(some) + 1, device=self.device)).sum())
                low[i] = high[i] = total % 2**62
        dist.all_reduce(low, op=dist.ReduceOp.MIN)
        dist.all_reduce(high, op=dist.ReduceOp.MAX)
        bad = [piece.full for piece, same in zip(pieces, (low == high).tolist()) if not same]
        if bad:
            raise RuntimeError(f"the holders of {bad[0]} (and {len(bad) - 1} other pieces) no longer agree")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluating the full model, which no worker holds
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def stream(sync, full, batches):
    """Runs the full model over `batches`, a list of inputs that it uses up, and yields the outputs.

    full: the full model, its parameters on the meta device, with `stages()`: [(module path, function)].  Only one stage has
    its weights in memory at a time, so that evaluation never needs the full model on a worker.  Collective, like `gather`.
    """
    for path, stage in full.stages():
        for name, weight in sync.gather(sync.params, under=path + "."):
            put(full, name, weight, False)                           # trains: autocast would keep a bf16 copy of every stage
        if path != full.stages()[-1][0]:
            for i, x in enumerate(batches):
                batches[i] = stage(x)
        else:
            yield from map(stage, batches)
        for name, weight in full.get_submodule(path).named_parameters(path):
            put(full, name, weight.to("meta"), False)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing masks: any rule with exactly k holders for every neuron would do; this one balances loads and mixes well
# ---------------------------------------------------------------------------------------------------------------------

def _balanced_sets(cost, size, subnets, held, seed):
    """Gives each of n items (blocks, say) a set of exactly `held` subnets; at most `subnets` different sets.

    cost [n, kinds], size [n] in neurons -> bool [n, subnets].  Simulated annealing on

        largest load/mean over subnets and kinds  +  0.01 * mean square load  -  0.02 * spectral gap
        +  10 * (connected components - 1)

    The weights say what matters: connected first, then balance, then, worth at most 2 % of balance, the gap; the mean
    square only shows the way where the largest load is flat.  No clock, no communication, and rounding before it
    compares: every rank finds the same sets.
    """
    if not 1 <= held <= subnets:
        raise ValueError(f"held must be from 1 to {subnets} (the number of subnets), not {held}")
    rng = np.random.default_rng(seed)
    cost = cost / cost.sum(0) * subnets / held                       # now a subnet's mean load is 1
    # Items beyond the number of sets share one: dearest first, into the lightest bundle
    bundle, bundles = np.zeros(len(cost), int), min(len(cost), subnets)
    weight, neurons = np.zeros((bundles, cost.shape[1])), np.zeros(bundles)
    for item in np.argsort(-cost.max(1), kind="stable"):
        g = bundle[item] = (weight + cost[item]).max(1).argmin()
        weight[g] += cost[item]
        neurons[g] += size[item]
    def energy(sets):
        gap, components = spectral_gap(sets, neurons)
        load = sets.T @ weight                                       # [subnets, kinds], mean 1
        return round(load.max() + 0.01 * (load ** 2).mean() - 0.02 * gap + 10 * (components - 1), 9)

    def start():
        """Dearest bundle first, to the `held` subnets that carry least, equal ones by chance."""
        sets, load = np.zeros((bundles, subnets), bool), np.zeros((subnets, cost.shape[1]))
        for g in np.argsort(-weight.max(1), kind="stable"):
            sets[g, np.argsort((load + weight[g]).max(1) + 1e-6 * rng.random(subnets))[:held]] = True
            load += sets[g][:, None] * weight[g]
        return sets

    answer = best = None
    for _ in range(4 if held < subnets else 1):                      # four times from another start: it can get stuck
        sets = min((start() for _ in range(16)), key=energy)
        now = energy(sets)
        if best is None or now < best:
            answer, best = sets, now
        steps = int(1500 * min(1, (12 / subnets) ** 2)) if held < subnets else 0
        for step, (pick, a, b, i, j, luck) in enumerate(rng.random((steps, 6))):
            # Bundle a gives up holder i and takes j.  a != b: b does the reverse, so nobody's number of bundles changes;
            # a = b: j is any subnet outside.  (All sets have `held` members, so `take` is empty only when `give` is)
            a, b = int(a * bundles), int(b * bundles)
            if pick < 0.3:
                b = a
            give = np.flatnonzero(sets[a] & ~sets[b] if a != b else sets[a])
            take = np.flatnonzero(sets[b] & ~sets[a] if a != b else ~sets[a])
            if not len(give):
                continue
            i, j = give[int(i * len(give))], take[int(j * len(take))]
            trial = sets.copy()
            trial[a, [i, j]] = False, True
            if a != b:
                trial[b, [i, j]] = True, False
            new, temperature = energy(trial), 0.015 * (1 - step / steps)
            if new <= now or luck < math.exp((now - new) / temperature):
                sets, now = trial, new
            if now < best:
                answer, best = sets, now
    return answer[bundle]
