"""
Tests of how sdp.py is used: masks and models of the user's own, right or refused with one clear message.

    python -m pytest -q experiments/test_use.py
"""

import copy
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model_llama as llama
import model_resnet as resnet
import sdp
from test_sdp import (
    TINY, TINY_RESNET, Plain, _gradients, alone, check_replicas, gathered, make_sync, masks_for, run_on,
    subnetwork, tokens_for,
)


def test_bad_masks_are_refused_and_odd_ones_warned_of():
    branches = llama.branches(TINY)
    good = sdp.neuron_masks(branches, 4, 3)
    assert sdp.check_masks(good, branches) == []
    name = next(iter(good))
    unheld = {**good, name: good[name].clone().fill_(False)}
    for bad, message in [(unheld[name], "no subnet holds neuron 0"), (good[name][:-1], "wanted"),
                         (good[name].float(), "wanted bool"), (good[name][:, :3], "wanted")]:
        with pytest.raises(ValueError, match=message):
            sdp.check_masks({**good, name: bad}, branches)
    last = list(good)[-1]
    with pytest.raises(ValueError, match="all of 4 subnets"):  # where check_masks was not called, too
        sdp.holder_sets({**good, last: good[last][:, :3]})
    with pytest.raises(ValueError, match="not of this model"):
        sdp.check_masks({b: m for b, m in good.items() if b != name}, branches)
    uneven = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert any("from 1 to 4 holders" in w for w in sdp.check_masks({**good, name: uneven}, branches))
    assert any("process groups" in w for w in sdp.check_masks({**good, name: uneven}, branches))
    assert any("separate groups" in w for w in sdp.check_masks(sdp.neuron_masks(branches, 4, 1), branches))
    with pytest.raises(ValueError, match="no subnet holds neuron 0"):  # wherever masks come in
        make_sync(TINY, unheld, True, simulated=4)
    for held in (0, 5):
        with pytest.raises(ValueError, match="held must be"):
            sdp.block_masks(branches, 4, held)


@pytest.mark.parametrize("level", ["block", "neuron"])
def test_the_loss_in_chunks_is_the_loss_in_one(monkeypatch, level):
    """Chunks are computed twice, and the simulation has put other weights back by then."""
    def update():
        sync = make_sync(TINY, masks_for(TINY, 2, 1, level), False, simulated=2)
        losses = []
        for worker in sync.workers:
            loss = sync.forward(worker, *tokens_for(0, worker))          # 18 tokens
            loss.backward()
            losses.append(loss.item())
        sync.finish()
        return losses, gathered(sync, [piece.param.grad for piece in sync.pieces])

    losses, gradients = update()
    monkeypatch.setattr(llama, "MAX_LOGITS", 4 * TINY.vocab_size)    # four tokens at a time
    calls = []
    summed_loss = llama.summed_loss

    def counted(*args):
        calls.append(args)
        return summed_loss(*args)
    monkeypatch.setattr(llama, "summed_loss", counted)
    same_losses, same_gradients = update()
    assert len(calls) == 2 * 2 * 5                                   # workers, forward and again, chunks
    assert same_losses == pytest.approx(losses, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, rtol=0, atol=1e-6)


def test_picture_shows_the_masks():
    branches = {"a": (0, 2, 1.0), "b": (1, 2, 1.0)}
    whole = torch.tensor([[True, False], [True, False]])
    assert sdp.picture({"a": whole, "b": ~whole}, branches) == "  block 0  ██ ··\n  block 1  ·· ██"
    assert sdp.picture({"a": whole, "b": torch.eye(2).bool()}, branches).splitlines()[1] == "  b        █· ·█"


class Branch(nn.Module):
    def __init__(self, n, bias=False):
        super().__init__()
        self.up = nn.Linear(4, n, bias=False)
        self.down = nn.Linear(n, 4, bias=bias)


class Net(nn.Module):
    """x + inside(x), between an embedding and a head that may be tied."""
    def __init__(self, n, tied=False, bias=False, rest=0):
        super().__init__()
        self.embed = nn.Linear(4, 4, bias=False)
        self.inside = Branch(n)
        if rest:
            self.inside.rest = Branch(rest, bias)
        self.head = nn.Linear(4, 4, bias=False)
        self.scale = nn.Parameter(torch.ones(()))           # a parameter without dimensions
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.inside.down(self.inside.up(x))) * self.scale


