"""
Subnetwork Data Parallelism (SDP): data parallelism in which each worker trains only a part of the model.

There are W workers, each on its own data, and S subnetworks.  Worker r trains subnetwork r mod S.  After each
backward pass, a parameter's gradient is averaged among the workers that hold it:

    g_j  =  1/|H_j|  *  sum over workers i in H_j of  g_ij         H_j: the workers that hold parameter j

No activations are exchanged.  Worked by hand, four neurons and two workers:

    mask [neurons, subnets]     gradient on worker 0     on worker 1        averaged
        1  0                            2                     -                 2
        1  1                            4                     6                 5
        1  1                            1                     3                 2
        0  1                            -                     8                 8

There are two regimes:

                                    forward masking             backward masking
    forward pass                    the subnetwork              the full model
    weights in memory               the subnetwork's            all
    gradients, optimizer state      the subnetwork's            the subnetwork's
    a branch's output               times 1/C (*)               as it is
    gradient, as an estimate
    of the full model's             biased (**)                 unbiased: its mean over the data is right

    (*) C, the coverage, is explained below.  Not where a batch norm follows, which scales anyway
    (**) what goes into a branch, and the gradient that comes back to it, depend on other branches, of which
    the worker has only parts.  And the scale 1/C is in the gradients too, which are averaged over the
    holders alone: so those of scaled branches are about 1/C times the full model's.  (Adam does not mind)

The words:

    branch      the f of a residual x <- x + f(x); its inside is a sum over its neurons
    neuron      the smallest part that is held or not: a head, a hidden unit, a channel
    subnet      the number of a subnetwork, 0 to S-1
    held        a worker holds the neurons of its subnetwork: it trains them
    holders     of a neuron: the subnets that hold it, a sorted tuple, also called a holder set.
                With S = W, which is usual, these are the workers H_j; else W/S workers for each subnet
    coverage    C = number of holders / S
    frozen      under backward masking a worker also has the neurons it does not hold; they do not train there
    local       a parameter's name in this process's module; its full name is the one in the full model
    refresh     workers that hold neurons send the new weights to those that have them frozen

The file has the method four times, each time closer to the machine:

    naive_masked_average    the formula, on full-size tensors
    Simulation              all workers in one process, one after another
    MaskedAllReduce         real workers; after the backward pass, one message for each holder set.
                            You can stop here and have the method
    SubnetDataParallel      what train.py uses: messages leave while the backward pass still runs

Then come `Refresher`, for backward masking alone; `stream`, which evaluates the full model; and `FullModel`,
which gives the simulation all that a training loop calls.  Appendix 1 has more masks, finds balanced ones,
and describes any.  Appendix 2 is about refusals.

Processes talk by collectives of torch.distributed.  A rank is the number of a process, a group is a set of
ranks.  A collective may wait for all ranks of its group, so all must call the same ones in the same order.
all_reduce: each gives a tensor, and each gets the sum.  broadcast: one gives, the others get.  all_to_all:
each sends a different part to each.  With async_op=True a collective returns at once, and the wait() of what
it returned waits for its end.  (On a GPU the host goes on, and the GPU's stream waits.)
"""

import hashlib
import math
import os
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain, product
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.func import functional_call


def naive_masked_average(grad, holds):
    """The formula with full-size tensors.  (Later, no worker stores what it does not hold.)

    grad [neurons, ...] of this worker; holds bool [neurons]: which it holds.  Each neuron has a holder.
    """
    holds = holds.to(grad.dtype).view(-1, *[1] * (grad.dim() - 1))  # [neurons, 1, ...]
    total = grad * holds                                    # zeros from those who do not hold
    count = holds.clone()
    dist.all_reduce(total)                                  # sum over i in H_j of g_ij
    dist.all_reduce(count)                                  # |H_j|
    return total / count


# -----------------------------------------------------------------------------------------------------------
# Masks: {branch: bool tensor [neurons, n_subnets]}, who holds what
# -----------------------------------------------------------------------------------------------------------
# A mask function gets the model's `branches`: branch name -> (block, number of neurons, *costs of one
# neuron).  The costs are weights, FLOPs and activations; only their ratios matter.  `held` is the k
# of the coverage k/S: so many of the `n_subnets` shall hold each neuron.  `balanced_sets` gives each of n
# items a set of `held` subnets, so that all subnets carry about equal costs.  It is in appendix 1, with
# `block_costs`, `neuron_masks`, `ends_masks`, and MASKS, the table of all mask functions.

def block_masks(branches, n_subnets, held, seed=0):
    """Each block is held or skipped whole.  Exactly `held` of the subnets hold it."""
    blocks = list(dict.fromkeys(block for block, *_ in branches.values()))  # each once, in order
    cost, size = block_costs(branches, blocks)              # what each block costs; its neurons
    sets = balanced_sets(cost, size, n_subnets, held, seed)  # bool [blocks, n_subnets]
    return {name: sets[blocks.index(block)].repeat(neurons, 1)
            for name, (block, neurons, *_) in branches.items()}


def count_subnets(masks):
    return next(iter(masks.values())).shape[-1]


def held_counts(masks, subnet):
    """{branch: number of neurons that the subnet holds}: the sizes to build its model with."""
    return {name: int(mask[:, subnet].sum()) for name, mask in masks.items()}


def branch_scales(masks, subnet):
    """{branch: what forward masking multiplies this subnet's branch by}: 1/C where the coverage is C.

    Let each neuron have k holders, as in our masks: it is in k of the S subnetworks.  Times S/k = 1/C, its
    output f_n has the mean k/S * S/k * f_n = f_n over the subnetworks, as in the full model, for one input.
    Dropout and stochastic depth (arXiv 1603.09382) scale for the same reason.  If the neurons of a branch
    have different k, it gets the mean of S/k over those held here, which is not exact.
    """
    scales = {}
    for branch, mask in masks.items():
        count = mask.sum(1)[mask[:, subnet]].double()       # holders of each neuron held here
        scales[branch] = mask.shape[1] * float((1 / count).mean()) if len(count) else 1.0
    return scales


def holder_sets(masks):
    """All different holder sets, and {branch: int tensor [neurons]: the number of each neuron's set}.

    Raises ValueError for what is no mask, and for a neuron without a holder.
    """
    sets = {}                                               # holders -> number
    which = {}
    for name, mask in masks.items():
        if mask.dtype != torch.bool or mask.shape[1:] != (count_subnets(masks),) or not len(mask):
            raise ValueError(f"mask of {name}: wanted bool [neurons, subnets], all of {count_subnets(masks)} "
                             f"subnets, got {mask.dtype} {list(mask.shape)}")
        alone = ~mask.any(1)
        if alone.any():
            raise ValueError(f"mask of {name}: no subnet holds neuron {int(alone.nonzero()[0])}")
        # rows: the mask's different rows, [[0, 1, 1], [1, 0, 1], ...]; inverse: which one each neuron has;
        # numbers: of the rows' sets, in `sets`
        rows, inverse = mask.unique(dim=0, return_inverse=True)
        found = [tuple(row.nonzero().flatten().tolist()) for row in rows]  # [(1, 2), (0, 2), ...]
        numbers = [sets.setdefault(holders, len(sets)) for holders in found]  # a new set gets the next number
        which[name] = torch.tensor(numbers)[inverse]
    return list(sets), which


