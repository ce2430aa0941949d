"""
Does Subnetwork Data Parallelism keep the quality of plain data parallelism?

Trains many small LLaMAs on text, by different methods, and compares the validation loss of the *full* models:

    python experiments/quality.py --list                              the rows, one a method
    python experiments/quality.py                                     every row, in order of worth; hours on one core
    python experiments/quality.py ddp 'block-6*' --updates 250        some rows (patterns as in a shell), one length
    python experiments/quality.py --table                             mean and standard deviation of what is there

One line a run is appended to experiments/results/quality.jsonl, and a run that is there is not done again: stop this
script at any time, and start it again to go on.

Rules, the same for every row.  The learning rate is searched on seed 0 at 250 updates: from 4e-3 in steps of a factor 2,
until both neighbours of the best are worse.  The best one serves all seeds and lengths.  "N updates" is the length of the
plain run; a row whose name ends in -flops gets as many more updates, and as much longer a schedule, as its workers can do
with the same FLOPs.  All workers have equal batches.
"""

import argparse
import fnmatch
import json
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import model_llama as llama
import sdp
from train import measure_flops

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
SEQ_LEN = 64
WORKERS = 8
SHORT, LONG = 250, 1000
FIRST_LR = 4e-3


def config_of(layers):
    """The model: eight layers, 0.4 million parameters in them, so that a run takes a minute."""
    return llama.LlamaConfig(256, 64, 192, layers, 4, 4, SEQ_LEN)


# ---------------------------------------------------------------------------------------------------------------------
# The rows of the table
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Row:
    """How a model is trained.  Without a level: plain data parallelism."""
    level: str = ""             # block or neuron
    held: int = 8               # k of the coverage k/S
    subnets: int = 8            # S
    flops: bool = False         # FLOP-matched; else as many updates as DDP
    backward: bool = False      # backward masking instead of forward masking
    scaled: bool = True         # forward masking multiplies branches by sdp.branch_scales
    workers: int = WORKERS
    sequences: int = 2          # of each worker in an update
    layers: int = 8
    draw: str = "balanced"      # balanced; random: any k holders; coin: each subnet holds a block with probability k/S
    redraw: int = 0             # masks are drawn anew every so many updates; 0: never
    ends: bool = False          # all subnets hold the first and the last block
    warmup: float = 0.2         # part of the run in which the learning rate rises
    zero_init: bool = False     # o_proj and down_proj begin with zeros, so that scaling does not change the start
    lr_of: str = ""             # the row whose learning rate this one takes over; "": it has its own search


def rows():
    """{name: Row}, in order of worth."""
    out = {"ddp": Row()}
    for held in 6, 7, 5, 4:
        for level in "block", "neuron":
            out[f"{level}-{held}-flops"] = Row(level, held, flops=True)
        for level in "block", "neuron":
            out[f"{level}-{held}"] = Row(level, held)
        if held == 6:
            for level in "block", "neuron":
                out[f"{level}-6-unscaled-flops"] = Row(level, 6, flops=True, scaled=False)
            out["stochastic-depth-6-flops"] = Row("block", 6, flops=True, draw="coin", redraw=1)
            out["small-6-layers-flops"] = Row(layers=6, flops=True)
            out["ddp-6-workers-flops"] = Row(workers=6, flops=True)
            out["ddp-6-workers"] = Row(workers=6)
            for level in "block", "neuron":
                out[f"backward-{level}-6"] = Row(level, 6, backward=True)
    for factor in 2, 4, 8:
        out[f"ddp-batch-x{factor}"] = Row(sequences=2 * factor)
    block = Row("block", 6, flops=True, lr_of="block-6-flops")
    changes = {"redraw-1": dict(redraw=1), "redraw-20": dict(redraw=20), "random": dict(draw="random"),
               "subnets-4": dict(subnets=4, held=3), "ends": dict(held=5, ends=True)}
    for name, change in changes.items():
        out[f"block-6-{name}-flops"] = Row(**{**asdict(block), **change})
    # 5 % of 250 updates are 12, too few: some seeds never recover
    out["ddp-warmup-5"] = Row(warmup=0.05)
    for level in "block", "neuron":
        out[f"{level}-6-warmup-5-flops"] = Row(level, 6, flops=True, warmup=0.05)
        out[f"{level}-6-unscaled-warmup-5-flops"] = Row(level, 6, flops=True, scaled=False, warmup=0.05)
    out["ddp-zero-init-warmup-5"] = Row(zero_init=True, warmup=0.05)
    out["block-6-zero-init-warmup-5-flops"] = Row("block", 6, flops=True, zero_init=True, warmup=0.05)
    return out