NET = {
    "embed.weight": (None, None, torch.Size([4, 4])),
    "inside.up.weight": ("inside", 0, torch.Size([6, 4])),
    "inside.down.weight": ("inside", 1, torch.Size([4, 6])),
    "head.weight": (None, None, torch.Size([4, 4])),
    "scale": (None, None, torch.Size([])),
}
NET_MASKS = {"inside": torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1], [0, 1], [1, 1]], dtype=torch.bool)}


def net_value(name):
    return torch.ones(NET[name][2])


def wrapped(module, masks=NET_MASKS, layout=NET, **options):
    sdp.materialize(module, masks, layout, 0, net_value)
    return sdp.SubnetDataParallel(module, masks, layout, **options)


def without(name):
    return {key: entry for key, entry in NET.items() if key != name}


WITH_BIAS = {**NET, "inside.down.bias": ("inside", None, torch.Size([4]))}
NORM = {"0.weight": (None, None, torch.Size([4])), "0.bias": (None, None, torch.Size([4]))}


@pytest.mark.parametrize("make,layout,message", [
    (lambda: Net(3), without("head.weight"), "head.weight is not in the layout"),
    (lambda: Net(4), NET, r"inside.up.weight has shape \[4, 4\], but by the masks \[3, 4\]"),
    (lambda: Net(3, tied=True), NET, "holds head.weight, but the module does not have it"),
    (lambda: Net(3, rest=3, bias=True), WITH_BIAS, "would add it again"),
    (lambda: nn.Sequential(nn.BatchNorm1d(4)), NORM, "buffer .* nobody averages"),
])
def test_a_model_that_would_be_trained_wrongly_is_refused(make, layout, message):
    with alone(), pytest.raises(ValueError, match=message):
        sdp.MaskedAllReduce(make(), NET_MASKS, layout)


def test_tied_parameters_work_if_they_are_shared_and_are_refused_in_a_branch():
    with alone():
        net = Net(3, tied=True)
        sync = wrapped(net, layout=without("head.weight"))
        assert net.head.weight is net.embed.weight and net.embed.weight is sync.params["embed.weight"]
        net(torch.ones(2, 4)).sum().backward()
        assert net.embed.weight.grad is None                # it left with its bucket, once
        sync.finish()
        assert len([piece for piece in sync.pieces if piece.name == "embed.weight"]) == 1
        albert = nn.Module()
        albert.a, albert.b = Branch(3), Branch(3)
        albert.b.up.weight = albert.a.up.weight
        layout = {
            "a.up.weight": ("a", 0, torch.Size([6, 4])),
            "a.down.weight": ("a", 1, torch.Size([4, 6])),
            "b.down.weight": ("b", 1, torch.Size([4, 6])),
        }
        with pytest.raises(ValueError, match="tied in a branch"):
            sdp.find_slots(albert, {"a": NET_MASKS["inside"], "b": NET_MASKS["inside"]}, layout, 0)


