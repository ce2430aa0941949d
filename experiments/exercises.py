"""
Ten exercises, from pencil to code.  Each has a check.

    python experiments/exercises.py           prints all exercises
    python experiments/exercises.py 3         prints number 3, and whether your answer to it is right

Write your answers into a file answers.py, in the folder from which you call this script.  Each exercise says
under which name it looks for your answer, a value or a function.  The script prints no answer, and this file
has none: the checks compute them.  (Lecturers: right answers are in test_teaching.py, as RIGHT.)
"""

import functools
import inspect
import itertools
import math
import numbers
import runpy
import signal
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

HERE = Path(__file__).parent
PATIENCE = 20                                                        # seconds; then it hangs
sys.path[:0] = [str(HERE.parent), str(HERE)]
import model_llama as llama
import sdp


class Wrong(Exception):
    """The answer is not right; the text says what is missing."""


def need(right, missing):
    if not right:
        raise Wrong(missing)


def close(answer, right, tolerance):
    """Raises Wrong unless `answer` is a list of the numbers `right`, each within the tolerance."""
    is_list = isinstance(answer, (list, tuple))
    need(is_list and len(answer) == len(right), f"wanted a list of {len(right)} numbers")
    for i, (a, b) in enumerate(zip(answer, right)):
        need(isinstance(a, numbers.Real), f"number {i + 1} of {len(right)}, {a!r}, is no plain number")
        need(abs(a - b) <= tolerance, f"number {i + 1} of {len(right)} is not right: {a}")


def averages(average):
    """Pencil: average by hand.

    Three workers, each with its own subnetwork (W = S = 3), and the gradients of four neurons.  A "-" says
    that the worker does not hold the neuron.

        neuron    worker 0    worker 1    worker 2
           0          3           -           6
           1          -           5           1
           2          2           2           -
           3          1           4           7

    averages = [the averaged gradient of neuron 0, of neuron 1, 2, 3]
    """
    grad = np.array([[3, math.nan, 6], [math.nan, 5, 1], [2, 2, math.nan], [1, 4, 7]])
    close(average, np.nanmean(grad, axis=1), 1e-6)


def shares(share):
    """Pencil: how much of the model does a worker hold?

    llama-tiny, block level, four subnetworks.  At coverage 3/4 a worker holds more than 75 % of the
    parameters.  Why?  (The sizes: vocabulary 256, d = 192, four blocks.  Each block has 8 query heads and 4
    KV heads of 24 numbers, an MLP of 512 hidden units, and two norms of d numbers.  There are no biases.
    Embedding and head are two matrices, and there is a last norm.  You may use a calculator.)

    shares = [percent of the parameters at coverage 3/4, percent at 1/2], to 0.1
    """
    config = llama.LlamaConfig()
    total = sum(shape.numel() for _, _, shape in llama.layout(config).values())
    right = []
    for held in 3, 2:
        masks = sdp.block_masks(llama.branches(config), 4, held)
        with torch.device("meta"):
            subnet = llama.Llama(config, sdp.held_counts(masks, 0))
        right.append(100 * sum(p.numel() for p in subnet.parameters()) / total)
    close(share, right, 0.1)


def bytes_sent(answer):
    """Pencil: how many bytes does a worker send?

    Four workers, each with its own subnetwork (W = S = 4).  k workers hold each neuron.  In a ring all-reduce
    among h workers, each of them sends 2 (h-1)/h bytes for each byte of the message.  How many bytes does a
    worker send in one update, on average, for each byte of the full model's branches?  Under backward masking
    each new weight travels once to each worker that has it frozen, from one of its holders.

    bytes_sent = {"forward": [at k = 1, 2, 3, 4], "backward": [at k = 1, 2, 3, 4]}
    """
    is_dict = isinstance(answer, dict)
    need(is_dict and answer.keys() == {"forward", "backward"}, "wanted a dict: forward, backward")
    for regime in answer:
        right = []
        for k in 1, 2, 3, 4:
            sent = k * 2 * (k - 1) / k                               # by all workers, for one neuron
            if regime == "backward":
                sent += 4 - k
            right.append(sent / 4)
        try:
            close(answer[regime], right, 1e-6)
        except Wrong as wrong:
            raise Wrong(f"{regime}: {wrong}") from None


