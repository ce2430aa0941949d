"""
Trains a LLaMA with Subnetwork Data Parallelism.

    torchrun --standalone --nproc-per-node=4 train.py         four workers, a subnetwork each
    python train.py --subnets 8                               the same method, simulated in one process
    python train.py --resume --out-dir out --sample "def "    prints text from a checkpoint
"""

import argparse
import json
import math
import os
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
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import data
import model_llama as llama
import sdp
from data import UserError

# The flags whose default depends on the model.  On two cores llama-tiny takes minutes.
DEFAULTS = {
    "llama-tiny": dict(steps=250, batch_size=16, seq_len=128, lr=3e-3),
    "llama-134m": dict(steps=10000, batch_size=8, seq_len=1024, lr=6e-4),
    "llama-500m": dict(steps=20000, batch_size=4, seq_len=2048, lr=4e-4),
    "llama-1b": dict(steps=40000, batch_size=2, seq_len=2048, lr=3e-4),
}


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
    p.add_argument("--data", help="stdlib, fineweb, or the path of a .bin token file [stdlib]")
    p.add_argument("--parallel", choices=["sdp", "ddp"], default="sdp", help="[%(default)s]")
    p.add_argument("--masking", choices=["forward", "backward"], default="forward", help="[%(default)s]")
    p.add_argument("--level", choices=["block", "neuron"], default="block", help="[%(default)s]")
    p.add_argument("--coverage", help="k/S: part of the model each worker trains [the smallest that is at least 0.75]")
    p.add_argument("--subnets", type=positive, help="S: number of different subnetworks [number of workers; 4 without torchrun]")
    p.add_argument("--seed", type=at_least(0), default=0, help="[%(default)s]")
    p.add_argument("--steps", type=positive, help="number of updates [by model]")
    p.add_argument("--flop-match", action="store_true", help="more steps, until the workers' mean FLOPs are those of DDP over --steps")
    p.add_argument("--batch-size", type=positive, help="sequences per worker and micro-step [by model]")
    p.add_argument("--seq-len", type=positive, help="tokens per sequence [by model]")
    p.add_argument("--lr", type=float, help="peak learning rate [by model]")
    p.add_argument("--grad-accum", type=positive, default=1, help="micro-steps per update [%(default)s]")
    p.add_argument("--eval-every", type=positive, default=100, help="updates between evaluations [%(default)s]")
    p.add_argument("--save-every", type=positive, default=500, help="updates between checkpoints [%(default)s]")
    p.add_argument("--log-every", type=positive, default=10, help="updates between lines of output [%(default)s]")
    p.add_argument("--out-dir", type=Path, default=Path("out"), help="[%(default)s]")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out-dir, if there is one")
    p.add_argument("--overwrite", action="store_true", help="delete the run in --out-dir first")
    p.add_argument("--device", help="cpu or cuda [cuda where there is one]")
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


def say(*words):
    if RANK == 0:
        print(*words, flush=True)


def start_processes(wanted):
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
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    return device


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

def save_checkpoint(out_dir, sync, optimizer, step, config, masks):
    """Gathers model and optimizer state, one parameter at a time, and writes ckpt.pt; the old one stays as ckpt.prev.pt."""
    def gather(tensors):
        return {name: t.detach().cpu().clone() if RANK == 0 else None for name, t in sync.gather(tensors)}

    trained = sync.trained()
    states = {local: optimizer.state[p] for local, p in trained.items()}
    keys = [k for k, v in next(iter(states.values())).items() if torch.is_tensor(v) and v.dim()]
    state = {key: gather({local: s[key] for local, s in states.items()}) for key in keys}
    model = gather(trained)
    if RANK == 0:
        state = {name: {**{key: state[key][name] for key in keys}, "step": step} for name in model}
        part, path = out_dir / "ckpt.pt.part", out_dir / "ckpt.pt"
        with open(part, "wb") as f:
            torch.save({"model": model, "optimizer": state, "step": step, "config": config, "masks": masks}, f)
            f.flush()
            os.fsync(f.fileno())
        if zipfile.ZipFile(part).testzip():
            raise OSError(f"{part} was not written correctly")
        if path.exists():
            os.replace(path, out_dir / "ckpt.prev.pt")
        os.replace(part, path)


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

def measure_flops(model, tokens):
    """FLOPs of one forward and backward pass, counted by torch from the operations of a run on the meta device."""
    with FlopCounterMode(display=False) as counter:
        llama.loss(model(tokens), tokens).backward()
    return counter.get_total_flops()