def test_wrong_use_is_refused():
    x = torch.ones(2, 4)
    with alone():
        sync = wrapped(Net(3))
        with pytest.raises(ValueError, match="wrapped already"):
            sdp.SubnetDataParallel(sync.module, NET_MASKS, NET)
        with pytest.raises(RuntimeError, match="call finish"):
            sync.clip_grad_norm(1.0)
        sync.module(x).sum().backward()
        sync.finish()
        sync.refresh()                                      # the norm of this update was not asked for
        with pytest.raises(RuntimeError, match="call finish"):
            sync.clip_grad_norm(1.0)
        with sync.no_sync():
            with sync.no_sync():
                pass
            sync.module(x).sum().backward()                 # inside of the outer one still
        sync.module(x).sum().backward()
        with pytest.raises(RuntimeError, match="put all but the last under no_sync"):
            sync.module(x).sum().backward()
        sync.reset()
        sync.module.head.weight.requires_grad_(False)
        sync.module(x).sum().backward()
        with pytest.raises(RuntimeError, match="head.weight was frozen after it was wrapped"):
            sync.finish()
        with sync.no_sync(), pytest.raises(RuntimeError, match="inside no_sync"):
            sync.finish()
        sync = wrapped(Net(3))
        sync.module.load_state_dict(dict(Net(3).state_dict()), assign=True)
        sync.module(x).sum().backward()
        with pytest.raises(RuntimeError, match="was replaced after it was wrapped"):
            sync.finish()
        with pytest.raises(ValueError, match="backward masking: the module lacks the neurons"):
            wrapped(Net(3), backward=True)
        with pytest.raises(ValueError, match="forward masking: the module has neurons"):
            wrapped(Net(3, rest=3))
        sync = wrapped(Net(3, rest=3), backward=True)
        sync.module(x).sum().backward()
        sync.finish()
        sync.module(x).sum().backward()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="needs refresh"):
                sync.finish()
        net = nn.Module()
        net.inside = Branch(6)
        inside = {name: place for name, place in NET.items() if "inside" in name}
        with pytest.raises(ValueError, match="a subnet holds nothing at all"):
            wrapped(net, {"inside": torch.tensor([[True, False]] * 6)}, inside)
        with pytest.raises(ValueError, match="scales nothing"):
            llama.Llama(TINY, backward=True, scales={})
        frozen = sdp.materialize(Net(3), NET_MASKS, NET, 0, net_value)
        frozen.head.weight.requires_grad_(False)
        with pytest.raises(ValueError, match="head.weight has requires_grad=False"):
            sdp.SubnetDataParallel(frozen, NET_MASKS, NET)
        with pytest.raises(ValueError, match="head.weight has requires_grad=False"):
            sdp.materialize(frozen, NET_MASKS, NET, 0, net_value)
    with alone(world=3), pytest.raises(ValueError, match="2 subnets do not divide the number of workers, 3"):
        wrapped(Net(3))
    with pytest.raises(ValueError, match="4 subnets do not divide the number of workers, 6"):
        make_sync(TINY, masks_for(TINY, 4, 3, "block"), False, simulated=6)


def _starts_that_differ(backward):
    masks, layout = masks_for(TINY, 4, 3, "neuron"), llama.layout(TINY)
    module = subnetwork(TINY, masks, dist.get_rank(), backward)
    value = sdp.fresh(layout, partial(llama.init, TINY), dist.get_rank())
    sdp.materialize(module, masks, layout, dist.get_rank(), value)
    sync = sdp.SubnetDataParallel(module, masks, layout, backward)
    check_replicas(sync)
    return gathered(sync)["model.embed_tokens.weight"], value("model.embed_tokens.weight")


def _saved_and_loaded_while_a_refresh_is_under_way():
    sync = make_sync(TINY, masks_for(TINY, 4, 3, "neuron"), True)
    old = {name: t.clone() for name, t in sync.module.state_dict().items()}
    for piece in sync.pieces:
        piece.param.data.add_(1)
    sync.refresh()
    saved = sync.module.state_dict()
    assert all(torch.equal(t, old[name] + 1) for name, t in saved.items())
    sync.refresh()
    sync.module.load_state_dict(old)
    sync.forward(dist.get_rank(), tokens_for(0, 0)[0])
    return all(torch.equal(t, old[name]) for name, t in sync.module.state_dict().items())


def test_weights_are_saved_and_loaded_after_those_under_way_have_arrived():
    assert all(run_on(4, _saved_and_loaded_while_a_refresh_is_under_way))


def test_a_wrapped_module_can_be_copied_under_forward_masking():
    with alone():
        sync = wrapped(Net(3))
        twin = copy.deepcopy(sync.module)                   # as those do who average weights over time
        for name, weight in sync.module.state_dict().items():
            assert torch.equal(twin.get_parameter(name), weight)


def _under_way_in_each_layer_and_without_some(masks):
    """Refreshes under way when each layer begins; then updates without the last layers, and without data."""
    sync, rank = make_sync(TINY, masks, True, bucket_bytes=1), dist.get_rank()
    optimizer = torch.optim.SGD([piece.param for piece in sync.pieces], lr=0.1)
    layers = sync.module.model.layers
    counts = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: counts.append(len(sync.refresher._coming)))
    for step, n in enumerate([3, 3, 1, 0, 3]):
        sync.module.model["layers"] = layers[:n]
        if n or rank:
            llama.loss(sync.forward(rank, tokens_for(step, rank)[0]), tokens_for(step, rank)[1]).backward()
        sync.finish()
        sync.clip_grad_norm(1.0)
        optimizer.step()
        optimizer.zero_grad()
        sync.refresh()
    sync.module.model["layers"] = layers
    check_replicas(sync)
    return counts[3:6]


