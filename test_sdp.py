"""
Tests of Subnetwork Data Parallelism, against oracles that share no code with it: transformers' LLaMA and
torchvision's ResNet with explicit 0/1 masks on full-size weights, torch's DistributedDataParallel, the naive
all-reduce, torch's fake process group.

    python -m pytest -q test_sdp.py                        # three minutes on two cores

What sdp.py refuses is in experiments/test_use.py, how good its masks are in experiments/test_masks.py.
"""

import functools
import gc
import multiprocessing
import pickle
import tempfile
import time
import traceback
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.func import functional_call
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import model_llama as llama
import model_resnet as resnet
import sdp

torch.set_num_threads(1)

# Grouped-query attention (3 KV heads, 6 query heads) and sizes that no S divides evenly
TINY = llama.LlamaConfig(vocab_size=61, hidden_size=24, intermediate_size=21, num_hidden_layers=3,
                         num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=16)
# Eight blocks, three of them with a convolution in the shortcut, and widths that no S divides evenly
TINY_RESNET = resnet.ResNetConfig(num_classes=5, widths=(6, 7, 9, 10))

STEPS = 5                                                   # moments, clipping and refreshes count by then
CLIP = 0.5


# -----------------------------------------------------------------------------------------------------------
# Real processes: eight workers are started once; a test runs a function on the first few of them, over gloo
# -----------------------------------------------------------------------------------------------------------

def _worker(pipe):
    torch.set_num_threads(1)
    gc.freeze()                                             # gc.collect() passes over what the imports made
    while True:
        try:
            rank, world, store, function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:                                    # the tests are over
            return
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world,
                                    timeout=timedelta(seconds=60))
            result = True, function(*args)
            if dist.is_initialized():                       # or gloo fails whoever still connects
                dist.barrier()
        except BaseException:
            result = False, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            for thing in gc.get_objects():
                # Its hooks keep an open wrapper alive.  (type(): a weakref proxy may be dead)
                if issubclass(type(thing), sdp.MaskedAllReduce):
                    thing.groups.clear()                    # each group has threads that wake up often
            gc.collect()
        pipe.send_bytes(pickle.dumps(result))


@functools.cache
def pool():
    """Eight workers, one set for all test files: importing torch takes a process seconds."""
    context = multiprocessing.get_context("forkserver")
    # The server imports once what its workers would import one by one; optimizers import torch._dynamo
    context.set_forkserver_preload(["test_sdp", "torch._dynamo", "transformers.models.llama.modeling_llama"])
    pipes = []
    for _ in range(8):
        mine, its = context.Pipe()
        context.Process(target=_worker, args=(its,), daemon=True).start()
        pipes.append(mine)
    return pipes


def run_on(world, function, *args):
    """-> [function's result on rank 0, on rank 1, ...]"""
    pipes = pool()[:world]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for rank, pipe in enumerate(pipes):
            pipe.send_bytes(pickle.dumps((rank, world, f"{folder}/store", function, args)))
        for pipe in pipes:
            results.append(pickle.loads(pipe.recv_bytes()) if pipe.poll(200) else (False, "hangs"))
    failed = [f"rank {rank}: {what}" for rank, (fine, what) in enumerate(results) if not fine]
    assert not failed, "\n".join(failed)
    return [what for _, what in results]


def family(config):
    return (resnet, resnet.ResNet) if isinstance(config, resnet.ResNetConfig) else (llama, llama.Llama)


FOUND = {}                                                  # masks: the search for them takes a while


def masks_for(config, subnets, held, level, seed=0):
    key = repr((config, subnets, held, level, seed))
    if key not in FOUND:
        FOUND[key] = sdp.MASKS[level](family(config)[0].branches(config), subnets, held, seed)
    return FOUND[key]


def subnetwork(config, masks, subnet, backward, scaled=False):
    more = {"scales": sdp.branch_scales(masks, subnet)} if scaled else {}
    with torch.device("meta"):
        return family(config)[1](config, sdp.held_counts(masks, subnet), backward, **more)


def tokens_for(step, worker, config=TINY, batch=2, length=9):
    rng = np.random.default_rng([step, worker])
    x = torch.from_numpy(rng.integers(config.vocab_size, size=(batch, length + 1)))
    return x[:, :-1], x[:, 1:]


def images_for(step, worker, config=TINY_RESNET, batch=4):
    rng = np.random.default_rng([step, worker])
    y = torch.from_numpy(rng.integers(config.num_classes, size=batch))
    return torch.from_numpy(rng.normal(size=(batch, 3, 16, 16))) + y.view(-1, 1, 1, 1) / 5, y  # float64


def batch_for(config):
    return images_for if family(config)[0] is resnet else tokens_for


def optimizer_for(config, params):
    if family(config)[0] is resnet:
        return torch.optim.SGD(params, lr=0.03, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1)


def first_value(config, seed=3):
    """LLaMA in float32.  ResNet in float64: batch norm over few images lets rounding grow fast in float32."""
    kind = family(config)[0]
    value = sdp.fresh(kind.layout(config), functools.partial(kind.init, config), seed)
    return value if kind is llama else lambda name: value(name).double()


def make_sync(config, masks, backward, simulated=None, kind=sdp.SubnetDataParallel, scaled=False, **options):
    """The distributed sync of this rank or, with simulated=W, all W workers in one process."""
    layout, value = family(config)[0].layout(config), first_value(config)
    n_subnets = sdp.count_subnets(masks)
    if simulated:
        modules = [subnetwork(config, masks, s, backward, scaled) for s in range(n_subnets)]
        return sdp.SimulatedDataParallel(modules, masks, layout, value, simulated)
    subnet = dist.get_rank() % n_subnets
    module = subnetwork(config, masks, subnet, backward, scaled)
    sdp.materialize(module, masks, layout, subnet, value)
    return kind(module, masks, layout, backward, **options)


