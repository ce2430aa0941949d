"""
Draws the figure of the README (needs matplotlib):  python assets/plot.py
"""

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
    fig.savefig(HERE / "masks.png", dpi=130)


if __name__ == "__main__":
    masks()
