"""
Draws figures (needs matplotlib).

    python experiments/figures.py             the figures of README and RESULTS, into figures/
    python experiments/figures.py step        one of them
    python experiments/figures.py RUN...      your own runs (folders with a metrics.jsonl), into runs.png here
"""

import json
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")                                                # into files, no window
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


def step():
    """One step of the method: four workers, what each holds in the README's first command, the averages."""
    import model_llama as llama                                      # the other figures need no torch
    import sdp

    n = 4
    made = sdp.block_masks(llama.branches(llama.PRESETS["llama-tiny"]), n, 3)
    of_block = [made[f"model.layers.{i}.mlp"][0].nonzero().flatten().tolist() for i in range(n)]
    rows = ["shared: embedding,\nlast norm, head", *(f"block {i}" for i in range(n))]
    colours = ["#757575", "#1b6ca8", "#c2571a", "#2f7d4f", "#7b4f9d"]
    fig, axis = plt.subplots(figsize=(10, 4.6))
    for worker in range(n):
        x = 1.25 * worker
        axis.text(x, 1.55, f"worker {worker}", ha="center", weight="bold")
        axis.text(x, 1.15, f"its own batch {worker}", ha="center", fontsize=9)
        axis.annotate("", (x, 0.5), (x, 1.05), arrowprops=dict(arrowstyle="->", color="#444444"))
    for row, (label, colour, holders) in enumerate(zip(rows, colours, [list(range(n)), *of_block])):
        y = -row
        axis.text(-0.75, y, label, ha="right", va="center")
        path = [(1.25 * holders[0], y)]
        for worker in range(n):
            x = 1.25 * worker
            corner = x - 0.42, y - 0.33
            if worker in holders:
                box = plt.Rectangle(corner, 0.84, 0.66, zorder=2, facecolor=colour)
                axis.text(x, y, f"$g_{{{worker}}}$", ha="center", va="center", fontsize=14, color="white")
            else:
                box = plt.Rectangle(corner, 0.84, 0.66, fill=False, edgecolor="#aaaaaa", linestyle=":")
                if worker > holders[0]:                              # the message goes past this worker
                    path += [(x - 0.52, y), (x - 0.52, y - 0.43), (x + 0.52, y - 0.43), (x + 0.52, y)]
            axis.add_patch(box)
        axis.plot(*zip(*path, (5.3, y)), color=colour, linewidth=2.5, zorder=1)
        total = " + ".join(f"g_{{{worker}}}" for worker in holders)
        axis.annotate("", (5.4, y), (5.2, y), arrowprops=dict(arrowstyle="-|>", color=colour, linewidth=2.5))
        axis.text(5.5, y, f"$g = ({total})\\,/\\,{len(holders)}$", va="center", color=colour, fontsize=12)
        axis.text(8.75, y, "{" + ", ".join(map(str, holders)) + "}", va="center", ha="center", color=colour)
    axis.text(5.5, 1.55, "averaged gradient", weight="bold")
    axis.text(8.75, 1.55, "holder set", weight="bold", ha="center")
    text = ("1.  Down each column: a worker runs its subnetwork forward and backward, on its own batch.\n"
            "     It does not have the empty blocks.\n"
            "2.  Along each row: the workers that hold a block average its gradient.  No one else does.\n"
            "3.  Every holder updates its copy by the same average, so the copies stay equal.")
    axis.text(-1.9, -5.0, text, va="top", fontsize=10, linespacing=1.5)
    axis.set_xlim(-2.3, 9.4)
    axis.set_ylim(-6.7, 1.9)
    axis.axis("off")
    fig.tight_layout(pad=0.4)
    fig.savefig(HERE / "figures/step.png", dpi=130, facecolor="white")
    plt.close(fig)


def runs(folders, path="runs.png"):
    """The training loss, the validation loss or accuracy, and the speed of each run."""
    labels = {"loss": "training loss", "val_loss": "validation loss, full model",
              "val_acc": "validation accuracy, full model", "tokens_per_s": "tokens a second",
              "images_per_s": "images a second"}
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    for folder in map(Path, folders):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        score = "val_acc" if any("val_acc" in line for line in lines) else "val_loss"
        speed = "tokens_per_s" if any("tokens_per_s" in line for line in lines) else "images_per_s"
        for axis, key in zip(axes, ("loss", score, speed)):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            marker = "o" if key == score else None                   # scores are few
            axis.plot(*zip(*points), marker=marker, markersize=3, label=folder.name)
            axis.set_ylabel(labels[key])
    for axis in axes:
        axis.set_xlabel("updates")
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].set_ylim(0)
    axes[0].legend(frameon=False, fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=130, facecolor="white")
    plt.close(fig)


