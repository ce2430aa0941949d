"""
Trains a LLaMA or a ResNet-18 with Subnetwork Data Parallelism.

    torchrun --standalone --nproc-per-node=4 train.py         four workers, a subnetwork each
    torchrun --standalone --nproc-per-node=4 train.py --model resnet18 --data cifar10
    python train.py --subnets 8                               the same method, simulated in one process
    python train.py --model llama-1b --subnets 8 --plan       what a worker would need, and who holds what; trains nothing
    torchrun --standalone --nproc-per-node=4 train.py --bench 12     times updates, measures memory and bytes, DDP and FSDP2 beside
    python train.py --resume --out-dir out --sample "def "    prints text from a checkpoint
"""

import argparse
import ctypes
import gc
import hashlib
import json
import math
import os
import signal
import sys
import time
import zipfile
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from datetime import timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median

os.environ.setdefault("KINETO_LOG_LEVEL", "99")                      # torch.profiler (--bench) has much to say
import torch
import torch.distributed as dist
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fake_collectives import CollectiveOp
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed._tools.mod_tracker import ModTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

import data
import model_llama as llama
import model_resnet as resnet
import sdp
from data import UserError

# The flags whose default depends on the model, or on the data.  On two cores llama-tiny takes minutes, and so does resnet18
# on shapes.  On CIFAR four workers have the usual batch of 128 between them, and 200 epochs.
DEFAULTS = {
    "llama-tiny": dict(data="stdlib", steps=250, batch_size=16, seq_len=128, lr=2e-3, eval_every=100),
    "llama-134m": dict(data="stdlib", steps=10000, batch_size=8, seq_len=1024, lr=6e-4, eval_every=100),
    "llama-500m": dict(data="stdlib", steps=20000, batch_size=4, seq_len=2048, lr=4e-4, eval_every=100),
    "llama-1b": dict(data="stdlib", steps=40000, batch_size=2, seq_len=2048, lr=3e-4, eval_every=100),
    "resnet18": dict(data="cifar10", steps=78000, batch_size=32, lr=0.1, eval_every=2000),
    "shapes": dict(steps=300, batch_size=16, lr=0.03, eval_every=100),
}
STATISTICS_IMAGES = 1024                                             # training images that batch norm's statistics come from


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------

def at_least(least):
    def integer(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return int(text)
    return integer


positive = at_least(1)


def parse(argv):
    p = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=list(DEFAULTS), help="[llama-tiny]")
    p.add_argument("--data", help="stdlib, fineweb, the path of a .bin token file; cifar10, cifar100, shapes [stdlib, or cifar10]")
    p.add_argument("--parallel", choices=["sdp", "ddp"], default="sdp", help="[%(default)s]")
    p.add_argument("--masking", choices=["forward", "backward"], default="forward", help="[%(default)s]")
    p.add_argument("--level", choices=["block", "neuron"], default="block", help="[%(default)s]")
    p.add_argument("--coverage", help="k/S: part of the model each worker trains [the smallest that is at least 0.75]")
    p.add_argument("--subnets", type=positive, help="S: number of different subnetworks [number of workers; 4 without torchrun]")
    p.add_argument("--seed", type=at_least(0), default=0, help="[%(default)s]")
    p.add_argument("--steps", type=positive, help="number of updates [by model]")
    p.add_argument("--flop-match", action="store_true", help="more steps, until the workers' mean FLOPs are those of DDP over --steps")
    p.add_argument("--batch-size", type=positive, help="sequences or images per worker and micro-step [by model]")
    p.add_argument("--seq-len", type=positive, help="tokens per sequence [by model]")
    p.add_argument("--lr", type=float, help="peak learning rate [by model]")
    p.add_argument("--grad-accum", type=positive, default=1, help="micro-steps per update [%(default)s]")
    p.add_argument("--eval-every", type=positive, help="updates between evaluations [by model]")
    p.add_argument("--save-every", type=positive, default=500, help="updates between checkpoints [%(default)s]")
    p.add_argument("--log-every", type=positive, default=10, help="updates between lines of output [%(default)s]")
    p.add_argument("--out-dir", type=Path, default=Path("out"), help="[%(default)s]")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out-dir, if there is one")
    p.add_argument("--overwrite", action="store_true", help="delete the run in --out-dir first")
    p.add_argument("--device", help="cpu or cuda [cuda where there is one]")
    p.add_argument("--timeout", type=positive, default=600, help="seconds to wait for a worker that does not answer [%(default)s]")
    p.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the matrix products; weights are fp32 [%(default)s]")
    p.add_argument("--compile", action="store_true", help="torch.compile, block by block")
    p.add_argument("--checkpoint-activations", action="store_true", help="recompute each block in the backward pass")
    p.add_argument("--plan", action="store_true", help="print who holds what, and what each variant needs; train nothing")
    p.add_argument("--bench", metavar="N", type=positive, help="time N updates of each variant, measure memory and bytes; train nothing")
    p.add_argument("--sample", metavar="TEXT", help="with --resume: print a continuation of TEXT and stop")
    return p.parse_args(argv)


def coverage_to_held(text, subnets):
    """k of a coverage k/S given as a number or a fraction."""
    if text is None:
        return math.ceil(Fraction(3, 4) * subnets)
    try:
        k = Fraction(text) * subnets
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--coverage {text} is neither a number nor a fraction such as 5/8") from None
    if not 0 < k <= subnets:
        raise UserError(f"--coverage {text} must be more than 0 and at most 1")
    if not round(k) or abs(k - round(k)) > Fraction(1, 1000):        # 0.33 is not 1/3, but 0.3333 is
        near = [f"{i}/{subnets}" for i in (math.floor(k), math.ceil(k)) if i]
        raise UserError(f"--coverage {text} is not a multiple of 1/{subnets} (one part per subnet); the nearest are {' and '.join(near)}")
    return round(k)


# ---------------------------------------------------------------------------------------------------------------------
# The processes
# ---------------------------------------------------------------------------------------------------------------------

DISTRIBUTED = "RANK" in os.environ                                   # started by torchrun
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


PHASE = "start-up"                                                   # what to name when the other workers are lost
STOP = False                                                         # SIGTERM has come: somebody wants this machine back


def say(*words):
    if RANK == 0:
        print(*words, flush=True)


