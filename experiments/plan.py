"""
What will a worker need?  Memory, FLOPs and bytes of every variant, on fake tensors; no GPU is needed.

    python experiments/plan.py --model llama-1b --subnets 8

One update of each variant runs on tensors that are mere shapes, under torch's fake process group, and torch's
memory tracker looks on.  Each figure is that of the worker with most.  The rows are appended to
experiments/results/plan.jsonl.
"""

import argparse
import json
import sys
import time
import warnings
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fake_collectives import CollectiveOp
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed._tools.mod_tracker import ModTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

import data
import sdp
import train
from train import say

VARIANTS = {                                                         # name -> the flags that make it
    "ddp": dict(parallel="ddp"),
    "ddp-bf16-hook": dict(parallel="ddp", reduce_dtype="bf16"),      # only with --dtype bf16
    "ddp-zero1": dict(parallel="ddp", zero1=True),                   # optimizer state is dealt out
    "ddp-checkpoint": dict(parallel="ddp", checkpoint_activations=True),
    "fsdp": dict(parallel="fsdp"),
    "fsdp-zero2": dict(parallel="fsdp-zero2"),  # keeps the gathered weights until the backward pass
    "sdp at coverage 1": dict(parallel="sdp", masking="forward", full=True),
    "sdp-forward-block": dict(parallel="sdp", masking="forward", level="block"),
    "sdp-forward-neuron": dict(parallel="sdp", masking="forward", level="neuron"),
    "sdp-forward-checkpoint": dict(parallel="sdp", masking="forward", level="block",
                                   checkpoint_activations=True),
    "sdp-backward-block": dict(parallel="sdp", masking="backward", level="block"),
    "sdp-backward-neuron": dict(parallel="sdp", masking="backward", level="neuron"),
}


def flags(description, results):
    """The flags that plan.py and bench.py share."""
    p = train.shared_flags(description)
    p.set_defaults(parallel="sdp", masking="forward", steps=None, eval_every=None, zero1=False)
    path = HERE / "results" / results
    p.add_argument("--results", type=Path, default=path, help="rows are appended there [%(default)s]")
    return p


def changed(args, **flags):
    return argparse.Namespace(**{**vars(args), **flags})


def designs(args, config):
    """{name of a variant: its Design}"""
    made = {}
    for name, its in VARIANTS.items():
        if name == "ddp-bf16-hook" and args.dtype != "bf16":
            continue
        its = dict(its)
        if its.pop("full", False):
            its["coverage"] = f"{args.subnets}/{args.subnets}"
        made[name] = train.Design(changed(args, **its), config)
    return made


# -- FSDP2, and what looks on --------------------------------------------------------------------------------

class Sharded:
    """FSDP2 with the interface of sdp.SubnetDataParallel as far as it is needed here.

    Each block is a group of its own, and so are what lies before the blocks and what lies behind them.
    bf16: weights are gathered and gradients reduced in bfloat16.  reshard: a block's gathered weights are
    freed after its forward pass and gathered once more for the backward pass (ZeRO-3); otherwise they stay
    (ZeRO-2).  Gradients are reduced in every micro-step, as they do not fit whole.
    """

    no_sync = nullcontext

    def __init__(self, model, mesh, reshard, bf16):
        self.device, self.workers = next(model.parameters()).device, [dist.get_rank()]
        self.world, self.module = dist.get_world_size(), model
        for p in model.parameters():
            p.data = p.data.contiguous()                             # sdp.cut had laid it out by neurons
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if bf16 else MixedPrecisionPolicy()
        paths = [path for path, _ in model.stages()]
        blocks = [path for path in paths if "layer" in path]
        before, behind = paths[:paths.index(blocks[0])], paths[paths.index(blocks[-1]) + 1:]
        for group in (before, *([path] for path in blocks), behind):
            modules = [model.get_submodule(path) for path in group]
            # What lies behind the blocks is needed again at once: to free it would only cost a message
            free = reshard and group != behind
            fully_shard(modules, mesh=mesh, reshard_after_forward=free, mp_policy=policy)
        # The loss runs the head once for each chunk of logits: its weights stay until the last chunk is done
        self.behind = [model.get_submodule(path) for path in behind]
        for module in self.behind:
            module.set_reshard_after_backward(False, recurse=False)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        self.pieces = [sdp.Piece(name, (0,), p.numel(), name, p) for name, p in model.named_parameters()]

    def forward(self, worker, *inputs):
        return self.module(*inputs)

    def clip_grad_norm(self, max_norm, *scalars):
        return nn.utils.clip_grad_norm_(self.module.parameters(), max_norm)

    def finish(self):
        for module in self.behind:
            module.reshard()                                         # all else its own hooks do

    def refresh(self):
        pass

    close = refresh


