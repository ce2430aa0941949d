"""
Draws figures (needs matplotlib).

    python experiments/figures.py             those of the README, into figures/, from the files in results/
    python experiments/figures.py step        one of them
    python experiments/figures.py RUN...      runs of your own, folders with a metrics.jsonl, into runs.png here
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
    """One step of the method: four workers, what each holds, the holder sets, the averages."""
    n = 4
    rows = ["shared\nembedding, head", *(f"block {i}" for i in range(n))]
    colours = ["#757575", "#1b6ca8", "#c2571a", "#2f7d4f", "#7b4f9d"]
    fig, axis = plt.subplots(figsize=(10, 4.6))
    for worker in range(n):
        x = 1.25 * worker
        axis.text(x, 1.55, f"worker {worker}", ha="center", weight="bold")
        axis.text(x, 1.15, f"its own batch {worker}", ha="center", fontsize=9)
        axis.annotate("", (x, 0.5), (x, 1.05), arrowprops=dict(arrowstyle="->", color="#444444"))
    for row, (label, colour) in enumerate(zip(rows, colours)):
        y = -row
        holders = [worker for worker in range(n) if worker != row - 1]       # worker i skips block i
        axis.text(-0.75, y, label, ha="right", va="center")
        axis.plot([1.25 * holders[0], 5.3], [y, y], color=colour, linewidth=2.5, zorder=1)
        for worker in range(n):
            held = worker in holders
            box = plt.Rectangle((1.25 * worker - 0.42, y - 0.33), 0.84, 0.66, zorder=2, linewidth=1.2,
                                facecolor=colour if held else "white", edgecolor=colour if held else "#aaaaaa",
                                linestyle="-" if held else ":")
            axis.add_patch(box)
            sign = f"$g_{{{worker}}}$" if held else "not held"
            axis.text(1.25 * worker, y, sign, ha="center", va="center", zorder=3, fontsize=12 if held else 7,
                      color="white" if held else "#777777")
        total = " + ".join(f"g_{{{worker}}}" for worker in holders)
        axis.annotate("", (5.4, y), (5.2, y), arrowprops=dict(arrowstyle="-|>", color=colour, linewidth=2.5))
        axis.text(5.5, y, f"$g = ({total})\\,/\\,{len(holders)}$", va="center", color=colour, fontsize=12)
        axis.text(8.75, y, "{" + ", ".join(map(str, holders)) + "}", va="center", ha="center", color=colour)
    axis.text(5.5, 1.55, "averaged gradient", weight="bold")
    axis.text(8.75, 1.55, "holder set", weight="bold", ha="center")
    axis.text(-1.9, -5.0, "1.  Down each column: a worker runs its subnetwork forward and backward, on its own batch.\n"
              "2.  Along each row: those who hold a block average its gradient, in one message.\n"
              "3.  Every holder updates its copy by the same average, so the copies stay equal.",
              va="top", fontsize=10, linespacing=1.6)
    axis.set_xlim(-2, 9.4)
    axis.set_ylim(-6.5, 1.9)
    axis.axis("off")
    fig.tight_layout(pad=0.4)
    fig.savefig(HERE / "figures/step.png", dpi=130, facecolor="white")
    plt.close(fig)


def runs(folders, path="runs.png"):
    """Loss, validation loss or accuracy, and speed of each run, from its metrics.jsonl."""
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    for folder in map(Path, folders):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        score = "val_acc" if any("val_acc" in line for line in lines) else "val_loss"
        speed = "tokens_per_s" if any("tokens_per_s" in line for line in lines) else "images_per_s"
        for axis, key in zip(axes, ("loss", score, speed)):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            axis.plot(*zip(*points), marker="o" if key == score else None, markersize=3, label=folder.name)
            axis.set_ylabel({"loss": "training loss", "val_loss": "validation loss, full model",
                             "val_acc": "validation accuracy, full model"}.get(key, key.replace("_per_s", " a second")))
    for axis in axes:
        axis.set_xlabel("updates")
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].set_ylim(0)
    axes[0].legend(frameon=False, fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=130, facecolor="white")
    plt.close(fig)


def masks():
    """Who holds what: 6 blocks, 8 subnetworks, coverage 5/8, at both levels."""
    import model_llama as llama                                      # the other figures need no torch
    import sdp

    config = llama.LlamaConfig(num_hidden_layers=6, intermediate_size=64)
    branches = {name: b for name, b in llama.branches(config).items() if name.endswith("mlp")}
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, level, make in (axes[0], "block", sdp.block_masks), (axes[1], "neuron", sdp.neuron_masks):
        made = make(branches, 8, 5)
        picture = np.concatenate([mask.numpy() for mask in made.values()])               # [6 * 64 neurons, 8]
        axis.imshow(picture, aspect="auto", interpolation="none", cmap="Blues", vmin=-0.15, vmax=1.4)
        axis.set_yticks([64 * i + 31.5 for i in range(6)], [f"block {i}" for i in range(6)])
        for i in range(1, 6):
            axis.axhline(64 * i - 0.5, color="white", linewidth=2)
        for i in range(1, 8):
            axis.axvline(i - 0.5, color="white", linewidth=3)
        gap = sdp.spectral_gap(*sdp.rows_of(made))[0]
        axis.set_title(f"{level} level, coverage 5/8, spectral gap {gap:.2f}", fontsize=10)
        axis.set_xlabel("subnetwork")
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    fig.tight_layout()
    fig.savefig(HERE / "figures/masks.png", dpi=130)


def memory():
    """What one worker of llama-1b has in memory at the peak, by --plan."""
    rows = [
        r for r in json.loads((HERE / "results/plan_llama-1b.json").read_text()) if " at " not in r["variant"]
    ]
    fig, axis = plt.subplots(figsize=(9, 3.4))
    left = np.zeros(len(rows))
    for kind, colour in zip(
        ("parameters", "gradients", "optimizer", "activations", "temporary"),
        ("#08306b", "#2171b5", "#6baed6", "#fdae6b", "#d9d9d9"),
    ):
        width = np.array([r["memory"][kind] / 1e9 for r in rows])
        axis.barh([r["variant"] for r in rows], width, left=left, color=colour, label=kind)
        left += width
    for i, total in enumerate(left):
        axis.text(total + 0.2, i, f"{total:.1f} GB, {total / left[0]:.0%}", va="center", fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, left.max() * 1.2)
    axis.set_xlabel("GB in use at the peak, largest worker")
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(HERE / "figures/memory.png", dpi=130)


def timeline():
    """When all-reduces run beside the backward pass over a link of 1 Gbit/s, from torch.profiler's traces."""
    settings = json.loads((HERE / "results/timeline.json").read_text())
    fig, axes = plt.subplots(len(settings), 1, figsize=(9, 4))
    for axis, (setting, variants) in zip(axes, settings.items()):
        for i, (name, t) in enumerate(variants.items()):
            axis.barh(
                i - 0.18, t["backward_ms"], height=0.34, color="#08306b", label="backward" if i == 0 else None
            )
            for j, (begin, end) in enumerate(t["all_reduces_ms"]):
                axis.barh(
                    i + 0.18,
                    end - begin,
                    left=begin,
                    height=0.34,
                    color="#fd8d3c",
                    alpha=0.55,
                    edgecolor="white",
                    linewidth=0.4,
                    label="all-reduces" if i == j == 0 else None,
                )
        axis.set_yticks(range(len(variants)), list(variants), fontsize=9)
        axis.invert_yaxis()
        axis.set_title(
            {"compute": "512 tokens a worker", "communication": "64 tokens a worker"}[setting],
            fontsize=10,
            loc="left",
        )
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0)
    axes[0].legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncol=2)
    axes[-1].set_xlabel("ms since the backward pass began")
    fig.tight_layout()
    fig.savefig(HERE / "figures/timeline.png", dpi=130)