def phase(name):
    global PHASE
    PHASE = name


def stop(*_):
    global STOP
    STOP = True


def pick_device(wanted):
    """This rank's device, and the backend: NCCL where each rank has a GPU of its own, otherwise gloo."""
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {wanted} is not cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {wanted} is not cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
    backend, gpus = "gloo", torch.cuda.device_count()
    if device.type == "cuda":
        if DISTRIBUTED:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % gpus)
            backend = "nccl" if int(os.environ["LOCAL_WORLD_SIZE"]) <= gpus else "gloo"
        if (device.index or 0) >= gpus:
            raise UserError(f"--device {wanted}: this machine has CUDA devices 0 to {gpus - 1}")
        torch.cuda.set_device(device.index or 0)
    return device, backend


def keep_freed_memory():
    """Has malloc keep what is freed for the next update, as torch's own allocator does on GPUs.

    By default glibc gives large freed blocks back to the system, and an update whose gradients come and go, as in sdp.py,
    then waits for 20,000 to 35,000 new pages (llama-134m), some 3 % of its time.  The resident peak is the same for SDP, and up
    to 6 % higher for DDP.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 32 * 2**20)                                 # M_MMAP_THRESHOLD: the largest it takes
        libc.mallopt(-1, -1)                                         # M_TRIM_THRESHOLD: never


def start_processes(wanted, timeout):
    """Joins the other ranks; returns this rank's device."""
    device, backend = pick_device(wanted)
    keep_freed_memory()
    if DISTRIBUTED:
        wait = timedelta(seconds=timeout)
        store, rank, world = next(rendezvous("env://", timeout=wait))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(WORLD):         # torchrun keeps the store over restarts: ranks would find
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)       # addresses of the dead
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    return device


def digest(*tensors):
    return hashlib.sha256(b"".join(t.cpu().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def agree(mine):
    """Refuses to start unless all ranks have the same {name: value}."""
    ranks = [mine] * WORLD
    if DISTRIBUTED:
        dist.all_gather_object(ranks, mine)
    for rank, its in enumerate(ranks):
        for name, value in its.items():
            if str(value) != str(ranks[0].get(name)):
                raise UserError(f"rank {rank} has {name} {value}, but rank 0 has {ranks[0].get(name)}: start all ranks with the same "
                                f"command, code and data")


def first_rank_first(work):
    """Runs work() on rank 0 alone and gives its result (or its error) to every rank."""
    result = [None, None]
    if RANK == 0:
        try:
            result[0] = work()
        except UserError as e:
            result[1] = str(e)
    if DISTRIBUTED:
        dist.broadcast_object_list(result)
    if result[1]:
        raise UserError(result[1])
    return result[0]


def over_ranks(values, op, device):
    """Element-wise sum or maximum of a list of numbers over the ranks."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    if DISTRIBUTED:
        dist.all_reduce(values, op=op)
    return values.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# From flags to workers
# ---------------------------------------------------------------------------------------------------------------------

class Design:
    """Who holds what, as the flags say.  Alike on every rank, and nothing of the model's size is in memory yet."""

    def __init__(self, args, config, masks=None):
        self.args, self.config = args, config
        self.family, self.Model = (resnet, resnet.ResNet) if args.model == "resnet18" else (llama, llama.Llama)
        self.branches, self.layout = self.family.branches(config), self.family.layout(config)
        self.masks, self.backward = masks, args.masking == "backward"
        if args.parallel != "sdp":                                   # no masks, no branches: everything is shared
            self.masks, self.layout = {}, {name: (None, None, shape) for name, (_, _, shape) in self.layout.items()}
        elif masks is None:
            make = sdp.block_masks if args.level == "block" else sdp.neuron_masks
            self.masks = make(self.branches, args.subnets, coverage_to_held(args.coverage, args.subnets), args.seed)

    def model(self, subnet, device="meta", fake=nullcontext()):
        """The model that a worker with this subnetwork trains, without masks the whole one.  `fake` may be a FakeTensorMode."""
        held = sdp.held_counts(self.masks, subnet) if self.masks else {b: neurons for b, (_, neurons, *_) in self.branches.items()}
        with fake, torch.device(device):
            return self.Model(self.config, held, self.backward)

    def initial(self, subnet, device):
        """The same with its weights, as they are at the start of a run."""
        value = sdp.fresh(self.layout, partial(self.family.init, self.config), self.args.seed)
        return sdp.materialize(self.model(subnet), self.masks, self.layout, subnet, value, device)

    def wrap(self, model):
        """Makes this rank's model, which has its weights, ready to be trained as --parallel says."""
        args = self.args
        model.checkpoint_activations = args.checkpoint_activations
        with unset_fake_temporarily():                               # masks are real numbers even where the model is not (--plan)
            if args.parallel.startswith("fsdp"):
                mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
            else:
                sync = sdp.SubnetDataParallel(model, self.masks, self.layout, self.backward, reduce=args.parallel == "sdp",
                                              timeout=timedelta(seconds=args.timeout))
        if args.parallel.startswith("fsdp"):
            return Sharded(model, mesh, reshard=args.parallel == "fsdp")
        if args.parallel == "ddp":            # torch's own averages the gradients (reduce=False); sync still gathers
            sync.module = DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False)
            sync.no_sync, sync.clip_grad_norm = sync.module.no_sync, partial(nn.utils.clip_grad_norm_, list(model.parameters()))
            if dist.get_backend() == "fake":
                sync.module.register_comm_hook(None, without_peers)
        return sync


def blocks_of(model):
    return [model.get_submodule(path) for path, _ in model.stages() if "layer" in path]


def compile_blocks(model):
    """Block by block, so that gradients still come one block at a time; blocks of equal sizes are compiled once."""
    for block in blocks_of(model):
        block.forward = torch.compile(block.forward)                 # hooks, such as FSDP's, stay outside


def accumulate(sync, batch, micro_steps, autocast):
    """Forward and backward passes of one update; batch(worker, micro step) -> inputs, targets.  Returns the sum of the workers' losses."""
    total = 0.0
    for worker in sync.workers:                                      # one under torchrun, all of them without
        for micro in range(micro_steps):
            with nullcontext() if micro == micro_steps - 1 else sync.no_sync():
                with autocast:
                    loss = sync.run(worker, *(t.to(sync.device) for t in batch(worker, micro))) / micro_steps
                loss.backward()
            total = total + loss.detach()
    sync.finish()                                                    # gradients are averages over their holders
    return total


def max_norm(args):
    return math.inf if args.model == "resnet18" else 1.0             # image recipes do not clip; the norm is logged


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: always of the full model, so that any number of workers can go on with any masks
# ---------------------------------------------------------------------------------------------------------------------

def save_checkpoint(out_dir, sync, optimizer, step, config, masks, statistics):
    """Gathers model and optimizer state, one parameter at a time, and writes ckpt.pt; the old one stays as ckpt.prev.pt.

    statistics: those of the full model's batch norms, {name: tensor}.
    """
    def gather(tensors):
        return {name: t.detach().cpu().clone() if RANK == 0 else None for name, t in sync.gather(tensors)}

    trained = sync.trained()
    states = {local: optimizer.state[p] for local, p in trained.items()}
    first = next(iter(states.values()))
    keys = [k for k, v in first.items() if torch.is_tensor(v) and v.dim()]
    updates = int(first.get("step", step))                           # fewer than `step` if some were skipped
    state = {key: gather({local: s[key] for local, s in states.items()}) for key in keys}
    model = gather(trained)

    def write():
        optimizer_state = {name: {**{key: state[key][name] for key in keys}, "step": updates} for name in model}
        model.update({name: b.cpu() for name, b in statistics.items()})
        if not all(t.isfinite().all() for tensors in (model, *state.values()) for t in tensors.values()):
            raise UserError(f"after step {step} the weights are not finite any more, and were not saved: try a smaller --lr")
        part, path = out_dir / "ckpt.pt.part", out_dir / "ckpt.pt"
        try:
            with open(part, "wb") as f:
                torch.save({"model": model, "optimizer": optimizer_state, "step": step, "config": config, "masks": masks}, f)
                f.flush()
                os.fsync(f.fileno())
            if zipfile.ZipFile(part).testzip():
                raise OSError("it does not read back as it was written")
            if path.exists():
                os.replace(path, out_dir / "ckpt.prev.pt")
            os.replace(part, path)
        except (OSError, RuntimeError, zipfile.BadZipFile) as e:     # torch's writer raises RuntimeError on a full disk
            part.unlink(missing_ok=True)
            raise UserError(f"cannot write {path} ({str(e).splitlines()[0]}); make room and go on with --resume") from None
    first_rank_first(write)


def log(path, line):
    try:
        with open(path, "a") as f:
            f.write(json.dumps(line) + "\n")
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}); make room and go on with --resume") from None