def branch_holders(mask):
    """The subnets that hold some neuron of the branch.  They hold its norm."""
    return tuple(mask.any(0).nonzero().flatten().tolist())


# -----------------------------------------------------------------------------------------------------------
# Cutting a subnetwork out of the full model
# -----------------------------------------------------------------------------------------------------------
# A model also tells us its `layout`: full parameter name -> (branch or None, dim or None, shape), in
# forward order.  Neuron n of a branch owns shape[dim] / neurons consecutive rows (or columns) along dim.
# dim None: the parameter belongs to the branch as a whole (its norm).  Branch None: shared, all subnets
# hold it (embedding, head).
#
# On real workers, what is averaged with the same workers shall lie together in memory:
#
# 1. A subnetwork has its neurons sorted by holder set.  (A branch is a sum: their order does not matter.)
# 2. Each cut parameter is stored neuron by neuron.  So one that is cut by columns (down_proj) is stored
#    column after column, like a transposed tensor.
# 3. So what one holder set has of a parameter is one stretch of memory: a *piece*.  A second, 1-D parameter
#    is laid over it.  The module computes with the one, the optimizer steps on the other: the numbers are the
#    same.  Averaging, optimizer and refreshes need no dimensions.
#
# An example, with three subnets, six neurons n0 to n5, and two numbers for each:
#
#     mask of n0 to n5                            1 0 1,  1 1 0,  0 1 1,  0 1 1,  1 1 0,  1 0 1
#     holder sets, numbered by `holder_sets`      (1, 2),  (0, 2),  (0, 1)
#     subnet 0 has in memory                      n0 n0 n5 n5                  n1 n1 n4 n4
#     of the set                                  (0, 2)                       (0, 1)
#     two pieces, averaged with                   subnet 2                     subnet 1
#
# Under backward masking, modules whose path has the part `rest` have the frozen neurons: a.rest.b.weight is
# cut from the full model's a.b.weight, and the branch is held(x) + rest(x).

class Slot(NamedTuple):
    """Where a parameter of a subnetwork lies in the full model."""
    name: str                       # of the full parameter
    dim: int | None                 # the dimension that is cut; None: the parameter is whole
    rows: torch.Tensor | None       # which indices along dim it has: rows, or columns if dim is 1
    trains: bool                    # False: frozen here (backward masking)


def find_slots(module, masks, layout, subnet):
    """{parameter name in the subnetwork `module`: Slot}.  Changes nothing.

    Raises ValueError where module, masks and layout disagree.
    """
    _, which = holder_sets(masks)
    found = {}
    for local, p in module.named_parameters():
        path = local.split(".")
        frozen = "rest" in path
        name = ".".join(part for part in path if part != "rest")
        check_place(local, name, frozen, masks, layout)
        branch, dim, shape = layout[name]
        if dim is None:
            # Shared, or a branch's norm, which is there once for held and rest: it trains where a neuron does
            slot = Slot(name, None, None, branch is None or bool(masks[branch][:, subnet].any()))
        else:
            mask = masks[branch]
            neurons = which[branch].argsort(stable=True)    # all of the branch, sorted by holder set
            holds = mask[neurons, subnet]
            neurons = neurons[~holds if frozen else holds]  # in the example: 0, 5, 1, 4
            each = shape[dim] // len(mask)                  # rows of one neuron: 2
            rows = neurons[:, None] * each + torch.arange(each)
            rows = rows.flatten()                           # 0, 1, 10, 11, 2, 3, 8, 9
            slot = Slot(name, dim, rows, not frozen)
            shape = (*shape[:dim], len(rows), *shape[dim + 1:])
        if p.shape != torch.Size(shape):
            raise ValueError(f"parameter {local} has shape {list(p.shape)}, but by the masks {list(shape)}")
        found[local] = slot
    check_module(module, masks, layout, subnet, found)
    return found


def cut(full, slot):
    """The part of a full tensor that belongs into `slot`."""
    if slot.dim is None:
        return full
    return full.index_select(slot.dim, slot.rows.to(full.device))


# -----------------------------------------------------------------------------------------------------------
# The first weights
# -----------------------------------------------------------------------------------------------------------

def seeded(*what):
    """A CPU random generator that is a function of `what` alone, on any machine and in any process."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # below 2^63


def fresh(layout, init, seed):
    """value(full name) -> initial value.  It depends on (seed, name) alone: all masks start from one model.

    init(name, tensor, generator) fills a full tensor in place.
    """
    @torch.no_grad()
    def value(name):
        tensor = torch.empty(layout[name][2])
        init(name, tensor, seeded(seed, name))
        return tensor
    return value


def materialize(module, masks, layout, subnet, value, device="cpu"):
    """Gives a subnetwork built on the meta device its weights, cut from value(full name), one at a time.

    Parameters that are frozen here get requires_grad=False.  Returns the module.  Raises ValueError if a
    buffer is on the meta device too, as nothing says what its value is; and if a parameter that trains here
    has requires_grad=False.
    """
    slots = find_slots(module, masks, layout, subnet)
    check_trains(module, slots)
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            raise ValueError(f"buffer {name} is on the meta device: make constants in forward, or give "
                             f"torch.zeros and the like device='cpu' there")
    made = {}                                               # tied parameters stay tied
    for local, p in list(module.named_parameters(remove_duplicate=False)):
        if p not in made:
            weight = cut(value(slots[local].name), slots[local]).to(device, copy=True)
            made[p] = nn.Parameter(weight, requires_grad=slots[local].trains)
        put(module, local, made[p])
    return module


def put(module, name, parameter):
    """Makes `parameter` the module's parameter called `name`."""
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, parameter)


# -----------------------------------------------------------------------------------------------------------
# All workers in one process: the clearest statement of the method, and what the tests compare with
# -----------------------------------------------------------------------------------------------------------