def curves():
    """Training loss of llama-tiny in float32 and in bfloat16, every variant."""
    rows = [json.loads(line) for line in (HERE / "results/bf16.jsonl").read_text().splitlines()]
    fig, axis = plt.subplots(figsize=(9, 3.4))
    for row, colour in zip(rows, ("black", "#2171b5", "#6baed6", "#d94801", "#fdae6b")):
        steps = 10 * np.arange(1, len(row["fp32"]) + 1)
        axis.plot(steps, row["fp32"], color=colour, label=row["variant"])
        axis.plot(steps, row["bf16"], color=colour, linestyle=":", linewidth=2.5)
    axis.set_xlabel("updates")
    axis.set_ylabel("training loss, nats per byte")
    axis.set_title("solid: float32, dotted: bfloat16", fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(HERE / "figures/curves.png", dpi=130)


FIGURES = {"step": step, "masks": masks, "memory": memory, "timeline": timeline, "curves": curves}


def main():
    wanted = sys.argv[1:] or list(FIGURES)
    if all(name in FIGURES for name in wanted):
        for name in wanted:
            FIGURES[name]()
        return 0
    for folder in wanted:
        path = Path(folder, "metrics.jsonl")
        if not path.is_file() or not path.read_text().strip():
            print(f"error: {folder} is neither a run (it has no metrics.jsonl) nor one of {', '.join(FIGURES)}", file=sys.stderr)
            return 2
    runs(wanted)
    print("wrote runs.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
