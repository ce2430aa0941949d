"""
Trains a LLaMA or a ResNet-18 with Subnetwork Data Parallelism.

    torchrun --standalone --nproc-per-node=4 train.py         four workers, a subnetwork each
    torchrun --standalone --nproc-per-node=4 train.py --model resnet18 --data cifar10
    python train.py --subnets 8                               the same method, simulated in one process
    python train.py --resume --out-dir out --sample "def "    prints text from a checkpoint

In reading order: flags; `train`, the whole run; from flags to workers.  You can stop there at first.  Then
come what is printed, evaluation, checkpoints, and the processes.  `say` prints on rank 0 alone, `on_rank_0`
calls a function there.  SDP_TRACEBACK=1 in the environment shows where an error comes from.
"""

import argparse
import ctypes
import fcntl
import json
import math
import os
import pickle
import shutil
import signal
import sys
import time
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import data
import model_llama as llama
import model_resnet as resnet
import sdp
from data import UserError

DISTRIBUTED = dist.is_torchelastic_launched() and "RANK" in os.environ  # by torchrun
RANK = int(os.environ["RANK"]) if DISTRIBUTED else 0
WORLD = int(os.environ["WORLD_SIZE"]) if DISTRIBUTED else 1
STOP = False                        # a signal has told this process to stop
PATIENT = None                      # a process group of all ranks, in which the others wait long for rank 0
LOCK = None                         # a file that rank 0 has locked, so that no other run uses the out-dir

# The flags whose default depends on the model, or on the data.  On two cores llama-tiny takes minutes, and so
# does resnet18 on shapes.  (llama-134m has 134M parameters with a vocabulary of 32,000, and 85M with the 256
# bytes of stdlib.)  On CIFAR four workers have the usual batch of 128 between them, and 200 epochs.
DEFAULTS = {
    "llama-tiny": dict(data="stdlib", steps=250, batch_size=16, seq_len=128, lr=2e-3, eval_every=100),
    "llama-134m": dict(data="stdlib", steps=10000, batch_size=8, seq_len=1024, lr=6e-4, eval_every=100),
    "llama-500m": dict(data="stdlib", steps=20000, batch_size=4, seq_len=2048, lr=4e-4, eval_every=100),
    "llama-1b": dict(data="stdlib", steps=40000, batch_size=2, seq_len=2048, lr=3e-4, eval_every=100),
    "resnet18": dict(data="cifar10", steps=78000, batch_size=32, lr=0.1, eval_every=2000),
    "shapes": dict(steps=300, batch_size=16, lr=0.03, eval_every=100),
}
STATISTICS_IMAGES = 1024            # batch norm's statistics come from at least so many images


def adamw(pieces, layout, lr):
    """The usual recipe for text.  Of the full model's parameters the matrices decay, the norms do not."""
    matrices = [piece.param for piece in pieces if len(layout[piece.name][2]) > 1]
    vectors = [piece.param for piece in pieces if len(layout[piece.name][2]) <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def momentum(pieces, layout, lr):
    """The usual recipe for CIFAR, as in arXiv 1708.04552, section 4.1."""
    params = [piece.param for piece in pieces]
    return torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


# Everything that differs between models of text and models of images:
#     size        the field of the model's config that the data decides
#     moments     the names of what the optimizer keeps for a weight
#     max_norm    gradients are clipped to it
#     last_lr     the last learning rate, as a part of the peak
#     scales      does forward masking scale the branches?  (Not where a batch norm follows: it scales anyway)
TEXT = SimpleNamespace(module=llama, Model=llama.Llama, size="vocab_size", optimizer=adamw,
                       moments=("exp_avg", "exp_avg_sq"), max_norm=1.0, last_lr=0.1, scales=True)
IMAGES = SimpleNamespace(module=resnet, Model=resnet.ResNet, size="num_classes", optimizer=momentum,
                         moments=("momentum_buffer",), max_norm=math.inf, last_lr=0.0, scales=False)
FAMILIES = {**dict.fromkeys(llama.PRESETS, TEXT), **dict.fromkeys(resnet.PRESETS, IMAGES)}


# -- Flags -----------------------------------------------------------------------------------------

def positive(text):
    if not 1 <= int(text) <= 10**9:                                  # more is too much for --timeout
        raise argparse.ArgumentTypeError(f"must be at least 1 and at most {10**9}, not {text}")
    return int(text)


def shared_flags(description):
    """A parser with the flags that train.py, experiments/plan.py and experiments/bench.py have in common."""
    p = data.Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=list(FAMILIES), help="[llama-tiny]")
    p.add_argument("--data", type=os.path.expanduser,
                   help="stdlib, fineweb, PATH.bin, 'PATH_*.bin'; cifar10, cifar100, shapes [by model]")
    p.add_argument("--level", choices=list(sdp.MASKS), default="block", help="mask function [%(default)s]")
    p.add_argument("--coverage", help="k/S: of S subnets, k hold a neuron [the smallest from 0.75 on]")
    p.add_argument("--subnets", type=positive, help="S: different subnetworks [workers; 4 without torchrun]")
    p.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    p.add_argument("--batch-size", type=positive, help="per worker and micro-step [by model]")
    p.add_argument("--seq-len", type=positive, help="tokens per sequence, for text [by model]")
    p.add_argument("--lr", type=float, help="peak learning rate [by model]")
    p.add_argument("--grad-accum", type=positive, default=1, help="micro-steps per update [%(default)s]")
    p.add_argument("--device", choices=["cpu", "cuda"], help="[cuda where there is one]")
    p.add_argument("--timeout", type=positive, default=600, help="seconds to wait for others [%(default)s]")
    p.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of matrix products [fp32]")
    p.add_argument("--reduce-dtype", choices=["fp32", "bf16"], default="fp32", help="of messages [fp32]")
    p.add_argument("--compile", action="store_true", help="torch.compile of each block and bucket")
    p.add_argument("--checkpoint-activations", action="store_true", help="compute blocks twice, keep less")
    return p