class SentBytes(TorchDispatchMode):
    """Counts what this worker sends in the collectives issued inside, each by an optimal (ring) algorithm.

    Among n workers that is (n-1)/n of a tensor's bytes, and twice that for an all-reduce.  Packets of a few
    numbers are not counted.
    """

    TIMES = {torch.ops.c10d.allreduce_.default: 2, torch.ops.c10d.broadcast_.default: 1,
             torch.ops.c10d._allgather_base_.default: 1, torch.ops.c10d._reduce_scatter_base_.default: 1}
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in self.TIMES:
            size = CollectiveOp.get_comm_tensor_size(func, result, args, kwargs)
            n = CollectiveOp.get_process_group(func, args).size()
            self.total += self.TIMES[func] * size * (n - 1) / n if size > 64 else 0
        elif func is torch.ops.c10d.alltoall_base_.default:  # (what comes, what goes, ...); nothing to itself
            self.total += args[1].nbytes
        return result


class Tracker(MemTracker):
    """torch's memory tracker, but for models with frozen parameters too, and without its hooks on modules.

    They take most of the time, and leave cycles of references in which a model lives for ever.
    """

    class NoModules(ModTracker):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def __init__(self):
        super().__init__()
        self._mod_tracker = self.NoModules()

    def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
        for p in module.parameters():
            if not p.requires_grad:                                  # has no gradient to hook
                nothing = RemovableHandle(OrderedDict())
                self._param_to_grad_hook_handles[p] = nothing, nothing
        return super()._track_module_params_and_buffers(module, install_grad_hooks)


def loads(masks, branches):
    """[n_subnets, kinds]: what each subnet carries of the branches, over the mean subnet."""
    load = sum(np.outer(mask.sum(0).numpy(), branches[name][2:]) for name, mask in masks.items())
    return load / load.mean(0)


@contextmanager
def alone(rank, world):
    """Makes this process worker `rank` of `world` without the others: a fake group takes every message."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    real = dist.all_to_all_single

    def all_to_all(new, message, get_sizes, send_sizes, **options):
        if len(message) or not len(new):                             # the fake group refuses to send nothing
            return real(new, message, get_sizes, send_sizes, **options)
        return real(new, torch.empty_like(new), get_sizes, get_sizes, **options)

    dist.all_to_all_single = all_to_all
    try:
        yield
    finally:
        dist.all_to_all_single = real
        dist.destroy_process_group()


def hook_without_peers(_, bucket):
    """DDP's communication hook under the fake process group, whose own results DDP cannot read."""
    dist.all_reduce(bucket.buffer())
    return done(bucket.buffer())


def bf16_hook_without_peers(_, bucket):
    message = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
    dist.all_reduce(message)
    return done(bucket.buffer().copy_(message))


def done(tensor):
    future = torch.futures.Future()
    future.set_result(tensor)
    return future


# -- One update of one worker --------------------------------------------------------------------------------