class Simulation:
    """All workers, one after another, on full parameters.

    modules: the S subnetworks, on the meta device: they have shapes, but no weights.  n_workers: S by
    default.  value(full name) -> the full parameter's first value.  Backward masking needs no refresh here:
    frozen weights are cut anew in each pass.  Raises ValueError if S does not divide the number of workers.
    """

    def __init__(self, modules, masks, layout, value, n_workers=None, device="cpu"):
        self.n_subnets = len(modules)
        self.world = n_workers or self.n_subnets
        check_workers(self.world, self.n_subnets)
        self.workers = list(range(self.world))
        self.device = torch.device(device)
        self.masks = masks
        self.layout = layout
        self.modules = modules
        self.slots = [find_slots(module, masks, layout, subnet) for subnet, module in enumerate(modules)]
        self.full = {name: nn.Parameter(value(name).to(device, copy=True)) for name in layout}

    def forward(self, worker, *inputs):
        """Forward pass of one worker, with weights that are cut from the full ones.

        Autograd knows how they were cut.  So the backward pass pastes their gradients back, and adds up those
        of all workers in the full parameter's .grad.
        """
        subnet = worker % self.n_subnets
        weights = {}
        for local, slot in self.slots[subnet].items():
            p = self.full[slot.name]
            weights[local] = cut(p if slot.trains else p.detach(), slot)
        return functional_call(self.modules[subnet], weights, inputs)  # runs the module with these weights

    @torch.no_grad()
    def finish(self):
        """Each gradient is now a sum over the workers that hold the parameter.  Makes it their mean."""
        for name, p in self.full.items():
            branch, dim, shape = self.layout[name]
            if branch is None:
                count = torch.tensor(self.n_subnets)        # of subnets that hold each entry
            elif dim is None:
                count = self.masks[branch].any(0).sum()
            else:
                # Each neuron's number of holders, for each of its rows, shaped to lie along dim
                count = self.masks[branch].sum(1).repeat_interleave(shape[dim] // len(self.masks[branch]))
                count = count.view([-1 if d == dim else 1 for d in range(len(shape))])
            total = torch.zeros_like(p) if p.grad is None else p.grad  # sum of g_ij
            # Not in place: two parameters' .grad may be one tensor, as autograd makes it for a + b
            p.grad = total / (count * (self.world // self.n_subnets)).to(self.device)  # 1/|H_j| * sum


# -----------------------------------------------------------------------------------------------------------
# Real workers: one process and one subnetwork each
# -----------------------------------------------------------------------------------------------------------

class Piece(NamedTuple):
    """What one holder set has of one parameter, and where it is in this process.

    All its holders have the same bits.  name: of the full parameter; local: the name of this process's
    parameter that has the piece, trained or frozen, or None if it is not here.
    """
    name: str
    holders: tuple                  # subnets
    numel: int
    local: str | None
    param: nn.Parameter | None      # [numel], a view of `local`; if it trains, the optimizer steps on it


def flat(tensor, slot):
    """A parameter's or gradient's numbers, neuron by neuron: 1-D, a view if they lie so, else a copy."""
    return tensor.movedim(slot.dim or 0, 0).reshape(-1)     # None: the parameter is whole


def pieces_of(masks, layout):
    """All pieces of the full model in forward order: (full name, holders, numel).  The same on all ranks.

    In a parameter they are in the order of `holder_sets`, by which `find_slots` has sorted the neurons.
    """
    sets, which = holder_sets(masks)
    everyone = tuple(range(count_subnets(masks)))
    for name, (branch, dim, shape) in layout.items():
        numel = torch.Size(shape).numel()
        if branch is None:
            yield name, everyone, numel
        elif dim is None:
            yield name, branch_holders(masks[branch]), numel
        else:
            neurons = which[branch].bincount(minlength=len(sets)).tolist()
            for holders, n in zip(sets, neurons):
                if n:
                    yield name, holders, numel // len(masks[branch]) * n


def find_pieces(params, slots, masks, layout, subnet):
    """All pieces of the full model in forward order, with their place in this process's module.

    params: its parameters by local name; slots: theirs.  Lays each parameter out neuron by neuron: shapes and
    values stay, the strides change.  Under backward masking a full parameter is split between two parameters
    here, the one that trains and the one in `rest`.  Each piece takes the next `numel` numbers of one of
    them, as `pieces_of` and `find_slots` have the holder sets in the same order.
    """
    here = {}                                               # (full name, trains) -> local, numbers not taken
    for local, slot in slots.items():
        p = params[local]
        dim = slot.dim or 0                                 # this dimension goes outermost in memory:
        p.data = p.data.movedim(dim, 0).contiguous().movedim(0, dim)
        # A view: what the optimizer writes there, the module has.  (Of p.data, autograd would not see it)
        here[slot.name, slot.trains] = local, flat(p.detach(), slot)
    out = []
    for name, holders, numel in pieces_of(masks, layout):
        trains = subnet in holders
        local, numbers = here.get((name, trains), (None, None))
        param = None                                        # forward masking: frozen neurons are not here
        if local is not None:
            param = nn.Parameter(numbers[:numel], requires_grad=trains)
            here[name, trains] = local, numbers[numel:]
        out.append(Piece(name, holders, numel, local, param))
    return out


def make_groups(all_pieces, n_subnets, timeout):
    """{holders: ProcessGroup of the workers that train these subnets}, in the order of the messages.

    The order matters: workers 0 and 1 may share the groups (0, 1) and (0, 1, 2).  If worker 0 began with the
    one and worker 1 with the other, both would wait for ever.  So all workers go through this dict in its
    order, which is the same everywhere, and leave out what is not for them.  Collective: to make a group, all
    ranks must call new_group, and those outside get a mere placeholder.
    """
    world = dist.get_world_size()
    groups = {}
    for piece in all_pieces:
        if piece.holders not in groups:
            workers = [rank for rank in range(world) if rank % n_subnets in piece.holders]
            whole = len(workers) == world
            # WORLD: the group of all ranks, which is there already
            groups[piece.holders] = dist.group.WORLD if whole else dist.new_group(workers, timeout=timeout)
    return groups


def deal_out(gradients, pieces):
    """Makes each piece's part of a 1-D tensor its gradient: views, no copies."""
    for piece, part in zip(pieces, gradients.split([piece.numel for piece in pieces])):
        piece.param.grad = part


class MaskedAllReduce:
    """The method on real workers in its plain form: after the backward pass, one message for each holder set.

        sync = MaskedAllReduce(module, masks, layout)
        optimizer = torch.optim.AdamW([piece.param for piece in sync.pieces])  # views of the module's weights

        loss.backward()
        sync.finish()                                # piece.param.grad is now the average over the holders
        optimizer.step()
        optimizer.zero_grad()
        sync.refresh()                               # backward masking: new weights for frozen neurons

    module: this process's subnetwork, number rank mod S, as `materialize` makes it.  As in DDP, all workers
        begin with the weights of the first holder, and the module must not be moved or converted later.
    backward: is it backward masking?
    timeout: a timedelta, for the process groups that are made here.
    pieces: what this worker trains.  all_pieces: those of the full model, whether they are here or not.

    masks, layout and backward must be the same on every rank, or the ranks wait for ever.  The loss must be
    the mean over this worker's batch.  Parameters in no loss get zeros.  Call no collective of your own
    between backward() and the end of finish(): it could meet another rank's gradients.  Raises ValueError for
    what SDP would train wrongly.
    """

    def __init__(self, module, masks, layout, backward=False, timeout=None):
        self.module = module
        self.masks = masks
        self.layout = layout
        self.backward = backward
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.n_subnets = count_subnets(masks)
        check_workers(self.world, self.n_subnets)
        self.subnet = self.rank % self.n_subnets
        self.slots = find_slots(module, masks, layout, self.subnet)
        self.params = dict(module.named_parameters())
        self.device = next(module.parameters()).device
        self.dtype = next(module.parameters()).dtype
        check_wrap(module, self.slots)
        self.all_pieces = find_pieces(self.params, self.slots, masks, layout, self.subnet)
        check_pieces(self.all_pieces, self.n_subnets, self.subnet, backward)
        self.pieces = [piece for piece in self.all_pieces if self.subnet in piece.holders]
        self.pieces_in = {}                                 # trained parameter -> its pieces, in order
        for piece in self.pieces:
            self.pieces_in.setdefault(piece.local, []).append(piece)
        self.groups = make_groups(self.all_pieces, self.n_subnets, timeout)
        # All workers that have a piece begin with the weights of its first holder.  Under backward masking
        # all workers have all pieces.  (The first worker of subnet s has rank s)
        for piece in self.all_pieces:
            if piece.param is not None:
                group = dist.group.WORLD if backward else self.groups[piece.holders]
                dist.broadcast(piece.param.detach(), src=piece.holders[0], group=group)

    def count_workers(self, holders):
        """|H_j|: W/S workers train each subnet."""
        return len(holders) * self.world // self.n_subnets

    @torch.no_grad()
    def finish(self):
        """Makes every piece's gradient the average over the workers that hold it, after the backward pass."""
        for local in self.pieces_in:
            self._take_gradient(local)
        for holders, group in self.groups.items():          # in the same order on all workers
            pieces = [piece for piece in self.pieces if piece.holders == holders]
            if pieces:                                      # this worker is one of the holders
                message = torch.cat([piece.param.grad for piece in pieces])
                message /= self.count_workers(holders)      # 1/|H_j| * g_ij
                dist.all_reduce(message, group=group)       # sum over i in H_j
                deal_out(message, pieces)

    def _take_gradient(self, local):
        """Moves the gradient of a parameter to its pieces.

        No copy: autograd gives a gradient its parameter's strides, so it lies neuron by neuron too.  (See
        "Default gradient layouts" in the documentation of torch.autograd.  If not, `flat` copies.)  Then the
        parameter's own .grad is None: the next backward pass would add to it, and it would take memory.
        """
        p = self.params[local]
        if not p.requires_grad:
            raise RuntimeError(f"{local} was frozen after it was wrapped, and others wait for its gradient: "
                               f"leave its pieces out of the optimizer instead")
        grad = torch.zeros_like(p) if p.grad is None else p.grad  # None: in no loss of this update
        deal_out(flat(grad, self.slots[local]), self.pieces_in[local])
        p.grad = None

    @torch.no_grad()
    def refresh(self):
        """Backward masking: brings new weights to those who have them frozen.  Forward masking: nothing."""
        for piece in self.all_pieces:
            if self.backward and len(piece.holders) < self.n_subnets:  # some subnet has it frozen
                dist.broadcast(piece.param.detach(), src=piece.holders[0])


# -----------------------------------------------------------------------------------------------------------
# The same, with little waiting and few bytes.  This is what train.py uses
# -----------------------------------------------------------------------------------------------------------

class Bucket(NamedTuple):
    """Pieces with the same holders.  Their gradients travel as one message."""
    holders: tuple
    pieces: list
    share: torch.Tensor             # 1/|H_j|, a tensor: torch.compile would make a program for each float


class SubnetDataParallel(MaskedAllReduce):
    """The same, but messages leave while the backward pass runs, and refreshes arrive in the next forward.

    bucket_bytes: when the pieces of some holder set have so many bytes, new buckets are begun.
    reduce_dtype: of the gradients in messages; torch.bfloat16 halves the bytes.  Replicas stay bit-identical.
    compile: torch.compile what is done with each message before and after it travels.  With a reduce_dtype
        it launches fewer kernels; without one there is nothing to fuse.

    `clip_grad_norm` comes after finish().  The norm that it returns is the same on all ranks: you may skip
    optimizer.step() by that, but not refresh().

    The optimizer steps on pieces (module.parameters() get no gradients).  They are 1-D, so it must treat each
    number by itself, as SGD and Adam do and Adafactor does not.  Weight decay for matrices alone goes by the
    shape in the layout: see `adamw` in train.py.  Use float32 weights, with autocast for bfloat16.  Do not
    use torch.amp.GradScaler: it skips an update on some ranks alone, and replicas differ.  On a GPU, call all
    methods and the module on one stream: the memory of messages belongs to it.
    """

    def __init__(self, module, masks, layout, backward=False, timeout=None, bucket_bytes=25 * 2**20,
                 reduce_dtype=None, compile=False):
        super().__init__(module, masks, layout, backward, timeout)
        module.is_wrapped = True
        self.workers = [self.rank]                          # of this process; a Simulation has all
        self.wire_dtype = reduce_dtype or self.dtype        # of gradients in messages
        self.bucket_bytes = bucket_bytes
        self.buckets = self._plan_buckets()
        self.shares = torch.stack([bucket.share for bucket in self.buckets]).double()
        # dynamic: compiled once, not once for each bucket's length
        self._pack = torch.compile(pack, dynamic=True) if compile else pack
        self._unpack = torch.compile(unpack, dynamic=True) if compile else unpack
        self.refresher = Refresher(self)                    # brings the weights that are frozen here
        self._stale = False                                 # frozen weights wait for refresh()
        self._synchronise = True
        self._restart()
        self._hooks = [self.params[local].register_post_accumulate_grad_hook(partial(self._ready, local))
                       for local in self.pieces_in]
        self._hooks += self.refresher.hook(self)

    def _plan_buckets(self):
        """This worker's buckets, in the order of sending.

        Go through the pieces in forward order, with one open bucket for each holder set.  When one is full,
        begin new ones of all sets: one that stayed open for many layers could leave only when the backward
        pass has come to the first of them.  Say that two pieces fill a bucket, and that layer 1 has pieces
        A1 and B1 of the sets A and B, and so on: the buckets are [A1 A2] [B1], then [B2 B3] [A3], and so on.
        The backward pass comes to the pieces in the opposite order, so the list is reversed.

        All workers make the same list, and each leaves out what is not for it.  So nobody waits for ever:
        take the first message in the list that is not done.  Its holders are done with all messages before
        it, so this is the next one for each of them, and it goes through.
        """
        buckets = []                                        # of all workers
        opened = {}                                         # holders -> open bucket
        filled = Counter()                                  # holders -> bytes in it
        for piece in self.all_pieces:
            holders = piece.holders
            if holders not in opened:
                share = torch.tensor(1 / self.count_workers(holders), dtype=self.dtype, device=self.device)
                opened[holders] = Bucket(holders, [], share)
                buckets.append(opened[holders])
            opened[holders].pieces.append(piece)
            filled[holders] += piece.numel * self.dtype.itemsize
            if filled[holders] >= self.bucket_bytes:        # full: begin new ones of all sets
                opened = {}
                filled = Counter()
        return [bucket for bucket in reversed(buckets) if self.subnet in bucket.holders]

    def _restart(self):
        self.squares = []                                   # sum of squares of each message that has arrived
        self._taken = set()                                 # parameters whose gradient is complete
        self._flying = []                                   # messages under way: of the first buckets

    def forward(self, worker, *inputs):
        """Forward pass of worker `worker`, which is this process's."""
        return self.module(*inputs)

    @contextmanager
    def no_sync(self):
        """Around all micro-steps of an update but the last one, whose backward pass synchronises the sum."""
        outer = self._synchronise                           # False inside of another no_sync()
        self._synchronise = False
        try:
            yield
        finally:
            self._synchronise = outer

    @torch.no_grad()
    def _ready(self, local, _=None):
        """Autograd calls this when a gradient is complete.  Sends the buckets whose turn has come."""
        if not self._synchronise:
            return
        if local in self._taken:
            raise RuntimeError("a second backward pass before finish(): put all but the last under no_sync()")
        self._taken.add(local)
        self._take_gradient(local)
        for bucket in self.buckets[len(self._flying):]:     # those that have not left
            if not all(piece.local in self._taken for piece in bucket.pieces):
                break                                       # or a later one would overtake
            # cat copies even a single piece.  It must: the copy is scaled in place, and p.grad's memory may
            # still be in use, as in x + p[None], where p.grad is a view of x's gradient
            gradients = torch.cat([piece.param.grad for piece in bucket.pieces])
            message = self._pack(gradients, bucket.share, self.wire_dtype)
            work = dist.all_reduce(message, group=self.groups[bucket.holders], async_op=True)
            for piece in bucket.pieces:
                piece.param.grad = None                     # it is in the message: free its memory
            self._flying.append((work, message, bucket))

    @torch.no_grad()
    def finish(self):
        """As in MaskedAllReduce.  Raises RuntimeError where the update would be wrong: see _check_finish."""
        untouched = [local for local in self.pieces_in if local not in self._taken]
        self._check_finish(untouched)
        self.arrive()                                       # weights of branches that did not run
        self._stale = bool(self.refresher.exchanges)
        for local in untouched:                             # no new gradient, but others wait for theirs
            self._ready(local)
        flying = self._flying
        self._restart()                                     # now this update's squares can be collected
        while flying:
            work, message, bucket = flying.pop(0)
            work.wait()                                     # on NCCL the stream waits, not the host
            averages, square = self._unpack(message, self.dtype)
            deal_out(averages, bucket.pieces)
            self.squares.append(square)

    def _check_finish(self, untouched):
        """Raises RuntimeError for an update that would be wrong."""
        if not self._synchronise:
            raise RuntimeError("finish() inside no_sync(): the last micro-step must be outside of it")
        if self._stale:
            raise RuntimeError("frozen weights may be old: backward masking needs refresh() after finish()")
        used = {self.layout[self.slots[local].name][0] for local in self._taken}
        self.refresher.check(used)                          # did a branch run with old weights?
        check_replaced(self.module, self.params, untouched)

    @torch.no_grad()
    def clip_grad_norm(self, max_norm, *scalars):
        """Scales the gradients so that the *full* model's gradient has at most this norm.

        -> float64 tensor [1 + len(scalars)]: the norm before, and the sum over all workers of each scalar
        (the loss, a wish to stop).  All travel in one message.  Each parameter counts once: each of the
        |H_j| workers that hold it adds 1/|H_j| of its square.  If you change gradients after finish(), the
        norm does not notice.
        """
        if len(self.squares) < len(self.buckets):
            raise RuntimeError("call finish() before clip_grad_norm(): the gradients are not averages yet")
        packet = torch.zeros(1 + len(scalars), dtype=torch.float64, device=self.device)
        packet[0] = (torch.stack(self.squares).double() * self.shares).sum()
        for i, scalar in enumerate(scalars, 1):
            packet[i] = scalar
        dist.all_reduce(packet)
        packet[0].sqrt_()
        scale = (max_norm / (packet[0] + 1e-6)).clamp(max=1).to(self.dtype)
        torch._foreach_mul_([piece.param.grad for piece in self.pieces], scale)
        self.squares = []
        return packet

    @torch.no_grad()
    def refresh(self):
        """Backward masking: begins to send and receive updated weights.  Forward masking: nothing.

        Each branch waits for its own in the next forward pass, and the module's (load_)state_dict() for all.
        Call arrive() before you read or write frozen weights in any other way.
        """
        self._stale = False
        self.squares = []                                   # they are of an old update now
        self.refresher.begin()

    def arrive(self):
        """Waits until all weights that refresh() has begun to receive are here."""
        self.refresher.arrive()

    def part_of(self, full, piece):
        """What belongs into piece.param, or into its optimizer state, of a full tensor."""
        slot = self.slots[piece.local]
        pieces = self.pieces_in[piece.local]
        parts = flat(cut(full, slot), slot).split([other.numel for other in pieces])
        return parts[pieces.index(piece)]

    @torch.no_grad()
    def gather(self, tensors=None, under=""):
        """Yields (full name, full tensor), one at a time, for full names that begin with `under`.

        tensors: one for each of self.pieces, in its shape: optimizer states or gradients; default the
        weights.  Clone what you keep: some are views of this worker's memory.  Collective: all ranks must
        exhaust it.  Each holder pastes its rows, the others have zero bytes there.  All holders have the
        same bits, so the maximum over bytes is exactly those bits.
        """
        tensors = tensors or [piece.param for piece in self.pieces]
        parts = defaultdict(list)                           # full name -> its pieces' tensors
        for piece, tensor in zip(self.pieces, tensors):
            parts[piece.name].append(tensor.detach())
        trained = {slot.name: slot for slot in self.slots.values() if slot.trains}
        for name, (branch, dim, shape) in self.layout.items():
            if not name.startswith(under):
                continue
            if branch is None:                              # everybody has it
                yield name, parts[name][0].view(shape)
                continue
            whole = torch.zeros(shape, dtype=tensors[0].dtype, device=self.device)
            if name in trained:
                slot = trained[name]
                part = torch.cat(parts[name])
                if dim is None:
                    whole.copy_(part.view(shape))
                else:
                    rows = whole.movedim(dim, 0)            # a view
                    rows[slot.rows.to(self.device)] = part.view(len(slot.rows), *rows.shape[1:])
            dist.all_reduce(whole.view(-1).view(torch.uint8), op=dist.ReduceOp.MAX)
            yield name, whole

    def ring_sends(self, holders):
        """What a ring all-reduce among h workers sends per number and worker: 2 (h-1)/h.

        The message is cut into h parts.  In h-1 turns each worker sends a part to its neighbour, which adds
        its own.  In h-1 more turns the sums go round.
        """
        return 2 - 2 / self.count_workers(holders)

    @property
    def sent_bytes(self):
        """What this worker sends in one update, in bytes.

        Take W = S and coverage k/S, and count per byte of the full model's branches.  A worker holds k/S of
        them, and sends 2 (k-1)/k for each: 2 (k-1)/S.  A refresh brings each weight to S-k workers, and all
        S share the work: (S-k)/S.  So

            forward masking  2 (k-1)/S
            backward masking  2 (k-1)/S + (S-k)/S  =  (k+S-2)/S
            plain data parallelism  2 (S-1)/S
        """
        reduced = sum(piece.numel * self.ring_sends(piece.holders) for piece in self.pieces)
        return reduced * self.wire_dtype.itemsize + self.refresher.sent * self.dtype.itemsize

    def reset(self):
        """Drops an update, so that you can go on after an exception in the backward pass.  Collective.

        Some ranks may have sent more of its messages than others, and a message needs all its holders.  So
        each rank sends the rest now.  All ranks must call it in the same update: if only one has failed, tell
        the others, or end them.
        """
        self._synchronise = True                            # inside no_sync() too
        for local in self.pieces_in:
            if local not in self._taken:
                self._ready(local)
        for work, *_ in self._flying:
            work.wait()
        self._restart()
        self.refresh()                                      # finish() may have been called
        for p in [*self.params.values(), *(piece.param for piece in self.pieces)]:
            p.grad = None

    def close(self):
        """Removes the hooks and ends the groups, so that the module can be wrapped again.  Collective."""
        self.reset()                                        # after a failed backward pass others may wait
        self.arrive()                                       # or the module would be left with old weights
        for hook in self._hooks:
            hook.remove()
        self.module.is_wrapped = False
        dist.barrier()                                      # a rank that is still at work needs its groups
        for group in self.groups.values():
            if group is not dist.group.WORLD and group is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)


def pack(gradients, share, dtype):
    """A bucket's gradients, 1-D, as they travel: 1/|H_j| * g_ij."""
    return gradients.mul_(share).to(dtype)


def unpack(message, dtype):
    """-> the averages that have arrived, 1-D, and the sum of their squares, which clipping needs."""
    averages = message.to(dtype)
    return averages, torch.dot(averages, averages)


# -----------------------------------------------------------------------------------------------------------
# Refreshing frozen weights: backward masking alone
# -----------------------------------------------------------------------------------------------------------

class Exchange(NamedTuple):
    """One message of a refresh: an all-to-all, in which a worker sends to each other what that one lacks."""
    branches: set                   # it has weights of these
    sends: list                     # for each rank a list of pieces' weights, which this worker sends to it
    gets: list                      # from each rank: frozen pieces' weights


class Refresher:
    """Brings new weights to those who have them frozen, in messages as large as the buckets.

    sync: the SubnetDataParallel it works for.  sent: how many numbers this worker sends in an update.

    Workers 0 to S-1 are a team, S to 2S-1 the next, and so on: a team has all subnets, and refreshes itself.
    So on a host with S devices these weights never leave the host.
    """

    def __init__(self, sync):
        team = sync.rank - sync.subnet                      # its first worker
        limit = sync.bucket_bytes / sync.dtype.itemsize     # numbers, per worker
        self.exchanges = []                                 # in forward order
        size = 0                                            # of the last exchange
        for piece, sender, receiver in plan_refresh(sync):
            if not self.exchanges or size >= limit:
                size = 0
                sends = [[] for _ in range(sync.world)]
                gets = [[] for _ in range(sync.world)]
                self.exchanges.append(Exchange(set(), sends, gets))
            size += piece.numel / sync.n_subnets            # mean per worker
            self.exchanges[-1].branches.add(sync.layout[piece.name][0])
            if sync.subnet == sender:
                sends[team + receiver].append(piece.param.detach())
            elif sync.subnet == receiver:
                gets[team + sender].append(piece.param.detach())
        self.sent = sum(numels(chain(*exchange.sends)) for exchange in self.exchanges)
        self.nothing = torch.empty(0, dtype=sync.dtype, device=sync.device)  # cat needs a tensor
        self._coming = []                                   # exchanges under way
        self._unawaited = set()                             # branches that did not wait for their weights yet

    def begin(self):
        """Begins all exchanges."""
        self.arrive()
        self._unawaited.update(*(exchange.branches for exchange in self.exchanges))
        for exchange in self.exchanges:
            message = torch.cat([self.nothing, *chain(*exchange.sends)])
            send_sizes = [numels(weights) for weights in exchange.sends]
            get_sizes = [numels(weights) for weights in exchange.gets]
            new = message.new_empty(sum(get_sizes))
            work = dist.all_to_all_single(new, message, get_sizes, send_sizes, async_op=True)
            self._coming.append((exchange, work, message, new))  # the message must live until it has gone

    def arrive(self):
        """Waits for all exchanges, for all branches."""
        self._unawaited.clear()
        self._wait(0)

    def _branch_waits(self, branch, left, *_):              # _: what hooks are called with
        self._unawaited.discard(branch)
        self._wait(left)

    @torch.no_grad()
    def _wait(self, left, *_):
        """Waits for exchanges, the oldest first, until at most `left` are under way."""
        while len(self._coming) > left:
            exchange, work, _, new = self._coming.pop(0)
            work.wait()                                     # on NCCL the stream waits, not the host
            weights = list(chain(*exchange.gets))
            if weights:
                torch._foreach_copy_(weights, new.split([weight.numel() for weight in weights]))

    def hook(self, sync):
        """Lets each branch wait for its weights, in the module that has all of its parameters.  -> hooks"""
        if not self.exchanges:
            return []
        hooks = [sync.module.register_state_dict_pre_hook(partial(self._wait, 0)),
                 sync.module.register_load_state_dict_pre_hook(partial(self._wait, 0))]
        for i, exchange in enumerate(self.exchanges):
            left = len(self.exchanges) - 1 - i              # so many later ones may still be under way
            for branch in exchange.branches:
                paths = [local.split(".")[:-1] for local, slot in sync.slots.items()
                         if sync.layout[slot.name][0] == branch]
                # The innermost module around the branch is what all paths begin with:
                # layers.3.mlp.up, layers.3.rest.mlp.up, layers.3.norm -> layers.3
                common = os.path.commonprefix(paths)        # (of lists of names)
                if "rest" in common:                        # it may never be called as a module
                    common = common[:common.index("rest")]
                module = sync.module.get_submodule(".".join(common))
                hooks.append(module.register_forward_pre_hook(partial(self._branch_waits, branch, left)))
        return hooks

    def check(self, used):
        """Raises RuntimeError if one of the branches `used` did not wait for its weights."""
        early = used & self._unawaited
        if early:
            raise RuntimeError(f"branch {min(early)} did not wait for its weights: the module around it was "
                               f"never called as one; call arrive() before the forward pass")


def plan_refresh(sync):
    """Yields (piece, subnet that sends it, subnet that lacks it).  All subnets send about as much."""
    pieces = sync.all_pieces if sync.backward else []       # forward masking: nothing is frozen
    load = Counter()                                        # numbers that each subnet sends, averaging too
    for piece in pieces:
        for subnet in piece.holders:
            load[subnet] += piece.numel * sync.ring_sends(piece.holders)
    for piece, receiver in product(pieces, range(sync.n_subnets)):
        if receiver not in piece.holders:
            sender = min(piece.holders, key=load.__getitem__)  # that with least to send so far
            load[sender] += piece.numel
            yield piece, sender, receiver


def numels(tensors):
    return sum(tensor.numel() for tensor in tensors)


# -----------------------------------------------------------------------------------------------------------
# Evaluating the full model, which no worker holds
# -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def stream(sync, full, batches):
    """Runs the full model over `batches`, a list of inputs, and yields the outputs.  Overwrites the list.

    full: the full model, its parameters on the meta device, with `stages()`: [(path, module)], a chain.
    Only one stage has its weights in memory at a time, so evaluation never needs the full model on a
    worker.  Collective, like `gather`.
    """
    last, _ = full.stages()[-1]
    for path, stage in full.stages():
        for name, weight in sync.gather(under=path + "."):
            put(full, name, nn.Parameter(weight, requires_grad=False))  # or autocast keeps a copy of each
        for name, weight in full.get_submodule(path).named_parameters(path):
            if weight.is_meta:
                raise ValueError(f"{name} is not in the layout, perhaps as it is tied: nobody can gather it")
        if path == last:
            yield from map(stage, batches)
        else:
            for i, x in enumerate(batches):
                batches[i] = stage(x)
        for name, weight in full.get_submodule(path).named_parameters(path):
            put(full, name, nn.Parameter(weight.to("meta"), requires_grad=False))


# -----------------------------------------------------------------------------------------------------------
# Where the full model is at hand: the simulation, and torch's own DDP (in train.py)
# -----------------------------------------------------------------------------------------------------------

class FullModel:
    """The rest of SubnetDataParallel's interface, where no weights have to be sent or gathered.

    So one training loop serves all.  self.full: {full name: parameter}; self.device: where they are.
    """
    no_sync = nullcontext
    sent_bytes = 0

    @property
    def pieces(self):
        """What the optimizer steps on: here whole parameters."""
        return [Piece(name, (), p.numel(), name, p) for name, p in self.full.items()]

    def clip_grad_norm(self, max_norm, *scalars):
        """-> float64 [1 + len(scalars)]: the norm before clipping, and scalars, which are sums already."""
        packet = torch.zeros(1 + len(scalars), dtype=torch.float64, device=self.device)
        packet[0] = nn.utils.clip_grad_norm_(self.full.values(), max_norm)
        for i, scalar in enumerate(scalars, 1):
            packet[i] = scalar
        return packet

    def refresh(self):
        """Nothing is frozen here.  (The simulation cuts frozen weights afresh in every pass.)"""

    def close(self):
        """Nothing of ours has to be ended."""

    def part_of(self, full, piece):
        """All of it: pieces are whole parameters."""
        return full

    def gather(self, tensors=None, under=""):
        """Yields (full name, full tensor), for names that begin with `under`."""
        for name, tensor in zip(self.full, tensors or self.full.values()):
            if name.startswith(under):
                yield name, tensor.detach()


class SimulatedDataParallel(FullModel, Simulation):
    """A simulation with the interface of SubnetDataParallel, to train with."""


# -----------------------------------------------------------------------------------------------------------
# Appendix 1: finding masks with balanced loads, and describing any.  (Any masks can be trained.)
# -----------------------------------------------------------------------------------------------------------

def neuron_masks(branches, n_subnets, held, seed=0):
    """The neurons are dealt to at most `n_subnets` holder sets in turn, like cards.

    First those of all branches with one cost (attention), then those of the next (MLP).  A branch goes on
    where the one before has ended, so branches with few neurons are balanced too.
    """
    total = sum(neurons for _, neurons, *_ in branches.values())
    ones = np.ones(min(n_subnets, total))                   # all sets cost the same
    sets = balanced_sets(ones[:, None], ones, n_subnets, held, seed)  # bool [sets, n_subnets]
    costs = {name: of_one for name, (_, _, *of_one) in branches.items()}
    masks = {}
    dealt = 0                                               # neurons, as cards are: to the sets in turn
    for name in sorted(branches, key=costs.get):
        neurons = branches[name][1]
        turns = (dealt + torch.arange(neurons)) % len(sets)
        masks[name] = sets[turns.sort().values]             # sorted, for a picture that people can read
        dealt += neurons
    return {name: masks[name] for name in branches}


def ends_masks(branches, n_subnets, held, seed=0):
    """As at neuron level, but all subnets hold both ends: the first block and the last."""
    blocks = [block for block, *_ in branches.values()]
    ends = min(blocks), max(blocks)
    inner = {name: branch for name, branch in branches.items() if branch[0] not in ends}
    masks = neuron_masks(inner, n_subnets, held, seed) if inner else {}
    all_hold = torch.ones(1, n_subnets, dtype=torch.bool)
    return {name: masks[name] if name in inner else all_hold.repeat(neurons, 1)
            for name, (_, neurons, *_) in branches.items()}


MASKS = {"block": block_masks, "ends": ends_masks, "neuron": neuron_masks}  # --level; add yours


def block_costs(branches, blocks):
    """What each block costs, [blocks, kinds], and how many neurons it has, [blocks]."""
    kinds = max(len(costs) for _, _, *costs in branches.values())
    cost = np.zeros((len(blocks), kinds))
    size = np.zeros(len(blocks))
    for block, neurons, *costs in branches.values():
        cost[blocks.index(block)] += neurons * np.array(costs)
        size[blocks.index(block)] += neurons
    return cost, size


def rows_of(masks):
    """Distinct rows of all masks [n, n_subnets], and how many neurons have each [n]."""
    rows, neurons = torch.cat(list(masks.values())).unique(dim=0, return_counts=True)
    return rows.numpy(), neurons.numpy()


def spectral_gap(rows, neurons):
    """How well news spreads among the subnets: spectral gap, and number of connected components.

    rows [n, n_subnets]: who holds item n; neurons [n]: how many neurons it stands for.  The gap is 1 -
    lambda_2 of the random walk subnet -> neuron -> subnet.  Gap 0: some subnet never hears of some other
    through shared neurons.  Gap 1: one step mixes all.  (The paper's convergence proof uses such a gap.)
    """
    rows = np.asarray(rows, float)
    # How many neurons carry news from subnet i to j.  Over the square roots of both degrees it is symmetric
    # and has the eigenvalues of the walk
    walk = (rows * (neurons / rows.sum(1))[:, None]).T @ rows  # [n_subnets, n_subnets]
    degree = walk.sum(1)
    alone = degree == 0                                     # a subnet that holds nothing stays where it is
    walk[alone, alone] = 1
    degree[alone] = 1
    eigenvalues = np.linalg.eigvalsh(walk / np.sqrt(np.outer(degree, degree)))
    gap = 1 - eigenvalues[-2] if len(eigenvalues) > 1 else 1.0
    return max(0.0, round(gap, 9)), int((eigenvalues > 1 - 1e-9).sum())


def picture(masks, branches):
    """The masks as text: branches down (one line for a block that is held whole), subnets across."""
    lines = {}                                              # label -> one cell for each subnet
    for name, mask in masks.items():
        block = branches[name][0]
        whole = all(bool((m == mask[0]).all()) for branch, m in masks.items() if branches[branch][0] == block)
        parts = mask.float().tensor_split(1 if whole else min(8, len(mask)))
        held = torch.stack([part.mean(0) for part in parts], dim=1)  # [n_subnets, parts], 0 to 1
        cells = ["".join("·░▒▓█"[math.ceil(4 * part)] for part in row) for row in held.tolist()]
        lines[f"block {block}" if whole else name] = " ".join(cell * 2 if whole else cell for cell in cells)
    margin = max(map(len, lines))
    return "\n".join(f"  {label:{margin}}  {cells}" for label, cells in lines.items())


def balanced_sets(cost, size, n_subnets, held, seed):
    """Gives each of n items (blocks, say) a set of `held` subnets; at most `n_subnets` different sets.

    cost [n, kinds], size [n] in neurons -> bool tensor [n, n_subnets].  Any sets can be trained.  The search
    looks for some that make this small:

        10 (components - 1)  +  largest load / mean  +  0.01 (mean square load)  -  0.02 (spectral gap)

    The factors say what matters: connected first, then balance, then the gap.  The search begins four times,
    each time with sets that follow one another round a ring.  It tries random exchanges and keeps those that
    do not make the sum larger.  At most S sets, as each costs a process group.  All ranks find the same sets,
    as sums are rounded before they are compared.
    """
    if not 1 <= held <= n_subnets:
        raise ValueError(f"held must be from 1 to {n_subnets} (the number of subnets), not {held}")
    if held == n_subnets:
        return torch.ones(len(cost), n_subnets, dtype=torch.bool)
    rng = np.random.default_rng(seed)
    total = cost.sum(0)
    cost = cost / np.where(total, total, 1) * n_subnets / held  # now a subnet's mean load is 1
    # Items beyond the number of sets share one, in a bundle: dearest first, into the cheapest bundle
    bundles = min(len(cost), n_subnets)
    bundle = np.zeros(len(cost), int)                       # of each item
    bundle_cost = np.zeros((bundles, cost.shape[1]))
    for item in np.argsort(-cost.max(1), kind="stable"):
        bundle[item] = (bundle_cost + cost[item]).max(1).argmin()
        bundle_cost[bundle[item]] += cost[item]
    neurons = np.bincount(bundle, size)

    def badness(sets):
        gap, components = spectral_gap(sets, neurons)
        load = sets.T @ bundle_cost                         # [n_subnets, kinds], mean 1
        return round(10 * (components - 1) + load.max() + 0.01 * (load ** 2).mean() - 0.02 * gap, 9)

    found = []
    for _ in range(4):                                      # a search can get stuck
        ring = rng.permutation(n_subnets)
        places = held * np.arange(bundles)[:, None] + np.arange(held)  # a set begins where the last one ends
        sets = np.zeros((bundles, n_subnets), bool)
        np.put_along_axis(sets, ring[places % n_subnets], True, axis=1)
        bad = badness(sets)
        for _ in range(round(500 * min(1, (12 / n_subnets) ** 2))):  # large S: fewer, as each takes longer
            i, j = rng.choice(n_subnets, 2, replace=False)
            gives = np.flatnonzero(sets[:, i] & ~sets[:, j])  # bundles that i can give to j
            takes = np.flatnonzero(sets[:, j] & ~sets[:, i])
            trial = sets.copy()
            if len(gives):
                trial[rng.choice(gives), [i, j]] = False, True
            if len(takes) and rng.random() < 0.7:           # mostly an exchange: the numbers of bundles stay
                trial[rng.choice(takes), [i, j]] = True, False
            new = badness(trial)
            if new <= bad:
                sets, bad = trial, new
        found.append((bad, sets))
    _, sets = min(found, key=itemgetter(0))
    return torch.from_numpy(sets[bundle])


# -----------------------------------------------------------------------------------------------------------
# Appendix 2: what we refuse, because it would be trained wrongly
# -----------------------------------------------------------------------------------------------------------

def check_masks(masks, branches):
    """Raises ValueError for masks that cannot be trained.  Returns warnings for odd ones."""
    if masks.keys() != branches.keys():
        odd = sorted(masks.keys() ^ branches.keys())
        raise ValueError(f"the masks are not of this model: branches {odd[:3]} differ")
    n_subnets = count_subnets(masks)
    for name, mask in masks.items():
        if len(mask) != branches[name][1]:
            raise ValueError(f"mask of {name}: wanted {branches[name][1]} neurons, got {len(mask)}")
    sets, _ = holder_sets(masks)
    sizes = {len(holders) for holders in sets}
    warnings = []
    if len(sizes) > 1:
        warnings.append(f"neurons have from {min(sizes)} to {max(sizes)} holders, so coverage is uneven")
    groups = {*sets, *(branch_holders(mask) for mask in masks.values())} - {tuple(range(n_subnets))}
    if len(groups) > n_subnets:
        warnings.append(f"the masks need {len(groups)} process groups, more than there are subnets")
    if spectral_gap(*rows_of(masks))[1] > 1:
        warnings.append("the subnets fall into separate groups that share no neuron of any branch")
    return warnings


def check_place(local, name, frozen, masks, layout):
    """Raises ValueError unless the layout says where the parameter `local` lies in the full one, `name`."""
    if name not in layout:
        raise ValueError(f"parameter {name} is not in the layout: add it (branch None if all hold it)")
    branch, dim, shape = layout[name]
    if dim is None and frozen:
        raise ValueError(f"parameter {local} belongs to its branch as a whole, and `rest` would add it "
                         f"again: add it once, outside of held and rest")
    if dim is not None and shape[dim] % len(masks[branch]):
        raise ValueError(f"{name} has {shape[dim]} rows, which {len(masks[branch])} neurons, as many as the "
                         f"mask of {branch} has, cannot share")


def check_module(module, masks, layout, subnet, found):
    """Raises ValueError for what the module lacks, ties or keeps so that SDP would train it wrongly."""
    trained = {slot.name for slot in found.values() if slot.trains}
    for name, holders, _ in pieces_of(masks, layout):
        if subnet in holders and name not in trained:
            raise ValueError(f"subnet {subnet} holds {name}, but the module does not have it (of tied "
                             f"parameters only the first name belongs into the layout, with branch None)")
    first_name = {p: local for local, p in module.named_parameters()}
    everything = dict(module.named_parameters(remove_duplicate=False))
    for alias, p in everything.items():
        first = first_name[p]
        if alias != first and layout[found[first].name][0] is not None:
            raise ValueError(f"{first} and {alias} are tied in a branch: only shared ones can be")
    for buffer in module.state_dict().keys() - everything.keys():
        raise ValueError(f"buffer {buffer} is state that nobody averages: register a constant with "
                         f"persistent=False, and batch norms with track_running_stats=False")


def check_pieces(all_pieces, n_subnets, subnet, backward):
    """Raises ValueError if some subnet holds nothing, or the module was built for the other regime."""
    if len(set(chain(*(piece.holders for piece in all_pieces)))) < n_subnets:
        raise ValueError("a subnet holds nothing at all: give it some neurons, or leave it out of the masks")
    for piece in all_pieces:
        if subnet not in piece.holders:
            if backward and piece.param is None:
                raise ValueError(f"backward masking: the module lacks the neurons of {piece.name} that this "
                                 f"worker does not hold (`rest`)")
            if not backward and piece.param is not None:
                raise ValueError(f"forward masking: the module has neurons of {piece.name} that this worker "
                                 f"does not hold (`rest`); they need backward=True")


def check_workers(world, n_subnets):
    """Raises ValueError if the workers cannot be dealt out to the subnets evenly."""
    if world % n_subnets:
        raise ValueError(f"{n_subnets} subnets do not divide the number of workers, {world}")


def check_trains(module, slots):
    """Raises ValueError for a parameter that trains here and has requires_grad=False."""
    for local, p in module.named_parameters():
        if slots[local].trains and not p.requires_grad:
            raise ValueError(f"{local} has requires_grad=False, but this worker trains it: leave its "
                             f"pieces out of the optimizer instead")


def check_replaced(module, params, names):
    """Raises RuntimeError if one of these parameters is not the one that was wrapped."""
    now = dict(module.named_parameters()) if names else {}
    for local in names:
        if now.get(local, params[local]) is not params[local]:
            raise RuntimeError(f"{local} was replaced after it was wrapped, as by load_state_dict() with "
                               f"assign=True: load without it")


def check_wrap(module, slots):
    """Raises for a module that is not ready to be wrapped."""
    if getattr(module, "is_wrapped", False):
        raise ValueError("the module is wrapped already: close() the first wrapper before the second")
    check_trains(module, slots)
    first = next(module.parameters())
    for local, p in module.named_parameters():
        if p.dtype != first.dtype or p.device != first.device:
            raise ValueError("all parameters must have one dtype and one device: they share messages")
        if p.requires_grad and not slots[local].trains:
            raise ValueError(f"{local} has requires_grad=True, but it is frozen here: use materialize()")
    # Overlapping groups communicate at the same time, each on a stream of its own.  That is safe if the GPU
    # begins their kernels in the order in which the host issued them, which NCCL promises from 2.26 on, if
    # this variable says so before the first communicator is made.  (With a CUDA older than 12.3 it does so by
    # running them one after another)
    if first.device.type == "cuda" and "nccl" in dist.get_backend_config():
        if torch.cuda.nccl.version() < (2, 26) or os.environ.get("NCCL_LAUNCH_ORDER_IMPLICIT") != "1":
            raise RuntimeError("overlapping NCCL groups can deadlock: this needs NCCL 2.26 or later, and "
                               "NCCL_LAUNCH_ORDER_IMPLICIT=1 set before init_process_group")