@pytest.mark.parametrize("level", ["block", "neuron"])
def test_each_layer_waits_for_its_own_weights_and_some_may_be_left_out(level):
    for first, middle, last in run_on(4, _under_way_in_each_layer_and_without_some,
                                      masks_for(TINY, 4, 3, level)):
        assert first > middle > last == 0


@pytest.mark.parametrize("backward", [False, True])
def test_all_begin_with_the_first_holders_weights(backward):
    (_, first), *others = run_on(4, _starts_that_differ, backward)
    for embedding, its_own in others:
        assert torch.equal(embedding, first) and not torch.equal(its_own, first)


def test_whatever_the_memory_format_runs_are_in_the_memory_of_the_module():
    masks = masks_for(TINY_RESNET, 4, 3, "neuron")
    for backward in False, True:
        net = subnetwork(TINY_RESNET, masks, 0, backward)
        value = sdp.fresh(resnet.layout(TINY_RESNET), partial(resnet.init, TINY_RESNET), 0)
        sdp.materialize(net, masks, resnet.layout(TINY_RESNET), 0, value)
        net.to(memory_format=torch.channels_last)
        with alone(world=4):
            sync = sdp.SubnetDataParallel(net, masks, resnet.layout(TINY_RESNET), backward)
        for piece in sync.pieces:
            piece.param.data.fill_(7)
        trained = [p for p in net.parameters() if p.requires_grad]
        assert trained and all((p == 7).all() for p in trained)


def test_after_an_exception_in_backward_reset_starts_afresh():
    """The ranks fail at different points: one before its first message, one before its last."""
    for before, after in run_on(2, _an_update_that_fails):
        assert before.keys() == after.keys() == NET.keys()
        assert all(torch.equal(grad, after[name]) for name, grad in before.items())


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError


def fail(module, inputs, output):
    return Fails.apply(output)


def _an_update_that_fails():
    rank = dist.get_rank()
    net = sdp.materialize(Net(int(NET_MASKS["inside"][:, rank].sum())), NET_MASKS, NET, rank, net_value)
    sync = sdp.SubnetDataParallel(net, NET_MASKS, NET, bucket_bytes=1)
    x = torch.full((2, 4), 1.0 + rank)
    grads = []
    for fails in False, True:
        if fails:
            hook = [net.head, net.embed][rank].register_forward_hook(fail)
            with pytest.raises(ArithmeticError):
                net(x).sum().backward()
            hook.remove()
            sync.reset()
        net(x).sum().backward()
        sync.finish()
        grads.append(gathered(sync, [piece.param.grad for piece in sync.pieces]))
        sync.reset()
    [net.head, net.embed][rank].register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        net(x).sum().backward()
    sync.close()                                            # sends what the other rank waits for
    return grads


def test_reset_inside_no_sync_sends_what_others_wait_for(monkeypatch):
    with alone():
        sync, sent, all_reduce = wrapped(Net(3)), [], dist.all_reduce

        def counted(*args, **options):
            sent.append(args)
            return all_reduce(*args, **options)
        monkeypatch.setattr(dist, "all_reduce", counted)
        with sync.no_sync():
            sync.reset()
        assert len(sent) == len(sync.buckets)


class Sum(nn.Module):
    """x + held(x) + rest(x), without a norm.  Parts without neurons are not there."""
    def __init__(self, held, rest):
        super().__init__()
        self.rest = nn.Module()
        for part, n in (self, held), (self.rest, rest):
            part.up = nn.Linear(4, n, bias=False) if n else None
            part.down = nn.Linear(n, 4, bias=False) if n else None

    def forward(self, x):
        return x + sum(part.down(part.up(x).relu()) for part in (self, self.rest) if part.up)


