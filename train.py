"""
Trains a LLaMA or a ResNet-18 with Subnetwork Data Parallelism.

    torchrun --standalone --nproc-per-node=4 train.py         four workers, a subnetwork each
    torchrun --standalone --nproc-per-node=4 train.py --model resnet18 --data cifar10
    python train.py --subnets 8                               the same method, simulated in one process
    python train.py --resume --out-dir out --sample "def "    prints text from a checkpoint
"""

import argparse
import hashlib
import json
import math
import os
import signal
import sys
import time
import zipfile
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from datetime import timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import data
import model_llama as llama
import model_resnet as resnet
import sdp
from data import UserError

# The flags whose default depends on the model, or on the data.  On two cores llama-tiny takes minutes, and so does resnet18
# on shapes.  On CIFAR four workers have the usual batch of 128 between them, and 200 epochs.
DEFAULTS = {
    "llama-tiny": dict(data="stdlib", steps=250, batch_size=16, seq_len=128, lr=3e-3, eval_every=100),
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


def start_processes(wanted, timeout):
    """Joins the other ranks; returns this rank's device.  NCCL where each rank has a GPU of its own, otherwise gloo."""
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

def measure_flops(model, loss, batch):
    """FLOPs of one forward and backward pass, counted by torch from the operations of a run on the meta device."""
    x, y = (t.to("meta") for t in batch)
    with FlopCounterMode(display=False) as counter:
        loss(model(x), y).backward()
    return counter.get_total_flops()


def describe_workers(subnets, masks, layout, whole, loss, batch):
    """Prints what one worker holds against plain data parallelism; returns FLOPs: mean over the workers, and DDP's."""
    states = 1 if isinstance(whole, resnet.ResNet) else 2            # momentum, or Adam's two moments

    def row(model, trains):
        numel = {local: p.numel() for local, p in model.named_parameters()}
        mine = sum(n for local, n in numel.items() if trains(local))
        return 4 * sum(numel.values()), 4 * mine, 4 * states * mine, measure_flops(model, loss, batch)

    rows = []
    for s, model in enumerate(subnets):
        slots = sdp.slots(model, masks, layout, s)
        rows.append(row(model, lambda local: slots[local].trains))
    ddp = row(whole, lambda local: True)
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
    if images:
        return torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return torch.optim.AdamW([{"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
                              {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95))


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
# The run
# ---------------------------------------------------------------------------------------------------------------------

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
        if getattr(args, flag) and not DISTRIBUTED:
            raise UserError(f"--{flag.replace('_', '-')} needs real workers: start with torchrun --nproc-per-node=1 or more")
    args.subnets = args.subnets or (WORLD if DISTRIBUTED else 4)
    if DISTRIBUTED and WORLD % args.subnets:
        raise UserError(f"--subnets {args.subnets} does not divide the number of workers, {WORLD}")
    held = args.subnets if args.parallel == "ddp" else coverage_to_held(args.coverage, args.subnets)
    args.coverage = f"{held}/{args.subnets}"
    return held


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
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
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
    device = start_processes(args.device, args.timeout)
    code = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
    agree({**{f"--{flag.replace('_', '-')}": value for flag, value in vars(args).items()}, "code": code, "torch": torch.__version__})
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
    if DISTRIBUTED:
        dist.barrier()
        dist.destroy_process_group()


def train(args, device, checkpoint):
    """The whole run: prepare, loop, evaluate, save.  Returns False if it was told to stop on the way."""
    # -- data, model, and masks: which of the S subnetworks holds which neuron
    held = settle(args, checkpoint)
    images = args.data in data.IMAGES
    family, Model = (resnet, resnet.ResNet) if images else (llama, llama.Llama)
    first_rank_first(lambda: data.download_images(args.data))
    dataset = data.load(args.data, args.batch_size, args.seq_len, args.seed, device)
    size = "num_classes" if images else "vocab_size"                 # the one size of the model that the data decides
    config = replace(family.PRESETS[args.model], **{size: getattr(dataset, size)})
    if checkpoint and checkpoint["config"][size] != getattr(config, size):
        raise UserError(f"{args.data} now has {size} {getattr(config, size)}, the checkpoint in {args.out_dir} {checkpoint['config'][size]}: "
                        f"bring back the data as it was, or train another model in another --out-dir")
    branches, layout = family.branches(config), family.layout(config)
    masks, backward = {}, args.masking == "backward"
    if args.parallel == "ddp":                                       # no masks, no branches: everything is shared
        layout = {name: (None, None, shape) for name, (_, _, shape) in layout.items()}
    else:
        saved = checkpoint["config"] if checkpoint else {}
        if all(saved.get(f) == getattr(args, f) for f in ("parallel", "subnets", "coverage", "level")):
            masks = checkpoint["masks"]
        else:
            make = sdp.block_masks if args.level == "block" else sdp.neuron_masks
            masks = make(branches, args.subnets, held, args.seed)
    x, y = dataset.batch("train", 0, 0, 1)
    agree({"data": digest(x, y, *dataset.batch("val", 0, 0, 1)), "masks": digest(*masks.values())})
    start = checkpoint["step"] if checkpoint else 0
    first_rank_first(lambda: claim(args.out_dir, args.resume, args.overwrite, start))

    with torch.device("meta"):                                       # shapes without memory
        full = Model(config)                                         # to evaluate
        whole = Model(config, {name: neurons for name, (_, neurons, *_) in branches.items()})   # what a worker of DDP trains
        modules = [Model(config, sdp.held_counts(masks, s), backward) for s in range(args.subnets)] if masks else [whole]
    workers = WORLD if DISTRIBUTED else args.subnets
    say(f"{args.model} on {args.data}{' (synthetic)' if args.data == 'shapes' else ''}, {args.parallel}, {workers} workers"
        f"{'' if DISTRIBUTED else ' simulated in this process'}, {device.type}, {args.dtype}")
    if masks:
        rows, neurons = sdp.rows_of(masks)
        say(f"{args.masking} masking, {args.level} level, coverage {args.coverage}; who holds what (subnets across):\n")
        say(sdp.picture(masks, branches))
        say("\n  largest load / mean: " + ", ".join(f"{x:.2f} {kind}" for x, kind in zip(
            sdp.loads(masks, branches).max(0), ("bytes", "FLOPs", "activations")))
            + f"; spectral gap {sdp.spectral_gap(rows, neurons)[0]:.2f}")
        for warning in sdp.check_masks(masks, branches):
            say(f"warning: {warning}")
    flops, ddp_flops = describe_workers(modules, masks, layout, whole, family.loss, (x, y))
    steps = round(args.steps * ddp_flops / flops) if args.flop_match else args.steps

    # -- this process's worker, or all of them
    value = checkpoint["model"].__getitem__ if checkpoint else sdp.fresh(layout, partial(family.init, config), args.seed)
    if DISTRIBUTED:
        subnet = RANK % len(modules)
        module = sdp.materialize(modules[subnet], masks, layout, subnet, value, device)
        module.checkpoint_activations = args.checkpoint_activations
        sync = sdp.SubnetDataParallel(module, masks, layout, backward, reduce=args.parallel == "sdp", timeout=timedelta(seconds=args.timeout))
        if args.compile:                                             # block by block: gradients still come one block at a time
            for path, _ in module.stages():
                if "layer" in path:
                    module.get_submodule(path).compile()
        if args.parallel == "ddp":     # torch's own averages the gradients (reduce=False); sync still clips, gathers and counts
            sync.module = DistributedDataParallel(module, gradient_as_bucket_view=True)
            sync.module.register_comm_hook(sync, counted_all_reduce)
    else:
        sync = sdp.Simulation(modules, masks, layout, value, workers, device)
    no_sync = sync.module.no_sync if DISTRIBUTED and args.parallel == "ddp" else sync.no_sync
    trained = sync.trained()
    optimizer = make_optimizer(trained.values(), args.lr, images)
    for local, p in trained.items() if checkpoint else ():
        for key, example in next(iter(checkpoint["optimizer"].values())).items():
            if torch.is_tensor(example):
                optimizer.state[p][key] = sync.cut(local, lambda name: checkpoint["optimizer"][name][key]).to(device, copy=True)
            elif not images:
                optimizer.state[p][key] = torch.tensor(float(example))       # Adam's number of updates
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")

    if DISTRIBUTED:
        sync.check_replicas()                                        # all holders begin with the same bits

    # -- the loop
    saved_config = {**{k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, **asdict(config)}
    since, done, sent = time.perf_counter(), start, sync.sent_bytes
    skipped = in_a_row = 0                                           # updates that were not finite
    for step in range(start, steps):
        phase(f"step {step + 1}")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr, 0.0 if images else 0.1)
        total = 0.0
        for worker in sync.workers:                                  # one under torchrun, all of them without
            for micro in range(args.grad_accum):
                x, y = dataset.batch("train", step * args.grad_accum + micro, worker, workers)
                last = micro == args.grad_accum - 1
                with nullcontext() if last else no_sync():
                    with autocast:
                        loss = family.loss(sync.run(worker, x.to(device)), y.to(device)) / args.grad_accum
                    loss.backward()
                total = total + loss.detach()
        sync.finish()                                                # gradients are averages over their holders
        norm = sync.clip_grad_norm(math.inf if images else 1.0)      # image recipes do not clip; the norm is logged
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
            most, peak = over_ranks([(sync.sent_bytes - sent) / (now - done), peak], dist.ReduceOp.MAX, device)
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
            since, done, sent = time.perf_counter(), now, sync.sent_bytes
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


def counted_all_reduce(sync, bucket):
    """DDP's own way to average gradients, with the bytes counted."""
    sync.sent_bytes += bucket.buffer().nbytes * 2 * (sync.size - 1) / sync.size
    return default_hooks.allreduce_hook(None, bucket)


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