def describe_workers(subnets, masks, layout, full, tokens):
    """Prints what one worker holds against plain data parallelism; returns FLOPs: mean over the workers, and DDP's."""
    def row(model, trains):
        numel = {local: p.numel() for local, p in model.named_parameters()}
        mine = sum(n for local, n in numel.items() if trains(local))
        return 4 * sum(numel.values()), 4 * mine, 8 * mine, measure_flops(model, tokens)

    rows = []
    for s, model in enumerate(subnets):
        slots = sdp.slots(model, masks, layout, s)
        rows.append(row(model, lambda local: slots[local].trains))
    whole = row(full, lambda local: True)
    say(f"\n  {'one worker':22}{'DDP':>12}{'largest here':>14}")
    for i, (name, unit) in enumerate((("parameters, MB", 1e6), ("gradients, MB", 1e6), ("optimizer state, MB", 1e6),
                                      ("GFLOPs a micro-step", 1e9))):
        largest = max(r[i] for r in rows)
        say(f"  {name:22}{whole[i] / unit:12.2f}{largest / unit:14.2f}{largest / whole[i]:8.0%}")
    say()
    return sum(r[3] for r in rows) / len(rows), whole[3]


def evaluate(sync, full, dataset, autocast):
    """Validation loss of the full model, nats per token: each worker reads its share, one stage's weights at a time."""
    batches = [dataset.batch("val", i, w, sync.size) for w in sync.workers for i in range(dataset.val_steps(sync.size))]
    batches = [(x, y) for x, y in batches if len(x)]                 # there may be none left for the last workers
    total = count = 0.0
    with torch.no_grad(), autocast:
        for logits, (_, y) in zip(sdp.stream(sync, full, [x.to(sync.device) for x, _ in batches]), batches):
            total += float(llama.loss(logits, y.to(sync.device))) * y.numel()
            count += y.numel()
    total, count = over_ranks([total, count], dist.ReduceOp.SUM, sync.device)
    return total / count