def offsets(answer):
    """Pencil or code: masks that spread news.

    The spectral gap (`sdp.spectral_gap`) says how well news spreads among the subnetworks.  There are eight.
    The subnetworks n + a, n + b and n + c (mod 8) hold neuron n, for three different offsets a, b, c.  Which
    offsets give the largest gap?  Before you search: what is the gap of two offsets, 0 and 4?  What does it
    mean?

    offsets = (a, b, c)
    """
    def gap(of):
        rows = np.zeros((8, 8))
        for n in range(8):
            rows[n, [(n + a) % 8 for a in of]] = 1
        return sdp.spectral_gap(rows, np.ones(8))[0]

    are_whole = isinstance(answer, (tuple, list)) and all(isinstance(a, int) for a in answer)
    need(are_whole and len({a % 8 for a in answer}) == 3, "wanted three different offsets, (a, b, c)")
    best = max(gap(of) for of in itertools.combinations(range(8), 3))
    need(gap(answer) > best - 1e-6, f"these have a gap of {gap(answer):.3f}, and there are better ones")


def updates(function):
    """Pencil: how many updates do the same FLOPs allow?

    DDP spends a fraction `shared` of an update's FLOPs outside of branches (embedding, head).  A worker of
    SDP spends all of those, and the fraction `coverage` of the rest.  How many updates of SDP cost as many
    FLOPs as `steps` updates of DDP?  Round down.

    def updates(steps, shared, coverage): ...
    """
    cases = (250, 0.03, 0.75), (1000, 0.0, 0.5), (100, 0.5, 0.25), (77, 0.1, 1.0), (100, 0.1, 0.5)
    for steps, shared, coverage in cases:
        done = 0
        spent = 0.0
        while spent + shared + coverage * (1 - shared) <= steps + 1e-6:
            spent += shared + coverage * (1 - shared)
            done += 1
        got = function(steps, shared, coverage)
        need(got == done, f"updates({steps}, {shared}, {coverage}) gives {got}")


def equal_to_dense(answer):
    """Predict, then see: when is it training of the full model?

    Four workers, each with its own subnetwork.  The dense model has all neurons, and its loss is the mean
    over the workers' batches.  Is the averaged gradient equal to the gradient of the dense model, in this one
    update, not only in the mean over the data?

    equal_to_dense = {
        "forward, coverage 1, own batches": True or False,
        "forward, coverage 3/4, one batch for all": ...,
        "backward, coverage 3/4, one batch for all": ...,
        "backward, coverage 3/4, own batches": ...,
    }
    """
    right = {}
    config = llama.LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=4, vocab_size=16)
    branches = llama.branches(config)
    layout = llama.layout(config)
    value = sdp.fresh(layout, functools.partial(llama.init, config), seed=0)
    tokens = torch.randint(16, (4, 2, 16), generator=torch.Generator().manual_seed(0))
    cases = [
        ("forward", 4, "own batches"),
        ("forward", 3, "one batch for all"),
        ("backward", 3, "one batch for all"),
        ("backward", 3, "own batches"),
    ]
    for regime, held, batches in cases:
        masks = sdp.neuron_masks(branches, 4, held)
        backward = regime == "backward"
        with torch.device("meta"):
            modules = []
            for subnet in range(4):
                scales = None if backward else sdp.branch_scales(masks, subnet)
                modules.append(llama.Llama(config, sdp.held_counts(masks, subnet), backward, scales))
            dense = llama.Llama(config)
        for name in layout:
            sdp.put(dense, name, torch.nn.Parameter(value(name)))
        simulation = sdp.Simulation(modules, masks, layout, value)
        for worker in range(4):
            batch = tokens[worker if batches == "own batches" else 0]
            simulation.forward(worker, batch, batch).backward()
            (dense(batch, batch) / 4).backward()
        simulation.finish()
        same = all(torch.allclose(p.grad, dense.get_parameter(name).grad, atol=1e-5)
                   for name, p in simulation.full.items())
        right[f"{regime}, coverage {'1' if held == 4 else '3/4'}, {batches}"] = same
    is_dict = isinstance(answer, dict)
    need(is_dict and answer.keys() == right.keys(), "wanted a dict with the four keys of the text")
    wrong = [case for case in right if answer[case] != right[case]]
    need(not wrong, f"not right: {wrong}")