def _losses_where_a_branch_is_frozen_whole(simulated):
    masks = {"0": torch.tensor([[False, True]] * 6), "1": torch.tensor([[True, False]] * 6)}
    layout = {f"{branch}.{name}.weight": (branch, dim, torch.Size(shape)) for branch in masks
              for name, dim, shape in (("up", 0, (6, 4)), ("down", 1, (4, 6)))}
    value = sdp.fresh(layout, lambda name, tensor, generator: tensor.normal_(generator=generator), 0)
    with torch.device("meta"):
        modules = [nn.Sequential(*(Sum(6, 0) if masks[branch][0, subnet] else Sum(0, 6) for branch in masks))
                   for subnet in range(2)]
    if simulated:
        sync = sdp.SimulatedDataParallel(modules, masks, layout, value)
    else:
        rank = dist.get_rank()
        sdp.materialize(modules[rank], masks, layout, rank, value)
        sync = sdp.SubnetDataParallel(modules[rank], masks, layout, backward=True)
    optimizer = torch.optim.SGD([piece.param for piece in sync.pieces], lr=0.1)
    losses = []
    for _ in range(3):
        for worker in sync.workers:
            loss = sync.forward(worker, torch.full((2, 4), 1.0 + worker)).square().mean()
            loss.backward()
            losses.append(loss.item())
        sync.finish()
        sync.clip_grad_norm(1.0)
        optimizer.step()
        optimizer.zero_grad()
        sync.refresh()
    return losses


def test_a_branch_that_is_frozen_whole_waits_for_its_weights():
    ranks = run_on(2, _losses_where_a_branch_is_frozen_whole, False)
    both = _losses_where_a_branch_is_frozen_whole(True)
    assert ranks[0] == pytest.approx(both[0::2], rel=1e-5) and ranks[1] == pytest.approx(both[1::2], rel=1e-5)


class Added(nn.Module):
    """Its parameter's gradient is a view of that of its input, which is still to flow on."""
    def __init__(self):
        super().__init__()
        self.first, self.place = nn.Linear(4, 4, bias=False), nn.Parameter(torch.zeros(3, 4))

    def forward(self, x):                                   # [1, 3, 4]
        return self.first(x) + self.place[None]


def _gradient_below_a_view(kind, options):
    shapes = {"first.weight": (4, 4), "place": (3, 4)}
    layout = {name: (None, None, torch.Size(shape)) for name, shape in shapes.items()}
    masks = {"none": torch.ones(1, dist.get_world_size(), dtype=torch.bool)}
    torch.manual_seed(0)
    sync = kind(Added(), masks, layout, **options)
    sync.module(torch.randn(1, 3, 4)).square().sum().backward()
    sync.finish()
    return gathered(sync, [piece.param.grad for piece in sync.pieces])


def test_the_gradients_memory_may_be_shared_with_one_that_is_still_to_flow_on():
    for nbytes in 1, 1000:                                  # a bucket for each parameter, and one for both
        plain = run_on(2, _gradient_below_a_view, Plain, {})[0]
        overlapped = run_on(2, _gradient_below_a_view, sdp.SubnetDataParallel, {"bucket_bytes": nbytes})[0]
        for name, grad in plain.items():
            torch.testing.assert_close(overlapped[name], grad, rtol=0, atol=1e-6)


def test_stream_refuses_a_full_model_with_a_parameter_that_is_tied():
    with alone():
        sync = wrapped(Net(3, tied=True), layout=without("head.weight"))
        with torch.device("meta"):
            full = Net(6, tied=True)
        full.stages = partial(list, [("embed", full.embed), ("inside", full.inside.up), ("head", full.head)])
        with pytest.raises(ValueError, match="head.weight is not in the layout"):
            list(sdp.stream(sync, full, [torch.ones(2, 4)]))


def test_gather_takes_states_of_another_dtype_and_parameters_without_dimensions():
    for full in run_on(2, _gathered_states):
        assert full["scale"].shape == () and all(t.dtype == torch.float64 for t in full.values())
        assert all(torch.equal(t, torch.full_like(t, 7)) for t in full.values())


def _gathered_states():
    rank = dist.get_rank()
    net = sdp.materialize(Net(int(NET_MASKS["inside"][:, rank].sum())), NET_MASKS, NET, rank, net_value)
    sync = sdp.SubnetDataParallel(net, NET_MASKS, NET)
    full = gathered(sync, [torch.full_like(piece.param, 7, dtype=torch.float64) for piece in sync.pieces])
    for piece in sync.pieces:                                   # cut is the way back
        sevens = torch.full_like(piece.param, 7, dtype=torch.float64)
        assert torch.equal(sync.part_of(full[piece.name], piece), sevens)
    return full