def fake_model(design, rank, device, fake):
    """The model of a worker, as fake tensors on the device.  Masks are real, only weights are fake."""
    def value(name):
        with fake:
            return torch.empty(design.layout[name][2], device=device)
    subnet = rank % design.n_subnets
    return sdp.materialize(design.model(subnet), design.masks, design.layout, subnet, value, device)


def wrap(design, module):
    """-> sync, optimizer.  Masks, and what is planned from them, are real even where the model is fake."""
    args = design.args
    alone_here = dist.get_backend() == "fake"
    if args.parallel.startswith("fsdp"):
        with unset_fake_temporarily():
            mesh = init_device_mesh(next(module.parameters()).device.type, (dist.get_world_size(),))
        sync = Sharded(module, mesh, args.parallel == "fsdp", args.dtype == "bf16")
    elif args.parallel == "sdp":
        with unset_fake_temporarily():
            sync = design.wrap(module)
    elif alone_here:
        sync = train.DataParallel(module)
        hook = bf16_hook_without_peers if args.reduce_dtype == "bf16" else hook_without_peers
        sync.module.register_comm_hook(None, hook)
    else:
        sync = design.wrap(module)
    optimizer = design.family.optimizer(sync.pieces, design.layout, args.lr)
    if args.zero1:
        # torch's own: after its step each rank broadcasts the weights whose state it has
        groups = [dict(group) for group in optimizer.param_groups]
        optimizer = ZeroRedundancyOptimizer(groups, type(optimizer), lr=args.lr)
    return sync, optimizer


def autocast_of(design, device):
    """FSDP2 has its own mixed precision."""
    bf16 = design.args.dtype == "bf16" and not design.args.parallel.startswith("fsdp")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


class Batches:
    """A data set for train.accumulate that has one batch."""

    def __init__(self, *inputs):
        self.inputs = inputs

    def batch(self, split, step, worker, workers):
        return self.inputs


def update(sync, optimizer, dataset, design, autocast):
    """One update, as in training (which also checks that loss and gradient are finite)."""
    loss = train.accumulate(sync, dataset, 0, design.args.grad_accum, autocast)
    sync.clip_grad_norm(design.family.max_norm, loss, 0.0)
    optimizer.step()
    optimizer.zero_grad()
    sync.refresh()


def first_update(design, module, dataset, fake=nullcontext()):
    """Wraps a worker's model and runs one update (two with backward masking) under torch's memory tracker.

    -> sync, optimizer, {"parameters": bytes, ..., "peak": bytes} at the moment of the peak, bytes sent.
    Inside a FakeTensorMode the tensors are mere shapes, and nothing is computed.
    """
    warnings.filterwarnings("ignore", message="Expected a tensor or a traceable")        # of an empty state
    tracker, sent = Tracker(), SentBytes()
    device = next(module.parameters()).device

    def snapshot(when):
        at = tracker.get_tracker_snapshot(when)[device]
        return {getattr(kind, "value", kind): size for kind, size in at.items()}

    autocast = autocast_of(design, device)
    with fake, tracker:
        sync, optimizer = wrap(design, module)
        for piece in sync.pieces:
            piece.param.grad = torch.zeros_like(piece.param)
        optimizer.step()                                             # it makes its state in its first step
        optimizer.zero_grad()
        # Now the tracker learns which tensors are what, and what is left is DDP's buckets
        tracker.track_external(sync.module, getattr(optimizer, "optim", optimizer))
    buckets = snapshot("current")["Activation"] if design.args.parallel == "ddp" else 0
    updates = 2 if design.backward else 1                            # refreshed weights arrive in the second
    with fake, tracker, sent:                                        # the peak is counted from here
        tracker._track_module_params_and_buffers(sync.module)        # and gradients are known as such
        for _ in range(updates):
            update(sync, optimizer, dataset, design, autocast)
    at = snapshot("peak")
    memory = {"parameters": at["Parameter"] + at["Buffer"], "gradients": at["Gradient"] + buckets,
              "optimizer": at["Optstate"], "activations": at["Activation"] - buckets,
              "temporary": at["Temp"] + at["Other"], "peak": at["Total"]}
    return sync, optimizer, memory, round(sent.total / updates)