def masks(function):
    """Code: a mask function.

    Perhaps it hurts most if a worker skips two blocks in a row.  So write masks at block level in which all
    subnetworks hold the blocks 0, 2, 4, ... whole, and exactly `held` subnetworks hold each of the others.
    Share those out evenly: no subnetwork holds two more of them than another.  (`branches` is as in
    model_llama.py; sdp.ends_masks does something like that.)

    def masks(branches, n_subnets, held, seed=0): ...
    """
    for layers, n_subnets, held in (6, 4, 2), (9, 4, 3), (4, 2, 1), (10, 8, 5):
        branches = llama.branches(llama.LlamaConfig(num_hidden_layers=layers))
        case = f"{layers} blocks, n_subnets={n_subnets}, held={held}"
        made = function(branches, n_subnets, held)
        try:
            sdp.check_masks(made, branches)
        except (ValueError, AttributeError, TypeError) as error:
            raise Wrong(f"{case}: {error}") from None
        carried = torch.zeros(n_subnets)
        for name, (block, *_) in branches.items():
            mask = made[name]
            need(bool((mask == mask[0]).all()), f"{case}: the neurons of {name} have different rows")
            twin = made[name.replace("mlp", "self_attn")]
            need(torch.equal(mask[0], twin[0]), f"{case}: block {block} is not held whole")
            even = block % 2 == 0
            wanted = n_subnets if even else held
            found = int(mask[0].sum())
            need(found == wanted, f"{case}: {found} subnets hold block {block}, not {wanted}")
            if not even and name.endswith("mlp"):
                carried += mask[0]
        uneven = float(carried.max() - carried.min())
        need(uneven <= 1, f"{case}: the subnets hold {carried.int().tolist()} of the odd blocks")


def contribution(function):
    """Code: clip by the full model's norm.

    A worker has its averaged gradients as a list of (h, gradient).  `gradient` is a 1-D tensor, and h workers
    have the same one.  Each worker gives one number to an all-reduce, which adds the numbers up.  The square
    root of the sum must be the norm of the full model's gradient.  (Suppose that each worker clips by the
    norm of what it holds instead.  What happens to the copies of a parameter?)

    def contribution(parts): ...     # -> a number
    """
    generator = torch.Generator().manual_seed(0)
    cases = [
        (3, [(0, 1), (1, 2), (0, 1, 2)]),
        (4, [(0,), (1, 2, 3), (0, 3), (0, 1, 2, 3)]),
        (1, [(0,)]),
    ]
    for workers, sets in cases:                                      # sets: who holds each gradient
        grads = [torch.randn(5, generator=generator) for _ in sets]
        total = 0.0
        for worker in range(workers):
            parts = [(len(holders), grad) for holders, grad in zip(sets, grads) if worker in holders]
            number = function(parts)
            need(isinstance(number, numbers.Real) or torch.is_tensor(number), f"{number} is not a number")
            total += float(number)
        right = float(torch.cat(grads).norm()) ** 2
        need(abs(total - right) < 1e-3 * right,
             f"{workers} workers: the sum is {total:.4f}, but must be {right:.4f}: how often does it count a "
             f"gradient that h workers have?")


def all_reduce(function):
    """Code: the masked all-reduce.

    Every worker has a gradient [neurons, 3].  The rows of neurons that it does not hold are zeros.  Average
    the gradient over the holders, in place.  Send *one message for each holder set*, and send no neuron to a
    worker that does not hold it.  Four processes run your function.

        mask      bool [neurons, 4]: who holds which neuron (W = S = 4)
        groups    {holder set: its process group}; a holder set is a sorted tuple of workers
        rank      the number of this worker
        send      send(message, group) adds up the tensor `message` over the group, in place

    def all_reduce(grad, mask, groups, rank, send): ...
    """
    path = inspect.getsourcefile(function)
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(reduce_worker, (path, function.__name__, folder), nprocs=4)
        except mp.ProcessRaisedException as error:
            last = str(error).strip().splitlines()[-1]
            if "timed out" in last.lower():
                last = "it hangs: all workers must take the groups in one order, see exercise 10"
            raise Wrong(last) from None