def learning_rate(step, steps, peak):
    """Warm-up over the first 5 %, then a cosine down to a tenth of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def sample(checkpoint, prompt, device, count=200):
    """Text from the full model of a checkpoint: an ordinary Llama, no trace of subnetworks is left in it."""
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
    for flag, default in ("model", "llama-tiny"), ("data", "stdlib"):
        was, given = checkpoint and checkpoint["config"][flag], getattr(args, flag)
        if was and given and was != given:
            raise UserError(f"--{flag} {given} contradicts the checkpoint in {args.out_dir}, which has {was}")
        setattr(args, flag, was or given or default)
    for flag, value in DEFAULTS[args.model].items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if not 0 < args.lr < math.inf:
        raise UserError(f"--lr must be a positive number, not {args.lr}")
    context = llama.PRESETS[args.model].max_position_embeddings
    if args.seq_len > context:
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
    device = start_processes(args.device)
    path = first_rank_first(lambda: find_checkpoint(args.out_dir)) if args.resume else None
    checkpoint = load_checkpoint(path) if path else None
    if args.sample is not None:
        if checkpoint is None:
            raise UserError(f"--sample needs --resume and a checkpoint in --out-dir {args.out_dir}")
        return say(sample(checkpoint, args.sample, device))

    train(args, device, checkpoint)
    del checkpoint
    if RANK == 0:                                                    # the workers' memory is free again
        say(f"\nA sample of the full model in {args.out_dir / 'ckpt.pt'}:\n")
        try:
            say(sample(load_checkpoint(args.out_dir / "ckpt.pt"), "def " if args.data == "stdlib" else "\n", device))
        except UserError as e:
            say(f"(none: {e})")
    if DISTRIBUTED:
        dist.barrier()
        dist.destroy_process_group()


def train(args, device, checkpoint):
    """The whole run: prepare, loop, evaluate, save."""
    # -- data, model, and masks: which of the S subnetworks holds which neuron
    held = settle(args, checkpoint)
    dataset = data.load(args.data, args.batch_size, args.seq_len, args.seed)
    config = replace(llama.PRESETS[args.model], vocab_size=dataset.vocab_size)
    if checkpoint and checkpoint["config"]["vocab_size"] != config.vocab_size:
        raise UserError(f"{args.data} now has a vocabulary of {config.vocab_size}, the checkpoint in {args.out_dir} one of "
                        f"{checkpoint['config']['vocab_size']}; tokenise it as it was, or train another model in another --out-dir")
    branches, layout = llama.branches(config), llama.layout(config)
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
    start = checkpoint["step"] if checkpoint else 0
    first_rank_first(lambda: claim(args.out_dir, args.resume, args.overwrite, start))

    def build(subnet=None):
        """A subnetwork, or the full model, on the meta device: shapes without memory."""
        with torch.device("meta"):
            return llama.Llama(config, sdp.held_counts(masks, subnet) if subnet is not None and masks else None,
                               backward and subnet is not None)

    full, modules = build(), [build(s) for s in range(args.subnets if masks else 1)]       # without masks one kind of worker
    workers = WORLD if DISTRIBUTED else args.subnets
    say(f"{args.model} on {args.data}, {args.parallel}, {workers} workers"
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
    flops, ddp_flops = describe_workers(modules, masks, layout, full, torch.zeros(args.batch_size, args.seq_len,
                                                                               dtype=torch.long, device="meta"))
    steps = round(args.steps * ddp_flops / flops) if args.flop_match else args.steps

    # -- this process's worker, or all of them
    value = checkpoint["model"].__getitem__ if checkpoint else sdp.fresh(layout, partial(llama.init, config), args.seed)
    if DISTRIBUTED:
        subnet = RANK % len(modules)
        module = sdp.materialize(modules[subnet], masks, layout, subnet, value, device)
        module.checkpoint_activations = args.checkpoint_activations
        sync = sdp.SubnetDataParallel(module, masks, layout, backward, reduce=args.parallel == "sdp")
        if args.compile:                                             # block by block: gradients still come one block at a time
            for layer in module.model.layers:
                layer.compile()
        if args.parallel == "ddp":     # torch's own averages the gradients (reduce=False); sync still clips, gathers and counts
            sync.module = DistributedDataParallel(module, gradient_as_bucket_view=True)
            sync.module.register_comm_hook(sync, counted_all_reduce)
    else:
        sync = sdp.Simulation(modules, masks, layout, value, workers, device)
    no_sync = sync.module.no_sync if DISTRIBUTED and args.parallel == "ddp" else sync.no_sync
    trained = sync.trained()
    optimizer = torch.optim.AdamW([{"params": [p for p in trained.values() if p.dim() > 1], "weight_decay": 0.1},
                                   {"params": [p for p in trained.values() if p.dim() == 1], "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.95))
    for local, p in trained.items() if checkpoint else ():
        for key, example in next(iter(checkpoint["optimizer"].values())).items():
            if torch.is_tensor(example):
                optimizer.state[p][key] = sync.cut(local, lambda name: checkpoint["optimizer"][name][key]).to(device, copy=True)
            else:
                optimizer.state[p][key] = torch.tensor(float(example))       # the number of updates
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")

    if DISTRIBUTED:
        sync.check_replicas()                                        # all holders begin with the same bits

    # -- the loop
    saved_config = {**{k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, **asdict(config)}
    since, done, sent = time.perf_counter(), start, sync.sent_bytes
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr)
        total = 0.0
        for worker in sync.workers:                                  # one under torchrun, all of them without
            for micro in range(args.grad_accum):
                x, y = dataset.batch("train", step * args.grad_accum + micro, worker, workers)
                last = micro == args.grad_accum - 1
                with nullcontext() if last else no_sync():
                    with autocast:
                        loss = llama.loss(sync.run(worker, x.to(device)), y.to(device)) / args.grad_accum
                    loss.backward()
                total = total + loss.detach()
        sync.finish()                                                # gradients are averages over their holders
        norm = sync.clip_grad_norm(1.0)
        optimizer.step()
        optimizer.zero_grad()
        sync.refresh()                                               # backward masking: frozen weights, from their holders

        now, end = step + 1, step + 1 == steps
        evaluates = end or now % args.eval_every == 0
        if evaluates or now % args.log_every == 0:
            mean = over_ranks([float(total)], dist.ReduceOp.SUM, device)[0] / workers
            ms = (time.perf_counter() - since) * 1000 / (now - done)
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else -1
            most, peak = over_ranks([(sync.sent_bytes - sent) / (now - done), peak], dist.ReduceOp.MAX, device)
            speed = workers * args.grad_accum * args.batch_size * args.seq_len / ms * 1000
            line = {"step": now, "loss": mean, "lr": group["lr"], "grad_norm": float(norm), "step_ms": ms,
                    "tokens_per_s": speed, "sent_bytes": round(most), "peak_mem_bytes": int(peak) if peak >= 0 else None}
            left = (steps - now) * ms / 1000
            say(f"step {now:5}/{steps}  loss {mean:.4f}  {ms:6.0f} ms/step  {speed:8.0f} tokens/s  {left / 60:5.1f} min left")
            if evaluates:
                line["val_loss"] = evaluate(sync, full, dataset, autocast)
                per = f" = {line['val_loss'] / math.log(2):.4f} bits per byte" if dataset.vocab_size == 256 else ""
                say(f"{'':18}full model: validation loss {line['val_loss']:.4f} nats{per}")
            if RANK == 0:
                with open(args.out_dir / "metrics.jsonl", "a") as f:
                    f.write(json.dumps(line) + "\n")
            since, done, sent = time.perf_counter(), now, sync.sent_bytes
        if end or now % args.save_every == 0:
            paused = time.perf_counter()
            save_checkpoint(args.out_dir, sync, optimizer, now, saved_config, masks)
            since += time.perf_counter() - paused                    # not a part of any step


def counted_all_reduce(sync, bucket):
    """DDP's own way to average gradients, with the bytes counted."""
    sync.sent_bytes += bucket.buffer().nbytes * 2 * (sync.size - 1) / sync.size
    return default_hooks.allreduce_hook(None, bucket)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        if RANK == 0:
            print(f"error: {e}", file=sys.stderr, flush=True)
        else:
            time.sleep(10)                                           # rank 0 says it; torchrun then ends this rank
        sys.exit(2)