# -- Rows ----------------------------------------------------------------------------------------------------

def sends(design, world):
    """[bytes that worker 0 sends in one update, worker 1, ...]"""
    sent_bytes = []
    for rank in range(world):
        with alone(rank, world):
            sync = design.wrap(design.model(rank % design.n_subnets))
            sent_bytes.append(sync.sent_bytes)
    return sent_bytes


def largest(design, world):
    """Workers that can need most of something: bytes, FLOPs, activations, or bytes and activations together.

    And, as what backward masking refreshes takes memory, the one with most to send.
    """
    if design.n_subnets == 1:
        return [0]
    load = loads(design.masks, design.branches)                      # [subnets, (bytes, FLOPs, activations)]
    found = {*load.argmax(0).tolist(), int(load[:, [0, 2]].sum(1).argmax())}
    if design.backward:
        sent_bytes = sends(design, world)
        found.add(sent_bytes.index(max(sent_bytes)))
    return sorted(found)


def size_of(design, world, batch):
    """-> params and flops of a row: number of parameters, and FLOPs of an update, of the worker with most."""
    models = [design.model(subnet) for subnet in range(design.n_subnets)]
    params = max(sum(p.numel() for p in model.parameters()) for model in models)
    if design.args.parallel.startswith("fsdp"):
        params = -(-params // world)
    most = models[int(loads(design.masks, design.branches)[:, 1].argmax())]
    return {"params": params, "flops": train.measure_flops(most, batch) * design.args.grad_accum}


def communicators(sync):
    """Number of process groups that this worker belongs to, the world among them."""
    mine = [g for g in getattr(sync, "groups", {}).values() if g is not dist.GroupMember.NON_GROUP_MEMBER]
    return len({id(g) for g in [*mine, dist.group.WORLD]})


def planned(name, design, world, batch, device):
    """A row.  Each figure is of the worker with most; `memory` is of the worker with the highest peak."""
    row = {"variant": name, **size_of(design, world, batch), "communicators": 0}
    memories = []
    for rank in largest(design, world):
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with alone(rank, world):
            with fake:
                inputs = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in batch]
            module = fake_model(design, rank, device, fake)
            sync, _, memory, sent = first_update(design, module, Batches(*inputs), fake)
            row["communicators"] = max(row["communicators"], communicators(sync))
        memories.append(memory)
    row["memory"] = max(memories, key=peak_of)
    row["sent_bytes"] = round(max(sends(design, world))) if design.args.parallel == "sdp" else sent
    return row


def peak_of(memory):
    return memory["peak"]


def shapes(args):
    """-> the model's sizes, and a batch on the meta device.  Without --data the vocabulary has 32,000."""
    given = args.data
    train.settle(args, {})
    family = train.FAMILIES[args.model]
    config = family.module.PRESETS[args.model]
    with torch.device("meta"):
        if family is train.IMAGES:
            config = replace(config, num_classes=data.IMAGE_SETS[args.data][0])
            images = torch.empty(args.batch_size, 3, 32, 32)
            return config, (images, torch.empty(args.batch_size, dtype=torch.int64))
        vocab_size = 32000
        if given:
            with torch.device("cpu"):
                vocab_size = data.load(args.data, args.batch_size, args.seq_len, args.seed).vocab_size
        tokens = torch.empty(args.batch_size, args.seq_len, dtype=torch.int64)
        return replace(config, vocab_size=vocab_size), (tokens, tokens)