def backward_pass(sync, config, step, accum=1, batches=None):
    """Forward and backward passes of one update.  -> losses of this process's workers and micro-steps"""
    losses, batches = [], batches or batch_for(config)
    for worker in sync.workers:
        for micro in range(accum):
            x, y = batches(step * accum + micro, worker)
            with sync.no_sync() if micro < accum - 1 else nullcontext():
                loss = family(config)[0].loss(sync.forward(worker, x), y)
                (loss / accum).backward()
            losses.append(loss.item())
    sync.finish()
    return losses


def gathered(sync, tensors=None):
    return {name: t.clone() for name, t in sync.gather(tensors)}


def train_steps(config, masks, backward, simulated=None, accum=1, batches=None, **options):
    """-> losses [STEPS, this process's workers], gradient norms [STEPS], full model at the end, bytes sent"""
    sync = make_sync(config, masks, backward, simulated, **options)
    optimizer = optimizer_for(config, [piece.param for piece in sync.pieces])
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(backward_pass(sync, config, step, accum, batches))
        norm, total, ranks = sync.clip_grad_norm(CLIP, sum(losses[-1]), 1).tolist()
        assert ranks == (1 if simulated else sync.world)             # scalars are added up over the workers
        assert total >= sum(losses[-1]) if not simulated else total == pytest.approx(sum(losses[-1]))
        norms.append(norm)
        optimizer.step()
        optimizer.zero_grad()
        sync.refresh()
    if not simulated:
        check_replicas(sync)
    return np.array(losses), np.array(norms), gathered(sync), sync.sent_bytes


def check_replicas(sync):
    """All holders of an entry have the same bits, and under backward masking so have the frozen copies."""
    if isinstance(sync, sdp.SubnetDataParallel):
        sync.arrive()                                       # the last refresh may be under way
    low = {name: torch.full(shape, 2**63 - 1) for name, (_, _, shape) in sync.layout.items()}
    high = {name: ~t for name, t in low.items()}            # the smallest integer
    for local, slot in sync.slots.items():
        p = sync.module.get_parameter(local).detach()
        bits = p.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[p.itemsize]).long()
        rows = slice(None) if slot.rows is None else slot.rows
        for full in low[slot.name], high[slot.name]:
            full.movedim(slot.dim or 0, 0)[rows] = bits.movedim(slot.dim or 0, 0)
    low, high = (torch.cat([t.flatten() for t in full.values()]) for full in (low, high))
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    assert torch.equal(low, high)                           # each entry is somebody's


class DenseLlama(nn.Module):
    """transformers' LLaMA; and what a subnet holds of each of its parameters, from the names alone."""

    def __init__(self, config):
        from transformers import LlamaConfig, LlamaForCausalLM
        super().__init__()
        self.config = config
        self.net = LlamaForCausalLM(LlamaConfig(**asdict(config), attn_implementation="eager")).float()

    def forward(self, x):
        return self.net(x).logits.transpose(1, 2)           # [B, V, T], as cross_entropy wants it

    def held(self, name, masks, s):
        """1 where subnet s holds the entry of parameter `name`; broadcasts to its shape."""
        c, group = self.config, self.config.num_attention_heads // self.config.num_key_value_heads
        if "layers" not in name:
            return torch.ones(())
        layer = name.split(".")[2]
        heads = masks[f"model.layers.{layer}.self_attn"][:, s]
        units = masks[f"model.layers.{layer}.mlp"][:, s]
        if "input_layernorm" in name:
            return heads.any()
        if "post_attention_layernorm" in name:
            return units.any()
        if "q_proj" in name:
            return heads.repeat_interleave(group * c.head_dim)[:, None]
        if "k_proj" in name or "v_proj" in name:
            return heads.repeat_interleave(c.head_dim)[:, None]
        if "o_proj" in name:
            return heads.repeat_interleave(group * c.head_dim)[None, :]
        return units[None, :] if "down_proj" in name else units[:, None]


class DenseResNet(nn.Module):
    """The same of a ResNet made of torchvision's blocks, with batch norm by the worker's own batch."""

    def __init__(self, config):
        from torchvision.models.resnet import BasicBlock
        super().__init__()
        norm, planes = functools.partial(nn.BatchNorm2d, track_running_stats=False), config.widths[0]
        net = {"conv1": nn.Conv2d(3, planes, 3, 1, 1, bias=False), "bn1": norm(planes), "relu": nn.ReLU()}
        for i, wide in enumerate(config.widths):
            shortcut = nn.Sequential(nn.Conv2d(planes, wide, 1, 2, bias=False), norm(wide)) if i else None
            first = BasicBlock(planes, wide, 2 if i else 1, shortcut, norm_layer=norm)
            net[f"layer{i + 1}"] = nn.Sequential(first, BasicBlock(wide, wide, norm_layer=norm))
            planes = wide
        net.update(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(planes, config.num_classes))
        self.net = nn.ModuleDict(net)

    def forward(self, x):
        for module in self.net.values():
            x = module(x)
        return x

    def held(self, name, masks, s):
        block = ".".join(name.split(".")[:2])
        if block not in masks or "downsample" in name:
            return torch.ones(())
        mine = masks[block][:, s]
        held = {"conv1": mine[:, None, None, None], "bn1": mine,
                "conv2": mine[None, :, None, None], "bn2": mine.any()}
        return held[name.split(".")[2]]


def dense_model(config):
    return DenseResNet(config) if family(config)[0] is resnet else DenseLlama(config)