def write_rows(path, rows):
    try:
        path.write_text("[" + ",\n ".join(map(json.dumps, rows)) + "]\n")
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror})") from None


def find_checkpoint(out_dir):
    """Path of the newest intact checkpoint, or None.

    torch.load does not notice a flipped bit, but the zip checksums do; what zip forgives in its tables, torch does not.
    """
    damaged = []
    for path in (out_dir / "ckpt.pt", out_dir / "ckpt.prev.pt"):
        if path.exists():
            try:
                if zipfile.ZipFile(path).testzip() is None and torch.load(path, mmap=True, weights_only=True):
                    if damaged:
                        print(f"warning: {damaged[0]} is damaged, going on from {path}", flush=True)
                    return path
            except Exception:                                        # damage has many faces
                pass
            damaged.append(path)
    if damaged:
        raise UserError(f"{damaged[0]} is damaged and there is no other checkpoint; start again with --overwrite")
    return None


def load_checkpoint(path):
    try:                                                             # mapped: a rank reads only what it cuts
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        assert {"model", "optimizer", "step", "config", "masks"} <= checkpoint.keys()
        return checkpoint
    except Exception:
        raise UserError(f"{path} is not a checkpoint of this program; start again with --overwrite") from None


# ---------------------------------------------------------------------------------------------------------------------
# The numbers
# ---------------------------------------------------------------------------------------------------------------------

def measure_flops(model, batch):
    """FLOPs of one forward and backward pass, counted by torch from the operations of a run on the meta device."""
    with FlopCounterMode(display=False) as counter:
        model(*(t.to("meta") for t in batch)).backward()
    return counter.get_total_flops()


def describe_masks(design):
    rows, neurons = sdp.rows_of(design.masks)
    say(sdp.picture(design.masks, design.branches))
    say("\n  largest load / mean: " + ", ".join(f"{x:.2f} {kind}" for x, kind in zip(
        sdp.loads(design.masks, design.branches).max(0), ("bytes", "FLOPs", "activations")))
        + f"; spectral gap {sdp.spectral_gap(rows, neurons)[0]:.2f}")
    for warning in sdp.check_masks(design.masks, design.branches):
        say(f"warning: {warning}")


def describe_workers(design, modules, batch):
    """Prints what one worker holds against plain data parallelism; returns FLOPs: mean over the workers, and DDP's."""
    states = 1 if design.family is resnet else 2                     # momentum, or Adam's two moments

    def row(model, trains):
        numel = {local: p.numel() for local, p in model.named_parameters()}
        mine = sum(n for local, n in numel.items() if trains(local))
        return 4 * sum(numel.values()), 4 * mine, 4 * states * mine, measure_flops(model, batch)

    rows = []
    for s, model in enumerate(modules):
        slots = sdp.slots(model, design.masks, design.layout, s)
        rows.append(row(model, lambda local: slots[local].trains))
    ddp = row(Design(argparse.Namespace(**{**vars(design.args), "parallel": "ddp"}), design.config).model(0), lambda local: True)
    say(f"\n  {'one worker':22}{'DDP':>12}{'largest here':>14}")
    for i, (name, unit) in enumerate((("parameters, MB", 1e6), ("gradients, MB", 1e6), ("optimizer state, MB", 1e6),
                                      ("GFLOPs a micro-step", 1e9))):
        largest = max(r[i] for r in rows)
        say(f"  {name:22}{ddp[i] / unit:12.2f}{largest / unit:14.2f}{largest / ddp[i]:8.0%}")
    say()
    return sum(r[3] for r in rows) / len(rows), ddp[3]


