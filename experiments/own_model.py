"""
Somebody else's GPT under sdp.py: what you must split, and what you must tell sdp.py about the model.

    python experiments/own_model.py                                        all workers in one process
    torchrun --standalone --nproc-per-node=4 experiments/own_model.py      the same on real workers

The model is in the manner of nanoGPT.  One matrix makes q, k and v.  Layers have biases.  The embedding and
the head are tied: they are one parameter.  A buffer has the causal mask.  You find the model here twice:
`Original`, and `GPT`, which you can build with some of the neurons.  (A neuron is a head or a hidden unit.)
Six things had to be done:

    1. A neuron must own equal, consecutive rows (or columns) of each parameter.  c_attn has all q, then all
       k, then all v, so the rows of one head are in three places.  Split it into q, k and v.
    2. The bias of q, k, v or c_fc has one number a row.  Cut it like the rows.  The bias of a branch's
       *output* is not a sum over neurons.  Like the norm, it belongs to the branch as a whole: add it once,
       outside of what forward masking scales.
    3. A tied parameter is one shared parameter.  Only its first name is in the layout.  (sdp.stream cannot
       evaluate a tied model, so train.py cannot.  Gather it, as here, or untie the head.)
    4. A constant buffer gets persistent=False.  Then state_dict() has only what sdp.py averages.
    5. Build a module with such a buffer on the CPU.  sdp.materialize() raises ValueError for a buffer on the
       meta device.
    6. The optimizer steps on pieces, which are 1-D.  nanoGPT's rule, to decay p.dim() >= 2, would decay
       nothing.  Go by the shape in the layout, as `adamw` in train.py does.

A norm or bias that two branches share gets branch None: all hold it, and the gradient of a worker that has
neither branch is zero.  If you compare weights with a dense model's, leave out the bias of k: it adds the
same to all scores of a query, so its gradient is 0 but for rounding, of which Adam makes whole steps.

`check_layout` says whether a layout is true of the model.  Run it on your own model before you train.  It
does not see an output's bias that is added among the neurons.  So build the model with backward=True as
well: sdp.materialize() then refuses such a bias.
"""

import copy
import os
import sys
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import sdp

VOCAB = 256                                                          # a token is a byte
LENGTH = 32                                                          # positions
WIDTH = 32                                                           # d
HEADS = 4                                                            # of a block
HIDDEN = 64                                                          # hidden units of a block
BLOCKS = 4


# ------------------------------------------------------------------------------------------------------------
# The model as it was.  In shapes: B sequences, T tokens, h numbers a head, V = VOCAB
# ------------------------------------------------------------------------------------------------------------

def attention(q, k, v, heads, causal):
    """q, k, v [B, T, heads * h] -> [B, T, heads * h].  causal: bool [LENGTH, LENGTH]"""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))          # [B, heads, T, h]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=causal[:q.shape[2], :q.shape[2]])
    return y.transpose(1, 2).flatten(2)


class OriginalBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)                    # all q, then all k, then all v
        self.attn_proj = nn.Linear(WIDTH, WIDTH)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.c_fc = nn.Linear(WIDTH, HIDDEN)
        self.mlp_proj = nn.Linear(HIDDEN, WIDTH)
        self.register_buffer("causal", torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())

    def forward(self, x):
        q, k, v = self.c_attn(self.ln_1(x)).split(WIDTH, dim=2)
        x = x + self.attn_proj(attention(q, k, v, HEADS, self.causal))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class Original(nn.Module):
    """The dense model: it has all neurons, and nothing was changed in it."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.wpe = nn.Embedding(LENGTH, WIDTH)
        self.h = nn.ModuleList(OriginalBlock() for _ in range(BLOCKS))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight                        # tied

    def forward(self, tokens, targets=None):
        """tokens int64 [B, T] -> logits [B, T, V]; with targets, the mean loss in nats a byte."""
        x = self.wte(tokens) + self.wpe.weight[:tokens.shape[1]]
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ------------------------------------------------------------------------------------------------------------
# The model as sdp.py needs it: a branch with n of its neurons is a module of its own
# ------------------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """n heads."""

    def __init__(self, n):
        super().__init__()
        self.heads = n
        size = n * WIDTH // HEADS
        self.q = nn.Linear(WIDTH, size)                              # three for one: see 1 above
        self.k = nn.Linear(WIDTH, size)
        self.v = nn.Linear(WIDTH, size)
        self.proj = nn.Linear(size, WIDTH, bias=False)               # its bias is in Branch: see 2
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        self.register_buffer("causal", causal, persistent=False)     # see 4

    def forward(self, x):
        return self.proj(attention(self.q(x), self.k(x), self.v(x), self.heads, self.causal))


class MLP(nn.Module):
    """n hidden units."""

    def __init__(self, n):
        super().__init__()
        self.c_fc = nn.Linear(WIDTH, n)
        self.proj = nn.Linear(n, WIDTH, bias=False)

    def forward(self, x):
        return self.proj(F.gelu(self.c_fc(x)))


class Branch(nn.Module):
    """x + scale * (part(norm(x)) + rest.part(norm(x))) + bias

    `part` has the `held` neurons.  Under backward masking, `rest.part` has the other `rest` neurons, frozen.
    sdp.py knows frozen parameters by the word rest in their path.  It cuts h.0.attn.rest.part.q.weight out of
    the full model's h.0.attn.part.q.weight.

    Norm and bias are no sums over neurons, so they stand here, once.  The scale leaves out the bias: even a
    worker that holds few heads has the whole bias.
    """

    def __init__(self, make, held, rest, scale):
        super().__init__()
        self.scale = scale
        self.absent = held + rest == 0
        if self.absent:                                              # no parameters at all
            return
        self.norm = nn.LayerNorm(WIDTH)
        self.part = make(held) if held else None
        self.rest = nn.Module()
        self.rest.part = make(rest) if rest else None
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        if self.absent:
            return x
        normed = self.norm(x)
        for part in self.part, self.rest.part:
            if part is not None:
                x = x + self.scale * part(normed)
        return x + self.bias


class GPT(nn.Module):
    """The model with `held` {branch: number of neurons}, or with all.

    backward, scales: as in model_llama.py.
    """

    def __init__(self, held=None, backward=False, scales=None):
        super().__init__()

        def branch(name, make):
            neurons = BRANCHES[name][1]
            here = neurons if held is None else held[name]
            rest = neurons - here if backward else 0
            scale = scales[name] if scales else 1.0
            return Branch(make, here, rest, scale)

        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.wpe = nn.Embedding(LENGTH, WIDTH)
        self.h = nn.ModuleList()
        for i in range(BLOCKS):
            attn, mlp = branch(f"h.{i}.attn", Attention), branch(f"h.{i}.mlp", MLP)
            self.h.append(nn.Sequential(OrderedDict(attn=attn, mlp=mlp)))    # runs attn, then mlp
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    forward = Original.forward                                       # nothing changes there


# ------------------------------------------------------------------------------------------------------------
# What you must tell sdp.py
# ------------------------------------------------------------------------------------------------------------

# {branch: (block, number of neurons, cost of one neuron)}.  One cost is enough here: the parameters
BRANCHES = {}
for _i in range(BLOCKS):
    BRANCHES[f"h.{_i}.attn"] = _i, HEADS, WIDTH // HEADS * (4 * WIDTH + 3)
    BRANCHES[f"h.{_i}.mlp"] = _i, HIDDEN, 2 * WIDTH + 1


def layout():
    """{full name: (branch or None, dimension along which its neurons lie or None, full shape)}"""
    out = {}
    for name, p in GPT().named_parameters():                         # a tied parameter comes once: see 3
        branch = ".".join(name.split(".")[:3])                       # h.0.attn
        if branch not in BRANCHES:
            out[name] = None, None, p.shape                          # shared: embeddings, ln_f
        elif ".part." not in name:
            out[name] = branch, None, p.shape                        # norm and bias: of the branch as a whole
        else:
            dim = 1 if name.endswith("proj.weight") else 0           # neurons are columns, or rows
            out[name] = branch, dim, p.shape
    return out


def from_original(state):
    """Returns the weights of Original's state_dict under GPT's names."""
    out = {name: tensor for name, tensor in state.items() if not name.startswith("h.")}
    for i in range(BLOCKS):
        h = f"h.{i}."
        for kind in "weight", "bias":
            out[f"{h}attn.norm.{kind}"] = state[f"{h}ln_1.{kind}"]
            out[f"{h}mlp.norm.{kind}"] = state[f"{h}ln_2.{kind}"]
            out[f"{h}mlp.part.c_fc.{kind}"] = state[f"{h}c_fc.{kind}"]
            for letter, part in zip("qkv", state[f"{h}c_attn.{kind}"].split(WIDTH)):
                out[f"{h}attn.part.{letter}.{kind}"] = part
        for branch in "attn", "mlp":
            out[f"{h}{branch}.part.proj.weight"] = state[f"{h}{branch}_proj.weight"]
            out[f"{h}{branch}.bias"] = state[f"{h}{branch}_proj.bias"]
    return out


def load_into_original(model, weights):
    """The way back.  weights: {name in GPT: full parameter}

    `from_original` gives views of the model's memory, each under its name in GPT: fill them.
    """
    with torch.no_grad():
        for name, place in from_original(model.state_dict()).items():
            if name != "lm_head.weight":                                     # tied
                place.copy_(weights[name])


@torch.no_grad()
def check_layout(full, branches, layout, *inputs):
    """Raises ValueError if the layout is not true of the full model.  The model stays as it is.

    A branch is a sum over its neurons.  Let the neurons change places, in all parameters at once: the output
    must stay the same.  It does not if the layout takes one neuron's rows for another's, as it would in
    c_attn.  inputs: what the model is called with.
    """
    model = copy.deepcopy(full).double().eval()                      # eval: no dropout
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():                                     # zeros and ones would hide mistakes
        p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    before = model(*inputs)
    for branch, (_, neurons, *_) in branches.items():
        for name, (owner, dim, shape) in layout.items():
            if owner == branch and dim is not None:
                p = model.get_parameter(name)
                p.copy_(p.roll(shape[dim] // neurons, dim))          # neuron n goes to the place of n + 1
        if not torch.allclose(model(*inputs), before, rtol=1e-6, atol=1e-9):
            raise ValueError(f"the layout of branch {branch} is not true: the output depends on the order of "
                             f"its {neurons} neurons.  Is a parameter fused, missing in the branch, or its "
                             f"dimension wrong?")


# ------------------------------------------------------------------------------------------------------------
# Training it
# ------------------------------------------------------------------------------------------------------------

TEXT = torch.frombuffer(bytearray(Path(sdp.__file__).read_bytes()), dtype=torch.uint8).long()


def batch(step, worker):
    """8 sequences: tokens and targets, int64 [8, LENGTH]."""
    starts = torch.randint(len(TEXT) - LENGTH, (8,), generator=sdp.seeded("batch", step, worker))
    window = TEXT[starts[:, None] + torch.arange(LENGTH + 1)]
    return window[:, :-1], window[:, 1:]


def first_model():
    torch.manual_seed(0)                                             # the same on every rank
    return Original()


def train_dense(steps, workers, one_batch=False):
    """Trains the dense model on the workers' batches.  -> the model, and its loss in each step."""
    model = first_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    losses = []
    for step in range(steps):
        batches = [batch(step, 0 if one_batch else worker) for worker in range(workers)]
        parts = [model(tokens, targets) for tokens, targets in batches]
        loss = torch.stack(parts).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def train_sdp(steps, masks, backward, one_batch=False):
    """Trains GPT with sdp.py: on real workers under torchrun, else all workers in one process.

    -> the full model, and the mean loss of the workers in each step.
    """
    n_subnets = sdp.count_subnets(masks)

    def build(subnet):                                               # on the CPU: see 5
        scales = None if backward else sdp.branch_scales(masks, subnet)
        return GPT(sdp.held_counts(masks, subnet), backward, scales)

    value = from_original(first_model().state_dict()).__getitem__    # full name -> full tensor
    if dist.is_initialized():
        subnet = dist.get_rank() % n_subnets
        module = sdp.materialize(build(subnet), masks, layout(), subnet, value)
        sync = sdp.SubnetDataParallel(module, masks, layout(), backward=backward)
    else:
        modules = [build(subnet) for subnet in range(n_subnets)]
        sync = sdp.SimulatedDataParallel(modules, masks, layout(), value)
    optimizer = torch.optim.AdamW([piece.param for piece in sync.pieces], lr=1e-3, weight_decay=0)
    losses = []
    for step in range(steps):
        mine = 0.0
        for worker in sync.workers:                                  # this process's: one, or all of them
            loss = sync.forward(worker, *batch(step, 0 if one_batch else worker))
            loss.backward()
            mine += loss.item()
        sync.finish()
        _, total = sync.clip_grad_norm(1.0, mine).tolist()           # total: summed over all workers
        optimizer.step()
        optimizer.zero_grad()
        sync.refresh()
        losses.append(total / sync.world)
    model = Original()
    load_into_original(model, dict(sync.gather()))
    sync.close()
    return model, losses


