"""
How long does an update take, what does it use and send?  DDP, ZeRO-1, FSDP2 and SDP in turns.

    torchrun --standalone --nproc-per-node=4 experiments/bench.py --updates 12
    python experiments/bench.py --updates 3      one worker at a time, without its peers: no communication

The variants take turns, so that all of them see the same weather, and each is torn down before the next is
built, so that memory is its own.  The rows are appended to experiments/results/bench.jsonl.
"""

import gc
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

os.environ.setdefault("KINETO_LOG_LEVEL", "99")                      # torch.profiler has much to say
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent))
import plan
import sdp
import train
from train import say

WARM_UP, TIMED = 1, 3  # updates of a variant in each of its turns


def real_model(design, rank, device):
    """The model of a worker, with its weights."""
    subnet = rank % design.n_subnets
    return sdp.materialize(
        design.model(subnet), design.masks, design.layout, subnet, design.initial(), device
    )


def take_turn(design, dataset, device, updates, trace):
    """Builds this rank's worker, measures it, and tears it down.  -> memory, bytes sent, ms of each update.

    trace: None, or where torch.profiler's timeline of one more update goes.
    """
    module = real_model(design, dist.get_rank(), device)
    sync, optimizer, memory, sent_bytes = plan.first_update(design, module, dataset)
    if design.args.compile:  # not before: the tracker has to see every operation
        train.compile_blocks(module)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    autocast, ms = plan.autocast_of(design, device), []
    for _ in range(WARM_UP + updates):
        begin = time.perf_counter()
        plan.update(sync, optimizer, dataset, design, autocast)
        if on_gpu:
            torch.cuda.synchronize()
        ms.append((time.perf_counter() - begin) * 1000)
    if on_gpu:  # the allocator knows better than the tracker,
        memory["peak"] = torch.cuda.max_memory_allocated()
        free, total = torch.cuda.mem_get_info()  # and the device what NCCL and others have taken
        memory["device"] = total - free
    with torch.profiler.profile() if trace and train.RANK == 0 else nullcontext() as profile:
        if trace:
            plan.update(sync, optimizer, dataset, design, autocast)
        sync.close()  # inside: messages under way when a profiler stops crash it
    if profile:
        profile.export_chrome_trace(str(trace))
    return memory, sent_bytes, ms[WARM_UP:]


def turns_of_all(design, dataset, device, updates, trace, world):
    """take_turn of every rank; without torchrun of the workers with most to hold, one after another."""
    turns = []
    for rank in [train.RANK] if train.DISTRIBUTED else plan.largest(design, world):
        with nullcontext() if train.DISTRIBUTED else plan.alone(rank, world):
            turns.append(take_turn(design, dataset, device, updates, trace))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if train.DISTRIBUTED:
        mine = turns[0]
        turns = [None] * world
        dist.all_gather_object(turns, mine)
    return zip(*turns)


def main(argv=None):
    p = plan.flags(__doc__, "bench.jsonl")
    p.add_argument(
        "--updates", type=train.positive, default=12, help="timed updates of each variant [%(default)s]"
    )
    p.add_argument(
        "--traces", type=Path, help="folder for torch.profiler's timeline of one more update of each variant"
    )
    args = p.parse_args(argv)
    device = train.start_processes(args.device, args.timeout)
    train.agree({flag: str(value) for flag, value in vars(args).items()})
    train.settle(args, {})
    dataset, config = train.load_data(args)
    world = train.WORLD if train.DISTRIBUTED else args.subnets
    everything, rows, rounds = plan.designs(args, config), {}, []
    if args.traces:
        args.traces.mkdir(parents=True, exist_ok=True)
    where = "" if train.DISTRIBUTED else ", of which one at a time is here, without communication"
    compiled = ", compiled" if args.compile else ""
    say(f"{args.model} on {args.data}, {world} workers{where}, {args.subnets} subnets, "
        f"coverage {args.coverage}, batch {args.batch_size} a worker, {device.type}, {args.dtype}{compiled}")
    since = time.monotonic()
    for done in range(0, args.updates, TIMED):
        rounds.append({})
        updates = min(TIMED, args.updates - done)
        # there and back: a drift cancels
        for name, design in list(everything.items())[::1 if len(rounds) % 2 else -1]:
            last = done + updates == args.updates
            trace = args.traces / f"trace-{name.replace(' ', '-')}.json" if args.traces and last else None
            memory, sent_bytes, ms = turns_of_all(design, dataset, device, updates, trace, world)
            rounds[-1][name] = [max(times) for times in zip(*ms)]  # an update is over when all ranks are done
            rows[name] = {
                "variant": name,
                "memory": max(memory, key=plan.peak_of),
                "sent_bytes": max(sent_bytes),
            }
        left = (time.monotonic() - since) / (done + updates) * (args.updates - done - updates)
        say(f"  {done + updates} of {args.updates} updates, {left / 60:.1f} min left")
    batch = dataset.batch("train", 0, 0, 1)
    for name, design in everything.items():
        ms = [t for one in rounds for t in one[name]]
        ratio = median([median(one[name]) / median(one["ddp"]) for one in rounds])
        rows[name].update(
            plan.size_of(design, world, batch),
            step_ms=median(ms),
            step_ms_range=[min(ms), max(ms)],
            step_ratio=ratio,
        )
    rows = [rows[name] for name in everything]
    plan.say_rows(rows)
    facts = {
        "world": world,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "alone": not train.DISTRIBUTED,
    }
    rows = [{**facts, **row} for row in rows]
    train.on_rank_0(plan.append, args.results, args, rows)
    if train.DISTRIBUTED:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    train.run(main)