def masks_of(row, branches, seed, drawing):
    """The masks {branch: bool [neurons, S]} of a row; drawing 0, 1, ... are different ones."""
    where = "block" if row.level == "block" else "neuron"
    if row.draw == "balanced":
        make = sdp.block_masks if row.level == "block" else sdp.neuron_masks
        masks = make(branches, row.subnets, row.held, seed + 1000 * drawing)
    else:
        rng = sdp.seeded("masks", seed, drawing)
        masks, of_block = {}, {}
        for name, (block, neurons, *_) in branches.items():
            if where == "neuron" or block not in of_block:
                count = 1 if where == "block" else neurons
                luck = torch.rand(count, row.subnets, generator=rng)
                of_block[block] = luck < row.held / row.subnets
                if row.draw == "random":                             # the `held` smallest of S random numbers
                    of_block[block] = luck.argsort(1).argsort(1) < row.held
            masks[name] = of_block[block].expand(neurons, row.subnets)
    last = max(block for block, *_ in branches.values())
    for name, (block, *_) in branches.items():
        if row.ends and block in (0, last):
            masks[name] = torch.ones_like(masks[name])
    return masks


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

class Dense:
    """All workers of forward masking in one pass of the full model, which is quicker here than one pass a subnetwork.

    The neurons that a worker does not hold are multiplied by 0 before the branch adds them up, in that worker's rows of the
    batch, and the others by the branch's scale.  It saves nothing and computes what sdp.Simulation computes: see the tests.
    Without masks it is plain data parallelism.
    """

    def __init__(self, config, workers, seed):
        self.layout, self.workers = llama.layout(config), workers
        self.model = llama.Llama(config)
        self.parameters = dict(self.model.named_parameters())
        value = sdp.fresh(self.layout, partial(llama.init, config), seed)
        for name, p in self.parameters.items():
            p.data.copy_(value(name))
        self.factors = None                                          # {branch: [workers, 1, 1, neurons, 1]}
        for branch in llama.branches(config):
            last = "o_proj" if branch.endswith("self_attn") else "down_proj"
            self.model.get_submodule(f"{branch}.{last}").register_forward_pre_hook(partial(self._multiply, branch))

    def _multiply(self, branch, _, inputs):
        if self.factors is None:
            return None
        x, = inputs                                                  # [workers * B, T, neurons * run]
        factors = self.factors[branch]
        return (x.view(self.workers, -1, x.shape[1], factors.shape[3], x.shape[2] // factors.shape[3]) * factors).view(x.shape)

    def use(self, masks, scaled):
        """Sets who holds what, from the next update on."""
        subnets = next(iter(masks.values())).shape[1]
        subnet_of = torch.arange(self.workers) % subnets
        scales = [sdp.branch_scales(masks, s) if scaled else dict.fromkeys(masks, 1.0) for s in range(subnets)]
        self.factors, self.holders = {}, {}
        for branch, mask in masks.items():
            scale = torch.tensor([scales[s][branch] for s in range(subnets)])
            factors = (mask * scale).T[subnet_of]                    # [workers, neurons]
            self.factors[branch] = factors[:, None, None, :, None]
        for name, (branch, dim, shape) in self.layout.items():
            if branch is None:
                holders = torch.tensor(self.workers)
            else:
                held = masks[branch][:, subnet_of]                   # [neurons, workers]
                if dim is None:
                    holders = held.any(0).sum()
                else:
                    holders = held.sum(1).repeat_interleave(shape[dim] // len(held))
                    holders = holders.view([-1 if d == dim else 1 for d in range(len(shape))])
            self.holders[name] = holders.clamp(min=1)                # a coin may leave a block to nobody: gradient 0

    def update(self, batches):
        """Gradients of one update, averaged over the holders; returns the mean loss.  batches: one of each worker."""
        x, y = (torch.cat(parts) for parts in zip(*batches))
        loss = self.model(x, y)
        loss.backward()
        if self.factors is not None:
            for name, p in self.parameters.items():
                p.grad *= self.workers / self.holders[name]          # loss is a mean over the workers, so now p.grad is too
        return float(loss.detach())

    @torch.no_grad()
    def validate(self, batches, factor=1.0):
        """Loss of the full model, whose branches are multiplied by `factor`."""
        factors, self.factors = self.factors, None
        for layer in self.model.model.layers:
            layer.scales = [factor, factor]
        losses = [float(self.model(x, y)) for x, y in batches]
        for layer in self.model.model.layers:
            layer.scales = [1.0, 1.0]
        self.factors = factors
        return sum(losses) / len(losses)


class Simulated:
    """The same interface around sdp.Simulation, for backward masking."""

    def __init__(self, config, seed):
        self.config, self.seed = config, seed
        self.layout = llama.layout(config)

    def use(self, masks, scaled):
        subnets = next(iter(masks.values())).shape[1]
        with torch.device("meta"):
            modules = [llama.Llama(self.config, sdp.held_counts(masks, s), True) for s in range(subnets)]
            self.full = llama.Llama(self.config)
        value = sdp.fresh(self.layout, partial(llama.init, self.config), self.seed)
        self.sync = sdp.Simulation(modules, masks, self.layout, value)
        self.parameters = self.sync.params

    def update(self, batches):
        total = 0.0
        for worker, batch in enumerate(batches):
            loss = self.sync.run(worker, *batch)
            loss.backward()
            total += float(loss.detach())
        self.sync.finish()
        return total / len(batches)

    @torch.no_grad()
    def validate(self, batches, factor=1.0):
        for layer in self.full.model.layers:
            layer.scales = [factor, factor]
        losses = [float(torch.func.functional_call(self.full, self.parameters, batch)) for batch in batches]
        return sum(losses) / len(losses)


def flops_of(row, seed):
    """FLOPs of one update of all workers, measured on the meta device, and DDP's on all WORKERS."""
    batch = [torch.zeros(row.sequences, SEQ_LEN, dtype=torch.int64, device="meta")] * 2
    plain = [torch.zeros(Row().sequences, SEQ_LEN, dtype=torch.int64, device="meta")] * 2
    with torch.device("meta"):
        ddp = measure_flops(llama.Llama(config_of(Row().layers)), plain) * WORKERS
        config = config_of(row.layers)
        if not row.level:
            return measure_flops(llama.Llama(config), batch) * row.workers, ddp
        # Coins differ from update to update; balanced masks of the same coverage cost what coins cost in the mean
        steady = row if row.draw != "coin" else Row(row.level, row.held)
        with torch.device("cpu"):
            masks = masks_of(steady, llama.branches(config), seed, 0)
        models = [llama.Llama(config, sdp.held_counts(masks, s), row.backward) for s in range(row.subnets)]
        return sum(measure_flops(m, batch) for m in models) / row.subnets * row.workers, ddp


def train(row, updates, seed, lr, text, report):
    """One run.  Returns what goes into the result file; report(step, steps) is called now and then."""
    config = config_of(row.layers)
    branches = llama.branches(config)
    flops, ddp_flops = flops_of(row, seed)
    steps = round(updates * ddp_flops / flops) if row.flops else updates
    workers = Simulated(config, seed) if row.backward else Dense(config, row.workers, seed)
    if row.level:
        masks = masks_of(row, branches, seed, 0)
        workers.use(masks, row.scaled)
    with torch.no_grad():
        for name, p in workers.parameters.items():
            if row.zero_init and ("o_proj" in name or "down_proj" in name):
                p.zero_()
    optimizer = torch.optim.AdamW([{"params": [p for p in workers.parameters.values() if p.dim() > 1], "weight_decay": 0.1},
                                   {"params": [p for p in workers.parameters.values() if p.dim() == 1], "weight_decay": 0.0}],
                                  lr=lr, betas=(0.9, 0.95), fused=True)
    text.batch_size, text.seed = 64, seed
    val = [text.batch("val", i, 0, 1) for i in range(text.val_steps(1))]
    text.batch_size = row.sequences
    curve, seconds, every = [], 0.0, max(1, steps // 4)
    for step in range(steps):
        began = time.perf_counter()
        if row.redraw and step and step % row.redraw == 0:
            workers.use(masks_of(row, branches, seed, step // row.redraw), row.scaled)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, steps, lr, row.warmup)
        workers.update([text.batch("train", step, w, row.workers) for w in range(row.workers)])
        nn.utils.clip_grad_norm_(workers.parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0 or step + 1 == steps:
            curve.append([step + 1, round(workers.validate(val), 5)])
        seconds += time.perf_counter() - began
        report(step + 1, steps, seconds)
    result = {"steps": steps, "val_loss": curve[-1][1], "curve": curve, "flops": flops * steps,
              "tokens": steps * row.workers * row.sequences * SEQ_LEN, "seconds": round(seconds, 1), "torch": torch.__version__}
    # Are the branches of the full model as large as they should be?  Then no other factor is better than 1
    result["at_factor"] = {f"{factor:g}": round(workers.validate(val, factor), 5) for factor in (0.8, 0.9, 1.1)}
    if row.level:
        result["spectral_gap"] = sdp.spectral_gap(*sdp.rows_of(masks))[0]
    return result


def schedule(step, steps, peak, warmup):
    """Warm-up over the given part of the run, then a cosine down to a tenth of the peak."""
    warm = max(1, round(steps * warmup))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm))))


# ---------------------------------------------------------------------------------------------------------------------
# What there is, and what is to be done
# ---------------------------------------------------------------------------------------------------------------------

def read(path):
    """Result lines [dict].  A last line that was cut off is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    out = []
    for line in lines:
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out


def append(path, line):
    """Adds a result, on a line of its own even where the line before was cut off."""
    text = path.read_text() if path.exists() else ""
    with open(path, "a") as f:
        f.write("\n" * (not text.endswith("\n") and bool(text)) + json.dumps(line) + "\n")


def losses(results, name, updates):
    """{(seed, lr): validation loss} of a row at a length."""
    return {(r["seed"], r["lr"]): r["val_loss"] for r in results if (r["row"], r["updates"]) == (name, updates)}


def search(done):
    """done {lr: loss} -> (best lr so far, next lr to try or None when both neighbours of the best are worse)."""
    if not done:
        return FIRST_LR, FIRST_LR
    best = min(done, key=done.get)
    for neighbour in best / 2, best * 2:
        if not any(math.isclose(neighbour, lr) for lr in done):
            return best, neighbour
    return best, None


def next_run(table, names, lengths, seeds, results, sweep_length):
    """(name, updates, seed, lr) of the first run that is missing, or None."""
    for updates in lengths:
        for name in names:
            source = table[name].lr_of or name
            best, missing = search({lr: loss for (seed, lr), loss in losses(results, source, sweep_length).items() if seed == 0})
            if missing:
                return source, sweep_length, 0, missing
            for seed in range(seeds):
                if (seed, best) not in losses(results, name, updates):
                    return name, updates, seed, best
    return None


def say_table(table, results, sweep_length):
    """Prints the results as markdown: loss of the full model, mean and standard deviation over the seeds."""
    lengths = sorted({r["updates"] for r in results})
    print("| row | lr | FLOPs | " + " | ".join(f"{n} updates" for n in lengths) + " |")
    print("|---|---|---|" + "---|" * len(lengths))
    ddp = {r["updates"]: r["flops"] for r in results if r["row"] == "ddp"}
    for name in table:
        source = table[name].lr_of or name
        sweep = {lr: loss for (seed, lr), loss in losses(results, source, sweep_length).items() if seed == 0}
        if not sweep or name not in {r["row"] for r in results}:
            continue
        best, missing = search(sweep)
        share = next((f"{r['flops'] / ddp[r['updates']]:.2f}" for r in results if r["row"] == name and r["updates"] in ddp), "")
        cells = []
        for updates in lengths:
            found = [loss for (_, lr), loss in sorted(losses(results, name, updates).items()) if lr == best]
            spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.3f}{spread} ({len(found)})" if found else "")
        print(f"| {name} | {best:g}{'?' if missing else ''} | {share} | " + " | ".join(cells) + " |")


def main(argv=None):
    p = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("rows", nargs="*", default=["*"], help="names of rows, or patterns [all]")
    p.add_argument("--updates", type=int, nargs="+", default=[SHORT, LONG], help="lengths of the plain run [250 1000]")
    p.add_argument("--seeds", type=int, default=3, help="[%(default)s]")
    p.add_argument("--sweep-updates", type=int, default=SHORT, help="length of the search for a learning rate [%(default)s]")
    p.add_argument("--results", type=Path, default=RESULTS, help="[experiments/results/quality.jsonl]")
    p.add_argument("--list", action="store_true", help="print the rows and stop")
    p.add_argument("--table", action="store_true", help="print the results and stop")
    args = p.parse_args(argv)
    table = rows()
    names = [name for name in table if any(fnmatch.fnmatchcase(name, pattern) for pattern in args.rows)]
    for pattern in args.rows:
        if not fnmatch.filter(table, pattern):
            raise data.UserError(f"no row is called {pattern}; --list shows the names")
    if args.list:
        for name in names:
            print(f"{name:28}" + ", ".join(f"{k}={v}" for k, v in asdict(table[name]).items() if v != getattr(Row(), k)))
        return
    if args.table:
        return say_table({name: table[name] for name in names}, read(args.results), args.sweep_updates)
    torch.set_num_threads(1)
    text = data.load("stdlib", 2, SEQ_LEN, 0)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    while job := next_run(table, names, args.updates, args.seeds, read(args.results), args.sweep_updates):
        name, updates, seed, lr = job
        label = f"{name}, {updates} updates, seed {seed}, lr {lr:g}"

        def report(step, steps, seconds):
            if step == steps or step % 20 == 0:
                print(f"\r{label}: step {step}/{steps}, {seconds / step * (steps - step) / 60:.1f} min left ", end="", flush=True)

        result = train(table[name], updates, seed, lr, text, report)
        line = {"row": name, "updates": updates, "seed": seed, "lr": lr, **result, "settings": asdict(table[name])}
        append(args.results, line)
        print(f"\r{label}: validation loss {line['val_loss']:.4f} after {line['steps']} steps, {line['seconds']:.0f} s     ", flush=True)


if __name__ == "__main__":
    try:
        main()
    except data.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
