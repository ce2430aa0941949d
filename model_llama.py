"""
A compact LLaMA that can be built at any held size.  It knows nothing of workers or of communication.

The model is a stack of residual branches, x <- x + f(x).  The inside of each is a sum over its *neurons*:

    attention   a neuron is one KV head, with the query heads that read it    o_proj adds up the heads
    MLP         a neuron is one hidden unit of the SwiGLU                     down_proj adds up the units

So a branch with only some of its neurons is a branch of the same kind, and a subnetwork is an ordinary Llama
with smaller matrices.  A branch with no neuron left is not built at all: x <- x.  The full model's parameters
have the names and the shapes of `transformers.LlamaForCausalLM`.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class LlamaConfig:
    """Sizes of the full model.  The fields have the names of `transformers.LlamaConfig`."""
    vocab_size: int = 256
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    max_position_embeddings: int = 256
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def queries_per_kv(self):                                        # query heads that read one KV head
        return self.num_attention_heads // self.num_key_value_heads


# The paper gives the parameter counts of its models but not their shapes; these shapes are ours.  In order:
# vocab_size, hidden_size, intermediate_size, layers, heads, KV heads, max_position_embeddings
PRESETS = {
    "llama-tiny": LlamaConfig(),
    "llama-134m": LlamaConfig(32000, 768, 2048, 12, 12, 12, 2048),
    "llama-500m": LlamaConfig(32000, 1280, 3456, 20, 20, 20, 2048),
    "llama-1b": LlamaConfig(32000, 2048, 5504, 18, 32, 32, 2048),
}
MAX_LOGITS = 2**25                                                   # held at a time in training: 128 MiB


# -- What sdp.py has to know: branches, their neurons, and how each parameter is made of neurons ------------

def branches(c):
    """Branch name (the module's path) -> (block, neurons, weights, FLOPs, activations of a neuron).

    The last three balance the workers' loads: neither units nor small errors matter.  FLOPs are 2 a weight
    forward and 4 backward, without the attention scores.
    """
    # Of one KV head: rows of q, k, v and columns of o
    rows = 2 * (c.queries_per_kv + 1) * c.head_dim                   # also its activations: q, k, v, output
    head = rows * c.hidden_size                                      # its weights
    unit = 3 * c.hidden_size                                         # those of a hidden unit: gate, up, down
    out = {}
    for i in range(c.num_hidden_layers):
        out[f"model.layers.{i}.self_attn"] = i, c.num_key_value_heads, head, 6 * head, rows
        out[f"model.layers.{i}.mlp"] = i, c.intermediate_size, unit, 6 * unit, 4  # gate, silu, up, product
    return out


def layout(c):
    """Full parameter name -> (branch or None, dimension of its neurons or None, full shape), in order.

    Each neuron owns equally many rows (0) or columns (1), one after another.  A norm belongs to the branch
    after it as a whole (None).  Branch None: all subnetworks hold it whole (embedding, final norm, head).
    """
    with torch.device("meta"):                                       # shapes without memory
        full = Llama(c)
    out = {}
    for name, p in full.named_parameters():
        *path, module, _ = name.split(".")                           # model, layers, 0, mlp, up_proj, weight
        path = ".".join(path)
        if module == "input_layernorm":
            out[name] = f"{path}.self_attn", None, p.shape
        elif module == "post_attention_layernorm":
            out[name] = f"{path}.mlp", None, p.shape
        elif module.endswith("_proj"):
            out[name] = path, 1 if module in ("o_proj", "down_proj") else 0, p.shape
        else:
            out[name] = None, None, p.shape
    return out


def init(c, name, tensor, generator):
    """Fills one full parameter in place: norms with 1, the rest at random (GPT-2's rule)."""
    if "norm" in name:
        tensor.fill_(1.0)
    elif "o_proj" in name or "down_proj" in name:                    # small: 2 branches per layer add to x
        tensor.normal_(0.0, 0.02 / (2 * c.num_hidden_layers) ** 0.5, generator=generator)
    else:
        tensor.normal_(0.0, 0.02, generator=generator)


# -- The model.  B sequences, T tokens, d hidden_size, n held neurons, h head_dim, V vocabulary --------------

def rope_table(length, c, device):
    """Rotary position embedding (arXiv 2104.09864): cosines and signed sines, each [length, 1, h]."""
    freq = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float32) / c.head_dim)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), freq)[:, None]
    return angle.cos().repeat(1, 1, 2), torch.cat((-angle.sin(), angle.sin()), dim=-1)