def full_model(sync, full, dataset, split, steps):
    """Yields (outputs, targets) of the full model, for the batches 0 to steps - 1 of every worker.

    As many batches go through the model at a time as it has stages: so it keeps no more activations than training does.
    """
    which = [(i, w) for i in range(steps) for w in sync.workers]
    for n in range(0, len(which), len(full.stages())):
        batches = [dataset.batch(split, i, w, sync.size) for i, w in which[n:n + len(full.stages())]]
        batches = [(x.to(sync.device), y.to(sync.device)) for x, y in batches if len(x)]     # the last workers may have none
        yield from zip(sdp.stream(sync, full, [x for x, _ in batches]), [y for _, y in batches])


@torch.no_grad()
def estimate_statistics(sync, full, dataset, autocast):
    """Mean and variance of every batch norm's inputs in the full model, over fixed training batches; puts them into `full`.

    The statistics of the subnetworks are not those of the full model, so training keeps none.  These are the plain means
    over all workers' first batches.  Returns {name: tensor}, for the checkpoint; for a model without batch norm {}.
    """
    norms = [m for m in full.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.to_empty(device=sync.device).reset_running_stats()
    if norms:
        full.train()
        with autocast:
            for _ in full_model(sync, full, dataset, "train", -(-STATISTICS_IMAGES // (dataset.batch_size * sync.size))):
                pass
        full.eval()
        if DISTRIBUTED:
            for b in full.buffers():
                dist.all_reduce(b)                                   # a sum; all workers have had equally many images
                if b.is_floating_point():
                    b /= WORLD
    return dict(full.named_buffers())


@torch.no_grad()
def evaluate(sync, full, dataset, loss, autocast):
    """-> validation loss of the full model in nats per token or image, and its accuracy."""
    total = right = count = 0.0
    with autocast:
        for outputs, y in full_model(sync, full, dataset, "val", dataset.val_steps(sync.size)):
            total += float(loss(outputs, y)) * y.numel()
            right += float((outputs.argmax(-1) == y).sum())
            count += y.numel()
    total, right, count = over_ranks([total, right, count], dist.ReduceOp.SUM, sync.device)
    return total / count, right / count


def make_optimizer(params, lr, images):
    """The usual recipes: momentum for images (as in arXiv 1708.04552, section 4.1), AdamW for text."""
    params = list(params)
    # Fused is faster and has no temporary tensors.  But on CPUs it rounds what is beyond the last whole vector (at most 16
    # numbers) of a tensor in another way: the replicas of a neuron, which have it at different places, would part
    fused = all(p.device.type == "cuda" or p.numel() % 16 == 0 for p in params)
    if images:
        return torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return torch.optim.AdamW([{"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
                              {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95), fused=fused)


def learning_rate(step, steps, peak, last):
    """Warm-up over the first 5 %, then a cosine down to `last` times the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (last + (1 - last) * (0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def sample(checkpoint, prompt, device, count=200):
    """Text from the full model of a checkpoint: an ordinary Llama, no trace of subnetworks is left in it."""
    if checkpoint["config"]["model"] == "resnet18":
        raise UserError("--sample prints text, and the checkpoint's model, resnet18, reads images")
    config = llama.LlamaConfig(**{f.name: checkpoint["config"][f.name] for f in fields(llama.LlamaConfig)})
    encoding = data.encoding_for(config.vocab_size)
    with torch.device("meta"):
        model = llama.Llama(config)
    model.load_state_dict(checkpoint["model"], assign=True)
    tokens = torch.tensor([encoding.encode_ordinary(prompt) or [10]], device=device)
    rng = torch.Generator(device).manual_seed(0)
    return encoding.decode(model.to(device).generate(tokens, count, generator=rng)[0].tolist())


# ---------------------------------------------------------------------------------------------------------------------
# --plan and --bench: what a worker needs, under SDP and under what people would use instead
# ---------------------------------------------------------------------------------------------------------------------

VARIANTS = {                                                         # name -> the flags that make it
    "ddp": dict(parallel="ddp"),
    "ddp-checkpoint": dict(parallel="ddp", checkpoint_activations=True),
    "fsdp": dict(parallel="fsdp"),
    "fsdp-zero2": dict(parallel="fsdp-zero2"),                       # keeps the gathered weights until the backward pass
    **{f"sdp-{masking}-{level}": dict(parallel="sdp", masking=masking, level=level)
       for masking in ("forward", "backward") for level in ("block", "neuron")},
}
WARM_UP, TIMED = 1, 3                                                # updates of a variant between building it and tearing it down


class Sharded:
    """FSDP2, `fully_shard` on each block, with the interface of sdp.SubnetDataParallel as far as it is needed here.

    reshard: free a block's gathered weights after its forward pass, and gather them once more for the backward pass (ZeRO-3);
    otherwise they stay (ZeRO-2).  Gradients are reduced in every micro-step, as they do not fit whole.
    """

    no_sync = nullcontext

    def __init__(self, model, mesh, reshard):
        self.device, self.workers, self.module = next(model.parameters()).device, [dist.get_rank()], model
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh)

    def trained(self):
        return dict(self.module.named_parameters())

    def run(self, worker, *inputs):
        return self.module(*inputs)

    def clip_grad_norm(self, max_norm):
        return nn.utils.clip_grad_norm_(self.module.parameters(), max_norm)

    def finish(self):
        pass                                                         # its own hooks wait

    refresh = close = finish


class SentBytes(TorchDispatchMode):
    """Counts what this worker sends in the collectives issued inside, each done by an optimal (ring) algorithm: among n
    workers (n-1)/n of a tensor's bytes, twice that for an all-reduce.  Single numbers are not counted."""

    TIMES = {torch.ops.c10d.allreduce_.default: 2, torch.ops.c10d.broadcast_.default: 1,
             torch.ops.c10d._allgather_base_.default: 1, torch.ops.c10d._reduce_scatter_base_.default: 1}
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in self.TIMES:
            size, n = CollectiveOp.get_comm_tensor_size(func, result, args, kwargs), CollectiveOp.get_process_group(func, args).size()
            self.total += self.TIMES[func] * size * (n - 1) / n if size > 8 else 0
        return result


class Tracker(MemTracker):
    """torch's memory tracker, but for models with frozen parameters too, and without its hooks on modules: they take most of
    the time, and leave cycles of references in which a model lives for ever."""

    class NoModules(ModTracker):
        __enter__, __exit__ = lambda self: self, lambda self, *_: None

    def __init__(self):
        super().__init__()
        self._mod_tracker = self.NoModules()

    def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
        for p in module.parameters():
            if not p.requires_grad:                                  # has no gradient to hook
                self._param_to_grad_hook_handles[p] = RemovableHandle(OrderedDict()), RemovableHandle(OrderedDict())
        return super()._track_module_params_and_buffers(module, install_grad_hooks)


@contextmanager
def alone(rank, world):
    """Makes this process worker `rank` of `world` without the others: torch's fake process group takes every message and brings none."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def without_peers(_, bucket):
    """DDP's communication hook under the fake process group, whose own results DDP cannot read."""
    dist.all_reduce(bucket.buffer())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def update(sync, optimizer, batch, args, autocast):
    """One update, as in training (which also checks that loss and gradient are finite)."""
    accumulate(sync, batch, args.grad_accum, autocast)
    sync.clip_grad_norm(max_norm(args))
    optimizer.step()
    optimizer.zero_grad()
    sync.refresh()


def first_update(design, model, batch, autocast, fake=nullcontext()):
    """Wraps a worker's model and runs one update (two with backward masking) under torch's memory tracker.

    Returns what `wrap` made, the optimizer, {"parameters": bytes, ..., "peak": bytes} at the moment of the peak, and the
    bytes sent.  Inside a FakeTensorMode the tensors are mere shapes, and nothing is computed.
    """
    tracker, sent, args = Tracker(), SentBytes(), design.args

    def snapshot(when):
        return {getattr(kind, "value", kind): size for kind, size in tracker.get_tracker_snapshot(when)[sync.device].items()}

    with fake:
        with tracker:
            sync = design.wrap(model)
            optimizer = make_optimizer(sync.trained().values(), args.lr, design.family is resnet)
            for p in sync.trained().values():
                p.grad = torch.zeros_like(p)
            optimizer.step()                                         # an optimizer makes its state in its first step
            optimizer.zero_grad()
            tracker.track_external(sync.module, optimizer)           # tells it which tensors are what
        buckets = snapshot("current")["Activation"] if args.parallel == "ddp" else 0     # what is left: the buckets of gradients
        updates = 2 if design.backward else 1                        # what the first one refreshes arrives in the second
        with tracker, sent:                                          # the peak is counted from here
            tracker._track_module_params_and_buffers(sync.module)    # and gradients are known as such
            for _ in range(updates):
                update(sync, optimizer, batch, args, autocast)
    at = snapshot("peak")
    memory = {"parameters": at["Parameter"] + at["Buffer"], "gradients": at["Gradient"] + buckets, "optimizer": at["Optstate"],
              "activations": at["Activation"] - buckets, "temporary": at["Temp"] + at["Other"], "peak": at["Total"]}
    return sync, optimizer, memory, round(sent.total / updates)


def designs(args, config):
    return {name: Design(argparse.Namespace(**{**vars(args), **flags}), config) for name, flags in VARIANTS.items()}


def sends(design, world):
    """[bytes that worker 0 sends in one update, worker 1, ...]"""
    out = []
    for rank in range(world):
        with alone(rank, world):
            out.append(design.wrap(design.model(rank % design.args.subnets)).sent_bytes)
    return out


def largest(design, world):
    """Workers that can need most of something: those with most bytes, FLOPs, activations, or bytes and activations together, or,
    as what backward masking refreshes takes memory, with most to send."""
    if not design.masks:
        return [0]
    load = sdp.loads(design.masks, design.branches)                  # [subnets, (bytes, FLOPs, activations)]
    sent = [max(range(world), key=sends(design, world).__getitem__)] if design.backward else []
    return sorted({int(s) for s in (*load.argmax(0), load[:, [0, 2]].sum(1).argmax(), *sent)})


def size_of(design, world, batch):
    """"params" and "flops" of a row: number of parameters, and FLOPs of one update, of the worker with most."""
    models = [design.model(s) for s in range(design.args.subnets if design.masks else 1)]
    params = max(sum(p.numel() for p in m.parameters()) for m in models)
    s = int(sdp.loads(design.masks, design.branches)[:, 1].argmax()) if design.masks else 0
    most, _ = models[s], sdp.slots(models[s], design.masks, design.layout, s)            # which freezes what does not train
    most.checkpoint_activations = design.args.checkpoint_activations
    return {"params": -(-params // world) if design.args.parallel.startswith("fsdp") else params,
            "flops": measure_flops(most, batch) * design.args.grad_accum}


def planned(name, design, world, batch, device):
    """A row of plan.json.  Each figure is that of the worker with most; `memory` that of the worker with the highest peak."""
    args, fake = design.args, FakeTensorMode(allow_non_fake_inputs=True)
    row = {"variant": name, **size_of(design, world, batch)}
    for rank in largest(design, world):
        with alone(rank, world):
            with fake:
                inputs = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in batch]
            *_, memory, sent = first_update(design, design.model(rank % args.subnets, device, fake), lambda *_: inputs, autocast_of(args, device), fake)
        row["memory"] = max(memory, row.get("memory", memory), key=lambda m: m["peak"])
    return {**row, "sent_bytes": round(max(sends(design, world))) if design.masks else sent}


def plan(args, device):
    """Prints, and writes to plan.json, what a worker of each variant will need.  Trains nothing, allocates nothing of any size."""
    given = args.data
    settle(args, None)
    world, config = WORLD if DISTRIBUTED else args.subnets, {**llama.PRESETS, **resnet.PRESETS}[args.model]
    with torch.device("meta"):
        if args.model == "resnet18":
            config = replace(config, num_classes=data.IMAGES[args.data][0])
            batch = torch.empty(args.batch_size, 3, config.image_size, config.image_size), torch.empty(args.batch_size, dtype=torch.int64)
        else:
            vocab_size = data.load(args.data, args.batch_size, args.seq_len, args.seed).vocab_size if given else 32000
            config, batch = replace(config, vocab_size=vocab_size), [torch.empty(args.batch_size, args.seq_len, dtype=torch.int64)] * 2
    make_folder(args.out_dir)
    all_designs = designs(args, config)
    say(f"{args.model}, {world} workers, {args.subnets} subnetworks, coverage {args.coverage}, batch {args.batch_size} a worker, "
        f"{device.type}, {args.dtype}; who holds what at {args.level} level (subnets across):\n")
    describe_masks(all_designs[f"sdp-forward-{args.level}"])
    rows = [planned(name, design, world, batch, device) for name, design in all_designs.items()]
    say_rows(rows)

    say(f"\nForward masking, {args.level} level, peak memory at other coverages:")
    peak, saved = rows[0]["memory"]["peak"], {}
    for held in range(1, args.subnets + 1):
        coverage = f"{held}/{args.subnets}"
        at = argparse.Namespace(**{**vars(args), "masking": "forward", "coverage": coverage})
        rows.append(planned(f"sdp-forward-{args.level} at {coverage}", Design(at, config), world, batch, device))
        saved[coverage] = 1 - rows[-1]["memory"]["peak"] / peak
        say(f"  {coverage}: {si(rows[-1]['memory']['peak'])}B, {saved[coverage]:4.0%} less than ddp")
    for wanted in 0.28, 0.60:
        enough = [coverage for coverage, part in saved.items() if part >= wanted]
        say(f"  {wanted:.0%} less: " + (f"at coverage {enough[-1]} or below" if enough else "at none; what all workers hold is too much"))
    write_rows(args.out_dir / "plan.json", rows)


def take_turn(design, batch, device, updates, trace):
    """Builds this rank's worker, measures it, and tears it down.  -> memory, bytes sent, ms of each update.

    trace: None, or where torch.profiler's timeline of one more update goes.
    """
    args, ms = design.args, []
    autocast, model = autocast_of(args, device), design.initial(dist.get_rank() % args.subnets, device)
    sync, optimizer, memory, sent = first_update(design, model, batch, autocast)
    if args.compile:                                                 # not before: the tracker has to see every operation
        compile_blocks(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP + updates):
        begin = time.perf_counter()
        update(sync, optimizer, batch, args, autocast)
        if device.type == "cuda":
            torch.cuda.synchronize()
        ms.append((time.perf_counter() - begin) * 1000)
    if device.type == "cuda":                                        # the allocator knows better than the tracker
        memory["peak"] = torch.cuda.max_memory_allocated()
    with torch.profiler.profile() if trace and RANK == 0 else nullcontext() as profile:
        if trace:
            update(sync, optimizer, batch, args, autocast)
        sync.close()                                                 # inside: messages under way when a profiler stops crash it
    if profile:
        profile.export_chrome_trace(str(trace))
    return memory, sent, ms[WARM_UP:]


def bench(args, device):
    """Times --bench updates of each variant, measures memory and bytes.  The variants take turns, so that all of them see the
    same weather, and each is torn down before the next is built, so that memory is its own.

    Without torchrun: the workers with most to hold, one after another, without their peers, hence without communication.
    """
    settle(args, None)
    dataset, config, _ = load_data(args, device)
    world, everything, rows, rounds = WORLD if DISTRIBUTED else args.subnets, designs(args, config), {}, []
    batch = lambda worker, micro: dataset.batch("train", micro, worker, world)
    make_folder(args.out_dir)
    say(f"{args.model} on {args.data}, {world} workers{'' if DISTRIBUTED else ', of which one at a time is here, without communication'}, {args.subnets} "
        f"subnetworks, coverage {args.coverage}, batch {args.batch_size} a worker, {device.type}, {args.dtype}{', compiled' if args.compile else ''}")
    for done in range(0, args.bench, TIMED):
        rounds.append({})
        updates = min(TIMED, args.bench - done)
        for name, design in list(everything.items())[::1 if len(rounds) % 2 else -1]:    # there and back: a drift cancels
            phase(f"the bench of {name}")
            trace = args.out_dir / f"trace-{name}.json" if done + updates == args.bench else None
            turns = []
            for rank in [RANK] if DISTRIBUTED else largest(design, world):
                with nullcontext() if DISTRIBUTED else alone(rank, world):
                    turns.append(take_turn(design, batch, device, updates, trace))
                gc.collect()
            if DISTRIBUTED:
                mine, turns = turns[0], [None] * WORLD
                dist.all_gather_object(turns, mine)
            memory, sent, ms = zip(*turns)
            rounds[-1][name] = [max(times) for times in zip(*ms)]    # an update is over when all ranks are done
            rows[name] = {"variant": name, "memory": max(memory, key=lambda m: m["peak"]), "sent_bytes": max(sent)}
        say(f"  {done + updates} of {args.bench} updates")
    for name, design in everything.items():
        ms = [t for one in rounds for t in one[name]]
        rows[name].update(size_of(design, world, batch(0, 0)), step_ms=median(ms), step_ms_range=[min(ms), max(ms)],
                          step_ratio=median([median(one[name]) / median(one["ddp"]) for one in rounds]))
    say_rows(list(rows.values()))
    first_rank_first(lambda: write_rows(args.out_dir / "bench.json", list(rows.values())))


def si(x):
    """1234567 -> '1.23 M'"""
    for unit in ("", "k", "M", "G"):
        if x < 999.5:
            break
        x, unit = x / 1000, "T"
    return f"{x:.3g} {unit}"


def say_rows(rows):
    """Two tables: each figure with what it is of DDP's, and what the memory consists of."""
    first, kinds = rows[0], list(rows[0]["memory"])
    get = {"params": lambda r: r["params"], "FLOPs": lambda r: r["flops"], "peak, B": lambda r: r["memory"]["peak"], "sent, B": lambda r: r["sent_bytes"]}
    say(f"\n  {'one worker, one update':24}" + "".join(f"{name:>16}" for name in get) + f"{'step, ms (range)':>31}" * ("step_ms" in first))
    for r in rows:
        cells = "".join(f"{si(of(r)):>10}{of(r) / max(1, of(first)):>6.0%}" for of in get.values())
        if "step_ms" in r:
            cells += f"{r['step_ms']:10.0f} ({r['step_ms_range'][0]:.0f} - {r['step_ms_range'][1]:.0f})".ljust(24) + f"{r['step_ratio']:7.1%}"
        say(f"  {r['variant']:24}{cells}")
    say(f"\n  {'at the peak, MB':24}" + "".join(f"{kind:>13}" for kind in kinds))
    for r in rows:
        say(f"  {r['variant']:24}" + "".join(f"{r['memory'][kind] / 1e6:13.1f}" for kind in kinds))


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------

def load_data(args, device):
    """-> the data set, the model's sizes made to fit it, and the name of the one size that the data decides."""
    first_rank_first(lambda: data.download_images(args.data))
    dataset = data.load(args.data, args.batch_size, args.seq_len, args.seed, device)
    size = "num_classes" if args.data in data.IMAGES else "vocab_size"
    return dataset, replace({**llama.PRESETS, **resnet.PRESETS}[args.model], **{size: getattr(dataset, size)}), size


def autocast_of(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")


def settle(args, checkpoint):
    """Fills in what the flags leave open, and refuses what cannot be."""
    for flag in "model", "data":
        was, given = checkpoint["config"][flag] if checkpoint else None, getattr(args, flag)
        if was is not None and given is not None and was != given:
            raise UserError(f"--{flag} {given} contradicts the checkpoint in {args.out_dir}, which has {was}")
        default = "llama-tiny" if flag == "model" else DEFAULTS[args.model]["data"]
        setattr(args, flag, next(v for v in (was, given, default) if v is not None))
    if args.model == "resnet18" and args.data not in data.IMAGES:
        raise UserError(f"resnet18 reads images: --data can be {', '.join(data.IMAGES)}, not {args.data}")
    if args.model != "resnet18" and args.data in data.IMAGES:
        raise UserError(f"--data {args.data} holds images, and {args.model} reads text: use --model resnet18")
    for flag, value in {**DEFAULTS[args.model], **DEFAULTS.get(args.data, {})}.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if not 0 < args.lr < 1e6:
        raise UserError(f"--lr must be a positive number below a million, not {args.lr}")
    if args.model == "resnet18":
        if args.seq_len is not None:
            raise UserError("--seq-len is for text, and resnet18 reads images")
    elif args.seq_len > (context := llama.PRESETS[args.model].max_position_embeddings):
        raise UserError(f"--seq-len {args.seq_len} is longer than the context of {args.model}, {context}")
    for flag in ("compile", "checkpoint_activations"):
        if getattr(args, flag) and not (DISTRIBUTED or args.plan or args.bench):
            raise UserError(f"--{flag.replace('_', '-')} needs real workers: start with torchrun --nproc-per-node=1 or more")
    args.subnets = args.subnets or (WORLD if DISTRIBUTED else 4)
    if DISTRIBUTED and WORLD % args.subnets:
        raise UserError(f"--subnets {args.subnets} does not divide the number of workers, {WORLD}")
    held = args.subnets if args.parallel == "ddp" else coverage_to_held(args.coverage, args.subnets)
    args.coverage = f"{held}/{args.subnets}"


def make_folder(out_dir):
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to --out-dir {out_dir}: {e.strerror}") from None


def claim(out_dir, resume, overwrite, step):
    """Makes the out-dir ready for a run that begins at `step`, without touching a run nobody said to touch."""
    def known(line):                                                 # whole, and not of steps that will be done again
        try:
            return json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            return False

    metrics = out_dir / "metrics.jsonl"
    old = [f for f in (out_dir / "ckpt.pt", out_dir / "ckpt.prev.pt", metrics) if f.exists()]
    if old and not (resume or overwrite):
        raise UserError(f"{out_dir} already holds a run: --resume goes on with it, --overwrite replaces it")
    make_folder(out_dir)
    try:
        for f in old if overwrite else []:
            f.unlink()
        lines = metrics.read_text().splitlines(True) if metrics.exists() else []
        metrics.with_suffix(".part").write_text("".join(filter(known, lines)))
        os.replace(metrics.with_suffix(".part"), metrics)
    except OSError as e:
        raise UserError(f"cannot write to --out-dir {out_dir}: {e.strerror}") from None


def main(argv=None):
    args = parse(argv)
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite contradict each other; give one of them")
    modes = [f"--{mode}" for mode in ("plan", "bench", "sample") if getattr(args, mode) not in (None, False)]
    if len(modes) > 1 or modes and modes[0] != "--sample" and (args.resume or args.overwrite):
        raise UserError(f"{modes[0]} goes together with none of --plan, --bench, --sample, --resume, --overwrite")
    if args.plan or args.bench:
        args.parallel = "sdp"                                        # whatever was said: all of them are compared
    if args.plan:
        return plan(args, pick_device(args.device)[0]) if RANK == 0 else None
    device = start_processes(args.device, args.timeout)
    code = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
    agree({**{f"--{flag.replace('_', '-')}": value for flag, value in vars(args).items()}, "code": code, "torch": torch.__version__})
    if args.bench:
        bench(args, device)
        return leave_the_others()
    path = first_rank_first(lambda: find_checkpoint(args.out_dir)) if args.resume else None
    checkpoint = load_checkpoint(path) if path else None
    if args.sample is not None:
        if checkpoint is None:
            raise UserError(f"--sample needs --resume and a checkpoint in --out-dir {args.out_dir}")
        return say(sample(checkpoint, args.sample, device))

    before = signal.signal(signal.SIGTERM, stop)
    try:
        finished = train(args, device, checkpoint)
    finally:
        signal.signal(signal.SIGTERM, before)
    del checkpoint
    if RANK == 0 and finished and args.model != "resnet18":          # the workers' memory is free again
        say(f"\nA sample of the full model in {args.out_dir / 'ckpt.pt'}:\n")
        try:
            say(sample(load_checkpoint(args.out_dir / "ckpt.pt"), "def " if args.data == "stdlib" else "\n", device))
        except UserError as e:
            say(f"(none: {e})")
    leave_the_others()


def leave_the_others():
    if DISTRIBUTED:
        dist.barrier()
        dist.destroy_process_group()


def train(args, device, checkpoint):
    """The whole run: prepare, loop, evaluate, save.  Returns False if it was told to stop on the way."""
    # -- data, model, and masks: which of the S subnetworks holds which neuron
    settle(args, checkpoint)
    dataset, config, size = load_data(args, device)
    if checkpoint and checkpoint["config"][size] != getattr(config, size):
        raise UserError(f"{args.data} now has {size} {getattr(config, size)}, the checkpoint in {args.out_dir} {checkpoint['config'][size]}: "
                        f"bring back the data as it was, or train another model in another --out-dir")
    saved = checkpoint["config"] if checkpoint else {}
    same = all(saved.get(f) == getattr(args, f) for f in ("parallel", "subnets", "coverage", "level"))
    design = Design(args, config, checkpoint["masks"] if same else None)
    family, masks, layout = design.family, design.masks, design.layout
    images = family is resnet
    x, y = dataset.batch("train", 0, 0, 1)
    agree({"data": digest(x, y, *dataset.batch("val", 0, 0, 1)), "masks": digest(*masks.values())})
    start = checkpoint["step"] if checkpoint else 0
    first_rank_first(lambda: claim(args.out_dir, args.resume, args.overwrite, start))

    with torch.device("meta"):                                       # shapes without memory
        full = design.Model(config)                                  # to evaluate
    modules = [design.model(s) for s in range(args.subnets if masks else 1)]
    workers = WORLD if DISTRIBUTED else args.subnets
    say(f"{args.model} on {args.data}{' (synthetic)' if args.data == 'shapes' else ''}, {args.parallel}, {workers} workers"
        f"{'' if DISTRIBUTED else ' simulated in this process'}, {device.type}, {args.dtype}")
    if masks:
        say(f"{args.masking} masking, {args.level} level, coverage {args.coverage}; who holds what (subnets across):\n")
        describe_masks(design)
    flops, ddp_flops = describe_workers(design, modules, (x, y))
    steps = round(args.steps * ddp_flops / flops) if args.flop_match else args.steps

    # -- this process's worker, or all of them
    value = checkpoint["model"].__getitem__ if checkpoint else sdp.fresh(layout, partial(family.init, config), args.seed)
    if DISTRIBUTED:
        subnet = RANK % len(modules)
        module = sdp.materialize(modules[subnet], masks, layout, subnet, value, device)
        sync = design.wrap(module)
        if args.compile:
            compile_blocks(module)
    else:
        sync = sdp.Simulation(modules, masks, layout, value, workers, device)
    trained = sync.trained()
    optimizer = make_optimizer(trained.values(), args.lr, images)
    for local, p in trained.items() if checkpoint else ():
        for key, example in next(iter(checkpoint["optimizer"].values())).items():
            if torch.is_tensor(example):
                optimizer.state[p][key] = sync.cut(local, lambda name: checkpoint["optimizer"][name][key]).to(device, copy=True)
            elif not images:
                optimizer.state[p][key] = torch.tensor(float(example), device=device)    # Adam's number of updates
    autocast = autocast_of(args, device)

    if DISTRIBUTED:
        sync.check_replicas()                                        # all holders begin with the same bits

    # -- the loop
    saved_config = {**{k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, **asdict(config)}
    since, done = time.perf_counter(), start
    skipped = in_a_row = 0                                           # updates that were not finite
    for step in range(start, steps):
        phase(f"step {step + 1}")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr, 0.0 if images else 0.1)
        total = accumulate(sync, lambda worker, micro: dataset.batch("train", step * args.grad_accum + micro, worker, workers),
                           args.grad_accum, autocast)
        norm = sync.clip_grad_norm(max_norm(args))
        mean, stops = over_ranks([float(total) / workers, STOP], dist.ReduceOp.SUM, device)
        if math.isfinite(mean) and math.isfinite(norm):              # both numbers, and so the decision, are everybody's
            optimizer.step()
            in_a_row = 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            if in_a_row == 10:
                raise UserError(f"loss or gradient was not finite in ten updates in a row, up to step {step + 1}: go on from the "
                                f"last checkpoint with --resume and a smaller --lr")
        optimizer.zero_grad()
        sync.refresh()                                               # backward masking: frozen weights, from their holders

        now, end = step + 1, step + 1 == steps
        evaluates = end or now % args.eval_every == 0 and not stops  # told to stop: there may be no time for it
        if evaluates or now % args.log_every == 0:
            ms = (time.perf_counter() - since) * 1000 / (now - done)
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else -1
            most, peak = over_ranks([sync.sent_bytes, peak], dist.ReduceOp.MAX, device)
            speed = workers * args.grad_accum * y.numel() / ms * 1000
            line = {"step": now, "loss": mean, "lr": group["lr"], "grad_norm": float(norm), "step_ms": ms,
                    f"{dataset.unit}_per_s": speed, "sent_bytes": round(most), "peak_mem_bytes": int(peak) if peak >= 0 else None, "skipped": skipped}
            left = (steps - now) * ms / 1000
            say(f"step {now:5}/{steps}  loss {mean:.4f}  {ms:6.0f} ms/step  {speed:8.0f} {dataset.unit}/s  {left / 60:5.1f} min left")
            if evaluates:
                phase(f"the evaluation after step {now}")
                statistics = estimate_statistics(sync, full, dataset, autocast)
                line["val_loss"], accuracy = evaluate(sync, full, dataset, family.loss, autocast)
                more = f" = {line['val_loss'] / math.log(2):.4f} bits per byte" if getattr(config, size) == 256 else ""
                if images:
                    line["val_acc"], more = accuracy, f", accuracy {accuracy:.2%}"
                say(f"{'':18}full model: validation loss {line['val_loss']:.4f} nats{more}")
            first_rank_first(lambda: log(args.out_dir / "metrics.jsonl", line))
            since, done = time.perf_counter(), now
        if end or stops or now % args.save_every == 0:
            phase(f"the checkpoint after step {now}")
            paused = time.perf_counter()
            if not evaluates:
                statistics = estimate_statistics(sync, full, dataset, autocast)
            save_checkpoint(args.out_dir, sync, optimizer, now, saved_config, masks, statistics)
            since += time.perf_counter() - paused                    # not a part of any step
        if stops and not end:
            say(f"told to stop (SIGTERM): saved after step {now}; the same command with --resume goes on from there")
            return False
    return True


def leave(code, said):
    """Ends this process at once: the threads of open or dead connections would wait, or turn the exit code into an abort."""
    print(f"error: {said}", file=sys.stderr, flush=True)
    os._exit(code)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        if RANK > 0:                                                 # rank 0 says it, and torchrun then ends this rank
            time.sleep(10)
        leave(2, (f"rank {RANK}: " if RANK else "") + str(e))
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        leave(1, f"rank {RANK} waited for the other workers in {PHASE}, but lost them: {str(e).splitlines()[0]}")