def test_close_ends_groups_and_hooks_so_that_masks_can_be_redrawn():
    for before, between, after, grad in run_on(4, _opened_and_closed, masks_for(TINY, 4, 3, "neuron")):
        assert before == after == 1 < between and grad


def _opened_and_closed(masks):
    groups = [len(dist.distributed_c10d._world.pg_map)]
    sync = make_sync(TINY, masks, True)
    groups.append(len(dist.distributed_c10d._world.pg_map))
    sync.close()
    groups.append(len(dist.distributed_c10d._world.pg_map))
    x, y = tokens_for(0, 0)
    llama.loss(sync.module(x), y).backward()
    grad = sync.module.lm_head.weight.grad                  # nobody takes the gradient away any more
    again = sdp.SubnetDataParallel(sync.module, masks, sync.layout, True)
    again.close()
    return (*groups, grad is not None and sync.module.lm_head.weight.grad is None)


def _own_mlp(held, masks):
    """SDP on a model this project has never seen, used as the docstring says; two optimizers take turns."""
    class Net(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.inside, self.stem, self.head = nn.Module(), nn.Linear(3, 4), nn.Linear(4, 2)
            self.inside.up, self.inside.down = nn.Linear(4, n), nn.Linear(n, 4, bias=False)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.inside.down(self.inside.up(x).relu()))
    layout = {
        "stem.weight": (None, None, torch.Size([4, 3])),
        "stem.bias": (None, None, torch.Size([4])),
        "inside.up.weight": ("inside", 0, torch.Size([6, 4])),
        "inside.up.bias": ("inside", 0, torch.Size([6])),
        "inside.down.weight": ("inside", 1, torch.Size([4, 6])),
        "head.weight": (None, None, torch.Size([2, 4])),
        "head.bias": (None, None, torch.Size([2])),
    }
    value = sdp.fresh(layout, lambda name, t, g: t.normal_(generator=g), 0)
    rank = dist.get_rank()
    with torch.device("meta"):
        net = Net(held[rank])
    sync = sdp.SubnetDataParallel(sdp.materialize(net, masks, layout, rank, value), masks, layout)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(rank))
    net.zero_grad()                                         # plain zero_grad between backward and backward
    net(x).square().mean().backward()
    sync.finish()
    full = gathered(sync, [piece.param.grad for piece in sync.pieces])
    # The formula, with full-size tensors and nothing from sdp
    mine = masks["inside"][:, rank]
    w = {n: value(n).requires_grad_() for n in layout}
    h = x @ w["stem.weight"].T + w["stem.bias"]
    u = ((h @ w["inside.up.weight"].T + w["inside.up.bias"]) * mine).relu()
    ((h + u @ w["inside.down.weight"].T) @ w["head.weight"].T + w["head.bias"]).square().mean().backward()
    count = masks["inside"].sum(1)
    for n, p in w.items():
        dist.all_reduce(p.grad)
        p.grad /= {0: dist.get_world_size(), 1: count[:, None] if "up.w" in n else count}["inside" in n]
        torch.testing.assert_close(full[n], p.grad, rtol=1e-5, atol=1e-6)
    return True


def test_a_model_of_the_users_own():
    mask = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 1], [1, 0, 1]], dtype=torch.bool)
    assert all(run_on(3, _own_mlp, mask.sum(0).tolist(), {"inside": mask}))