def rotate(x, rope):
    """Each (a, b) = (x_i, x_{i + h/2}) of x [B, T, heads, h] becomes (a cos - b sin, b cos + a sin)."""
    cos, sin = (t.to(x.dtype) for t in rope)
    other = x.roll(x.shape[-1] // 2, dims=-1)                        # each number's partner
    return torch.addcmul(x * cos, other, sin)                        # x cos + other sin


class Attention(nn.Module):
    """Causal self-attention over `n` KV heads, each read by `config.queries_per_kv` query heads."""

    def __init__(self, c, n):
        super().__init__()
        self.kv_heads = n
        self.q_heads = n * c.queries_per_kv
        self.q_proj = nn.Linear(c.hidden_size, self.q_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, n * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, n * c.head_dim, bias=False)
        self.o_proj = nn.Linear(self.q_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x, rope):                                      # [B, T, d]
        q = self.q_proj(x).unflatten(-1, (self.q_heads, -1))         # [B, T, q_heads, h]
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1))        # [B, T, kv_heads, h]
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1))
        # In one go: on a GPU, many small kernels cost more than what they compute
        q, k = rotate(torch.cat((q, k), dim=2), rope).split((self.q_heads, self.kv_heads), dim=2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))             # [B, heads, T, h]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.q_heads != self.kv_heads)
        return self.o_proj(y.transpose(1, 2).flatten(2))             # sum over the heads


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202) with `n` hidden units."""

    def __init__(self, c, n):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, n, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, n, bias=False)
        self.down_proj = nn.Linear(n, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # sum over the units


class Layer(nn.Module):
    """Attention and MLP, each behind its RMSNorm: x + scale * f(norm(x)).

    n_held, n_rest: numbers of (KV heads, hidden units).  The held neurons train.  Under backward masking the
    layer also runs all the others: the child `rest` has them, sdp.py freezes them, f is held(x) + rest(x).
    At first, read this for forward masking, where n_rest is (0, 0).
    """

    def __init__(self, c, n_held, n_rest, scales):
        super().__init__()
        self.config = c
        self.scales = scales                                         # of both branches
        norm = partial(nn.RMSNorm, c.hidden_size, c.rms_norm_eps)
        heads, units = n_held
        rest_heads, rest_units = n_rest
        self.input_layernorm = norm() if heads + rest_heads else None  # without neurons: not built, x <- x
        self.self_attn = Attention(c, heads) if heads else None
        self.post_attention_layernorm = norm() if units + rest_units else None
        self.mlp = MLP(c, units) if units else None
        self.rest = nn.Module()                                      # frozen neurons of both branches, if any
        self.rest.self_attn = Attention(c, rest_heads) if rest_heads else None
        self.rest.mlp = MLP(c, rest_units) if rest_units else None

    def forward(self, x, rope=None):                                 # None: in evaluation, see `stages`
        if self.input_layernorm:
            normed = self.input_layernorm(x)
            rope = rope or rope_table(x.shape[1], self.config, x.device)
            for part in filter(None, (self.self_attn, self.rest.self_attn)):  # those that were built
                x = torch.add(x, part(normed, rope), alpha=self.scales[0])  # one kernel: x + scale * part
        if self.post_attention_layernorm:
            normed = self.post_attention_layernorm(x)
            for part in filter(None, (self.mlp, self.rest.mlp)):
                x = torch.add(x, part(normed), alpha=self.scales[1])
        return x


class Llama(nn.Module):
    """LLaMA at any held size.

    held: branch name -> number of neurons built; by default all of them, which is the full model.
    backward: build the neurons that are not held as well, as frozen `rest` modules (backward masking).
    scales: branch name -> what the branch's output is multiplied by; by default 1.  Under forward masking a
        branch is a part of a sum, and `sdp.branch_scales` brings it to the size of the whole.
    """

    def __init__(self, c, held=None, backward=False, scales=None):
        super().__init__()
        if backward and scales is not None:
            raise ValueError("backward masking runs whole branches: it scales nothing")
        self.config = c
        self.checkpoint_activations = False
        neurons = {name: n for name, (_, n, *_) in branches(c).items()}
        held = held or neurons
        scales = scales or dict.fromkeys(neurons, 1.0)
        layers = nn.ModuleList()
        for i in range(c.num_hidden_layers):
            names = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
            rest = [neurons[b] - held[b] if backward else 0 for b in names]
            layers.append(Layer(c, [held[b] for b in names], rest, [scales[b] for b in names]))
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
            "layers": layers,
            "norm": nn.RMSNorm(c.hidden_size, c.rms_norm_eps),
        })
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def stages(self):
        """-> [(path, module)], a chain, for evaluation: it has the weights of one at a time in memory."""
        layers = [f"model.layers.{i}" for i in range(self.config.num_hidden_layers)]
        paths = ["model.embed_tokens", *layers, "model.norm", "lm_head"]
        return [(path, self.get_submodule(path)) for path in paths]

    def forward(self, tokens, targets=None):
        """tokens int64 [B, T] -> logits [B, T, V]; with targets int64 [B, T], the loss (see `loss`)."""
        x = self.model.embed_tokens(tokens)
        rope = rope_table(x.shape[1], self.config, x.device)         # once for all layers
        for layer in self.model.layers:
            if self.checkpoint_activations:
                x = checkpoint(layer, x, rope, use_reentrant=False)
            else:
                x = layer(x, rope)
        x = self.model.norm(x)
        if targets is None:
            return self.lm_head(x)
        if targets.numel() * self.config.vocab_size <= MAX_LOGITS:
            return loss(self.lm_head(x), targets)
        return loss_in_parts(x.flatten(0, 1), targets.flatten(), self.lm_head.weight)

    @torch.no_grad()
    def generate(self, tokens, count, temperature=0.8, generator=None):
        """Appends `count` sampled tokens to tokens [B, T].  No KV cache: short and slow."""
        for _ in range(count):
            logits = self(tokens[:, -self.config.max_position_embeddings:])[:, -1]
            probabilities = F.softmax(logits.float() / temperature, dim=-1)
            tokens = torch.cat((tokens, torch.multinomial(probabilities, 1, generator=generator)), dim=1)
        return tokens


def loss(logits, targets):
    """Mean cross-entropy in nats per token.  logits [..., V], targets int64 [...]."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def loss_in_parts(x, targets, weight):
    """The loss of the logits F.linear(x, weight), with x the last norm's output [N, d] and targets [N].

    Logits are by far the largest tensor, and the loss would hold three: them, their softmax, their gradient.
    So only those of some tokens are alive at a time, and they are computed again in the backward pass.
    """
    total = 0.0
    at_once = MAX_LOGITS // len(weight)
    for xs, ys in zip(x.split(at_once), targets.split(at_once)):
        total += checkpoint(summed_loss, xs, ys, weight, use_reentrant=False)
    return total / len(targets)


def summed_loss(x, targets, weight):
    return loss(F.linear(x, weight), targets) * len(targets)