@torch.no_grad()
def full_loss(model):
    """Mean loss of the dense model on batches that no worker had."""
    return sum(model(*batch("validation", i)).item() for i in range(16)) / 16


def say(text):
    """Prints on worker 0 only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text)


def main():
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    workers = dist.get_world_size() if dist.is_initialized() else 4
    check_layout(GPT(), BRANCHES, layout(), batch(0, 0)[0])
    say("the layout is true\n")
    held = max(1, workers * 3 // 4)
    masks = {
        "block": sdp.block_masks(BRANCHES, workers, held),
        "neuron": sdp.neuron_masks(BRANCHES, workers, held),
    }
    steps = 100
    say(f"{workers} workers, coverage {held}/{workers}, {steps} updates"
        "            training loss      full model")
    for one_batch in True, False:
        name = "one batch for all workers" if one_batch else "own batches"
        model, losses = train_dense(steps, workers, one_batch)
        say(f"{name:26} dense                {losses[-1]:13.6f}  {full_loss(model):14.6f}")
        for backward in True, False:
            for level, mask in masks.items():
                model, losses = train_sdp(steps, mask, backward, one_batch)
                kind = f"{'backward' if backward else 'forward'} {level}"
                say(f"{name:26} {kind:20} {losses[-1]:13.6f}  {full_loss(model):14.6f}")
    say("\nBackward masking with one batch for all workers is dense training."
        "  The rest is near it, not equal to it.")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(data.run_program(main))
