"""
How many kernels does one update launch?  On a GPU each costs some 5 microseconds, whatever it computes.

    python experiments/kernels.py [--model llama-134m] [--subnets 8] [--held 6]

One worker runs alone, with one short sequence, and torch's fake process group takes its messages.  A dispatch
mode sees each operation of torch and counts it.  So the counts do not depend on the machine.  Views, and
tensors that are only allocated, launch nothing.

The last lines are about sdp.py's `pack` and `unpack`, what happens to one bucket before and after it travels.
They give the kernels in eager mode, and those of the code that torch.compile makes (compile=True).
"""

import argparse
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch._inductor.metrics
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import model_llama as llama
import sdp
from plan import alone, hook_without_peers

RESULTS = Path(__file__).resolve().parent / "results" / "kernels.jsonl"
PHASES = "forward", "backward", "finish", "clip", "step", "refresh"
FREE = {                                                    # operations that launch nothing
    "_unsafe_view", "detach", "empty", "empty_like",
    "empty_strided", "lift_fresh", "new_empty", "wait_tensor",
}


class Kernels(TorchDispatchMode):
    """Counts operations that are neither views nor mere allocations."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.overloadpacket.__name__ not in FREE:
            self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def update(module, params, optimizer, sync, tokens):
    """Runs one update.  Returns {phase: number of kernels}."""
    counts = {}

    def counted(phase, work, *args):
        with Kernels() as kernels:
            result = work(*args)
        counts[phase] = sum(kernels.count.values())
        return result

    loss = counted("forward", module, tokens, tokens)
    counted("backward", loss.backward)
    if sync is None:
        counted("clip", nn.utils.clip_grad_norm_, params, 1.0)
    else:
        counted("finish", sync.finish)
        counted("clip", sync.clip_grad_norm, 1.0)
    counted("step", optimizer.step)
    optimizer.zero_grad()
    if sync is not None:
        counted("refresh", sync.refresh)
    return {phase: counts.get(phase, 0) for phase in PHASES}


def measure(variant, config, masks, make_module):
    """A row: the kernels of an update that is not the first one, and the number of messages."""
    with alone(0, sdp.count_subnets(masks)):
        with torch.device("meta"):
            module = make_module()
        module.to_empty(device="cpu")                       # values do not matter: zeros are quick to make
        for p in module.parameters():
            p.data.zero_()
        sync = None
        if variant == "ddp":
            module = DistributedDataParallel(module, gradient_as_bucket_view=True, init_sync=False)
            module.register_comm_hook(None, hook_without_peers)
        elif variant.startswith("sdp"):
            layout = llama.layout(config)
            for local, slot in sdp.find_slots(module, masks, layout, 0).items():
                module.get_parameter(local).requires_grad_(slot.trains)
            sync = sdp.SubnetDataParallel(module, masks, layout, backward="backward" in variant)
        params = [piece.param for piece in sync.pieces] if sync else list(module.parameters())
        optimizer = torch.optim.AdamW(params, fused=True)
        tokens = torch.zeros(1, 16, dtype=torch.int64)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()                                    # it makes its state in its first step
        optimizer.zero_grad()
        if sync:                                            # refreshed weights arrive in the next update
            update(module, params, optimizer, sync, tokens)
        kernels = update(module, params, optimizer, sync, tokens)
        messages = len(sync.buckets) + len(sync.refresher.exchanges) if sync else 0
        if sync:
            sync.close()
    return {"variant": variant, "messages": messages, "kernels": kernels}


def count_all(model="llama-134m", n_subnets=8, held=6):
    """Rows for DDP, for subnetworks that train alone without sdp.py, and for the four variants of SDP."""
    config = llama.PRESETS[model]
    branches = llama.branches(config)
    masks = {level: sdp.MASKS[level](branches, n_subnets, held) for level in ("block", "neuron")}
    counts = {level: sdp.held_counts(masks[level], 0) for level in masks}
    rows = [measure("ddp", config, masks["block"], partial(llama.Llama, config))]
    for level in masks:
        make = partial(llama.Llama, config, counts[level])
        rows.append(measure(f"dense-{level}", config, masks[level], make))
    for masking in "forward", "backward":
        for level in masks:
            make = partial(llama.Llama, config, counts[level], masking == "backward")
            rows.append(measure(f"sdp-{masking}-{level}", config, masks[level], make))
    return rows


def count_fused():
    """Rows for `pack` and `unpack`, with float32 and with bfloat16 messages: numbers of kernels."""
    rows = []
    for dtype in torch.float32, torch.bfloat16:
        gradients = torch.ones(1000)
        share = torch.tensor(0.5)
        work = {
            "pack": (sdp.pack, (gradients, share, dtype)),
            "unpack": (sdp.unpack, (gradients.to(dtype), torch.float32)),
        }
        for name, (function, args) in work.items():
            with Kernels() as kernels:
                function(*args)
            torch._dynamo.reset()
            torch._inductor.metrics.reset()
            torch.compile(function, dynamic=True)(*args)
            rows.append({
                "variant": f"{name} {dtype}".replace("torch.", ""),
                "eager": sum(kernels.count.values()),
                "compiled": torch._inductor.metrics.generated_kernel_count,
            })
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=list(llama.PRESETS), default="llama-134m")
    p.add_argument("--subnets", type=int, default=8)
    p.add_argument("--held", type=int, default=6, help="holders of each neuron [%(default)s]")
    args = p.parse_args()
    rows = count_all(args.model, args.subnets, args.held)
    ddp = sum(rows[0]["kernels"].values())
    phases = "".join(f"{phase:>10}" for phase in PHASES)
    print(f"{'':22}{phases}{'sum':>8}{'of DDP':>8}{'messages':>10}")
    for row in rows:
        cells = "".join(f"{row['kernels'][phase]:10}" for phase in PHASES)
        total = sum(row["kernels"].values())
        print(f"{row['variant']:22}{cells}{total:8}{total / ddp:8.2f}{row['messages']:10}")
    fused = count_fused()
    print("\na bucket" + " " * 16 + "eager  compiled")
    for row in fused:
        print(f"{row['variant']:22}{row['eager']:7}{row['compiled']:10}")
    with open(RESULTS, "w") as f:
        for row in rows + fused:
            line = {"model": args.model, "subnets": args.subnets, "held": args.held, **row}
            f.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(data.run_program(main))