def reduce_worker(rank, path, name, folder):
    """One of the four processes.  Runs the function `name` of the file `path`, and checks what it did."""
    torch.set_num_threads(1)
    function = runpy.run_path(path)[name]
    wait = timedelta(seconds=PATIENCE)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=4, timeout=wait)
    try:
        mask = torch.tensor([
            [1, 1, 0, 0],
            [0, 1, 1, 1],
            [1, 1, 0, 0],
            [1, 0, 1, 1],
            [1, 1, 1, 1],
            [0, 1, 1, 1],
        ]).bool()
        generator = torch.Generator().manual_seed(1)
        everybody = torch.randn(4, 6, 3, generator=generator) * mask.T[:, :, None]       # [workers, 6, 3]
        sets = sorted({tuple(row.nonzero().flatten().tolist()) for row in mask})
        groups = {holders: dist.new_group(holders, timeout=wait) for holders in sets}
        sent = []

        def send(message, group):
            sent.append(message.numel())
            dist.all_reduce(message, group=group)

        grad = everybody[rank].clone()
        function(grad, mask, groups, rank, send)
        right = everybody.sum(0) / mask.sum(1, keepdim=True) * mask[:, rank, None]
        need(torch.allclose(grad, right, atol=1e-6),
             f"worker {rank} has not the averages of what it holds, and 0 elsewhere")
        mine = sum(rank in holders for holders in sets)
        need(len(sent) == mine, f"worker {rank} sent {len(sent)} messages, but is in {mine} holder sets")
        held = grad[mask[:, rank]].numel()
        need(sum(sent) == held, f"worker {rank} sent {sum(sent)} numbers, but holds {held}")
    finally:
        dist.destroy_process_group()


def hang(orders):
    """Pencil: why one global order?

    Three workers, 0, 1 and 2, and three groups of two: "01", "12", "02".  Each group has one all-reduce, so
    each worker takes part in two.  A worker that has begun one waits until the other member begins it too.
    Find an order for each worker, with which all workers wait for ever.

    hang = {0: [two groups], 1: [two groups], 2: [two groups]}
    """
    groups = "01", "12", "02"
    is_dict = isinstance(orders, dict)
    need(is_dict and sorted(orders) == [0, 1, 2], "wanted {0: [...], 1: [...], 2: [...]}")
    left = {}
    for worker, order in orders.items():
        its_groups = sorted(group for group in groups if str(worker) in group)
        need(sorted(order) == its_groups, f"worker {worker} must go once through each of {its_groups}")
        left[worker] = list(order)
    moved = True
    while moved:
        moved = False
        for group in groups:
            members = [int(c) for c in group]
            if all(left[worker][:1] == [group] for worker in members):
                for worker in members:
                    left[worker].pop(0)
                moved = True
    need(all(left.values()), "with these orders it does not hang")


EXERCISES = [
    averages, shares, bytes_sent, offsets, updates,
    equal_to_dense, masks, contribution, all_reduce, hang,
]


def check(number, answers):
    """Returns "right", or what is missing.  answers: {name: value}, or None."""
    exercise = EXERCISES[number - 1]
    if answers is None:
        return f"no answer yet: there is no answers.py in {Path.cwd()}"
    if exercise.__name__ not in answers:
        return f"no answer yet: answers.py has no {exercise.__name__}"
    answer = answers[exercise.__name__]
    wants_function = f"def {exercise.__name__}(" in exercise.__doc__
    if callable(answer) != wants_function:
        return "not yet: wanted a function" if wants_function else "not yet: wanted a value, not a function"
    try:
        exercise(answer)
    except Wrong as wrong:
        return f"not yet: {wrong}"
    return "right"


def main():
    numbers = range(1, len(EXERCISES) + 1)
    if sys.argv[1:] and (len(sys.argv) > 2 or sys.argv[1] not in map(str, numbers)):
        print(f"error: wanted one number from 1 to {len(EXERCISES)}", file=sys.stderr)
        return 2
    if not sys.argv[1:]:
        print(inspect.cleandoc(__doc__) + "\n")
        for number in numbers:
            print(f"{number}. {inspect.getdoc(EXERCISES[number - 1])}\n")
        return 0
    number = int(sys.argv[1])
    print(f"{number}. {inspect.getdoc(EXERCISES[number - 1])}\n")
    path = Path("answers.py")
    result = check(number, runpy.run_path(str(path)) if path.exists() else None)
    print(result)
    return 0 if result == "right" else 1


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)           # `| head` may close the output
    sys.exit(main())
