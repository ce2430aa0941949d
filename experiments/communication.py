"""
Does the time of communication fall with the bytes?  A model, not a measurement.

    python experiments/communication.py --model llama-134m

Every worker has a link of bandwidth 1.  A message among h workers costs each of them 2 (h-1)/h of its bytes (a ring
all-reduce).  All gradients are there at the start.  Three ways to send the buckets of forward masking:

    one stream          a worker sends one message at a time, in the global order.  A message begins when all of its
                        workers have ended the one before.  (NCCL, if all groups share one stream)
    a stream a group    a group sends one message at a time, in the global order.  A worker's groups share its link
                        fairly.  (NCCL with async_op=True, which sdp.py uses; gloo)
    bytes               the bound: the worker with most bytes sends without a pause

The result is the time over that of plain data parallelism on the same model, where all three are the same.  What the
model leaves out: latency, the topology of the network, what kernels of different groups take from each other and from
the backward pass.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model_llama as llama
import sdp

RESULTS = Path(__file__).resolve().parent / "results" / "streams.jsonl"


def messages_of(config, masks, n_subnets):
    """[(holders, bytes)] of one update in the global order, and the bytes that plain data parallelism sends."""
    found = {}                                              # rank -> its messages
    layout = llama.layout(config)
    for rank in range(n_subnets):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n_subnets)
        with torch.device("meta"):
            module = llama.Llama(config, sdp.held_counts(masks, rank))
        sync = sdp.SubnetDataParallel(module, masks, layout)
        dist.destroy_process_group()
        found[rank] = [(bucket.holders, 4 * sum(run.numel for run in bucket.runs)) for bucket in sync.buckets]
    merged = []                                             # one list in which all ranks' lists keep their order
    while any(found.values()):
        for messages in found.values():
            if messages:
                holders, _ = messages[0]
                if all(found[rank][0] == messages[0] for rank in holders):
                    merged.append(messages[0])
                    for rank in holders:
                        found[rank].pop(0)
                    break
    numel = sum(shape.numel() for _, _, shape in layout.values())
    return merged, 4 * numel * 2 * (n_subnets - 1) / n_subnets


def one_stream(messages):
    """Time until the last message has ended, if a worker sends one at a time."""
    free = {}                                               # worker -> when it has ended its last message
    for holders, nbytes in messages:
        h = len(holders)
        end = max(free.get(rank, 0) for rank in holders) + nbytes * 2 * (h - 1) / h
        for rank in holders:
            free[rank] = end
    return max(free.values())


def stream_a_group(messages):
    """The same, if a group sends one at a time, and the groups of a worker share its link (max-min fair)."""
    queues = {}                                             # holders -> what each of them still has to send
    for holders, nbytes in messages:
        h = len(holders)
        queues.setdefault(holders, []).append(nbytes * 2 * (h - 1) / h)
    now = 0.0
    while queues:
        rates = fair_rates(queues)
        step = min(queues[holders][0] / rate for holders, rate in rates.items())
        now += step
        for holders, rate in rates.items():
            queues[holders][0] -= rate * step
            if queues[holders][0] < 1e-6:
                queues[holders].pop(0)
        queues = {holders: queue for holders, queue in queues.items() if queue}
    return now


def fair_rates(groups):
    """{group: rate}: all grow alike; a group stops when the link of one of its workers is full."""
    rates = {}
    capacity = {rank: 1.0 for holders in groups for rank in holders}
    growing = set(groups)
    while growing:
        sharing = {rank: sum(rank in holders for holders in growing) for rank in capacity}
        tightest = min((capacity[rank] / n, rank) for rank, n in sharing.items() if n)
        rate, rank = tightest
        for holders in [holders for holders in growing if rank in holders]:
            rates[holders] = rate
            growing.remove(holders)
            for member in holders:
                capacity[member] -= rate
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in llama.PRESETS], default="llama-134m")
    args = parser.parse_args()
    config = llama.PRESETS[args.model]
    print(f"{args.model}, forward masking; % of plain data parallelism")
    print(f"{'level':8}{'coverage':>10}{'bytes':>8}{'one stream':>12}{'a stream a group':>18}")
    for level, make in sdp.MASKS.items():
        for n_subnets, held in (8, 6), (4, 3), (8, 4):
            masks = make(llama.branches(config), n_subnets, held)
            messages, ddp = messages_of(config, masks, n_subnets)
            sent = [sum(nbytes * 2 * (len(holders) - 1) / len(holders) for holders, nbytes in messages if rank in holders)
                    for rank in range(n_subnets)]
            row = {"model": args.model, "level": level, "coverage": f"{held}/{n_subnets}", "bytes": max(sent) / ddp,
                   "one_stream": one_stream(messages) / ddp, "stream_a_group": stream_a_group(messages) / ddp}
            print(f"{level:8}{row['coverage']:>10}{row['bytes']:8.0%}{row['one_stream']:12.0%}"
                  f"{row['stream_a_group']:18.0%}", flush=True)
            RESULTS.parent.mkdir(exist_ok=True)
            with open(RESULTS, "a") as f:
                f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