def masks():
    """Who holds what: 8 blocks, 8 subnetworks, coverage 6/8, at both levels."""
    import model_llama as llama
    import sdp

    config = llama.LlamaConfig(num_hidden_layers=8, intermediate_size=64)
    branches = {name: b for name, b in llama.branches(config).items() if name.endswith("mlp")}
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, level, make in (axes[0], "block", sdp.block_masks), (axes[1], "neuron", sdp.neuron_masks):
        made = make(branches, 8, 6)
        picture = np.concatenate([mask.numpy() for mask in made.values()])               # [8 * 64 neurons, 8]
        colours = matplotlib.colors.ListedColormap(["#e0d8c8", "#1b6ca8"])  # not held, held
        axis.imshow(picture, aspect="auto", interpolation="none", cmap=colours)
        axis.set_yticks([64 * i + 31.5 for i in range(8)], [f"block {i}" for i in range(8)])
        for i in range(1, 8):
            axis.axhline(64 * i - 0.5, color="black", linewidth=1)
        for i in range(1, 8):
            axis.axvline(i - 0.5, color="white", linewidth=3)
        axis.set_title(f"{level} level, coverage 6/8", fontsize=13)
        axis.set_xlabel("subnetwork", fontsize=11)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    fig.tight_layout()
    fig.savefig(HERE / "figures/masks.png", dpi=130)


def read(name):
    """The rows of a file in results/, each a dict."""
    return [json.loads(line) for line in (HERE / "results" / name).read_text().splitlines()]


def memory():
    """What one worker of llama-1b has in memory at the peak, as plan.py says."""
    last = {row["variant"]: row for row in read("plan.jsonl") if row["model"] == "llama-1b"}
    labels = {"ddp": "DDP", "ddp-zero1": "DDP, ZeRO-1", "ddp-checkpoint": "DDP, activation checkpoints",
              "fsdp": "FSDP2", "fsdp-zero2": "FSDP2, ZeRO-2", "sdp at coverage 1": "SDP at coverage 1",
              "sdp-forward-block": "SDP forward block", "sdp-forward-neuron": "SDP forward neuron",
              "sdp-forward-checkpoint": "SDP forward block, checkpoints",
              "sdp-backward-block": "SDP backward block", "sdp-backward-neuron": "SDP backward neuron"}
    rows = [last[name] for name in labels]
    fig, axis = plt.subplots(figsize=(9, 3.8))
    left = np.zeros(len(rows))
    colours = {"parameters": "#08306b", "gradients": "#d62728", "optimizer": "#6baed6",
               "activations": "#fdae6b", "temporary": "#d9d9d9"}
    for kind, colour in colours.items():
        width = np.array([row["memory"][kind] / 1e9 for row in rows])
        axis.barh(list(labels.values()), width, left=left, color=colour, label=kind)
        left += width
    for i, total in enumerate(left):
        axis.text(total + 0.2, i, f"{total:.1f} GB, {total / left[0]:.0%}", va="center", fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, left.max() * 1.2)
    axis.set_title("llama-1b, S = 8, coverage 6/8, two sequences of 2,048 tokens", loc="left", fontsize=11)
    axis.set_xlabel("GB in use at the peak, largest worker (SDP's gradients are in messages: temporary)")
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(HERE / "figures/memory.png", dpi=130, facecolor="white")
    plt.close(fig)


def best_runs(updates):
    """{row: [its runs of so many updates]}, at the learning rate that was best on seed 0.

    A row is a method of training, see quality.py.
    """
    results = read("quality.jsonl")
    out = {}
    for name in dict.fromkeys(row["row"] for row in results):
        source = next(row["settings"]["lr_of"] for row in results if row["row"] == name) or name
        wanted = source, updates, 0
        searched = [row for row in results if (row["row"], row["updates"], row["seed"]) == wanted]
        if searched:
            lr = min(searched, key=validation_loss)["lr"]
            wanted = name, updates, lr
            found = [row for row in results if (row["row"], row["updates"], row["lr"]) == wanted
                     and row["seed"] < SEEDS]
            if found:
                out[name] = found
    return out


def validation_loss(row):
    return row["val_loss"]


SEEDS = 3                                                            # the same for all rows: 0, 1, 2
LOOKS = {                                                            # row -> label, colour
    "ddp{}": ("DDP", "black"),
    "block-6{}-flops": ("SDP forward block 6/8", "#1b6ca8"),
    "neuron-6{}-flops": ("SDP forward neuron 6/8", "#c2571a"),
    "neuron-6-ends-early-3{}-flops": ("SDP ends 3/8, then 5/8", "#7b2d8b"),
    "ddp-half-batch{}-flops": ("DDP, half the batch", "#999999"),
    "small-6-layers{}-flops": ("DDP, 6 of 8 blocks", "#2f7d4f"),
    "small-6-layers-half-batch{}-flops": ("DDP, 6 of 8 blocks, half the batch", "#8cc49f"),
}