def append(path, args, rows):
    """Appends rows to a .jsonl file, each with the flags that made it."""
    kept = ("model", "data", "subnets", "coverage", "level", "batch_size", "seq_len", "grad_accum", "dtype",
            "reduce_dtype", "compile", "checkpoint_activations")
    settings = {flag: getattr(args, flag) for flag in kept}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f:
        for row in rows:
            f.write(json.dumps({**settings, "torch": torch.__version__, **row}) + "\n")


def si(x):
    """1234567 -> '1.23 M'"""
    for unit in ("", "k", "M", "G"):
        if x < 999.5:
            break
        x, unit = x / 1000, "T"
    return f"{x:.3g} {unit}"


def say_rows(rows):
    """Two tables: each figure with what it is of DDP's, and what the memory consists of."""
    def figures(row):
        return row["params"], row["flops"], row["memory"]["peak"], row["sent_bytes"]

    first = rows[0]
    times = f"{'step, ms (range)':>31}" if "step_ms" in first else f"{'communicators':>16}"
    names = "".join(f"{name:>16}" for name in ("params", "FLOPs", "peak, B", "sent, B"))
    say(f"\n  {'one worker, one update':24}{names}{times}")
    for row in rows:
        cells = "".join(f"{si(x):>10}{x / max(1, ddp):>6.0%}" for x, ddp in zip(figures(row), figures(first)))
        if "step_ms" in row:
            low, high = row["step_ms_range"]
            cells += f"{row['step_ms']:10.0f} ({low:.0f} - {high:.0f})".ljust(24)
            cells += f"{row['step_ratio']:7.1%}"
        else:
            cells += f"{row['communicators']:16}"
        say(f"  {row['variant']:24}{cells}")
    kinds = list(first["memory"])
    say(f"\n  {'at the peak, MB':24}" + "".join(f"{kind:>13}" for kind in kinds))
    for row in rows:
        say(f"  {row['variant']:24}" + "".join(f"{row['memory'][kind] / 1e6:13.1f}" for kind in kinds))


def main(argv=None):
    args = flags(__doc__, "plan.jsonl").parse_args(argv)
    device = train.pick_device(args.device)
    config, batch = shapes(args)
    world, all_designs = args.subnets, designs(args, config)
    say(f"{args.model}, {world} workers, {args.subnets} subnets, coverage {args.coverage}, "
        f"batch {args.batch_size}, {device.type}, {args.dtype}; who holds what (subnets across):\n")
    shown = train.Design(args, config)
    say(sdp.picture(shown.masks, shown.branches))
    for held in range(1, args.subnets + 1):
        coverage = f"{held}/{args.subnets}"
        at = changed(args, masking="forward", coverage=coverage)
        all_designs[f"sdp-forward-{args.level} at {coverage}"] = train.Design(at, config)
    rows, since = [], time.monotonic()
    for name, design in all_designs.items():
        rows.append(planned(name, design, world, batch, device))
        left = (time.monotonic() - since) / len(rows) * (len(all_designs) - len(rows))
        progress = f"  {len(rows)} of {len(all_designs)} variants, {left / 60:.1f} min left"
        print(progress, end="\r", file=sys.stderr, flush=True)
    say()
    say_rows([row for row in rows if "at " not in row["variant"] or row["variant"] == "sdp at coverage 1"])

    say(f"\nForward masking, {args.level} level, peak memory at other coverages:")
    ddp, saved = rows[0]["memory"]["peak"], {}
    for row in rows[-args.subnets:]:
        coverage, peak = row["variant"].split()[-1], row["memory"]["peak"]
        saved[coverage] = 1 - peak / ddp
        say(f"  {coverage}: {si(peak)}B, {saved[coverage]:4.0%} less than ddp")
    for wanted in 0.28, 0.60:
        enough = [coverage for coverage, part in saved.items() if part >= wanted]
        where = "at none; what all workers hold is too much"
        if enough:
            where = f"at coverage {enough[-1]} or below"
        say(f"  {wanted:.0%} less: {where}")
    append(args.results, args, rows)


if __name__ == "__main__":
    train.run(main)
