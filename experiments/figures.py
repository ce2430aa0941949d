"""
Draws the figures of the README into figures/ from the files in results/ (needs matplotlib).

    python experiments/figures.py
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import model_llama as llama
import sdp


def masks():
    """Who holds what: 6 blocks, 8 subnetworks, coverage 5/8, at both levels."""
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


if __name__ == "__main__":
    for draw in masks, memory, timeline, curves:
        draw()