def flops():
    """Validation loss of the full model against FLOPs: mean over the seeds, and the range they span.

    Above, the warm-up is 2/5 of the updates, as in train.py; below, with a larger batch, 1/5.
    """
    settings = ("-warm-up", 250), ("-warm-up", 1000), ("-batch-x4", 250), ("-batch-x4", 1000)
    fig, axes = plt.subplots(2, 2, figsize=(10, 7))
    for axis, (ending, updates) in zip(axes.flat, settings):
        found = best_runs(updates)
        for name, (label, colour) in LOOKS.items():
            rows = found.get(name.format(ending), [])
            if len(rows) < SEEDS:
                continue
            steps = [step for step, _ in rows[0]["curve"]]
            if steps[-2] > 0.98 * steps[-1]:                         # two points in one place
                steps.pop(-2)
            losses = np.array([[dict(row["curve"])[step] for step in steps] for row in rows])
            flops, count = rows[0]["flops"], rows[0]["steps"]
            half = rows[0].get("first_half_flops", flops * (count // 2) / count)
            work = np.interp(steps, [0, count // 2, count], [0, half, flops]) / 1e12
            axis.plot(work, losses.mean(0), color=colour, marker="o", markersize=3.5, label=label)
            axis.fill_between(work, losses.min(0), losses.max(0), color=colour, alpha=0.15, linewidth=0)
        setting = "4,096 tokens, warm-up 1/5" if ending == "-batch-x4" else "1,024 tokens, warm-up 2/5"
        axis.set_title(f"{updates:,} updates of DDP, {setting}", fontsize=11, loc="left")
        axis.set_xlabel("work of all workers, 10^12 FLOP")
        axis.set_ylabel("validation loss, nats per byte; 3 seeds")
        axis.spines[["top", "right"]].set_visible(False)
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.05 * len(axis.lines) * (high - low))  # room for the legend
        axis.legend(frameon=False, fontsize=9, loc="upper right")
    fig.tight_layout()
    fig.savefig(HERE / "figures/flops.png", dpi=130, facecolor="white")
    plt.close(fig)


def coverage():
    """Validation loss against coverage, at equal FLOPs and at equal steps, as quality.py ran."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    for axis, updates in zip(axes, (250, 1000)):
        rows = best_runs(updates)
        ddp = [row["val_loss"] for row in rows["ddp"]]
        for level, colour in ("block", "#1b6ca8"), ("neuron", "#c2571a"):
            for ending, style, what in ("-flops", "-", "equal FLOPs"), ("", "--", "equal steps"):
                points = []
                for held in range(4, 8):
                    points += [(held, row["val_loss"]) for row in rows.get(f"{level}-{held}{ending}", [])]
                axis.plot(*zip(*points), "o", color=colour, markersize=4, alpha=0.6,
                          markerfacecolor=colour if ending else "none")
                points += [(8, loss) for loss in ddp]
                helds = sorted({held for held, _ in points})
                means = [np.mean([loss for h, loss in points if h == held]) for held in helds]
                axis.plot(helds, means, style, color=colour, label=f"{level}, {what}")
        axis.plot([8] * len(ddp), ddp, "o", color="black", markersize=4)
        axis.set_title(f"{updates:,} updates of DDP; lines: means, points: seeds", loc="left", fontsize=11)
        axis.set_xticks(range(4, 9), ["4/8", "5/8", "6/8", "7/8", "8/8 = DDP"])
        axis.set_xlabel("coverage")
        axis.set_ylabel("validation loss, nats per byte")
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(HERE / "figures/coverage.png", dpi=130, facecolor="white")
    plt.close(fig)


FIGURES = {"step": step, "masks": masks, "memory": memory, "flops": flops, "coverage": coverage}


def main():
    wanted = sys.argv[1:] or list(FIGURES)
    if all(name in FIGURES for name in wanted):
        for name in wanted:
            FIGURES[name]()
        return 0
    for folder in wanted:
        path = Path(folder, "metrics.jsonl")
        if not path.is_file() or not path.read_text().strip():
            names = ", ".join(FIGURES)
            print(f"error: {folder} is neither a run (it has no metrics.jsonl) nor one of {names}",
                  file=sys.stderr)
            return 2
    runs(wanted)
    print("wrote runs.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