def dense_masked_model(config, masks, workers, backward, accum=1, batches=None, scale=1):
    """The oracle: another library's model at full size.

    Worker i sees weights times its 0/1 mask; gradients are summed over workers and divided by counts.
    Backward masking: all weights are seen, the masked ones without a gradient.  scale: of a branch's output,
    that is, of the weights that make it.  -> losses [STEPS, workers], norms [STEPS], the model at the end
    """
    batches, model, value = batches or batch_for(config), dense_model(config), first_value(config)
    names = [name.removeprefix("net.") for name, _ in model.named_parameters()]
    weights = {name: nn.Parameter(value(name)) for name in names}
    factor = {name: scale if "o_proj" in name or "down_proj" in name else 1 for name in names}
    subnets = next(iter(masks.values())).shape[1]
    masked = [{name: torch.ones_like(w) * model.held(name, masks, s) for name, w in weights.items()}
              for s in range(subnets)]
    optimizer = optimizer_for(config, weights.values())
    losses, norms = [], []
    for step in range(STEPS):
        losses.append([])
        for worker in range(workers):
            m = masked[worker % subnets]
            for micro in range(accum):
                x, y = batches(step * accum + micro, worker)
                seen = {f"net.{n}": factor[n] * (w * m[n] + (w * (1 - m[n])).detach() * backward)
                        for n, w in weights.items()}
                loss = nn.functional.cross_entropy(functional_call(model, seen, (x,)), y)
                (loss / accum).backward()
                losses[-1].append(loss.item())
        for name, w in weights.items():
            w.grad /= sum(masked[worker % subnets][name] for worker in range(workers))
        norms.append(float(nn.utils.clip_grad_norm_(weights.values(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    return np.array(losses), np.array(norms), {n: w.detach() for n, w in weights.items()}


# -----------------------------------------------------------------------------------------------------------

def random_branches(rng, blocks):
    """Blocks of one to three branches with unequal neurons and unequal loads of three kinds."""
    return {f"{b}.{i}": (b, int(rng.integers(1, 40)), *rng.uniform(0.5, 5, 3)) for b in range(blocks)
            for i in range(rng.integers(1, 4))}


@pytest.mark.parametrize("level", ["block", "neuron"])
def test_masks_have_exactly_k_holders_few_sets_and_one_component(level):
    rng = np.random.default_rng(0)
    for trial in range(6):
        subnets = int(rng.integers(1, 12))
        held, blocks = int(rng.integers(1, subnets + 1)), int(rng.integers(1, 15))
        branches = random_branches(rng, blocks)
        make = sdp.block_masks if level == "block" else sdp.neuron_masks
        masks = make(branches, subnets, held, seed=trial)
        assert list(masks) == list(branches)
        for name, mask in masks.items():
            assert mask.shape == (branches[name][1], subnets) and mask.dtype == torch.bool
            assert (mask.sum(1) == held).all()
            if level == "block":
                same = [m for branch, m in masks.items() if branches[branch][0] == branches[name][0]]
                assert all((m == mask[0]).all() for m in same)
            else:                                           # holder sets get equal parts of every branch
                sizes = mask.unique(dim=0, return_counts=True)[1]
                assert sizes.max() - sizes.min() <= 1
        rows = {tuple(row.tolist()) for mask in masks.values() for row in mask}
        assert len(rows) <= subnets
        items = blocks if level == "block" else sum(b[1] for b in branches.values())
        parts = components([set(np.flatnonzero(row)) for row in rows], subnets)
        assert parts == 1 or items * (held - 1) < subnets - 1, (trial, subnets, held, items)
        if trial == 0:                                      # no clock, no state: the same on every rank
            again = make(branches, subnets, held, seed=trial)
            assert all(torch.equal(masks[b], again[b]) for b in masks)


def components(sets, subnets):
    """Union-find, to be independent of the eigenvalues in sdp.py."""
    parent = list(range(subnets))

    def root(i):
        return i if parent[i] == i else root(parent[i])
    for s in sets:
        first, *others = s
        for i in others:
            parent[root(i)] = root(first)
    return len({root(i) for i in range(subnets)})


def test_spectral_gap_of_known_masks():
    def translates(base):
        return np.array([[(j - i) % 8 in base for j in range(8)] for i in range(8)])
    assert sdp.spectral_gap(translates({0, 1, 2}), np.ones(8)) == (pytest.approx(0.352, abs=5e-4), 1)
    assert sdp.spectral_gap(translates({0, 1, 3}), np.ones(8)) == (pytest.approx(0.667, abs=5e-4), 1)
    assert sdp.spectral_gap(translates({0, 4}), np.ones(8)) == (0, 4)
    # The walk's transition matrix, written as the random walk it is
    rng = np.random.default_rng(1)
    rows, weight = rng.random((9, 5)) < 0.6, rng.integers(1, 9, 9)
    rows[:, 0] = True
    walk = (rows * weight[:, None] / (rows * weight[:, None]).sum(0)).T @ (rows / rows.sum(1, keepdims=True))
    assert sdp.spectral_gap(rows, weight)[0] == pytest.approx(1 - sorted(np.linalg.eigvals(walk).real)[-2])
    # Our search finds the best gap known for this case
    branches = {str(b): (b, 1, 1.0) for b in range(8)}
    assert sdp.spectral_gap(*sdp.rows_of(sdp.block_masks(branches, 8, 3)))[0] > 0.66


# -----------------------------------------------------------------------------------------------------------
# Exactness, over real processes
# -----------------------------------------------------------------------------------------------------------

def _worked_example():
    mine = [[1, 1, 1, 0], [0, 1, 1, 1]][dist.get_rank()]
    grad = torch.tensor([[2.0, 4, 1, 0], [0, 6, 3, 8]])[dist.get_rank()]
    return sdp.naive_masked_average(grad, torch.tensor(mine, dtype=torch.bool)).tolist()


def test_worked_example_at_the_top_of_sdp():
    assert run_on(2, _worked_example) == [[2, 5, 2, 8]] * 2


ALL = [(level, masking) for level in ("block", "neuron") for masking in ("forward", "backward")]
EQUAL, CROSSED = [ALL[0], ALL[3]], [ALL[1], ALL[2]]         # two that differ in both
CASES = [  # subnets, held, workers, accumulation steps: each case meets both levels and both maskings
    *[(TINY, (4, 3, 4, 1), *both) for both in ALL],
    *[(TINY, case, *both) for case in [(2, 1, 4, 2), (1, 1, 1, 1), (8, 5, 8, 1)] for both in EQUAL],
    *[(TINY, case, *both) for case in [(3, 2, 3, 2), (3, 1, 6, 1), (4, 1, 4, 1), (2, 2, 2, 1)]
      for both in CROSSED],
    *[(TINY_RESNET, (3, 2, 3, 2), *both) for both in ALL],
    *[(TINY_RESNET, case, *both) for case in [(2, 1, 4, 1), (1, 1, 1, 1)] for both in EQUAL],
    *[(TINY_RESNET, case, *both) for case in [(4, 1, 4, 1)] for both in CROSSED],
]


def name_of(value):
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    return value if isinstance(value, str) else family(value)[1].__name__


@pytest.mark.parametrize("config,case,level,masking", CASES, ids=name_of)
def test_distributed_equals_simulated_equals_dense_masked_model(config, case, level, masking):
    subnets, held, workers, accum = case
    masks, backward = masks_for(config, subnets, held, level), masking == "backward"
    distributed = functools.partial(train_steps, accum=accum, bucket_bytes=10000)
    ranks = run_on(workers, distributed, config, masks, backward)
    losses = np.concatenate([r[0] for r in ranks], axis=1)
    norms, weights = ranks[0][1:3]
    simulated = train_steps(config, masks, backward, workers, accum=accum)
    dense = dense_masked_model(config, masks, workers, backward, accum=accum)
    assert dense[1].min() > CLIP                            # clipping was at work in every step
    atol = 1e-4 if config is TINY else 1e-8                 # Adam makes much of rounding in small gradients
    for other in (simulated, dense):
        np.testing.assert_allclose(losses, other[0], rtol=5e-6)
        np.testing.assert_allclose(norms, other[1], rtol=5e-6)
        for name, w in other[2].items():
            torch.testing.assert_close(weights[name], w, rtol=0, atol=atol, msg=name)
    for rank in ranks:                                      # the same norms and full model, bit for bit
        assert (rank[1] == norms).all() and all(torch.equal(w, weights[name]) for name, w in rank[2].items())
    start = first_value(config)
    assert max((w - start(name)).abs().max() for name, w in weights.items()) > 0.01  # it did train


def _ddp_losses(config):
    """torch's DistributedDataParallel, another library's model, the same batches; bytes from its buckets."""
    model, value, sent = dense_model(config), first_value(config), [0]
    model.to(value(next(iter(family(config)[0].layout(config)))).dtype)
    model.net.load_state_dict({name: value(name) for name in model.net.state_dict()})
    ddp = nn.parallel.DistributedDataParallel(model)

    def hook(_, bucket):
        sent[0] += bucket.buffer().nbytes * 2 * (dist.get_world_size() - 1) / dist.get_world_size()
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
        return work.then(lambda f: f.value()[0])
    ddp.register_comm_hook(None, hook)
    optimizer, losses = optimizer_for(config, model.parameters()), []
    for step in range(STEPS):
        x, y = batch_for(config)(step, dist.get_rank())
        loss = nn.functional.cross_entropy(ddp(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, sent[0] / STEPS


@pytest.mark.parametrize("config", [TINY, TINY_RESNET], ids=name_of)
def test_coverage_1_is_torch_ddp_with_the_same_bytes(config):
    ddp = run_on(4, _ddp_losses, config)
    wanted = np.array([r[0] for r in ddp]).T
    for level, masking in EQUAL:
        ours = run_on(4, train_steps, config, masks_for(config, 4, 4, level), masking == "backward")
        np.testing.assert_allclose(np.concatenate([r[0] for r in ours], axis=1), wanted, rtol=1e-5)
        assert [r[3] for r in ours] == [pytest.approx(r[1], rel=1e-12) for r in ddp]


@pytest.mark.parametrize("config", [TINY, TINY_RESNET], ids=name_of)
def test_backward_masking_on_one_batch_is_unmasked_training_whatever_the_masks(config):
    same = functools.partial(_same_batch, config)
    whole = dense_masked_model(config, masks_for(config, 1, 1, "block"), 1, False, batches=same)
    for subnets, held, level in (4, 3, "block"), (4, 1, "neuron"), (3, 2, "neuron"):
        masks = masks_for(config, subnets, held, level)
        for rank in run_on(subnets, functools.partial(train_steps, batches=same), config, masks, True):
            np.testing.assert_allclose(rank[0], whole[0], rtol=5e-6)
            np.testing.assert_allclose(rank[1], whole[1], rtol=5e-6)  # the full gradient's, before clipping


def _same_batch(config, step, worker):
    return batch_for(config)(step, 0)


def odd_masks(config=TINY):
    """A user's own: unequal holders, more sets than subnets, a worker with nothing of a branch, or of all."""
    rng = np.random.default_rng(5)
    masks = {name: torch.from_numpy(rng.random((neurons, 4)) < 0.5)
             for name, (_, neurons, *_) in family(config)[0].branches(config).items()}
    for mask in masks.values():
        mask[:, 3] = False                                  # worker 3 holds only what is shared
        mask[~mask.any(1), 1] = True
    masks[list(masks)[2]][:] = torch.tensor([True, False, False, False])
    return masks


@pytest.mark.parametrize("config", [TINY, TINY_RESNET], ids=name_of)
@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_masks_of_the_users_own_are_exact_too(config, masking):
    masks, backward = odd_masks(config), masking == "backward"
    warnings = sdp.check_masks(masks, family(config)[0].branches(config))
    assert len(warnings) == 3                               # uneven, many groups, worker 3 apart
    ranks = run_on(4, train_steps, config, masks, backward)
    dense = dense_masked_model(config, masks, 4, backward)
    np.testing.assert_allclose(np.concatenate([r[0] for r in ranks], 1), dense[0], rtol=1e-5)
    np.testing.assert_allclose(ranks[0][1], dense[1], rtol=1e-4)

# -----------------------------------------------------------------------------------------------------------
# The stages of sdp.py: each gives the gradients of the one before
# -----------------------------------------------------------------------------------------------------------

class Plain(sdp.MaskedAllReduce):
    """The plain form, with what the functions of this file call."""

    no_sync = nullcontext                                   # gradients of micro-steps add up until finish()
    forward = sdp.SubnetDataParallel.forward
    gather = sdp.SubnetDataParallel.gather

    @property
    def workers(self):
        return [self.rank]


def _gradients(kind, masks, backward, options):
    """-> averaged gradients of two updates, assembled to full size"""
    sync = make_sync(TINY, masks, backward, kind=kind, **options)
    optimizer = torch.optim.SGD([piece.param for piece in sync.pieces], lr=0.1)
    out = []
    for step in range(2):
        backward_pass(sync, TINY, step, accum=2)
        out.append(gathered(sync, [piece.param.grad for piece in sync.pieces]))
        optimizer.step()
        optimizer.zero_grad()
        sync.refresh()
    check_replicas(sync)
    return out


def _naive_gradients(masks, backward):
    """The first update's gradients by naive_masked_average, of this worker's gradients pasted into zeros."""
    rank, layout = dist.get_rank(), llama.layout(TINY)
    module = subnetwork(TINY, masks, rank, backward)
    sdp.materialize(module, masks, layout, rank, first_value(TINY))
    for micro in range(2):
        x, y = tokens_for(micro, rank)
        (llama.loss(module(x), y) / 2).backward()
    mine = {slot.name: (slot, module.get_parameter(local).grad)
            for local, slot in sdp.find_slots(module, masks, layout, rank).items() if slot.trains}
    out = {}
    for name, (branch, dim, shape) in layout.items():
        grad = torch.zeros(shape).movedim(dim or 0, 0)
        held = torch.ones(len(grad), dtype=torch.bool)
        if dim is not None:
            held = masks[branch][:, rank].repeat_interleave(shape[dim] // len(masks[branch]))
        elif branch is not None:
            held = held * masks[branch][:, rank].any()
        if name in mine:
            slot, part = mine[name]
            rows = slice(None) if slot.rows is None else slot.rows
            grad[rows] = part.movedim(dim or 0, 0)
        out[name] = sdp.naive_masked_average(grad, held).movedim(0, dim or 0)
    return out


@pytest.mark.parametrize("level,masking", [*EQUAL, ("odd", "forward"), ("odd", "backward")])
def test_each_stage_has_the_gradients_of_the_one_before(level, masking):
    masks = odd_masks() if level == "odd" else masks_for(TINY, 4, 3, level)
    backward = masking == "backward"
    simulation = make_sync(TINY, masks, backward, simulated=4)
    backward_pass(simulation, TINY, 0, accum=2)
    simulated = gathered(simulation, [piece.param.grad for piece in simulation.pieces])
    naive = run_on(4, _naive_gradients, masks, backward)[0]
    plain = run_on(4, _gradients, Plain, masks, backward, {})[0]
    overlapped = [run_on(4, _gradients, sdp.SubnetDataParallel, masks, backward, {"bucket_bytes": nbytes})[0]
                  for nbytes in (2000, 2**24)]
    for name in simulated:
        torch.testing.assert_close(naive[name], simulated[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(plain[0][name], simulated[name], rtol=0, atol=1e-6)
        for grads in overlapped:
            for step in range(2):
                torch.testing.assert_close(grads[step][name], plain[step][name], rtol=0, atol=1e-6)


def test_bf16_messages_have_half_the_bytes_and_replicas_stay_identical():
    for level, backward in ("block", False), ("neuron", True):
        masks = masks_for(TINY, 4, 3, level)
        wide, narrow = (run_on(4, _gradients, sdp.SubnetDataParallel, masks, backward, options)[0]
                        for options in ({}, {"reduce_dtype": torch.bfloat16}))  # it checks the replicas' bits
        with alone(world=4):
            sent, narrow_sent = (make_sync(TINY, masks, backward, reduce_dtype=dtype).sent_bytes
                                 for dtype in (None, torch.bfloat16))
        if not backward:
            assert narrow_sent == sent / 2
        assert sent / 2 <= narrow_sent < sent
        for name, grad in wide[0].items():
            error = (narrow[0][name] - grad).abs().max()
            assert 0 < error <= 2**-6 * grad.abs().max()


@pytest.mark.parametrize("level", ["block", "neuron"])
def test_the_scaling_rule_is_exact_and_its_mean_is_the_full_branch(level):
    for n_subnets, held in (4, 3), (3, 1), (8, 5):
        masks = masks_for(TINY, n_subnets, held, level)
        scales = [sdp.branch_scales(masks, s) for s in range(n_subnets)]
        for branch, mask in masks.items():                  # each neuron counts S times over all subnetworks
            total = sum(mask[:, s] * scales[s][branch] for s in range(n_subnets))
            torch.testing.assert_close(total, torch.full_like(total, n_subnets))
    masks = masks_for(TINY, 4, 3, level)
    ranks = run_on(4, functools.partial(train_steps, scaled=True), TINY, masks, False)
    simulated = train_steps(TINY, masks, False, 4, scaled=True)
    dense = dense_masked_model(TINY, masks, 4, False, scale=4 / 3)
    plain = backward_pass(make_sync(TINY, masks, False, simulated=4), TINY, 0)
    losses = np.concatenate([r[0] for r in ranks], axis=1)
    np.testing.assert_allclose(losses, simulated[0], rtol=1e-5)
    np.testing.assert_allclose(losses, dense[0], rtol=1e-5)
    assert np.abs(losses[0] - plain).max() > 1e-4           # and it does change something


def _any_optimizer(masks, make, dtype):
    layout, rank = llama.layout(TINY), dist.get_rank()
    module = subnetwork(TINY, masks, rank, True)
    value = first_value(TINY)
    sdp.materialize(module, masks, layout, rank, lambda name: value(name).to(dtype))
    sync = sdp.SubnetDataParallel(module, masks, layout, True)
    optimizer = make([piece.param for piece in sync.pieces])
    for step in range(3):
        backward_pass(sync, TINY, step)
        sync.clip_grad_norm(0.5)
        optimizer.step()
        optimizer.zero_grad()
        sync.refresh()
    check_replicas(sync)
    return True


def test_replicas_stay_identical_under_any_optimizer():
    """Even under those whose kernels round by position, or look at a whole tensor: all step on pieces."""
    adam = functools.partial(torch.optim.AdamW, lr=1e-2, fused=True)
    adafactor = functools.partial(torch.optim.Adafactor, lr=1e-2)
    rmsprop = functools.partial(torch.optim.RMSprop, lr=1e-3)
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    masks = masks_for(TINY, 4, 3, "neuron")
    for make in adam, adafactor, rmsprop, sgd:
        assert all(run_on(4, _any_optimizer, masks, make, torch.float32))
    for make in sgd, rmsprop:
        assert all(run_on(4, _any_optimizer, masks, make, torch.bfloat16))


# -----------------------------------------------------------------------------------------------------------
# Right, or refused with one clear message
# -----------------------------------------------------------------------------------------------------------

@contextmanager
def alone(rank=0, world=2):
    """This process is one of `world` workers; torch's fake process group takes messages and brings none."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    real = dist.all_to_all_single

    def all_to_all(new, message, get_sizes, send_sizes, **options):
        if len(message) or not len(new):                    # the fake group refuses to send nothing
            return real(new, message, get_sizes, send_sizes, **options)
        return real(new, torch.zeros_like(new), get_sizes, get_sizes, **options)
    dist.all_to_all_single = all_to_all
    try:
        yield
    finally:
        dist.all_to_all_single = real
        dist.destroy_process_group()


def _messages_of_a_refresh_before_and_after_the_forward_pass(masks):
    sync, (x, y) = make_sync(TINY, masks, True), tokens_for(0, 0)
    llama.loss(sync.forward(0, x), y).backward()
    sync.finish()
    messages, real = [], dist.all_to_all_single

    def all_to_all(*args, **options):
        messages.extend(weakref.ref(tensor) for tensor in args[:2])
        return real(*args, **options)

    def alive():
        return sum(ref() is not None for ref in messages)
    dist.all_to_all_single = all_to_all
    sync.refresh()
    dist.all_to_all_single = real
    before = alive()
    sync.forward(0, x)
    end = time.monotonic() + 5
    while alive() and time.monotonic() < end:               # gloo's own thread lets go a little later
        time.sleep(0.01)
    return before, alive()


def test_after_the_forward_pass_nothing_of_a_refresh_is_in_memory():
    masks = masks_for(TINY, 4, 3, "block")                  # of 3 blocks: one worker holds them all
    assert any(all(sdp.held_counts(masks, s).values()) for s in range(4))
    counts = run_on(4, _messages_of_a_refresh_before_and_after_the_forward_pass, masks)
    assert sum(before for before, _ in counts) > 0 and all(after == 0 for _, after in counts), counts


# -----------------------------------------------------------------------------------------------------------
# Real savings
# -----------------------------------------------------------------------------------------------------------

BIG = llama.LlamaConfig(vocab_size=50, hidden_size=80, intermediate_size=112, num_hidden_layers=4,
                        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=32)
BIG_RESNET = resnet.ResNetConfig(num_classes=5, widths=(12, 20, 28, 36))


class SizesCreated(TorchDispatchMode):
    """Records the element count of every tensor an operation returns."""
    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.shapes.add(tuple(t.shape))
        return out


def saved_bytes(module, loss_of, x, y):
    """Bytes of the distinct storages autograd saves for the backward pass, weights left out."""
    weights, saved = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(module(x), y)
    kept = sum(n for n, _ in saved.values())
    loss.backward()
    return kept


def _sizes(config, masks, backward):
    sync, loss_of = make_sync(config, masks, backward), family(config)[0].loss
    optimizer = torch.optim.AdamW([piece.param for piece in sync.pieces], lr=1e-3)
    x, y = batch_for(config)(0, 0, config)
    with SizesCreated() as created:
        loss_of(sync.forward(0, x), y).backward()
        sync.finish()
        sync.clip_grad_norm(1.0)
        optimizer.step()
        sync.refresh()
    params = sum(p.numel() for p in sync.params.values())
    grads = sum(piece.param.grad.numel() for piece in sync.pieces)
    assert all(p.grad is None for p in sync.params.values())
    state = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())
    optimizer.zero_grad()
    return params, grads, state, created.shapes, saved_bytes(sync.module, loss_of, x, y)


@pytest.mark.parametrize("config", [BIG, BIG_RESNET], ids=name_of)
@pytest.mark.parametrize("level", ["block", "neuron"])
def test_a_worker_has_its_subnetwork_s_size(config, level):
    kind, Model = family(config)
    masks, layout, branches = masks_for(config, 4, 3, level), kind.layout(config), kind.branches(config)
    full = sum(shape.numel() for _, _, shape in layout.values())
    x, y = batch_for(config)(0, 0, config)

    def saved_by(held):
        model = Model(config, held).to(first_value(config)(next(iter(layout))).dtype)
        for p in model.parameters():
            nn.init.ones_(p)
        return saved_bytes(model, kind.loss, x, y)
    all_saved = saved_by({name: neurons for name, (_, neurons, *_) in branches.items()})

    def held(s):                                            # by the masks alone
        total = 0
        for branch, dim, shape in layout.values():
            part = torch.ones(())
            if branch is not None:
                part = masks[branch][:, s].float().mean() if dim is not None else masks[branch][:, s].any()
            total += round(shape.numel() * float(part))
        return total

    whole_branches = {tuple(shape) for _, dim, shape in layout.values() if dim is not None and len(shape) > 1}
    for s, (params, grads, state, created, saved) in enumerate(run_on(4, _sizes, config, masks, False)):
        assert params == grads == held(s) and state == 2 * held(s)
        if level == "neuron":                               # nothing of a full branch parameter's size, ever
            assert not created & whole_branches
        assert saved == saved_by(sdp.held_counts(masks, s)) < all_saved  # the residual stream stays whole
    for s, (params, grads, state, created, saved) in enumerate(run_on(4, _sizes, config, masks, True)):
        assert params == full and grads == held(s) and state == 2 * held(s)
        if kind is llama:                                   # no input is saved for frozen weights
            frozen = sum(int((~masks[f"model.layers.{i}.mlp"][:, s]).sum()) for i in range(4))
            assert saved <= all_saved - frozen * x.numel() * 4
        else:                                               # nor for frozen convolutions: conv2's
            sides = {path: 16 // 2 ** (int(path[5]) - 1) for path in masks}  # of layer1.0 and so on
            frozen = sum(int((~masks[name][:, s]).sum()) * side ** 2 for name, side in sides.items())
            sums = 8 * 2 * 2 * sum(neurons for _, neurons, *_ in branches.values())  # of held + rest
            assert saved <= all_saved - frozen * len(x) * 8 + sums

# -----------------------------------------------------------------------------------------------------------
# Synchronisation: order, bytes, overlap, kernels
# -----------------------------------------------------------------------------------------------------------

def replay(masks, backward, rank, workers, bucket_bytes, monkeypatch, config=TINY, updates=1):
    """Updates of one rank on the fake process group: accumulation, clipping, evaluation, a skipped update.

    -> its collectives [(ranks, kind, numbers)], its sync, the number of groups.  Of an all-to-all the numbers
    say how much is sent to whom and comes from whom.
    """
    calls, everyone, groups = [], tuple(range(workers)), [dist.group.WORLD]

    def ranks(group):
        return everyone if group in (None, dist.group.WORLD) else tuple(dist.get_process_group_ranks(group))

    def all_reduce(t, op=dist.ReduceOp.SUM, group=None, async_op=False):
        calls.append((ranks(group), "reduce", t.numel()))
        return real_reduce(t, op, group, async_op)

    def all_to_all(new, message, get_sizes, send_sizes, async_op=False):
        assert sum(get_sizes) == len(new) and sum(send_sizes) == len(message)
        calls.append((everyone, "exchange", (tuple(send_sizes), tuple(get_sizes))))
        return real_exchange(new, message, get_sizes, send_sizes, async_op=async_op)

    def new_group(*args, **options):
        groups.append(args)
        return real_group(*args, **options)
    with alone(rank, workers), monkeypatch.context() as m:
        real_reduce, real_exchange, real_group = dist.all_reduce, dist.all_to_all_single, dist.new_group
        m.setattr(dist, "new_group", new_group)
        sync = make_sync(config, masks, backward, bucket_bytes=bucket_bytes)
        m.setattr(dist, "all_reduce", all_reduce)
        m.setattr(dist, "all_to_all_single", all_to_all)
        for update in range(updates):
            backward_pass(sync, config, update, accum=2 if updates > 1 else 1)
            if updates > 1:
                sync.clip_grad_norm(1.0, 0.5)
                with torch.device("meta"):
                    full = llama.Llama(config)
                list(sdp.stream(sync, full, [tokens_for(0, rank, config)[0]]))
            if update != 1:                                 # as a skipped update: nothing is stepped on
                for piece in sync.pieces:
                    piece.param.grad = None
            sync.refresh()
        return calls, sync, len(groups)


@pytest.mark.parametrize("subnets,held,workers,level,masking", [
    (4, 3, 4, "neuron", "forward"), (8, 5, 16, "block", "forward"), (0, 0, 4, "odd", "forward"),
    (4, 3, 4, "neuron", "backward"), (8, 5, 16, "block", "backward"), (5, 2, 15, "neuron", "backward"),
    (8, 6, 64, "neuron", "backward"), (0, 0, 4, "odd", "backward")])
def test_every_pair_of_ranks_agrees_on_two_updates_of_collectives(
        subnets, held, workers, level, masking, monkeypatch):
    masks = masks_for(TINY, subnets, held, level) if subnets else odd_masks()
    runs = [replay(masks, masking == "backward", rank, workers, 3000, monkeypatch, updates=2)[0]
            for rank in range(workers)]
    for a in range(workers):
        assert all(a in who for who, _, _ in runs[a])       # nobody calls a collective of others
        for b in range(a):
            mine, its = ([call for call in runs[r] if a in call[0] and b in call[0]] for r in (a, b))
            assert [call[:2] for call in mine] == [call[:2] for call in its], (a, b)
            for (_, kind, x), (_, _, y) in zip(mine, its):
                if kind == "reduce":
                    assert x == y
                else:                                       # what one sends, the other expects
                    assert x[0][b] == y[1][a] and y[0][a] == x[1][b]


@pytest.mark.parametrize("masking", ["forward", "backward"])
@pytest.mark.parametrize("subnets,held,workers,level", [
    (4, 3, 4, "neuron"), (8, 5, 16, "block"), (8, 3, 16, "neuron"), (0, 0, 4, "odd")])
def test_bytes_are_optimal_and_stay_in_the_family(subnets, held, workers, level, masking, monkeypatch):
    masks = masks_for(TINY, subnets, held, level) if subnets else odd_masks()
    subnets, backward = sdp.count_subnets(masks), masking == "backward"
    ddp = 4 * 2 * (workers - 1) / workers * sum(shape.numel() for _, _, shape in llama.layout(TINY).values())
    total = 0
    for rank in range(workers):
        calls, sync, groups = replay(masks, backward, rank, workers, 3000, monkeypatch)
        issued = sum(4 * n * 2 * (len(who) - 1) / len(who) for who, kind, n in calls if kind == "reduce")
        for who, kind, sizes in calls:
            if kind == "exchange":
                issued += 4 * sum(sizes[0])
                outside = [r for r in who if r // subnets != rank // subnets]
                assert not any(sizes[0][r] + sizes[1][r] for r in outside) and not sizes[0][rank]
        assert sync.sent_bytes == pytest.approx(issued, rel=1e-12)
        assert level == "odd" or groups <= subnets + 1 + 2 * TINY.num_hidden_layers
        assert level == "odd" or sync.sent_bytes <= ddp     # no worker sends more
        total += issued
    wanted = 0                                              # from the masks: the optimum derived in sdp.py
    for branch, dim, shape in llama.layout(TINY).values():
        size = 4 * shape.numel()
        rows = torch.ones(1, subnets, dtype=torch.bool)
        if branch is not None:
            rows = masks[branch] if dim is not None else masks[branch].any(0)[None]
        for row in rows:
            h = int(row.sum()) * workers // subnets
            wanted += size / len(rows) * (2 * (h - 1) + backward * (workers - h))
    assert total == pytest.approx(wanted, rel=1e-9)


def test_1024_workers_need_no_more_groups_than_8(monkeypatch):
    masks = masks_for(TINY, 8, 6, "block")
    groups = replay(masks, True, 1000, 1024, 2**24, monkeypatch)[2]
    assert groups == replay(masks, True, 0, 8, 2**24, monkeypatch)[2] <= 9


@pytest.mark.parametrize("level", ["block", "neuron"])
def test_buckets_are_full_and_few(level, monkeypatch):
    config = replace(TINY, num_hidden_layers=40)
    masks, layout = masks_for(config, 4, 3, level), llama.layout(config)
    largest = 4 * max(shape.numel() for branch, _, shape in layout.values() if branch)
    full = 16 * largest
    _, sync, _ = replay(masks, False, 0, 4, full, monkeypatch, config)
    sizes = {}
    for bucket in sync.buckets:
        nbytes = 4 * sum(piece.numel for piece in bucket.pieces)
        sizes.setdefault(bucket.holders, []).append(nbytes)
    assert max(max(s) for s in sizes.values()) >= full
    for holders, s in sizes.items():
        if len(holders) < 4:
            assert max(s) < full + largest
            assert len(s) <= sum(s) / full + 2


def test_messages_leave_while_backward_still_runs_and_gradients_live_in_them(monkeypatch):
    masks, taken, complete = masks_for(TINY, 4, 3, "block"), [], []
    with alone(world=4):
        sync, real = make_sync(TINY, masks, False, bucket_bytes=3000), dist.all_reduce

        def all_reduce(*args, **options):
            complete.append(len(taken))
            return real(*args, **options)
        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        for p in sync.params.values():
            p.register_hook(taken.append)                   # called when its gradient is complete
        x, y = tokens_for(0, 0)
        llama.loss(sync.forward(0, x), y).backward()
        assert complete == sorted(complete) and complete[0] < len(sync.params) / 2
        count = len(complete)
        assert count == len(sync.buckets)
        assert all(p.grad is None for p in [*sync.params.values(), *(piece.param for piece in sync.pieces)])
        sync.finish()
        assert len(complete) == count                       # every bucket left during backward
        grads = [piece.param.grad for piece in sync.pieces]       # and the gradients lie in the messages
        assert len({g.untyped_storage().data_ptr() for g in grads}) == count
        with sync.no_sync():
            llama.loss(sync.forward(0, x), y).backward()
        assert len(complete) == count


# -----------------------------------------------------------------------------------------------------------
# Initialisation, the full model, checkpoints
# -----------------------------------------------------------------------------------------------------------

def _start(masks, backward):
    sync = make_sync(TINY, masks, backward)
    full = gathered(sync)
    with torch.device("meta"):
        model = llama.Llama(TINY)
    inputs = [tokens_for(s, 0)[0] for s in range(3)] if dist.get_rank() == 0 else [tokens_for(9, 9)[0]]
    return full, list(sdp.stream(sync, model, inputs))


@pytest.mark.parametrize("level,masking", EQUAL)
def test_the_full_model_starts_the_same_everywhere_and_streams_as_an_ordinary_one(level, masking):
    value = first_value(TINY)
    model = llama.Llama(TINY)
    model.load_state_dict({name: value(name) for name in llama.layout(TINY)})
    for subnets, held, workers in (1, 1, 1), (2, 1, 4), (3, 2, 3), (4, 4, 4):
        ranks = run_on(workers, _start, masks_for(TINY, subnets, held, level), masking == "backward")
        for full, _ in ranks:
            assert full.keys() == set(llama.layout(TINY))
            assert all(torch.equal(t, value(name)) for name, t in full.items())
        for step, logits in enumerate(ranks[0][1]):
            torch.testing.assert_close(logits, model(tokens_for(step, 0)[0]))


def test_init_is_a_function_of_seed_and_name():
    a, b, c = first_value(TINY, 0), first_value(TINY, 0), first_value(TINY, 1)
    names = [n for n in llama.layout(TINY) if "norm" not in n]
    assert all(torch.equal(a(n), b(n)) and not torch.equal(a(n), c(n)) for n in names)
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(a(first), a(second)) and a(first).std() == pytest.approx(0.02, rel=0.2)
