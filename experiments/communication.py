"""
Workers send fewer bytes.  Does communication take less time in proportion?  A calculation, not a measurement.

    python experiments/communication.py --model llama-134m

Suppose that every worker has a link of bandwidth 1, and that all gradients are there at the start.  The
workers that hold the same parameters (a group) average them in messages.  All workers keep one order of
messages, the global order.  In a message among h workers, each sends 2 (h-1)/h of its bytes (a ring
all-reduce).  There are three answers for forward masking:

    one stream          A worker sends one message at a time.  A message begins when all of its workers have
                        ended the one before.  (NCCL, if all groups share one stream)
    a stream a group    A group sends one message at a time.  A worker's groups share its link fairly.
                        (NCCL with async_op=True, which sdp.py uses; gloo)
    bytes               The bound: the worker with most bytes sends without a pause.

The result is the time, divided by the time of plain data parallelism on the same model, for which all three
answers are the same.  This leaves out latency, the topology of the network, and what kernels of different
groups take from each other and from the backward pass.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import model_llama as llama
import sdp

RESULTS = Path(__file__).resolve().parent / "results" / "streams.jsonl"


def messages_of(config, masks, n_subnets):
    """-> [(holders, bytes)] of one update in the global order, and the bytes that a worker sends under DDP.

    DDP is plain data parallelism on as many workers.
    """
    found = {}                                              # rank -> its messages
    layout = llama.layout(config)
    for rank in range(n_subnets):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n_subnets)
        with torch.device("meta"):
            module = llama.Llama(config, sdp.held_counts(masks, rank))
        sync = sdp.SubnetDataParallel(module, masks, layout)
        dist.destroy_process_group()
        found[rank] = [(bucket.holders, 4 * sdp.numels(piece.param for piece in bucket.pieces))
                       for bucket in sync.buckets]
    merged = []                                             # all messages; each rank's keep their order
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


def cost(holders, nbytes):
    """What each holder sends in an all-reduce of so many bytes."""
    h = len(holders)
    return nbytes * 2 * (h - 1) / h


def bytes_of(messages, rank):
    """What a worker sends in all of its messages."""
    return sum(cost(holders, nbytes) for holders, nbytes in messages if rank in holders)


def one_stream(messages):
    """Time until the last message has ended, if a worker sends one at a time."""
    free = {}                                               # worker -> when it has ended its last message
    for holders, nbytes in messages:
        end = max(free.get(rank, 0) for rank in holders) + cost(holders, nbytes)
        for rank in holders:
            free[rank] = end
    return max(free.values())


def stream_a_group(messages):
    """The same, if a group sends one at a time, and the groups of a worker share its link fairly."""
    queues = {}                                             # holders -> what each of them still has to send
    for holders, nbytes in messages:
        queues.setdefault(holders, []).append(cost(holders, nbytes))
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
    """{group: rate}, max-min fair.

    All rates grow alike.  A group's rate stops when the link of one of its workers is full.
    """
    rates = {}
    capacity = {rank: 1.0 for holders in groups for rank in holders}
    growing = set(groups)
    while growing:
        sharing = {rank: sum(rank in holders for holders in growing) for rank in capacity}
        rate, rank = min((capacity[rank] / n, rank) for rank, n in sharing.items() if n)
        for holders in [holders for holders in growing if rank in holders]:
            rates[holders] = rate
            growing.remove(holders)
            for member in holders:
                capacity[member] -= rate
    return rates


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=list(llama.PRESETS), default="llama-134m")
    args = p.parse_args()
    config = llama.PRESETS[args.model]
    print(f"{args.model}, forward masking; % of plain data parallelism")
    print(f"{'level':8}{'coverage':>10}{'bytes':>8}{'one stream':>12}{'a stream a group':>18}")
    for level in "block", "neuron":
        for n_subnets, held in (8, 6), (4, 3), (8, 4):
            masks = sdp.MASKS[level](llama.branches(config), n_subnets, held)
            messages, ddp = messages_of(config, masks, n_subnets)
            most = max(bytes_of(messages, rank) for rank in range(n_subnets))
            row = {
                "model": args.model,
                "level": level,
                "coverage": f"{held}/{n_subnets}",
                "bytes": most / ddp,
                "one_stream": one_stream(messages) / ddp,
                "stream_a_group": stream_a_group(messages) / ddp,
            }
            print(f"{level:8}{row['coverage']:>10}{row['bytes']:8.0%}{row['one_stream']:12.0%}"
                  f"{row['stream_a_group']:18.0%}", flush=True)
            RESULTS.parent.mkdir(exist_ok=True)
            with open(RESULTS, "a") as f:
                f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(data.run_program(main))