def _block_that_is_never_called(mask, arrive):
    """Backward masking.  `inside` is a mere container, so no hook of it waits.  `after` is called."""
    class Net(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.inside = Sum(n, 6 - n)
            self.after = Sum(n, 6 - n)

        def forward(self, x):
            x = x + self.inside.down(self.inside.up(x)) + self.inside.rest.down(self.inside.rest.up(x))
            return self.after(x)
    masks = {"inside": mask, "after": mask}
    layout = {f"{branch}.{name}.weight": (branch, dim, torch.Size(shape)) for branch in masks
              for name, dim, shape in (("up", 0, (6, 4)), ("down", 1, (4, 6)))}
    rank = dist.get_rank()
    with torch.device("meta"):
        net = Net(int(mask[:, rank].sum()))
    sdp.materialize(net, masks, layout, rank, sdp.fresh(layout, lambda name, t, g: t.normal_(generator=g), 0))
    sync = sdp.SubnetDataParallel(net, masks, layout, backward=True, bucket_bytes=1)
    optimizer = torch.optim.SGD([piece.param for piece in sync.pieces], lr=0.1)
    for step in range(2):
        if arrive:
            sync.arrive()
        net(torch.randn(5, 4, generator=torch.Generator().manual_seed(rank))).square().mean().backward()
        net.state_dict()                                    # waits for all, but too late
        try:
            sync.finish()
        except RuntimeError as e:
            return step, str(e)
        optimizer.step()
        optimizer.zero_grad()
        sync.refresh()
    sync.arrive()
    for full, weight in sync.gather():
        local = full.replace(".", ".rest.", 1)
        assert torch.equal(net.get_parameter(local), sdp.cut(weight, sync.slots[local]))


def test_frozen_weights_are_never_used_before_they_have_arrived():
    mask = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1], [0, 1], [1, 1]], dtype=torch.bool)
    for step, message in run_on(2, _block_that_is_never_called, mask, False):
        assert step == 1 and "branch inside did not wait for its weights" in message
    assert run_on(2, _block_that_is_never_called, mask, True) == [None, None]


def _old_graph_after_a_step(backward):
    sync = make_sync(TINY, masks_for(TINY, 4, 3, "neuron"), backward)
    optimizer = torch.optim.SGD([piece.param for piece in sync.pieces], lr=0.1)
    batch = tokens_for(0, 0)
    old = sync.forward(0, *batch)
    sync.forward(0, *batch).backward()
    sync.finish()
    optimizer.step()
    sync.refresh()
    sync.arrive()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()
    return True


@pytest.mark.parametrize("backward", [False, True])
def test_autograd_notices_that_the_optimizer_has_stepped(backward):
    """As it does without SDP.  A gradient of old and new weights mixed would be wrong."""
    assert all(run_on(4, _old_graph_after_a_step, backward))


class TwoOfOneShape(Net):
    def __init__(self, n):
        super().__init__(n)
        self.first, self.second = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(3, 4))

    def forward(self, x):
        return super().forward(x) + (self.first[None] + self.second[None])


def test_two_gradients_in_one_memory_are_averaged_and_clipped_once():
    """Of worker 0 alone: what worker 1 gives, autograd would add to that memory twice, without SDP too."""
    shape = torch.Size([3, 4])
    layout = {**NET, "first": (None, None, shape), "second": (None, None, shape)}
    value = sdp.fresh(layout, lambda name, t, g: t.normal_(generator=g), 0)
    with torch.device("meta"):
        modules = [TwoOfOneShape(n) for n in NET_MASKS["inside"].sum(0).tolist()]
    sync = sdp.SimulatedDataParallel(modules, NET_MASKS, layout, value)
    loss = sync.forward(0, torch.ones(1, 3, 4)).square().sum()
    right, = torch.autograd.grad(loss, sync.full["first"], retain_graph=True)
    loss.backward()
    assert sync.full["first"].grad.data_ptr() == sync.full["second"].grad.data_ptr()
    sync.finish()
    for name in "first", "second":
        torch.testing.assert_close(sync.full[name].grad, right / 2)
    norm = sync.clip_grad_norm(1.0)[0].item()
    for name in "first", "second":
        torch.testing.assert_close(sync.full[name].grad, right / 2 / norm)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("reduce_dtype,atol", [(None, 1e-6), (torch.bfloat16, 1e-3)])
def test_the_compiled_path_is_the_eager_one_to_rounding(reduce_dtype, atol):
    masks = masks_for(TINY, 2, 1, "neuron")
    results = []
    for compile in False, True:
        options = {"bucket_bytes": 4000, "reduce_dtype": reduce_dtype, "compile": compile}
        results.append(run_on(2, _gradients, sdp.SubnetDataParallel, masks, True, options)[0])
    for eager, compiled in zip(*results, strict=True):
        for name, grad in eager.items():
            torch.testing.assert_close(compiled[name], grad, rtol=0, atol=atol)