def parse(argv):
    p = shared_flags(__doc__)
    p.add_argument("--parallel", choices=["sdp", "ddp"], default="sdp", help="[%(default)s]")
    p.add_argument("--masking", choices=["forward", "backward"], default="forward", help="[%(default)s]")
    p.add_argument("--steps", type=positive, help="number of updates [by model]")
    p.add_argument("--until", type=positive, help="stop after this update; --resume goes on")
    p.add_argument("--flop-match", action="store_true", help="more steps: the FLOPs of DDP over --steps")
    p.add_argument("--eval-every", type=positive, help="updates between evaluations [by model]")
    p.add_argument("--save-every", type=positive, default=500, help="updates between checkpoints [500]")
    p.add_argument("--log-every", type=positive, default=10, help="updates between lines of output [10]")
    p.add_argument("--out-dir", type=os.path.expanduser, default="out", help="[%(default)s]")
    either = p.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on from --out-dir's checkpoint, if any")
    either.add_argument("--overwrite", action="store_true", help="delete the run in --out-dir first")
    p.add_argument("--sample", metavar="TEXT", help="with --resume: print a continuation of TEXT and stop")
    args = p.parse_args(argv)
    if (args.compile or args.checkpoint_activations or args.reduce_dtype == "bf16") and not DISTRIBUTED:
        raise UserError("--reduce-dtype bf16, --compile and --checkpoint-activations need real workers: "
                        "start with torchrun")
    return args


def coverage_to_held(text, n_subnets):
    """k of a coverage k/S given as a number or a fraction."""
    if text is None:
        return math.ceil(3 * n_subnets / 4)
    top, _, bottom = text.partition("/")
    with suppress(ValueError, ArithmeticError):                      # no numbers; 1/0 or infinity
        exact = float(top) / float(bottom or 1) * n_subnets
        held = round(exact)
        if 1 <= held <= n_subnets and abs(exact - held) < 1e-3:      # 0.33 is not 1/3, but 0.3333 is
            return held
    raise UserError(f"--coverage {text} is none of k/{n_subnets}, with k from 1 to {n_subnets}")


def settle(args, saved):
    """Fills in what the flags leave open, and refuses what cannot be.  saved: checkpoint's config or {}."""
    args.model = args.model or saved.get("model", "llama-tiny")
    if saved and args.model != saved["model"]:
        raise UserError(f"--model {args.model} contradicts the checkpoint, which has {saved['model']}")
    if args.data is None:
        args.data = saved.get("data", DEFAULTS[args.model]["data"])
    for flag, value in {**DEFAULTS[args.model], **DEFAULTS.get(args.data, {})}.items():
        if getattr(args, flag, None) is None:
            setattr(args, flag, value)
    sees_images = FAMILIES[args.model].size == "num_classes"
    if sees_images != (args.data in data.IMAGE_SETS):
        raise UserError(f"{args.model} cannot read --data {args.data}: resnet18 reads images "
                        f"({', '.join(data.IMAGE_SETS)}), the others read text")
    if args.model in llama.PRESETS and args.seq_len > llama.PRESETS[args.model].max_position_embeddings:
        raise UserError(f"--seq-len {args.seq_len} is longer than the context of {args.model}")
    if args.seed < 0 or not 0 < args.lr < 1e6:
        raise UserError("--seed must be at least 0, --lr above 0 and below a million")
    if args.compile and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("--compile needs a C++ compiler: install g++, or name yours in the variable CXX")
    args.subnets = args.subnets or (WORLD if DISTRIBUTED else 4)
    if DISTRIBUTED and WORLD % args.subnets:
        raise UserError(f"--subnets {args.subnets} does not divide the number of workers, {WORLD}")
    args.coverage = f"{coverage_to_held(args.coverage, args.subnets)}/{args.subnets}"
    args.mask_seed = saved.get("mask_seed", args.seed)               # --resume keeps the masks of the run


