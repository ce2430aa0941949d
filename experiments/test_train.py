"""
Tests of runs: what train.py computes, writes, refuses and survives.

    python -m pytest -q experiments/test_train.py          (-m slow for those of many minutes)
"""

import functools
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import data
import model_llama as llama
import model_resnet as resnet
import sdp
import train
from test_sdp import run_on

torch.set_num_threads(1)
with warnings.catch_warnings():  # pytest wants marks listed in a file of its own
    warnings.simplefilter("ignore")
    slow = pytest.mark.slow
only_when_asked = pytest.mark.skipif(
    "slow" not in sys.argv, reason="takes many minutes: python -m pytest -m slow"
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def when_asked(*values):
    """A case of a parametrized test that only -m slow runs."""
    return pytest.param(*values, marks=[slow, only_when_asked])


def remembered(function, key):
    """A pure function, computed once for each key in a process: they take most of the time of a short run."""
    known = {}

    def once(*args):
        if key(*args) not in known:
            known[key(*args)] = function(*args)
        return known[key(*args)]
    return once


def key_of_model(model, batch):
    parameters = [(name, p.shape, p.requires_grad) for name, p in model.named_parameters()]
    plain = {name: value for name, value in vars(model).items() if isinstance(value, (bool, int, float, str))}
    return repr((type(model), model.config, parameters, plain, [t.shape for t in batch]))


def key_of_masks(*args):
    return repr(args)


train.measure_flops = remembered(train.measure_flops, key_of_model)
for level in sdp.MASKS:
    sdp.MASKS[level] = remembered(sdp.MASKS[level], key_of_masks)
train.sample.__defaults__ = (10,)  # tokens, where 200 would take most of the time


# -- Ways to run train.py --------------------------------------------------------------------------

def train_on_pool(arguments, prepare=None):
    """train.main in a process of the pool, as a rank of torchrun's would run it -> None or what it refused.

    prepare() changes something there, and returns what undoes it.
    """
    train.DISTRIBUTED, train.RANK, train.WORLD, train.STOP = (
        True,
        dist.get_rank(),
        dist.get_world_size(),
        False,
    )
    train.start_processes, train.say = a_cpu, be_silent
    here = os.getcwd()
    undo = prepare() if prepare else None
    try:
        train.main(arguments)
    except data.UserError as e:
        return str(e)
    finally:
        os.chdir(here)
        for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:  # as they were
            signal.signal(number, signal.SIG_DFL)
        if undo:
            undo()


def a_cpu(*_):
    return torch.device("cpu")


def be_silent(*_):
    pass


@pytest.fixture(autouse=True)
def signals_as_before():
    """A run in this process leaves its handlers, and its lock, to the process's end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    if train.LOCK:
        train.LOCK.close()


def torchrun(ranks, arguments, code=0, timeout=150, script="train.py", **environment):
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            script,
            *arguments,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**ENVIRONMENT, **environment},
    )
    assert (run.returncode == 0) == (code == 0), run.stdout + run.stderr
    return run.stdout, run.stderr


def python(arguments, **environment):
    """train.py as a program of its own."""
    program = [sys.executable, "train.py", *arguments]
    environment = {**ENVIRONMENT, **environment}
    return subprocess.run(program, cwd=ROOT, capture_output=True, timeout=150, env=environment)


def text_bin(folder, name="text", count=6000, vocab=256):
    """Words of three tokens, so that there is something to learn."""
    rng = np.random.default_rng(0)
    words = rng.integers(min(vocab, 100), size=(20, 3))
    data.write_bin(
        folder / f"{name}.bin", words[rng.integers(20, size=count // 3 + 1)].flatten()[:count], vocab
    )
    return str(folder / f"{name}.bin")


def flags(folder, *more, out="out", steps=6):
    text = folder / "text.bin"
    if not text.exists():
        text_bin(folder)
    return [
        "--data",
        str(text),
        "--batch-size",
        "2",
        "--seq-len",
        "12",
        "--steps",
        str(steps),
        "--save-every",
        "3",
        "--eval-every",
        "4",
        "--log-every",
        "1",
        "--out-dir",
        str(folder / out),
        "--device",
        "cpu",
        *map(str, more),
    ]


def image_flags(folder, *more, out="out", steps=6):
    return [
        "--model",
        "resnet18",
        "--data",
        "shapes",
        "--batch-size",
        "4",
        "--steps",
        str(steps),
        "--save-every",
        "3",
        "--eval-every",
        "4",
        "--log-every",
        "1",
        "--out-dir",
        str(folder / out),
        "--device",
        "cpu",
        *map(str, more),
    ]


def metrics(folder, out="out"):
    return [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]


def load(folder, out="out", name="ckpt.pt"):
    return torch.load(folder / out / name, weights_only=True)


def same_checkpoint(a, b):
    a, b = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in (a, b))
    return (
        a["step"] == b["step"]
        and all(torch.equal(w, b["model"][n]) for n, w in a["model"].items())
        and all(
            torch.equal(value, b["optimizer"][n][key])
            for n, state in a["optimizer"].items()
            for key, value in state.items()
            if torch.is_tensor(value)
        )
    )


def refused(folder, message, *arguments, out="out"):
    """train.main says one line."""
    with pytest.raises((data.UserError, OSError), match=message) as caught:
        train.main(flags(folder, *arguments, out=out))
    assert "\n" not in str(caught.value)


SMALL_IMAGES = """
import data, model_resnet as resnet, train
real_shapes = data.shapes
data.shapes = lambda count, rng: real_shapes(count // 40, rng)       # 250 images to train on, 50 to validate
train.STATISTICS_IMAGES = 32
resnet.PRESETS["resnet18"] = resnet.ResNetConfig(widths=(6, 7, 9, 10))
"""


@pytest.fixture
def small_images(monkeypatch, tmp_path):
    """A narrow ResNet and few images, here and (the fixture's value) as a script for torchrun."""
    monkeypatch.setattr(data, "shapes", data.shapes)                 # all three are put back after the test
    monkeypatch.setattr(train, "STATISTICS_IMAGES", 0)
    monkeypatch.setitem(resnet.PRESETS, "resnet18", None)
    exec(SMALL_IMAGES, {})
    script = tmp_path / "small.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{SMALL_IMAGES}\ntrain.main(sys.argv[1:])"
    )
    return str(script)


def small_images_on_pool():
    saved = data.shapes, train.STATISTICS_IMAGES, resnet.PRESETS["resnet18"]
    exec(SMALL_IMAGES, {})

    def undo():
        data.shapes, train.STATISTICS_IMAGES, resnet.PRESETS["resnet18"] = saved
    return undo


# -- What a run computes and writes ----------------------------------------------------------------

def test_checkpoint_is_an_ordinary_llama(tmp_path, capsys):
    """transformers loads it unchanged, with the same logits and the validation loss that we measured."""
    from transformers import LlamaConfig, LlamaForCausalLM
    train.main(flags(tmp_path, "--level", "neuron", "--masking", "backward"))
    shown = capsys.readouterr().out
    assert (
        "full model: validation loss" in shown
        and "gradients, MB" in shown
        and "█" in shown
        and "validation: the last tenth" in shown
    )
    saved = load(tmp_path)
    assert set(saved) == {"model", "optimizer", "step", "config", "masks"} and saved["step"] == 6
    fields = {k: saved["config"][k] for k in asdict(llama.LlamaConfig())}
    assert fields["num_key_value_heads"] < fields["num_attention_heads"]  # grouped-query attention
    theirs = LlamaForCausalLM(LlamaConfig(**fields))
    theirs.load_state_dict(saved["model"])
    ours = llama.Llama(llama.LlamaConfig(**fields))
    ours.load_state_dict(saved["model"])
    x = torch.randint(256, (2, 50))
    torch.testing.assert_close(theirs(x).logits, ours(x), rtol=1e-4, atol=1e-4)
    dataset = data.load(str(tmp_path / "text.bin"), 300, 12, 0)
    x, y = dataset.batch("val", 0, 0, 1)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()
    assert metrics(tmp_path)[-1]["val_loss"] == pytest.approx(loss, rel=1e-5)
    for name, state in saved["optimizer"].items():
        assert (
            state["exp_avg"].shape == state["exp_avg_sq"].shape == saved["model"][name].shape
            and state["step"] == 6
        )
    train.main(["--resume", "--out-dir", str(tmp_path / "out"), "--sample", "def ", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("def ")


def test_torchrun_equals_plain_python_and_writes_the_contract_s_metrics(tmp_path):
    # Adam makes much of rounding in steep updates
    more = ["--level", "neuron", "--coverage", "1/2", "--grad-accum", 2, "--lr", 1e-3]
    torchrun(2, flags(tmp_path, *more, out="many"))
    train.main(flags(tmp_path, *more, "--subnets", 2, out="one"))
    many, one = metrics(tmp_path, "many"), metrics(tmp_path, "one")
    assert [m["step"] for m in many] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(many, one):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-4
        )
        assert a["sent_bytes"] > 0 == b["sent_bytes"] and a["peak_mem_bytes"] is None and a["skipped"] == 0
        assert {"lr", "step_ms", "tokens_per_s"} <= a.keys()
        assert a["flops"] == b["flops"] == pytest.approx(a["step"] * many[0]["flops"])
    assert [m["step"] for m in many if "val_loss" in m] == [4, 6]
    assert many[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-5)
    masks = [load(tmp_path, out)["masks"] for out in ("many", "one")]
    assert all(torch.equal(m, masks[1][b]) for b, m in masks[0].items())


@pytest.mark.parametrize("parallel", ["ddp", "sdp"])
def test_flops_are_the_ones_that_the_operations_need(tmp_path, parallel):
    """6 FLOPs for each weight of a matrix and token, and those of attention: counted by hand."""
    train.main(
        flags(tmp_path, "--parallel", parallel, "--coverage", "1", "--subnets", 2, "--grad-accum", 3, steps=2)
    )
    c = llama.LlamaConfig()
    matrices = sum(
        shape.numel()
        for name, (_, _, shape) in llama.layout(c).items()
        if len(shape) > 1 and "embed" not in name
    )
    # q k^T and times v, 12 positions, forward and 2x backward
    scores = 2 * 2 * c.hidden_size * 12 * 3 * c.num_hidden_layers
    wanted = 2 * 12 * 6 * matrices + 2 * 12 * scores                 # of a batch of 2 x 12
    # the softmax is somebody else's
    assert metrics(tmp_path)[-1]["flops"] == pytest.approx(2 * 3 * wanted, rel=0.15)
    assert metrics(tmp_path)[0]["flops"] == pytest.approx(metrics(tmp_path)[-1]["flops"] / 2)


@pytest.mark.parametrize("level,masking", [("block", "forward"), ("neuron", "backward")])
def test_resnet_on_real_workers_equals_plain_python(tmp_path, small_images, capsys, level, masking):
    more = ["--level", level, "--masking", masking, "--coverage", "1/2"]
    many = image_flags(
        tmp_path, *more, *(["--checkpoint-activations"] if level == "block" else []), out="many"
    )
    assert run_on(2, train_on_pool, many, small_images_on_pool) == [None, None]
    train.main(image_flags(tmp_path, *more, "--subnets", 2, out="one"))
    assert "resnet18 on shapes (synthetic)" in capsys.readouterr().out
    many, one = metrics(tmp_path, "many"), metrics(tmp_path, "one")
    for a, b in zip(many, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and a["images_per_s"] > 0
    assert many[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert [m["step"] for m in many if "val_acc" in m] == [4, 6] and {"val_loss", "val_acc"} <= many[
        -1
    ].keys()
    many, one = (load(tmp_path, out)["model"] for out in ("many", "one"))
    assert many.keys() == one.keys()
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("stem", ["cifar", when_asked("imagenet")])
def test_checkpoint_is_torchvision_s_resnet18(tmp_path, small_images, stem):
    """torchvision loads it and gives the same logits and the same validation loss.

    Its batch norm statistics are those of torch's own update_bn over the same batches.
    """
    from torchvision.models import resnet18
    resnet.PRESETS["resnet18"] = resnet.ResNetConfig(stem=stem)
    train.main(image_flags(tmp_path, "--level", "neuron", "--subnets", 2, "--coverage", "1/2", steps=2))
    saved = load(tmp_path)
    ours, theirs = resnet.ResNet(resnet.PRESETS["resnet18"]), resnet18(num_classes=10)
    if stem == "cifar":
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    for model in (ours, theirs):
        model.load_state_dict(saved["model"])
        model.eval()
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    dataset = data.load("shapes", 4, None, 0)
    with torch.no_grad():
        batches = [dataset.batch("val", i, 0, 1) for i in range(math.ceil(dataset.val_count / 4))]
        val = [(theirs(x), y) for x, y in batches]
    outputs, y = torch.cat([o for o, _ in val]), torch.cat([y for _, y in val])
    last = metrics(tmp_path)[-1]
    assert last["val_loss"] == pytest.approx(nn.functional.cross_entropy(outputs, y).item(), rel=1e-4)
    assert last["val_acc"] == pytest.approx((outputs.argmax(1) == y).float().mean().item())
    torch.optim.swa_utils.update_bn(
        [dataset.batch("train", i, w, 2)[0] for i in range(4) for w in range(2)], theirs
    )
    for name, b in theirs.named_buffers():
        torch.testing.assert_close(saved["model"][name], b, rtol=1e-4, atol=1e-5)
    state = saved["optimizer"]["layer1.0.conv1.weight"]
    assert state["momentum_buffer"].shape == (64, 64, 3, 3) and state["step"] == 2
    with pytest.raises(data.UserError, match="--sample prints text"):
        train.main(["--resume", "--out-dir", str(tmp_path / "out"), "--sample", "x", "--device", "cpu"])


def test_flop_match_lengthens_the_run(tmp_path):
    """Half of the branches, all of embedding and head: 9 to 12 updates instead of 6, of as many FLOPs."""
    train.main(flags(tmp_path, "--coverage", "1/2", "--flop-match", "--subnets", 4))
    train.main(flags(tmp_path, "--parallel", "ddp", out="ddp"))
    last, ddp = metrics(tmp_path)[-1], metrics(tmp_path, "ddp")[-1]
    assert 9 <= last["step"] <= 12
    assert last["flops"] == pytest.approx(ddp["flops"], abs=last["flops"] / last["step"])


@pytest.mark.parametrize(
    "masking,more,tolerance",
    [
        ("forward", ["--checkpoint-activations"], 1e-4),
        when_asked("forward", ["--compile"], 1e-4),
        ("backward", ["--compile"], 1e-4),
        ("forward", ["--dtype", "bf16"], 0.02),
        ("backward", ["--reduce-dtype", "bf16"], 0.01),
    ],
)
def test_the_same_losses_with_another_way_to_compute(tmp_path, masking, more, tolerance):
    same = ["--coverage", "1/2", "--masking", masking]
    train.main(flags(tmp_path, "--subnets", 2, *same, out="plain", steps=4))
    assert run_on(2, train_on_pool, flags(tmp_path, *same, *more, steps=4)) == [None, None]
    for a, b in zip(metrics(tmp_path, "plain"), metrics(tmp_path), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)


def test_ddp_is_the_simulation_at_coverage_1_and_sends_half_in_bfloat16(tmp_path):
    train.main(flags(tmp_path, "--subnets", 2, "--coverage", "1", out="one"))
    train.main(flags(tmp_path, "--subnets", 2, "--parallel", "ddp", out="alone"))
    for out, more, tolerance in ("fp32", [], 1e-4), ("bf16", ["--reduce-dtype", "bf16"], 0.01):
        assert run_on(2, train_on_pool, flags(tmp_path, "--parallel", "ddp", *more, out=out)) == [None, None]
        for a, b, c in zip(
            metrics(tmp_path, out), metrics(tmp_path, "one"), metrics(tmp_path, "alone"), strict=True
        ):
            assert a["loss"] == pytest.approx(b["loss"], rel=tolerance) and c["loss"] == pytest.approx(
                b["loss"], rel=1e-5
            )
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.05)
    numel = sum(w.numel() for w in load(tmp_path, "fp32")["model"].values())
    assert (
        metrics(tmp_path, "fp32")[0]["sent_bytes"]
        == 4 * numel
        == 2 * metrics(tmp_path, "bf16")[0]["sent_bytes"]
    )


def test_blocks_of_one_size_are_compiled_once():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = llama.LlamaConfig(vocab_size=61, hidden_size=24, intermediate_size=21, num_hidden_layers=3,
                               num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=16)
    model = llama.Llama(config, {name: branch[1] for name, branch in llama.branches(config).items()})
    train.compile_blocks(model)
    model(*torch.randint(61, (2, 2, 9)).unbind()).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 < config.num_hidden_layers


def test_training_imports_nothing_private_of_torch_and_text_no_torchvision():
    source = (ROOT / "train.py").read_text()
    assert not re.search(r"torch[\w.]*\._[a-z]", source)
    run = subprocess.run(
        [sys.executable, "-c", "import sys, train; print('torchvision' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "False", run.stderr


# -- Going on --------------------------------------------------------------------------------------

@pytest.mark.parametrize("ranks,more", [(2, ["--masking", "backward"]), (1, []), (2, ["--parallel", "ddp"])])
def test_resume_gives_the_uninterrupted_run_bit_for_bit(tmp_path, ranks, more):
    def go(out, *extra):
        arguments = flags(tmp_path, "--coverage", "1/2" if ranks == 2 else "3/4", *more, *extra, out=out)
        assert (
            run_on(ranks, train_on_pool, arguments) == [None] * ranks
            if ranks > 1
            else train.main(arguments) is None
        )
    go("whole")
    (tmp_path / "cut").mkdir()
    shutil.copy(tmp_path / "whole" / "ckpt.prev.pt", tmp_path / "cut" / "ckpt.pt")       # step 3
    lines = (tmp_path / "whole" / "metrics.jsonl").read_bytes().splitlines(True)
    # Two lines beyond the checkpoint, and what a crash may leave
    (tmp_path / "cut" / "metrics.jsonl").write_bytes(
        b"".join(lines[:5]) + b"\xff\x00\x80\n[1]\n" + lines[5][:20]
    )
    go("cut", "--resume")
    assert same_checkpoint(tmp_path / "whole", tmp_path / "cut")
    for x, y in zip(metrics(tmp_path, "whole"), metrics(tmp_path, "cut"), strict=True):
        assert all(x.get(k) == y.get(k) for k in ("step", "loss", "lr", "grad_norm", "flops", "val_loss"))


def test_resnet_resumes_bit_for_bit(tmp_path, small_images):
    train.main(image_flags(tmp_path, "--level", "neuron", out="whole"))
    (tmp_path / "cut").mkdir()
    shutil.copy(tmp_path / "whole" / "ckpt.prev.pt", tmp_path / "cut" / "ckpt.pt")
    train.main(image_flags(tmp_path, "--level", "neuron", "--resume", out="cut"))
    assert same_checkpoint(tmp_path / "whole", tmp_path / "cut")


def optimizers_stand_still():
    steps = {kind: kind.step for kind in (torch.optim.AdamW, torch.optim.SGD)}
    for kind in steps:
        kind.step = be_silent
    return lambda: [setattr(kind, "step", step) for kind, step in steps.items()]


def both(first, second):
    undo = [prepare() for prepare in (first, second) if prepare]
    return lambda: [u() for u in undo if u]


LAYOUTS = [(2, ["--parallel", "ddp"]), (2, ["--coverage", "1/2"]),
           (3, ["--masking", "backward", "--level", "neuron", "--coverage", "2/3"]),
           (4, ["--masking", "backward", "--subnets", "2", "--coverage", "1/2"]), (1, [])]


@pytest.mark.parametrize("make_flags", [flags, image_flags], ids=["Llama", "ResNet"])
def test_a_checkpoint_resumes_bit_for_bit_under_any_layout(tmp_path, make_flags):
    """A run is resumed under five layouts in a row, of a ResNet three.

    The first time it takes no step, only saves: model and optimizer are the saved ones, bit for bit.
    Then it trains on, and the loss stays sane.
    """
    if make_flags is image_flags:
        more, prepare = ["--data", "shapes", "--batch-size", "2"], small_images_on_pool
    else:
        more, prepare = [], None
    step, path = 0, tmp_path / "out" / "ckpt.pt"
    layouts = LAYOUTS if make_flags is flags else LAYOUTS[::2]
    for workers, layout in layouts:
        if step:  # one update that changes nothing, then back to the step before
            before = torch.load(path, weights_only=True)
            raw = path.read_bytes()
            still = functools.partial(both, prepare, optimizers_stand_still)
            arguments = make_flags(tmp_path, "--resume", *layout, *more, steps=step + 1)
            assert run_on(workers, train_on_pool, arguments, still) == [None] * workers
            after = torch.load(path, weights_only=True)
            assert all(torch.equal(before["model"][n], after["model"][n]) for n in before["optimizer"])
            for name, state in before["optimizer"].items():
                assert all(
                    torch.equal(value, after["optimizer"][name][key])
                    for key, value in state.items()
                    if torch.is_tensor(value)
                )
            path.write_bytes(raw)
        step += 3
        arguments = make_flags(tmp_path, "--resume", *layout, *more, steps=step)
        assert run_on(workers, train_on_pool, arguments, prepare) == [None] * workers
        saved = torch.load(path, weights_only=True)
        assert saved["step"] == step and all(s["step"] == step for s in saved["optimizer"].values())
    losses = [m["loss"] for m in metrics(tmp_path)]
    assert len(losses) == 3 * len(layouts) and max(losses) < 1.3 * losses[0]
    if make_flags is flags:
        assert losses[-1] < losses[0] - 0.3


def test_resume_says_what_it_does_with_masks_and_flags(tmp_path, capsys, monkeypatch):
    def said(*more, steps):
        train.main(flags(tmp_path, "--resume", "--subnets", 3, *more, steps=steps))
        return capsys.readouterr().out
    first = said("--seed", 1, steps=1)
    assert "masks are" not in first and "not as it was" not in first
    masks = load(tmp_path)["masks"]
    out = said("--seed", 2, "--lr", "0.001", "--batch-size", 1, steps=2)
    assert (
        "the masks are the saved ones" in out
        and sdp.picture(masks, llama.branches(llama.PRESETS["llama-tiny"])) in out
    )
    assert all(
        f"--{what}" in out for what in ("seed 2 (was 1)", "lr 0.001 (was 0.002)", "batch-size 1 (was 2)")
    )
    said("--seed", 2, steps=3)                                       # the masks are still those of seed 1
    assert all(torch.equal(m, masks[b]) for b, m in load(tmp_path)["masks"].items())
    assert "new masks: today's flags" in said("--coverage", "1/3", steps=4)
    again = {b: m.roll(1, 1) for b, m in load(tmp_path)["masks"].items()}
    monkeypatch.setitem(sdp.MASKS, "block", lambda *_: again)
    assert "mask function do not make the saved ones" in said("--coverage", "1/3", steps=5)
    assert all(torch.equal(m, again[b]) for b, m in load(tmp_path)["masks"].items())
    out = said("--coverage", "1/3", steps=5)
    assert "nothing to do" in out and "is of step 5, and the run has 5 steps" in out and "sample" not in out


def test_contents_of_the_data_decide_not_their_name(tmp_path):
    train.main(flags(tmp_path, steps=1))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "text.bin", tmp_path / "elsewhere" / "moved.bin")
    moved = [
        "--data",
        str(tmp_path / "elsewhere" / "." / "moved.bin"),
        "--out-dir",
        str(tmp_path / "out"),
        "--resume",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--seq-len",
        "12",
        "--device",
        "cpu",
    ]
    train.main(moved)
    assert load(tmp_path)["step"] == 2
    text_bin(tmp_path / "elsewhere", "moved", count=6003)
    for arguments in (moved, moved[2:]):
        with pytest.raises(data.UserError, match="contradicts the checkpoint"):
            train.main(arguments)
    with pytest.raises(
        data.UserError, match="--model llama-134m contradicts the checkpoint, which has llama-tiny"
    ):
        train.main([*moved, "--model", "llama-134m"])


def test_a_vocabulary_without_tokenizer_trains_to_the_end(tmp_path):
    data.write_bin(tmp_path / "text.bin", np.arange(6000) % 900, 1000)
    train.main(flags(tmp_path, steps=2))
    with pytest.raises(data.UserError, match="no tokenizer is known for a vocabulary of 1000"):
        train.main(flags(tmp_path, "--resume", "--sample", "x"))
    data.write_bin(tmp_path / "text.bin", np.arange(6000) % 900, 901)
    refused(tmp_path, "the checkpoint's model has other names, shapes or types", "--resume")


def test_a_run_whose_first_updates_were_all_skipped_resumes(tmp_path, monkeypatch):
    real = llama.loss
    monkeypatch.setattr(
        llama, "loss", lambda logits, y: real(logits, y) * (math.nan if logits.requires_grad else 1)
    )
    train.main(flags(tmp_path, steps=3))
    for state in load(tmp_path)["optimizer"].values():
        assert state["step"] == 0 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()
    first = json.loads(
        (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0], parse_constant=refuse_constant
    )
    assert first["loss"] is None and first["skipped"] == 1           # JSON, not NaN
    monkeypatch.setattr(llama, "loss", real)
    train.main(flags(tmp_path, "--resume", steps=6))
    assert (
        all(state["step"] == 3 for state in load(tmp_path)["optimizer"].values())
        and metrics(tmp_path)[-1]["loss"] > 0
    )


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


# -- What is refused -------------------------------------------------------------------------------

BAD = [
    (["--coverage", "0.7", "--subnets", "4"], r"--coverage 0.7 is none of k/4"),
    *[
        ([f"--coverage={c}"], "none of k/4, with k from 1 to 4")
        for c in ("0", "9/8", "1e9", "-1/2", "1/0", "nan", "inf", "", "half", "0.0002")
    ],
    (["--coverage"], "--coverage: expected one argument"),
    (["--subnets", "two"], "--subnets: invalid"),
    (["--model", "gpt5"], "invalid choice: 'gpt5'"),
    (["--data", "none.bin"], "No such file or directory: 'none.bin'"),
    (["--data", "wikipedia"], "unknown --data wikipedia"),
    (["--data", ""], "unknown --data"),
    (["--data", "fineweb"], "no FineWeb shards.*data.py fineweb"),
    (["--seq-len", "4096"], "--seq-len 4096 is longer than the context of llama-tiny"),
    (["--batch-size", "9999"], "too short for one batch"),
    *[
        ([f"--{flag}", value], f"--{flag}: must be at least 1")
        for flag in (
            "subnets",
            "steps",
            "batch-size",
            "seq-len",
            "grad-accum",
            "eval-every",
            "save-every",
            "log-every",
            "timeout",
        )
        for value in ("0", "-1")
    ],
    *[
        ([f"--{flag}", "1.5"], f"--{flag}: invalid")
        for flag in ("seed", "steps", "batch-size", "grad-accum", "timeout")
    ],
    (["--seed", "-1"], "--seed must be at least 0"),
    *[(["--lr", value], "--lr must be a positive number") for value in ("nan", "inf", "0", "-1", "1e38")],
    (["--lr", "fast"], "--lr: invalid float"),
    *[
        (["--device", value], "--device: invalid choice")
        for value in ("tpu", "mps", "gpu", "cpu:x")
    ],
    (["--device", "cuda"], "no CUDA device"),
    (["--resume", "--overwrite"], "not allowed with"),
    (["--sample", "x"], "--sample needs --resume"),
    (["--resume", "--sample", "x"], "--sample needs --resume and a checkpoint"),
    (["--compile"], "--compile and .* need real workers"),
    (["--checkpoint-activations"], "--checkpoint-activations need real workers"),
    (["--frobnicate"], "unrecognized arguments"),
    (["train"], "unrecognized arguments"),
    *[
        ([f"--{flag}", "sideways"], "invalid choice")
        for flag in ("masking", "level", "parallel", "dtype", "reduce-dtype")
    ],
    (["--model", "resnet18"],
     "resnet18 cannot read --data /.*: resnet18 reads images .cifar10, cifar100, shapes"),
    (["--data", "cifar10"], "llama-tiny cannot read --data cifar10"),
]


@pytest.mark.parametrize("more,message", BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_input_is_one_clear_line_before_anything_happens(tmp_path, more, message):
    if more[-2:] == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    refused(tmp_path, message, *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more,message", [
    (["--subnets", "3"], "--subnets 3 does not divide the number of workers, 2"),
    when_asked(["--frobnicate"], "unrecognized arguments"),
    when_asked(["--data", "none.bin"], "No such file or directory: 'none.bin'"),
    (["--out-dir", "/dev/null/out"], "/dev/null/out"),
])
def test_bad_input_under_torchrun_is_one_line_from_one_rank(tmp_path, more, message):
    out, err = torchrun(2, flags(tmp_path, *more), code=1, timeout=100)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert 'train.py", line' not in err and "exitcode  : 2" in err and not (tmp_path / "out").exists()


def test_as_a_program_it_ends_with_one_line(tmp_path):
    """Standard output full or of another encoding.  (test_data.py has all kinds of errors.)"""
    fine = flags(tmp_path, "--overwrite", steps=1)
    with open("/dev/full", "w") as full:
        program = [sys.executable, "train.py", *fine]
        run = subprocess.run(program, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert run.returncode == 2 and re.fullmatch(b"error: .*No space left.*\n", run.stderr), run.stderr
    # It cannot show the masks; RANK was left in the environment
    run = python([*fine, "--out-dir", "~/x/out"], HOME=str(tmp_path), PYTHONIOENCODING="cp1252", RANK="1")
    assert run.returncode == 0 and b"?? ??" in run.stdout, run.stderr
    assert (tmp_path / "x" / "out" / "ckpt.pt").exists()


def test_compile_needs_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "DISTRIBUTED", True)
    monkeypatch.setattr(train, "start_processes", a_cpu)
    monkeypatch.setattr(train, "agree", be_silent)
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused(tmp_path, "needs a C\\+\\+ compiler", "--compile")


BAD_CHECKPOINTS = {
    "empty": b"",
    "text": b"not a checkpoint",
    "zip of nothing": b"PK\x05\x06" + bytes(18),
    "pickle": pickle.dumps({"model": 1}),
    "list": [1, 2],
    "half": {"model": {}, "step": 3},
    "tensor": torch.zeros(3),
    "malicious": type("Evil", (), {"__reduce__": lambda self: (os.system, ('touch "$EVIL"',))})(),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_one_clear_line_and_nothing_in_them_is_run(tmp_path, monkeypatch, kind):
    """What is whole, but of somebody else, is not called damaged, and nobody advises to overwrite it."""
    monkeypatch.setenv("EVIL", str(tmp_path / "evil-was-here"))
    (tmp_path / "out").mkdir()
    path, content = tmp_path / "out" / "ckpt.pt", BAD_CHECKPOINTS[kind]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"model": content} if kind == "malicious" else content, path)
    before = path.read_bytes()
    for more in ([], ["--sample", "x"]):
        refused(
            tmp_path,
            "is damaged" if kind == "zip of nothing" else "is not a checkpoint of this program: move it",
            "--resume",
            *more,
        )
    assert path.read_bytes() == before and os.listdir(tmp_path / "out") == ["ckpt.pt"]
    assert not (tmp_path / "evil-was-here").exists()
    if kind == "malicious":                                          # it would have worked
        torch.load(path, weights_only=False)
        assert (tmp_path / "evil-was-here").exists()


def edited(part, change):
    """A change of a part of a checkpoint: of the value itself, or of the value under a name."""
    def edit(checkpoint):
        checkpoint[part] = change(checkpoint[part])
    return edit


def without_first(values):
    return dict(list(values.items())[1:])


def of_first(change):
    return lambda values: {
        name: change(value) if i == 0 else value for i, (name, value) in enumerate(values.items())
    }


WRONG = {
    "a name is missing": edited("model", without_first),
    "a name too many": edited("model", lambda m: {**m, "more": torch.zeros(1)}),
    "another shape": edited("model", of_first(lambda t: t[1:])),
    "another dtype": edited("model", of_first(lambda t: t.double())),
    "not a tensor": edited("model", of_first(lambda t: 1.0)),
    "no dict": edited("model", lambda m: 3),
    "no state of a name": edited("optimizer", without_first),
    "no moment": edited("optimizer", of_first(without_first)),
    "a moment of another shape": edited("optimizer", of_first(lambda s: {**s, "exp_avg": s["exp_avg"][1:]})),
    "a moment of another dtype": edited(
        "optimizer", of_first(lambda s: {**s, "exp_avg": s["exp_avg"].half()})
    ),
    "no number of updates": edited(
        "optimizer", of_first(lambda s: {k: v for k, v in s.items() if k != "step"})
    ),
    "two numbers of updates": edited("optimizer", of_first(lambda s: {**s, "step": 2})),
    "more updates than steps": edited("step", lambda s: s - 1),
    "a step below 0": edited("step", lambda s: -5),
    "a step that is no integer": edited("step", float),
    "no model's name": edited("config", lambda c: {k: v for k, v in c.items() if k != "model"}),
    "an unknown model": edited("config", lambda c: {**c, "model": "gpt5"}),
    "no flags": edited("config", lambda c: {"model": c["model"]}),
    "no dict as config": edited("config", lambda c: 3),
}


def test_a_checkpoint_that_loads_but_is_wrong_is_one_line(tmp_path):
    train.main(flags(tmp_path, "--subnets", 2, steps=3))
    path = tmp_path / "out" / "ckpt.pt"
    raw = path.read_bytes()
    for what, edit in WRONG.items():
        checkpoint = torch.load(io.BytesIO(raw), weights_only=True)
        edit(checkpoint)
        torch.save(checkpoint, path)
        with pytest.raises(data.UserError, match="checkpoint") as caught:
            train.main(flags(tmp_path, "--resume", "--subnets", 2, steps=4))
        assert "\n" not in str(caught.value), what
        if what in ("no model's name", "no flags"):
            with pytest.raises(data.UserError, match="checkpoint"):
                train.main(flags(tmp_path, "--resume", "--sample", "x"))
    path.write_bytes(raw)
    train.main(flags(tmp_path, "--resume", "--subnets", 2, steps=4))


def test_wrong_masks_in_a_checkpoint_are_not_used(tmp_path, capsys):
    train.main(flags(tmp_path, "--subnets", 2, steps=1))
    path, saved = tmp_path / "out" / "ckpt.pt", load(tmp_path)
    wrong = {b: torch.ones(len(mask), 3, dtype=torch.bool) for b, mask in saved["masks"].items()}
    for masks in wrong, {b: mask.int() for b, mask in saved["masks"].items()}, without_first(saved["masks"]):
        torch.save({**saved, "masks": masks}, path)
        train.main(flags(tmp_path, "--resume", "--subnets", 2, steps=2))
        assert "new masks" in capsys.readouterr().out
        assert all(torch.equal(mask, saved["masks"][b]) for b, mask in load(tmp_path)["masks"].items())


def test_an_out_dir_with_a_run_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    metrics = tmp_path / "out" / "metrics.jsonl"
    metrics.write_text("precious")
    refused(tmp_path, "already holds a run: --resume goes on with it, --overwrite replaces it")
    assert metrics.read_text() == "precious"
    (tmp_path / "file").write_text("")
    for out in "file", "file/out":
        refused(tmp_path, "(File exists|Not a directory): .*file", out=out)
    metrics.write_text("")                                           # of a run that never was
    train.main(flags(tmp_path, steps=1))


def differs(what, folder):
    """Rank 1 is started otherwise than rank 0."""
    os.chdir(folder)
    if dist.get_rank() == 1 and what == "data":
        os.chdir(folder / "other")
    if dist.get_rank() == 1 and what == "code":
        was, sdp.__file__ = sdp.__file__, str(folder / "other" / "sdp.py")
        return lambda: setattr(sdp, "__file__", was)


def on_rank_1(arguments, *more, **options):
    return train_on_pool(arguments + (list(more) if dist.get_rank() == 1 else []), **options)


def test_ranks_that_were_started_differently_are_told_apart(tmp_path):
    for folder in (tmp_path, tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        text_bin(folder)
    (tmp_path / "other" / "sdp.py").write_text("print('another version')")
    arguments = flags(tmp_path)
    for more in ["--lr", "0.1"], ["--seed", "7"], ["--masking", "backward"], ["--batch-size", "3"]:
        said = run_on(2, on_rank_1, arguments, *more)
        name = more[0].strip("-").replace("-", "_")
        assert said == [f"rank 1 was started with another {name} than rank 0"] * 2
    data.write_bin(tmp_path / "other" / "text.bin", np.arange(6000) % 200, 256)
    relative = ["text.bin" if a.endswith("text.bin") else a for a in arguments]
    for what, name in ("data", "contents of --data"), ("code", "code"):
        prepare = functools.partial(differs, what, tmp_path)
        said = run_on(2, functools.partial(on_rank_1, prepare=prepare), relative)
        assert said == [f"rank 1 was started with another {name} than rank 0"] * 2
    assert not (tmp_path / "out").exists()
    # The same name, another checkpoint
    for steps, folder in (1, tmp_path), (2, tmp_path / "other"):
        train.main(flags(tmp_path, "--overwrite", steps=steps))
        if folder != tmp_path:
            shutil.move(tmp_path / "out", folder / "out")
            train.main(flags(tmp_path, steps=1))
    relative = [
        a.replace(str(tmp_path) + "/", "") if a.endswith("/out") else a for a in flags(tmp_path, "--resume")
    ]
    said = run_on(
        2, functools.partial(on_rank_1, prepare=functools.partial(differs, "data", tmp_path)), relative
    )
    assert said == ["rank 1 was started with another checkpoint than rank 0"] * 2


def test_an_editor_s_files_do_not_stop_the_start(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, copy)
    (copy / ".#train.py").symlink_to("nobody@nowhere.1234")
    (copy / "broken.py").write_bytes(b"\xff")
    program = [sys.executable, "train.py", *flags(tmp_path, steps=1)]
    run = subprocess.run(program, cwd=copy, capture_output=True, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr


# -- A run is never lost ---------------------------------------------------------------------------

def test_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    train.main(flags(tmp_path))
    path = tmp_path / "out" / "ckpt.pt"
    raw = path.read_bytes()
    for damaged in (
        raw[:-1000],
        raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :],
    ):
        path.write_bytes(damaged)
        assert train.open_checkpoint(tmp_path / "out")["step"] == 3
        assert "is damaged, going on from" in capsys.readouterr().out


def test_random_damage_is_always_noticed(tmp_path):
    train.main(flags(tmp_path, steps=1))
    path, rng = tmp_path / "out" / "ckpt.pt", np.random.default_rng(0)
    raw = path.read_bytes()
    whole = torch.load(io.BytesIO(raw), weights_only=True)["model"]
    for _ in range(30):
        broken = bytearray(raw)
        if rng.random() < 0.3:
            del broken[rng.integers(2, len(raw)):]
        else:  # in the weights, or in the archive's own tables
            broken[
                rng.integers(2, len(raw)) if rng.random() < 0.5 else -rng.integers(1, 9000)
            ] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        try:  # a flip in a comment or time stamp does no harm
            found = train.open_checkpoint(tmp_path / "out")
            assert all(torch.equal(w, found["model"][n]) for n, w in whole.items())
        except data.UserError as e:
            assert "is damaged" in str(e)


def loss_is_nan_at(rank, steps):
    real, calls = llama.loss, [0]

    def loss(*args):
        # FLOPs are counted on the meta device
        trains = args[0].requires_grad and args[0].device.type == "cpu"
        calls[0] += trains
        return real(*args) * (math.nan if trains and calls[0] in steps and dist.get_rank() == rank else 1)
    llama.loss = loss
    return lambda: setattr(llama, "loss", real)


def test_an_update_that_is_not_finite_is_skipped_by_all_and_ten_end_the_run(tmp_path):
    prepare = functools.partial(loss_is_nan_at, 1, [2, 4])
    assert run_on(2, train_on_pool, flags(tmp_path, "--coverage", "1/2"), prepare) == [None, None]
    assert [m["skipped"] for m in metrics(tmp_path)] == [0, 1, 1, 2, 2, 2]
    saved = load(tmp_path)
    assert all(t.isfinite().all() for t in saved["model"].values()) and {
        s["step"] for s in saved["optimizer"].values()
    } == {4}
    prepare = functools.partial(loss_is_nan_at, 1, range(4, 99))
    said = run_on(2, train_on_pool, flags(tmp_path, "--coverage", "1/2", steps=20, out="lost"), prepare)
    assert said[0] == said[1] and "ten updates in a row, up to step 13" in said[0]
    assert load(tmp_path, "lost")["step"] == 12


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: [p.data.fill_(math.inf) for p in self.param_groups[0]["params"]],
    )
    refused(tmp_path, "weights are not finite any more, so not saved")
    assert not (tmp_path / "out" / "ckpt.pt").exists()


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    (tmp_path / "small").mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", tmp_path / "small"], capture_output=True
    ).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:  # a checkpoint has 21 MB: two fit, a third does not
        refused(tmp_path, "cannot write .*ckpt.pt: .*--resume", out="small/out", *["--steps", "12"])
        assert sorted(os.listdir(tmp_path / "small" / "out")) == [
            "ckpt.prev.pt",
            "ckpt.pt",
            "lock",
            "metrics.jsonl",
        ]
        assert load(tmp_path, "small/out")["step"] == 6
        (tmp_path / "small" / "out" / "ckpt.prev.pt").unlink()
        train.main(flags(tmp_path, "--resume", out="small/out", steps=7))
    finally:
        subprocess.run(["umount", tmp_path / "small"])


def test_a_checkpoint_has_its_name_only_when_it_and_the_folder_are_on_the_disk(tmp_path, monkeypatch):
    synced = []
    real_replace, real_fsync = os.replace, os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name) or real_fsync(fd)
    )
    monkeypatch.setattr(os, "replace", lambda a, b: synced.append(f"-> {Path(b).name}") or real_replace(a, b))
    train.main(flags(tmp_path))
    assert synced == ["-> metrics.jsonl", "ckpt.pt.part", "-> ckpt.pt", "out",
                      "ckpt.pt.part", "-> ckpt.prev.pt", "-> ckpt.pt", "out"]


class Torchrun:
    """A running torchrun, whose workers can be killed."""

    def __init__(self, ranks, arguments, restarts=0, script="train.py"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        self.process = subprocess.Popen(
            [*command, f"--max-restarts={restarts}", script, *arguments],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
        )

    def workers(self):
        """The processes that still live; Z is one that has ended and whose parent has not looked yet."""
        out = subprocess.run(
            ["ps", "-o", "pid=,stat=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        ).stdout
        return [int(line.split()[0]) for line in out.splitlines() if "Z" not in line.split()[1]]

    def wait_for_line(self, path, count, seconds=120):
        end = time.monotonic() + seconds
        while not path.exists() or len(path.read_text().splitlines()) < count:
            assert time.monotonic() < end and self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)

    def end(self, seconds=150):
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err


def alive(process):
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0]
    except OSError:
        return False


def kill_and_finish(folder, kills, seed):
    rng, path = np.random.default_rng(seed), folder / "killed" / "metrics.jsonl"
    more = ["--coverage", "1/2", "--save-every", "2", "--eval-every", "3"]
    assert run_on(2, train_on_pool, flags(folder, *more, out="whole", steps=6 + 3 * kills)) == [None, None]
    run = Torchrun(2, flags(folder, *more, "--resume", out="killed", steps=6 + 3 * kills), restarts=kills)
    for kill in range(kills):  # in the midst of a step, an evaluation or a save
        run.wait_for_line(path, 2 + 3 * kill)
        time.sleep(rng.uniform(0, 0.5))
        victims = run.workers()
        if victims:
            os.kill(int(rng.choice(victims)), signal.SIGKILL)
        while set(run.workers()) & set(victims) and run.process.poll() is None:
            time.sleep(0.02)
    code, out, err = run.end(60 * (2 + kills))
    assert code == 0, out + err
    assert same_checkpoint(folder / "whole", folder / "killed")
    whole, killed = metrics(folder, "whole"), metrics(folder, "killed")
    assert [m["step"] for m in whole] == [m["step"] for m in killed] and whole[-1]["val_loss"] == killed[-1][
        "val_loss"
    ]


def test_killed_workers_come_back_and_the_result_is_the_same(tmp_path):
    kill_and_finish(tmp_path, 1, 0)


@slow
@only_when_asked
def test_twenty_kills(tmp_path):
    kill_and_finish(tmp_path, 20, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_lets_the_update_end_and_saves(tmp_path, monkeypatch, capsys, number):
    real = data.Tokens.batch

    def batch(self, split, step, worker, workers):
        if (split, step, worker) == ("train", 1, 0):                 # once: a second SIGINT would end the run
            signal.raise_signal(number)
        return real(self, split, step, worker, workers)
    monkeypatch.setattr(data.Tokens, "batch", batch)
    monkeypatch.setattr(train, "STOP", False)                        # and so it is again after the test
    before = signal.getsignal(number)
    try:
        train.main(flags(tmp_path, steps=5))
    finally:
        signal.signal(number, before)
    said = capsys.readouterr().out
    assert "told to stop: saved after step 2" in said and "sample" not in said
    assert load(tmp_path)["step"] == 2


@pytest.mark.parametrize("stops", [
    [("torchrun", signal.SIGTERM)],
    when_asked([("worker", signal.SIGTERM), ("torchrun", signal.SIGTERM), ("worker", signal.SIGHUP)]),
])
def test_a_signal_under_torchrun_saves_and_the_run_goes_on_from_there(tmp_path, stops):
    """One worker is told to end, or, as a cluster does it, torchrun, which tells all."""
    few = ["--coverage", "1/2", "--eval-every", 100, "--save-every", 100]
    assert run_on(2, train_on_pool, flags(tmp_path, *few, out="whole", steps=60)) == [None, None]
    lines, saved = 4, 0
    for target, number in stops:
        run = Torchrun(2, flags(tmp_path, *few, "--resume", steps=60))
        run.wait_for_line(tmp_path / "out" / "metrics.jsonl", lines)
        os.kill(run.workers()[1] if target == "worker" else run.process.pid, number)
        code, out, err = run.end()
        assert "told to stop: saved after step" in out and "error:" not in err, err
        assert code == 0 or target == "torchrun"  # torchrun itself says that it was interrupted
        saved, before = load(tmp_path)["step"], saved
        assert before < saved < 60
        lines = saved + 2
    assert run_on(2, train_on_pool, flags(tmp_path, *few, "--resume", steps=60)) == [None, None]
    assert same_checkpoint(tmp_path / "whole", tmp_path / "out")


SLOW_TO_SAVE = """
import sys, time, train
real, seconds = train.write_checkpoint, int(sys.argv.pop())

def slowly(*args):
    print("saving", flush=True)
    time.sleep(seconds)
    real(*args)

train.write_checkpoint = slowly
train.run(train.main)
"""


@pytest.mark.parametrize("presses,code,said", [
    when_asked(1, 0, ""),
    (2, 130, "error: interrupted once more: nothing else is saved\n"),
])
def test_ctrl_c_saves_and_a_second_one_does_not_wait(tmp_path, presses, code, said):
    arguments = [*flags(tmp_path, "--save-every", 5000, steps=5000), str(60 * (presses - 1))]
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW_TO_SAVE, *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    lines = iter(run.stdout.readline, "")
    next(line for line in lines if line.startswith("step "))
    run.send_signal(signal.SIGINT)
    if presses == 2:
        next(line for line in lines if line == "saving\n")
        run.send_signal(signal.SIGINT)
    shown, errors = run.communicate(timeout=50)
    assert run.returncode == code and errors == said
    assert (
        ("told to stop: saved after step" in shown)
        == (tmp_path / "out" / "ckpt.pt").exists()
        == (presses == 1)
    )


def test_an_out_dir_has_one_owner_and_workers_end_with_torchrun(tmp_path):
    run = Torchrun(2, flags(tmp_path, steps=5000))
    run.wait_for_line(tmp_path / "out" / "metrics.jsonl", 2)
    for more in ["--resume"], ["--overwrite"]:
        refused(tmp_path, "another run is at work in .*out", *more)
    workers = run.workers()
    run.process.kill()                                               # nobody tells the workers
    run.process.wait()
    end = time.monotonic() + 60
    while any(map(alive, workers)):
        assert time.monotonic() < end, "the orphans go on"
        time.sleep(0.1)
    assert [m["step"] for m in metrics(tmp_path)] == list(range(1, len(metrics(tmp_path)) + 1))
    step = load(tmp_path)["step"]                                    # they have saved, too
    train.main(flags(tmp_path, "--resume", steps=step + 1))


@pytest.mark.parametrize("how", [when_asked(signal.SIGKILL), signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_rank_that_dies_or_hangs_ends_the_others_with_a_line(tmp_path, how):
    run = Torchrun(2, flags(tmp_path, "--coverage", "1/2", "--timeout", "5", steps=5000))
    run.wait_for_line(tmp_path / "out" / "metrics.jsonl", 2)
    workers = run.workers()
    os.kill(workers[1], how)
    start = time.monotonic()
    # torchrun itself waits for the stopped one
    while workers[0] in run.workers() and time.monotonic() < start + 45:
        time.sleep(0.1)
    seconds = time.monotonic() - start
    if how == signal.SIGSTOP:
        os.kill(workers[1], signal.SIGKILL)
    code, out, err = run.end()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (
        code and seconds < 40 and lines and all("lost the other workers" in line for line in lines)
    ), err
    assert 'train.py", line' not in err


SLOW_RANK_0 = """
import os, sys, time
sys.path.insert(0, {root!r})
import train
real_fsync = os.fsync

def slow_fsync(fd):
    time.sleep(8)
    real_fsync(fd)

os.fsync = slow_fsync
train.run(train.main)
"""


def test_what_rank_0_does_alone_does_not_count_against_the_others_patience(tmp_path):
    """A slow disk, two waits of 8 s a checkpoint, with --timeout 5."""
    (tmp_path / "slow.py").write_text(SLOW_RANK_0.format(root=str(ROOT)))
    torchrun(2, flags(tmp_path, "--timeout", "5", steps=1), script=str(tmp_path / "slow.py"))
    assert load(tmp_path)["step"] == 1


@contextmanager
def two_hosts(rate=None):
    """Two network namespaces joined by a cable of `rate` (like "1gbit"), with half of the cores each.

    Yields torchrun(arguments, script), two ranks on each.
    """
    def run(*words):
        return subprocess.run(words, capture_output=True).returncode == 0

    hosts = [f"sdp{os.getpid()}{i}" for i in (0, 1)]
    if not shutil.which("ip") or not all([run("ip", "netns", "add", host) for host in hosts]):
        pytest.skip("network namespaces are not allowed here")

    def torchrun_on_both(arguments, script="train.py", timeout=240):
        runs, cores = [], sorted(os.sched_getaffinity(0))
        try:
            for i, host in enumerate(hosts):                         # hosts do not share cores
                os.sched_setaffinity(0, cores[i::2] or cores)        # a process begins with its parent's
                command = [
                    "ip",
                    "netns",
                    "exec",
                    host,
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nnodes=2",
                    "--nproc-per-node=2",
                    "--rdzv-backend=c10d",
                    "--rdzv-endpoint=10.77.0.1:29400",
                    f"--rdzv-conf=is_host={1 - i}",
                    f"--local-addr=10.77.0.{i + 1}",
                    script,
                    *arguments,
                ]
                runs.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        text=True,
                        env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": f"sdp{i}"},
                    )
                )
        finally:
            os.sched_setaffinity(0, cores)
        said = [run.communicate(timeout=timeout)[0] for run in runs]
        assert all(run.returncode == 0 for run in runs), said
        return said[0] + said[1]
    try:
        assert run(
            "ip",
            "link",
            "add",
            "sdp0",
            "netns",
            hosts[0],
            "type",
            "veth",
            "peer",
            "name",
            "sdp1",
            "netns",
            hosts[1],
        )
        for i, host in enumerate(hosts):
            assert run("ip", "-n", host, "addr", "add", f"10.77.0.{i + 1}/24", "dev", f"sdp{i}")
            assert run("ip", "-n", host, "link", "set", f"sdp{i}", "up") and run(
                "ip", "-n", host, "link", "set", "lo", "up"
            )
            if rate and not run(
                "ip",
                "netns",
                "exec",
                host,
                "tc",
                "qdisc",
                "add",
                "dev",
                f"sdp{i}",
                "root",
                "tbf",
                "rate",
                rate,
                "burst",
                "256kb",
                "latency",
                "50ms",
            ):
                pytest.skip("links cannot be made slow here")
        yield torchrun_on_both
    finally:
        for host in hosts:
            run("ip", "netns", "del", host)


@slow
@only_when_asked
def test_two_hosts_give_the_losses_of_one(tmp_path):
    """The command for several machines, the machines being two network namespaces joined by a cable."""
    more = ["--level", "neuron", "--masking", "backward"]
    with two_hosts() as run:
        assert "4 workers, cpu" in run(flags(tmp_path, *more, out="two"))
    train.main(flags(tmp_path, *more, "--subnets", "4", out="one"))
    for two, one in zip(metrics(tmp_path, "two"), metrics(tmp_path, "one"), strict=True):
        assert all(
            two[key] == pytest.approx(one[key], rel=1e-5) for key in ("loss", "val_loss") if key in one
        )