# -- The run ---------------------------------------------------------------------------------------

def train(args, device):
    """Set-up, loop, evaluations, checkpoints.

    The method is in the middle of the loop, from `lr =` to `sync.refresh()`; you can skip the rest at first.
    `sync` does what sdp.MaskedAllReduce does, and more: `workers`, those of this process; `forward(worker,
    ...)`; `no_sync()`, under which a backward pass only adds to the gradients; `clip_grad_norm`, by the full
    model's norm, which also adds up numbers over all workers; `gather()`, the full parameters, one by one;
    `part_of(full, piece)`, what belongs into a piece.
    """
    # Data, model, and masks: which of the S subnetworks holds which neuron
    out_dir = Path(args.out_dir)
    checkpoint = open_checkpoint(out_dir) if args.resume else {}
    saved = checkpoint.get("config", {})
    settle(args, saved)
    dataset, config = load_data(args)
    design = Design(args, config)
    full = design.full_model()
    # The steps done before, and how many of them changed the weights: a step with a NaN does not
    first, updates = check_checkpoint(checkpoint, design, full, dataset) if checkpoint else (0, 0)
    agree({**vars(args), "contents of --data": dataset.digest, "checkpoint": checkpoint.get("checksum"),
           "masks": data.fingerprint(mask.numpy() for mask in design.masks.values())})
    on_rank_0(claim_out_dir, args)
    describe(design, dataset, saved, device)
    batch = dataset.batch("train", 0, 0, 1)                          # for its shape
    flops, full_flops = measure_workers(design, full, batch)         # of a micro-step: workers' mean, DDP's
    steps = round(args.steps * full_flops / flops) if args.flop_match else args.steps
    last = min(steps, args.until or steps)
    if first >= last:
        say(f"nothing to do: the checkpoint in {out_dir} is of step {first} of {steps}")
        return

    # This process's worker (without torchrun all of them), and the optimizer of what it trains
    sync, optimizer = build(design, device, checkpoint)
    on_rank_0(begin_metrics, args, first)                            # not before, as building can fail
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")
    flops_done = saved.get("flops", 0)
    lost = 0                                                         # updates skipped in a row
    run_began = time.perf_counter()
    watch_signals()

    for step in range(first, last):
        began = time.perf_counter()
        done = step + 1
        lr = learning_rate(step, steps, args.lr, design.family.last_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = accumulate(sync, dataset, step, args.grad_accum, autocast)
        # clip_grad_norm also adds up two numbers over the workers, in the same message: the loss, which
        # becomes their mean, and how many of them a signal has told to stop
        message = sync.clip_grad_norm(design.family.max_norm, loss / sync.world, float(STOP))
        norm, loss, stops = message.tolist()
        if math.isfinite(norm) and math.isfinite(loss):              # alike on all ranks
            optimizer.step()
            updates += 1
            lost = 0
        else:
            lost += 1
        if lost == 10:                                               # a dead model must not be saved
            raise UserError(f"loss or gradient was not finite in ten updates in a row, up to step {done}: "
                            f"go on from the last checkpoint with --resume and a smaller --lr")
        optimizer.zero_grad()
        sync.refresh()                                               # backward masking: new frozen weights
        flops_done += flops * args.grad_accum
        ms = (time.perf_counter() - began) * 1000

        # No evaluation after a signal: whoever stops us may kill us before it ends
        evaluates = done == last or (done % args.eval_every == 0 and not stops)
        saves = done == last or stops or done % args.save_every == 0
        if evaluates or saves:
            estimate_statistics(sync, full, dataset, autocast)       # of batch norms, if any
        if evaluates or done % args.log_every == 0:
            speed = sync.world * args.grad_accum * batch[1].numel() / ms * 1000
            left = (time.perf_counter() - run_began) / (done - first) * (last - done)
            say(f"step {done:5}/{steps}  loss {loss:.4f}  {ms:6.0f} ms/step  {speed:8.0f} {dataset.unit}/s  "
                f"{left / 60:5.1f} min left")
            ranks = of_all_ranks((sync.sent_bytes, torch.cuda.max_memory_allocated()))
            sent_bytes, peaks = zip(*ranks)
            line = {"step": done, "loss": loss, "lr": lr, "grad_norm": norm, "step_ms": ms,
                    f"{dataset.unit}_per_s": speed, "sent_bytes": round(max(sent_bytes)),
                    "peak_mem_bytes": max(peaks) or None, "flops": flops_done, "skipped": done - updates}
            if evaluates:
                line |= evaluate(sync, full, dataset, design.family.module.loss, autocast)
                say(f"{'':18}full model: validation loss {line['val_loss']:.4f} nats, "
                    f"accuracy {line['val_acc']:.2%}")
            on_rank_0(add_line, out_dir / "metrics.jsonl", line)
        if saves:
            settings = {**vars(args), **asdict(design.config), "data_digest": dataset.digest,
                        "flops": flops_done}
            facts = {"step": done, "config": settings, "masks": design.masks}
            save_checkpoint(out_dir, facts, sync, full, optimizer, design.family.moments, updates)
        if stops:
            break
    if done < steps:
        say(f"stopped and saved after step {done}: --resume goes on from there")


def accumulate(sync, dataset, step, micro_steps, autocast):
    """Forward and backward passes of one update.  -> sum of this process's workers' losses, on the device."""
    total = 0.0
    for worker in sync.workers:                                      # one under torchrun, all of them without
        for micro in range(micro_steps):
            inputs = dataset.batch("train", step * micro_steps + micro, worker, sync.world)
            with sync.no_sync() if micro < micro_steps - 1 else nullcontext():
                with autocast:
                    loss = sync.forward(worker, *(t.to(sync.device) for t in inputs)) / micro_steps
                loss.backward()
            total = total + loss.detach()
    sync.finish()                                                    # now gradients are averages
    return total


def learning_rate(step, steps, peak, end):
    """Warm-up over 2/5 of the run, at most 1,000 updates; then a cosine down to `end` times the peak."""
    warm = max(1, min(2 * steps // 5, 1000))                         # at 250 updates better than 1/5
    if step < warm:
        return peak * (step + 1) / warm
    height = (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
    return peak * (end + (1 - end) * height)


# -- From flags to workers -------------------------------------------------------------------------

def load_data(args):
    """-> the data set, and the model's sizes made to fit it."""
    if args.data in ("cifar10", "cifar100"):
        on_rank_0(data.cifar, args.data, True)                       # fetches it, where it is not there yet
    dataset = data.load(args.data, args.batch_size, args.seq_len, args.seed)
    family = FAMILIES[args.model]
    return dataset, replace(family.module.PRESETS[args.model], **{family.size: getattr(dataset, family.size)})


class Design:
    """Who holds what, as the flags say: the same on every rank.  It needs no memory of the model's size.

    Raises UserError for masks that cannot be trained.
    """

    def __init__(self, args, config):
        self.args = args
        self.config = config
        self.family = FAMILIES[args.model]
        self.branches = self.family.module.branches(config)
        self.layout = self.family.module.layout(config)
        self.backward = args.masking == "backward"
        if args.parallel == "sdp":
            held = coverage_to_held(args.coverage, args.subnets)
            self.masks = sdp.MASKS[args.level](self.branches, args.subnets, held, args.mask_seed)
        else:                                                        # one subnetwork, which holds everything
            self.masks = sdp.block_masks(self.branches, n_subnets=1, held=1)
        try:
            self.warnings = sdp.check_masks(self.masks, self.branches)
        except ValueError as e:
            raise UserError(str(e)) from None
        self.n_subnets = sdp.count_subnets(self.masks)

    def full_model(self):
        """Without weights: evaluation streams them through it."""
        with torch.device("meta"):                                   # shapes without memory
            full = self.family.Model(self.config).eval()
        full.checkpoint_activations = self.args.checkpoint_activations
        return full

    def model(self, subnet):
        """The model that a worker with this subnetwork trains, on the meta device."""
        more = {}
        if self.family.scales and not self.backward:                 # brings a part to the size of the whole
            more["scales"] = sdp.branch_scales(self.masks, subnet)
        with torch.device("meta"):
            model = self.family.Model(self.config, sdp.held_counts(self.masks, subnet), self.backward, **more)
        model.checkpoint_activations = self.args.checkpoint_activations
        # Frozen weights cost fewer FLOPs, and these are counted before the model has weights
        for local, slot in sdp.find_slots(model, self.masks, self.layout, subnet).items():
            model.get_parameter(local).requires_grad_(slot.trains)
        return model

    def initial(self):
        """value(full name) -> the full parameter at the start of a run."""
        return sdp.fresh(self.layout, partial(self.family.module.init, self.config), self.args.seed)

    def wrap(self, module):
        """Makes this rank's model, which has its weights, ready to be trained as --parallel says."""
        wire = torch.bfloat16 if self.args.reduce_dtype == "bf16" else None
        if self.args.parallel == "ddp":
            return DataParallel(module, wire)
        return sdp.SubnetDataParallel(module, self.masks, self.layout, self.backward, reduce_dtype=wire,
                                      timeout=timedelta(seconds=self.args.timeout), compile=self.args.compile)


def build(design, device, checkpoint):
    """-> this process's worker, or without torchrun all of them, and the optimizer of what it trains."""
    args = design.args
    value = checkpoint["model"].__getitem__ if checkpoint else design.initial()
    if DISTRIBUTED:
        subnet = RANK % design.n_subnets
        module = sdp.materialize(design.model(subnet), design.masks, design.layout, subnet, value, device)
        sync = design.wrap(module)
        if args.compile:
            compile_blocks(module)
    else:
        modules = [design.model(subnet) for subnet in range(design.n_subnets)]
        # DDP too: one subnetwork, and args.subnets workers
        sync = sdp.SimulatedDataParallel(modules, design.masks, design.layout, value, args.subnets, device)
    optimizer = design.family.optimizer(sync.pieces, design.layout, args.lr)
    saved = checkpoint.get("optimizer", {})                          # {}: the run begins
    for piece in sync.pieces:
        for key, x in saved.get(piece.name, {}).items():
            part = sync.part_of(x, piece) if torch.is_tensor(x) else torch.tensor(float(x))
            optimizer.state[piece.param][key] = part.to(sync.device, copy=True)
    return sync, optimizer


def compile_blocks(model):
    """Block by block, so that gradients still come one block at a time; equal blocks are compiled once."""
    for path, _ in model.stages():
        if "layer" in path:
            block = model.get_submodule(path)
            block.forward = torch.compile(block.forward)             # hooks stay outside


class DataParallel(sdp.FullModel):
    """torch's DistributedDataParallel with the interface of sdp.SubnetDataParallel, to compare with."""

    def __init__(self, module, wire=None):
        self.full = dict(module.named_parameters())
        self.device = next(iter(self.full.values())).device
        self.world = dist.get_world_size()
        self.workers = [dist.get_rank()]
        self.module = DistributedDataParallel(module, gradient_as_bucket_view=True, init_sync=False)
        if wire:
            self.module.register_comm_hook(None, bf16_compress_hook)
        self.no_sync = self.module.no_sync
        nbytes = sum(p.numel() * (wire or p.dtype).itemsize for p in self.full.values())
        self.sent_bytes = 2 * (1 - 1 / self.world) * nbytes

    def forward(self, worker, *inputs):
        return self.module(*inputs)

    def finish(self):
        pass                                                         # the backward pass has averaged

    def clip_grad_norm(self, max_norm, *scalars):
        packet = super().clip_grad_norm(max_norm, *scalars)
        packet[0] /= self.world                                      # all have the same norm: the sum is that
        dist.all_reduce(packet)
        return packet


# -- What is said of a run before it begins --------------------------------------------------------

def describe(design, dataset, saved, device):
    """Prints what is trained, where, with which masks, and what is not as it was before --resume."""
    args = design.args
    synthetic = " (synthetic)" if args.data == "shapes" else ""
    workers = f"{WORLD} workers" if DISTRIBUTED else f"{args.subnets} workers simulated in this process"
    say(f"{args.model} on {args.data}{synthetic}, {args.parallel}, {workers}, {device.type}, {args.dtype}; "
        f"validation: {dataset.validation}")
    changed = [f"{flag} {now} (was {saved[flag]})" for flag, now in vars(args).items()
               if flag not in ("resume", "overwrite") and saved.get(flag, now) != now]
    if changed:
        say(f"not as it was before --resume: {', '.join(changed)}")
    if args.parallel == "sdp":
        say(f"{args.masking} masking, {args.level} level, coverage {args.coverage}; "
            f"who holds what (subnets across):\n\n{sdp.picture(design.masks, design.branches)}")
    for warning in design.warnings:
        say(f"warning: {warning}")


def measure_flops(model, batch):
    """FLOPs of a forward and backward pass, counted by torch in a run on the meta device."""
    with FlopCounterMode(display=False) as counter:
        model(*(t.to("meta") for t in batch)).backward()
    return counter.get_total_flops()


def measure_workers(design, full, batch):
    """Prints what a worker has beside one of DDP.  -> FLOPs of a micro-step: the workers' mean, and DDP's"""
    models = [full, *(design.model(subnet) for subnet in range(design.n_subnets))]
    weights = [sum(p.nbytes for p in model.parameters()) for model in models]
    trained = [sum(p.nbytes for p in model.parameters() if p.requires_grad) for model in models]
    flops = [measure_flops(model, batch) for model in models]
    say(f"\n  {'one worker':22}{'DDP':>12}{'largest here':>14}")
    for name, unit, values in (("parameters, MB", 1e6, weights), ("gradients, MB", 1e6, trained),
                               ("GFLOPs a micro-step", 1e9, flops)):
        most = max(values[1:])
        say(f"  {name:22}{values[0] / unit:12.2f}{most / unit:14.2f}{most / values[0]:8.0%}")
    say()
    return sum(flops[1:]) / design.n_subnets, flops[0]


# -- The full model, which no worker holds ---------------------------------------------------------

def run_full_model(sync, full, dataset, split, count):
    """Yields (outputs, targets) of the full model, for batches of at least `count` examples in all.

    As many batches go through it at a time as it has stages: it keeps no more activations than training does.
    """
    steps = math.ceil(count / (dataset.batch_size * sync.world))
    which = [(i, worker) for i in range(steps) for worker in sync.workers]
    at_once = len(full.stages())
    for n in range(0, len(which), at_once):
        batches = [dataset.batch(split, i, worker, sync.world) for i, worker in which[n:n + at_once]]
        xs = [x.to(sync.device) for x, _ in batches if len(x)]       # the last workers may have none
        ys = [y.to(sync.device) for _, y in batches if len(y)]
        yield from zip(sdp.stream(sync, full, xs), ys)


@torch.no_grad()
def estimate_statistics(sync, full, dataset, autocast):
    """Gives the batch norms of `full`, if there are any, mean and variance of their inputs.

    Those of the subnetworks would be of no use.  These are plain means over all workers' first batches.
    """
    norms = [module for module in full.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.to_empty(device=sync.device).reset_running_stats()
    full.train()
    with autocast:
        for _ in run_full_model(sync, full, dataset, "train", STATISTICS_IMAGES):
            pass                                                     # the forward passes fill the statistics
    full.eval()
    if DISTRIBUTED:
        for b in full.buffers():
            dist.all_reduce(b)                                       # of equally many images each
            if b.is_floating_point():
                b /= WORLD


@torch.no_grad()
def evaluate(sync, full, dataset, loss_of, autocast):
    """-> val_loss of the full model, in nats per token or image, and val_acc"""
    sums = torch.zeros(3, dtype=torch.float64, device=sync.device)   # losses, right answers, all answers
    with autocast:
        for outputs, y in run_full_model(sync, full, dataset, "val", dataset.val_count):
            sums[0] += loss_of(outputs, y) * y.numel()
            sums[1] += (outputs.argmax(-1) == y).sum()
            sums[2] += y.numel()
    if DISTRIBUTED:
        dist.all_reduce(sums)
    loss, accuracy = (sums[:2] / sums[2]).tolist()
    return {"val_loss": loss, "val_acc": accuracy}


def sample(args, count=200):
    """Prints text of a checkpoint's full model: an ordinary Llama, no trace of subnetworks is left in it."""
    checkpoint = open_checkpoint(Path(args.out_dir)) if args.resume else {}
    if not checkpoint:
        raise UserError(f"--sample needs --resume and a checkpoint in --out-dir {args.out_dir}")
    saved = checkpoint["config"]
    settle(args, saved)                                              # refuses another --model
    if args.model not in llama.PRESETS:
        raise UserError(f"--sample prints text of a LLaMA, and the checkpoint's model is {args.model}")
    encoding = data.encoding_for(saved.get("vocab_size"))
    device = pick_device(args.device)
    with torch.device("meta"):
        model = llama.Llama(replace(llama.PRESETS[args.model], vocab_size=saved["vocab_size"]))
    if kinds(checkpoint.get("model")) != kinds(model.state_dict()):
        raise UserError("the checkpoint's model has other names, shapes or types than it should")
    model.load_state_dict(checkpoint["model"], assign=True)
    tokens = torch.tensor([encoding.encode_ordinary(args.sample or "\n")], device=device)
    rng = torch.Generator(device).manual_seed(0)
    say(encoding.decode(model.to(device).generate(tokens, count, generator=rng)[0].tolist()))


# -- The out-dir, and checkpoints: they have the full model, so other workers can go on with them ---

RUN_FILES = ("metrics.jsonl", "ckpt.pt", "ckpt.prev.pt")


def claim_out_dir(args):
    """Rank 0 takes the out-dir, so that no other run does."""
    global LOCK
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    LOCK = open(out_dir / "lock", "a")                               # held until this process ends
    try:
        fcntl.flock(LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is at work in {out_dir}: wait, or take another --out-dir") from None
    sizes = [file.stat().st_size for file in out_dir.iterdir() if file.name in RUN_FILES]
    if any(sizes) and not (args.resume or args.overwrite):
        raise UserError(f"{out_dir} already holds a run: --resume goes on with it, --overwrite replaces it, "
                        f"another --out-dir leaves it alone")


def begin_metrics(args, start):
    """Removes the lines after step `start` from metrics.jsonl; with --overwrite, the whole old run."""
    out_dir = Path(args.out_dir)
    metrics, part = out_dir / "metrics.jsonl", out_dir / "metrics.part"
    if args.overwrite:
        for name in RUN_FILES:
            (out_dir / name).unlink(missing_ok=True)
    kept = []
    for line in metrics.read_bytes().splitlines(True) if metrics.exists() else []:
        with suppress(ValueError, KeyError, TypeError):              # a crash leaves bytes of any kind
            if json.loads(line)["step"] <= start:
                kept.append(line)
    part.write_bytes(b"".join(kept))
    os.replace(part, metrics)


def add_line(path, line):
    """Adds a line to metrics.jsonl."""
    # null for NaN and infinity, which JSON does not have
    line = {name: None if x is None or not math.isfinite(x) else x for name, x in line.items()}
    with open(path, "a") as f:
        f.write(json.dumps(line) + "\n")


def save_checkpoint(out_dir, facts, sync, full, optimizer, moments, updates):
    """Gathers model and optimizer state, one parameter at a time, and writes ckpt.pt.

    facts: the rest of the checkpoint.  full: it has the statistics of batch norms.  moments: names in the
    optimizer's state.  updates: how often it has stepped; before the first time its moments are zeros.
    """
    def gathered(tensors=None):
        return {name: t.to("cpu", copy=True) for name, t in sync.gather(tensors) if RANK == 0}

    model = gathered()
    state = {name: {"step": updates} for name in model}
    params = [piece.param for piece in sync.pieces]
    for key in moments:
        parts = [optimizer.state[p].get(key, torch.zeros_like(p)) for p in params]
        for name, moment in gathered(parts).items():
            state[name][key] = moment
    model.update({name: b.cpu() for name, b in full.named_buffers()})
    on_rank_0(write_checkpoint, {"model": model, "optimizer": state, **facts}, out_dir / "ckpt.pt")


def write_checkpoint(checkpoint, path):
    """Only a whole file on the disk gets the name `path`; the one that had it is ckpt.prev.pt then."""
    for tensors in checkpoint["model"], *checkpoint["optimizer"].values():
        if not all(torch.as_tensor(x).isfinite().all() for x in tensors.values()):
            raise UserError("weights are not finite any more, so not saved: --resume with a smaller --lr")
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        if zipfile.ZipFile(part).testzip():
            raise OSError("it does not read back as it was written")
    except (OSError, RuntimeError, zipfile.BadZipFile) as e:         # on a full disk torch has a RuntimeError
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {str(e).splitlines()[0]}; mend that, then --resume") from None
    if path.exists():
        os.replace(path, path.with_name("ckpt.prev.pt"))
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)                                                 # or a power cut could undo the renaming
    os.close(folder)


def open_checkpoint(out_dir):
    """-> the newest undamaged checkpoint, or {} if there is none."""
    paths = [path for path in (out_dir / "ckpt.pt", out_dir / "ckpt.prev.pt") if path.exists()]
    for path in paths:
        checkpoint = read_checkpoint(path)
        if checkpoint is not None:
            if path != paths[0]:
                say(f"warning: {paths[0]} is damaged, going on from {path}")
            return checkpoint
    if paths:
        raise UserError(f"{paths[0]} is damaged and no other is there: start again with --overwrite")
    return {}


def read_checkpoint(path):
    """-> the checkpoint, with a checksum; None if the file is damaged.  Refuses what is not ours.

    Its tensors are mapped: a rank reads only what it cuts.
    """
    checkpoint = None
    try:
        # zip's checksums find a flipped bit, which torch.load does not; torch.load finds what zip forgives
        archive = zipfile.ZipFile(path)
        if archive.testzip():
            raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:                                   # more than tensors and plain values
        pass
    except Exception:                                                # damage raises errors of any kind
        with open(path, "rb") as file:
            if file.read(2) == b"PK":                                # an archive, as ours are
                return None
    config = checkpoint.get("config") if isinstance(checkpoint, dict) else None
    if not isinstance(config, dict) or config.get("model") not in FAMILIES or "data_digest" not in config:
        raise UserError(f"{path} is not a checkpoint of this program: move it, or change --out-dir")
    return {**checkpoint, "checksum": [file.CRC for file in archive.infolist()]}


def kinds(x):
    """The names, shapes and types in nested dicts, without the values."""
    if isinstance(x, dict):
        return {name: kinds(value) for name, value in x.items()}
    return (x.shape, x.dtype) if torch.is_tensor(x) else type(x)


def check_checkpoint(checkpoint, design, full, dataset):
    """-> steps and updates done.  Raises UserError unless the checkpoint fits model, data, and itself."""
    keys = design.family.moments
    state = {name: {"step": 0, **dict.fromkeys(keys, p)} for name, p in full.named_parameters()}
    for part, wanted in {"model": full.state_dict(), "optimizer": state, "step": 0}.items():
        if kinds(checkpoint.get(part)) != kinds(wanted):
            raise UserError(f"the checkpoint's {part} has other names, shapes or types than the model")
    step = checkpoint["step"]
    updates = {state["step"] for state in checkpoint["optimizer"].values()}
    if len(updates) > 1 or not 0 <= min(updates) <= step:
        raise UserError(f"the checkpoint has step {step} and {sorted(updates)[:3]} updates, which cannot be")
    if checkpoint["config"]["data_digest"] != dataset.digest:
        raise UserError(f"--data {design.args.data} contradicts the checkpoint, which has seen other data")
    masks = design.masks
    saved = checkpoint.get("masks")
    if kinds(masks) == kinds(saved) and all(torch.equal(masks[name], saved[name]) for name in masks):
        say("the masks are the saved ones")
    else:
        say("new masks: today's flags or mask function do not make the saved ones")
    return step, min(updates)


# -- The processes ---------------------------------------------------------------------------------

def say(*words):
    if RANK == 0:
        print(*words, flush=True)


def watch_signals():
    """After a signal the update ends, and a checkpoint is saved.  A Ctrl-C after that ends all at once."""
    def stop(*_):
        global STOP
        STOP = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for signum in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
        if signal.getsignal(signum) != signal.SIG_IGN:               # as nohup does with SIGHUP
            signal.signal(signum, stop)


def pick_device(wanted):
    """-> this rank's device: a GPU where there is one"""
    gpus = torch.cuda.device_count()
    if wanted == "cuda" and not gpus:
        raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
    if wanted == "cpu" or not gpus:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % gpus if DISTRIBUTED else 0)
    torch.cuda.set_device(device)
    return device


def start_processes(wanted, timeout):
    """Joins the other ranks.  -> this rank's device"""
    global PATIENT
    device = pick_device(wanted)
    if not DISTRIBUTED:
        return device
    ranks_here = int(os.environ["LOCAL_WORLD_SIZE"])
    backend = "gloo"                                                 # NCCL needs a GPU for each rank
    if device.type == "cuda" and ranks_here <= torch.cuda.device_count():
        backend = "nccl"
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):                                       # Linux
        libc.prctl(1, signal.SIGTERM)                                # PR_SET_PDEATHSIG: end with torchrun
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")         # for groups that overlap, see sdp.py
    wait = timedelta(seconds=timeout)
    store, rank, world = next(rendezvous("env://", timeout=wait))
    if ranks_here == WORLD:
        # After a restart torchrun's store still has the addresses of dead ranks: use other keys in it
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait,
                            device_id=device if backend == "nccl" else None)
    # Rank 0 itself waits no longer than usual, and so notices a worker that hangs
    patience = timedelta(days=365) if RANK > 0 else wait
    PATIENT = dist.new_group(backend="gloo", timeout=patience)
    return device


def of_all_ranks(mine):
    """-> a list of what each rank has called this with."""
    ranks = [mine] * WORLD
    if DISTRIBUTED:
        dist.all_gather_object(ranks, mine)
    return ranks


def agree(mine):
    """Refuses to start unless all ranks have the same {name: value}."""
    for its in of_all_ranks(mine):
        for name, value in its.items():
            if value != mine[name]:
                raise UserError(f"not all ranks were started with the same {name}")


def on_rank_0(work, *arguments):
    """Calls work on rank 0 alone, while the others wait without a limit.  Its error is everybody's."""
    error = [None]
    if RANK == 0:
        try:
            work(*arguments)
        except (UserError, OSError) as e:
            error = [str(e) or type(e).__name__]
    if DISTRIBUTED:
        dist.broadcast_object_list(error, group=PATIENT)
    if error[0]:
        raise UserError(error[0])


def main(argv=None):
    args = parse(argv)
    if args.sample is None:
        train(args, start_processes(args.device, args.timeout))
    elif RANK == 0:
        sample(args)
    if dist.is_initialized():
        dist.barrier()                                               # or gloo fails a rank still connecting
        dist.destroy_process_group()


def run(main):
    """Runs main() as the program of this rank: what went wrong is one line, said by one rank."""
    def this_rank():
        try:
            main()
        except (UserError, OSError):
            if RANK > 0:
                time.sleep(10)                                       # rank 0 says it; torchrun ends this rank
            raise
        except RuntimeError as e:
            if isinstance(e, dist.DistError) or "gloo" in str(e):
                raise UserError(f"rank {RANK} lost the other workers: {str(e).splitlines()[0]}") from e
            raise

    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")                     # not every terminal can show the masks
    code = data.run_program(this_rank)
    if code:
        os._exit(code)                                               # sys.exit waits for dead connections


if __name__ == "__main__":
    run(main)
