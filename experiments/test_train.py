"""
Tests of runs: what train.py computes, writes, refuses and survives.

    python -m pytest -q experiments/test_train.py          (-m slow for those of many minutes)

Most runs are in this process, or in test_sdp.py's pool of workers.  Only a test about processes starts any,
as each imports torch, which takes seconds.
"""

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
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from inspect import getsource
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
with warnings.catch_warnings():                                      # pytest wants marks listed in a file
    warnings.simplefilter("ignore")
    slow = pytest.mark.slow
only_when_asked = pytest.mark.skipif("slow" not in sys.argv, reason="takes minutes: python -m pytest -m slow")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL_LLAMA = llama.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3)
SMALL_RESNET = resnet.ResNetConfig(widths=(6, 7, 9, 10))


def when_asked(*values):
    """A case of a parametrized test that only -m slow runs."""
    return pytest.param(*values, marks=[slow, only_when_asked])


# -- Ways to run train.py --------------------------------------------------------------------------

def remembered(make_masks):
    """A mask function that searches only once."""
    known = {}

    def once(*args):
        key = repr(args)
        if key not in known:
            known[key] = make_masks(*args)
        return known[key]
    return once


MASKS = {level: remembered(make_masks) for level, make_masks in sdp.MASKS.items()}
MEASURE_FLOPS = train.measure_flops


def six_per_weight(model, batch):
    """FLOPs, roughly, for tests of other things: to count them takes longer than a run."""
    return 6 * batch[1].numel() * sum(p.numel() for p in model.parameters())


def make_small(patch):
    """llama-tiny, resnet18 and shapes as these tests have them: a run takes a second."""
    patch.setitem(llama.PRESETS, "llama-tiny", SMALL_LLAMA)
    patch.setitem(resnet.PRESETS, "resnet18", SMALL_RESNET)
    patch.setattr(train, "STATISTICS_IMAGES", 32)
    patch.setattr(train, "measure_flops", six_per_weight)
    for level, make_masks in MASKS.items():
        patch.setitem(sdp.MASKS, level, make_masks)
    shapes = data.shapes

    def few_shapes(count, rng):
        return shapes(count // 40, rng)                              # 250 to train on, 50 to validate
    patch.setattr(data, "shapes", few_shapes)


@pytest.fixture(autouse=True)
def small_runs(monkeypatch):
    """A run in this process leaves its handlers of signals, and its lock, to the process's end."""
    make_small(monkeypatch)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    if train.LOCK:
        train.LOCK.close()


def train_on_pool(arguments, prepare=None, main=train.main):
    """train.main in a process of the pool, as a rank of torchrun's would run it -> None or what it refused.

    prepare(patch) changes something there, with a pytest.MonkeyPatch.
    """
    here = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        patch.setattr(train, "DISTRIBUTED", True)
        patch.setattr(train, "RANK", dist.get_rank())
        patch.setattr(train, "WORLD", dist.get_world_size())
        patch.setattr(train, "STOP", False)
        patch.setattr(train, "start_processes", a_cpu)
        patch.setattr(train, "say", be_silent)
        if prepare:
            prepare(patch)
        try:
            main(arguments)
        except data.UserError as e:
            return str(e)
        finally:
            os.chdir(here)
            for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
                signal.signal(number, signal.SIG_DFL)                # as they were


def a_cpu(*_):
    return torch.device("cpu")


def be_silent(*_):
    pass


def small_program(folder, more=""):
    """train.py with the small LLaMA, as a script for torchrun.  more: lines that change something else."""
    script = folder / "small.py"
    lines = [
        "import os, sys, time",
        f"sys.path.insert(0, {str(ROOT)!r})",
        "import model_llama as llama, train",
        f"llama.PRESETS['llama-tiny'] = llama.{SMALL_LLAMA}",
        getsource(six_per_weight),
        "train.measure_flops = six_per_weight",
        more,
        "train.run(train.main)",
    ]
    script.write_text("\n".join(lines))
    return str(script)


class Torchrun:
    """A running torchrun, whose workers can be killed."""

    def __init__(self, ranks, script, arguments, restarts=0):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
                   f"--max-restarts={restarts}", script, *arguments]
        # Files, as a pipe that nobody reads would fill up, and then rank 0 would wait
        self.written = [tempfile.TemporaryFile("w+") for _ in range(2)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self.written[0], stderr=self.written[1],
                                        env=ENVIRONMENT)

    def workers(self):
        """The processes that still live."""
        command = ["ps", "-o", "pid=", "--ppid", str(self.process.pid)]
        out = subprocess.run(command, capture_output=True, text=True).stdout
        return [process for process in map(int, out.split()) if alive(process)]

    def wait_for_line(self, path, count, seconds=120):
        end = time.monotonic() + seconds
        while not path.exists() or len(path.read_text().splitlines()) < count:
            assert time.monotonic() < end and self.process.poll() is None, self.said()
            time.sleep(0.02)

    def said(self):
        """-> what it has written to standard output, and to standard error."""
        for file in self.written:
            file.seek(0)
        return [file.read() for file in self.written]

    def end(self, seconds=150):
        code = self.process.wait(seconds)
        return code, *self.said()


def alive(process):
    """Z is one that has ended and whose parent has not looked yet."""
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0]
    except OSError:
        return False


def text_bin(folder, name="text", count=2400, vocab=256):
    """Words of three tokens, so that there is something to learn."""
    rng = np.random.default_rng(0)
    words = rng.integers(min(vocab, 100), size=(20, 3))
    tokens = words[rng.integers(20, size=count // 3 + 1)].flatten()[:count]
    data.write_bin(folder / f"{name}.bin", tokens, vocab)
    return str(folder / f"{name}.bin")


def usual(folder, out, steps):
    usual = f"--save-every 3 --eval-every 4 --log-every 1 --device cpu --steps {steps} --out-dir"
    return [*usual.split(), str(folder / out)]


def flags(folder, *more, out="out", steps=6):
    text = folder / "text.bin"
    if not text.exists():
        text_bin(folder)
    sizes = ["--data", str(text), "--batch-size", "2", "--seq-len", "12"]
    return [*usual(folder, out, steps), *sizes, *map(str, more)]


def image_flags(folder, *more, out="out", steps=6):
    sizes = ["--model", "resnet18", "--data", "shapes", "--batch-size", "4"]
    return [*usual(folder, out, steps), *sizes, *map(str, more)]


def metrics(folder, out="out"):
    return [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]


def load(folder, out="out", name="ckpt.pt"):
    return torch.load(folder / out / name, weights_only=True)


def check_same(a, b):
    """Two checkpoints have the same model and optimizer state, bit for bit."""
    assert a["step"] == b["step"]
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name
    check_same_optimizer(a, b)


def check_same_optimizer(a, b):
    for name, state in a["optimizer"].items():
        for key, value in state.items():
            if torch.is_tensor(value):
                assert torch.equal(value, b["optimizer"][name][key]), (name, key)


def refused(folder, message, *arguments, out="out"):
    """train.main says one line."""
    with pytest.raises((data.UserError, OSError), match=message) as caught:
        train.main(flags(folder, *arguments, out=out))
    assert "\n" not in str(caught.value)


# -- What a run computes and writes ----------------------------------------------------------------

class OtherNumbers:
    """An encoding in which a newline is not token 10, as in GPT-2's."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode_ordinary(self, text):
        return [(byte + 1) % self.vocab_size for byte in text.encode()]

    def decode(self, tokens):
        return bytes((token - 1) % self.vocab_size for token in tokens).decode("latin-1")


def test_checkpoint_is_an_ordinary_llama(tmp_path, capsys, monkeypatch):
    """transformers loads it unchanged, with the same logits and the validation loss that we measured."""
    from transformers import LlamaConfig, LlamaForCausalLM
    train.main(flags(tmp_path, "--level", "neuron", "--masking", "backward"))
    shown = capsys.readouterr().out
    for words in "full model: validation loss", "gradients, MB", "█", "validation: the last tenth":
        assert words in shown
    saved = load(tmp_path)
    assert set(saved) == {"model", "optimizer", "step", "config", "masks"} and saved["step"] == 6
    fields = {k: saved["config"][k] for k in asdict(llama.LlamaConfig())}
    assert fields["num_key_value_heads"] < fields["num_attention_heads"]         # grouped-query attention
    theirs = LlamaForCausalLM(LlamaConfig(**fields))
    theirs.load_state_dict(saved["model"])
    ours = llama.Llama(llama.LlamaConfig(**fields))
    ours.load_state_dict(saved["model"])
    x = torch.randint(256, (2, 50))
    torch.testing.assert_close(theirs(x).logits, ours(x), rtol=1e-4, atol=1e-4)
    dataset = data.load(str(tmp_path / "text.bin"), 50, 12, 0)
    x, y = dataset.batch("val", 0, 0, 1)
    assert len(x) == dataset.val_count
    with torch.no_grad():
        loss = nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()
    assert metrics(tmp_path)[-1]["val_loss"] == pytest.approx(loss, rel=1e-5)
    for name, state in saved["optimizer"].items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == saved["model"][name].shape
        assert state["step"] == 6
    for text, start in ("def ", "def "), ("", "\n"):                 # a text cannot begin with nothing
        train.main(["--resume", "--out-dir", str(tmp_path / "out"), "--sample", text, "--device", "cpu"])
        assert capsys.readouterr().out.startswith(start)
    monkeypatch.setattr(data, "encoding_for", OtherNumbers)
    train.main(["--resume", "--out-dir", str(tmp_path / "out"), "--sample", "", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("\n")


SLOW_DISK = """
real_fsync = os.fsync

def slow_fsync(fd):
    os.fsync = real_fsync                                            # only once
    time.sleep(6)
    real_fsync(fd)

os.fsync = slow_fsync
"""


def test_torchrun_equals_plain_python_and_writes_the_contract_s_metrics(tmp_path):
    """And what rank 0 does alone, here on a slow disk, does not count against the others' patience."""
    more = ["--level", "neuron", "--coverage", "1/2", "--grad-accum", 2]
    arguments = flags(tmp_path, *more, "--timeout", 4, out="many")
    code, out, err = Torchrun(2, small_program(tmp_path, SLOW_DISK), arguments).end()
    assert code == 0, out + err
    train.main(flags(tmp_path, *more, "--subnets", 2, out="one"))
    many, one = metrics(tmp_path, "many"), metrics(tmp_path, "one")
    assert [m["step"] for m in many] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(many, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["sent_bytes"] > 0 == b["sent_bytes"] and a["peak_mem_bytes"] is None and a["skipped"] == 0
        assert {"lr", "step_ms", "tokens_per_s"} <= a.keys()
        assert a["flops"] == b["flops"] == pytest.approx(a["step"] * many[0]["flops"])
    assert [m["step"] for m in many if "val_loss" in m] == [4, 6]
    assert many[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-5)
    masks = [load(tmp_path, out)["masks"] for out in ("many", "one")]
    assert all(torch.equal(m, masks[1][b]) for b, m in masks[0].items())


@pytest.mark.parametrize("parallel", ["ddp", "sdp"])
def test_flops_are_the_ones_that_the_operations_need(tmp_path, monkeypatch, parallel):
    """6 FLOPs for each weight of a matrix and token, and those of attention: counted by hand."""
    c = llama.LlamaConfig()
    monkeypatch.setitem(llama.PRESETS, "llama-tiny", c)
    monkeypatch.setattr(train, "measure_flops", MEASURE_FLOPS)
    more = ["--parallel", parallel, "--coverage", "1", "--subnets", 2, "--grad-accum", 3]
    train.main(flags(tmp_path, *more, steps=2))
    shapes = {name: shape for name, (_, _, shape) in llama.layout(c).items()}
    matrices = sum(s.numel() for name, s in shapes.items() if len(s) > 1 and "embed" not in name)
    # q k^T and times v, 12 positions, forward and 2x backward
    scores = 2 * 2 * c.hidden_size * 12 * 3 * c.num_hidden_layers
    wanted = 2 * 12 * 6 * matrices + 2 * 12 * scores                 # of a batch of 2 x 12
    first, last = metrics(tmp_path)
    assert last["flops"] == pytest.approx(2 * 3 * wanted, rel=0.15)  # the softmax is somebody else's
    assert first["flops"] == pytest.approx(last["flops"] / 2)


@pytest.mark.parametrize("level,masking,more", [
    ("block", "forward", ["--checkpoint-activations"]), ("neuron", "backward", [])])
def test_resnet_on_real_workers_equals_plain_python(tmp_path, capsys, level, masking, more):
    same = ["--level", level, "--masking", masking, "--coverage", "1/2"]
    assert run_on(2, train_on_pool, image_flags(tmp_path, *same, *more, out="many")) == [None, None]
    train.main(image_flags(tmp_path, *same, "--subnets", 2, out="one"))
    assert "resnet18 on shapes (synthetic)" in capsys.readouterr().out
    many, one = metrics(tmp_path, "many"), metrics(tmp_path, "one")
    for a, b in zip(many, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and a["images_per_s"] > 0
    assert many[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert [m["step"] for m in many if "val_acc" in m] == [4, 6]
    assert {"val_loss", "val_acc"} <= many[-1].keys()
    many, one = (load(tmp_path, out)["model"] for out in ("many", "one"))
    assert many.keys() == one.keys()
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("stem", ["cifar", when_asked("imagenet")])
def test_checkpoint_is_torchvision_s_resnet18(tmp_path, monkeypatch, stem):
    """torchvision loads it and gives the same logits and the same validation loss.

    Its batch norm statistics are those of torch's own update_bn over the same batches.
    """
    from torchvision.models import resnet18
    monkeypatch.setitem(resnet.PRESETS, "resnet18", resnet.ResNetConfig(stem=stem))
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
        outputs, y = torch.cat([theirs(x) for x, _ in batches]), torch.cat([y for _, y in batches])
    last = metrics(tmp_path)[-1]
    assert last["val_loss"] == pytest.approx(nn.functional.cross_entropy(outputs, y).item(), rel=1e-4)
    assert last["val_acc"] == pytest.approx((outputs.argmax(1) == y).float().mean().item())
    batches = [dataset.batch("train", i, worker, 2)[0] for i in range(4) for worker in range(2)]
    torch.optim.swa_utils.update_bn(batches, theirs)
    for name, b in theirs.named_buffers():
        torch.testing.assert_close(saved["model"][name], b, rtol=1e-4, atol=1e-5)
    state = saved["optimizer"]["layer1.0.conv1.weight"]
    assert state["momentum_buffer"].shape == (64, 64, 3, 3) and state["step"] == 2
    with pytest.raises(data.UserError, match="--sample prints text"):
        train.main(["--resume", "--out-dir", str(tmp_path / "out"), "--sample", "x", "--device", "cpu"])


def test_flop_match_lengthens_the_run(tmp_path, monkeypatch):
    """Half of the branches, all of embedding and head: 9 to 12 updates instead of 6, of as many FLOPs."""
    monkeypatch.setattr(train, "measure_flops", MEASURE_FLOPS)
    train.main(flags(tmp_path, "--coverage", "1/2", "--flop-match", "--subnets", 4))
    train.main(flags(tmp_path, "--parallel", "ddp", out="ddp"))
    last, ddp = metrics(tmp_path)[-1], metrics(tmp_path, "ddp")[-1]
    assert 9 <= last["step"] <= 12
    assert last["flops"] == pytest.approx(ddp["flops"], abs=last["flops"] / last["step"])


@pytest.mark.parametrize("steps,warm", [(250, 100), (10_000, 1000)])
def test_the_learning_rate_rises_for_two_fifths_or_1000_updates_and_then_falls(steps, warm):
    rates = np.array([train.learning_rate(step, steps, 3.0, 0.1) for step in range(steps)])
    np.testing.assert_allclose(rates[:warm], 3.0 * np.arange(1, warm + 1) / warm)
    assert (np.diff(rates[warm:]) < 0).all() and rates[warm] == 3.0
    assert rates[-1] == pytest.approx(0.3, rel=0.01)
    assert rates[(steps + warm) // 2] == pytest.approx(1.65)        # half of the way down


def compile_without_cpp(patch):
    """What torch.compile captures runs as it is: a compiler would take most of the time."""
    patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.mark.parametrize("masking,more,tolerance,prepare", [
    ("forward", ["--checkpoint-activations"], 1e-4, None),
    when_asked("forward", ["--compile"], 1e-4, None),
    when_asked("backward", ["--compile"], 1e-4, None),
    ("backward", ["--compile"], 1e-4, compile_without_cpp),
    ("forward", ["--dtype", "bf16"], 0.02, None),
    ("backward", ["--reduce-dtype", "bf16"], 0.01, None),
])
def test_the_same_losses_with_another_way_to_compute(tmp_path, masking, more, tolerance, prepare):
    same = ["--coverage", "1/2", "--masking", masking]
    train.main(flags(tmp_path, "--subnets", 2, *same, out="plain", steps=4))
    assert run_on(2, train_on_pool, flags(tmp_path, *same, *more, steps=4), prepare) == [None, None]
    for a, b in zip(metrics(tmp_path, "plain"), metrics(tmp_path), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)


def test_ddp_is_the_simulation_at_coverage_1_and_sends_half_in_bfloat16(tmp_path):
    train.main(flags(tmp_path, "--subnets", 2, "--coverage", "1", out="one"))
    train.main(flags(tmp_path, "--subnets", 2, "--parallel", "ddp", out="alone"))
    for out, more, tolerance in ("fp32", [], 1e-4), ("bf16", ["--reduce-dtype", "bf16"], 0.01):
        assert run_on(2, train_on_pool, flags(tmp_path, "--parallel", "ddp", *more, out=out)) == [None, None]
        rows = [metrics(tmp_path, name) for name in (out, "one", "alone")]
        for ddp, one, alone in zip(*rows, strict=True):
            assert ddp["loss"] == pytest.approx(one["loss"], rel=tolerance)
            assert alone["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert ddp["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.05)
    numel = sum(w.numel() for w in load(tmp_path, "fp32")["model"].values())
    sent, half = (metrics(tmp_path, out)[0]["sent_bytes"] for out in ("fp32", "bf16"))
    assert sent == 4 * numel == 2 * half


def test_blocks_of_one_size_are_compiled_once(monkeypatch):
    compile_without_cpp(monkeypatch)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = llama.Llama(SMALL_LLAMA)
    train.compile_blocks(model)
    model(*torch.randint(256, (2, 2, 9)).unbind()).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 < SMALL_LLAMA.num_hidden_layers


def test_training_imports_nothing_private_of_torch():
    assert not re.search(r"torch[\w.]*\._[a-z]", (ROOT / "train.py").read_text())


# -- Going on --------------------------------------------------------------------------------------

@pytest.mark.parametrize("ranks,make_flags,more", [
    (2, flags, ["--masking", "backward", "--coverage", "1/2"]),
    (2, flags, ["--parallel", "ddp"]),
    (1, flags, []),
    (1, image_flags, ["--level", "neuron"]),
])
def test_resume_gives_the_uninterrupted_run_bit_for_bit(tmp_path, ranks, make_flags, more):
    def go(out, *extra):
        arguments = make_flags(tmp_path, *more, *extra, out=out)
        if ranks > 1:
            assert run_on(ranks, train_on_pool, arguments) == [None] * ranks
        else:
            train.main(arguments)
    go("whole")
    (tmp_path / "cut").mkdir()
    shutil.copy(tmp_path / "whole" / "ckpt.prev.pt", tmp_path / "cut" / "ckpt.pt")       # step 3
    lines = (tmp_path / "whole" / "metrics.jsonl").read_bytes().splitlines(True)
    # Two lines beyond the checkpoint, and what a crash may leave
    crashed = b"".join(lines[:5]) + b"\xff\x00\x80\n[1]\n" + lines[5][:20]
    (tmp_path / "cut" / "metrics.jsonl").write_bytes(crashed)
    go("cut", "--resume")
    check_same(load(tmp_path, "whole"), load(tmp_path, "cut"))
    for x, y in zip(metrics(tmp_path, "whole"), metrics(tmp_path, "cut"), strict=True):
        assert all(x.get(k) == y.get(k) for k in ("step", "loss", "lr", "grad_norm", "flops", "val_loss"))


def optimizers_stand_still(patch):
    for kind in torch.optim.AdamW, torch.optim.SGD:
        patch.setattr(kind, "step", be_silent)


LAYOUTS = [(2, ["--parallel", "ddp"]), (2, ["--coverage", "1/2"]),
           (3, ["--masking", "backward", "--level", "neuron", "--coverage", "2/3"]),
           (4, ["--masking", "backward", "--subnets", "2", "--coverage", "1/2"]), (1, [])]


@pytest.mark.parametrize("make_flags,layouts", [
    (flags, LAYOUTS), (image_flags, LAYOUTS[::2])], ids=["Llama", "ResNet"])
def test_a_checkpoint_resumes_bit_for_bit_under_any_layout(tmp_path, make_flags, layouts):
    """A run is resumed under five layouts in a row, of a ResNet three.

    The first time it takes no step, only saves: model and optimizer are the saved ones, bit for bit.
    Then it trains on, and the loss stays sane.
    """
    step, path = 0, tmp_path / "out" / "ckpt.pt"
    for workers, layout in layouts:
        if step:                        # one update that changes nothing, then back to the step before
            before, raw = load(tmp_path), path.read_bytes()
            arguments = make_flags(tmp_path, "--resume", *layout, steps=step + 1)
            assert run_on(workers, train_on_pool, arguments, optimizers_stand_still) == [None] * workers
            after = load(tmp_path)
            assert all(torch.equal(before["model"][n], after["model"][n]) for n in before["optimizer"])
            check_same_optimizer(before, after)
            path.write_bytes(raw)
        step += 3
        arguments = make_flags(tmp_path, "--resume", *layout, steps=step)
        assert run_on(workers, train_on_pool, arguments) == [None] * workers
        saved = load(tmp_path)
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
    assert "the masks are the saved ones" in out and sdp.picture(masks, llama.branches(SMALL_LLAMA)) in out
    for changed in "seed 2 (was 1)", "lr 0.001 (was 0.002)", "batch_size 1 (was 2)":
        assert changed in out
    said("--seed", 2, steps=3)                                       # the masks are still those of seed 1
    assert all(torch.equal(m, masks[b]) for b, m in load(tmp_path)["masks"].items())
    assert "new masks: today's flags" in said("--coverage", "1/3", steps=4)
    again = {b: m.roll(1, 1) for b, m in load(tmp_path)["masks"].items()}
    monkeypatch.setitem(sdp.MASKS, "block", lambda *_: again)
    assert "mask function do not make the saved ones" in said("--coverage", "1/3", steps=5)
    assert all(torch.equal(m, again[b]) for b, m in load(tmp_path)["masks"].items())
    out = said("--coverage", "1/3", steps=5)
    assert "nothing to do" in out and "is of step 5 of 5" in out and "sample" not in out


def test_contents_of_the_data_decide_not_their_name(tmp_path):
    train.main(flags(tmp_path, steps=1))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "text.bin", tmp_path / "elsewhere" / "moved.bin")
    same = [*usual(tmp_path, "out", 2), "--batch-size", "2", "--seq-len", "12", "--resume"]
    moved = [*same, "--data", str(tmp_path / "elsewhere" / "." / "moved.bin")]
    train.main(moved)
    assert load(tmp_path)["step"] == 2
    text_bin(tmp_path / "elsewhere", "moved", count=2403)
    for arguments in moved, same:
        with pytest.raises(data.UserError, match="contradicts the checkpoint"):
            train.main(arguments)
    message = "--model llama-134m contradicts the checkpoint, which has llama-tiny"
    with pytest.raises(data.UserError, match=message):
        train.main([*moved, "--model", "llama-134m"])


def test_a_vocabulary_without_tokenizer_trains_to_the_end(tmp_path):
    data.write_bin(tmp_path / "text.bin", np.arange(6000) % 900, 1000)
    train.main(flags(tmp_path, steps=2))
    with pytest.raises(data.UserError, match="no tokenizer is known for a vocabulary of 1000"):
        train.main(flags(tmp_path, "--resume", "--sample", "x"))
    data.write_bin(tmp_path / "text.bin", np.arange(6000) % 900, 901)
    refused(tmp_path, "the checkpoint's model has other names, shapes or types", "--resume")


def test_a_run_whose_first_updates_were_all_skipped_resumes(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        loss_is_nan_at(range(99), patch)
        train.main(flags(tmp_path, steps=3))
    for state in load(tmp_path)["optimizer"].values():
        assert state["step"] == 0 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()
    first = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0]
    first = json.loads(first, parse_constant=refuse_constant)
    assert first["loss"] is None and first["skipped"] == 1           # JSON, not NaN
    train.main(flags(tmp_path, "--resume", steps=6))
    assert all(state["step"] == 3 for state in load(tmp_path)["optimizer"].values())
    assert metrics(tmp_path)[-1]["loss"] > 0


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


# -- What is refused -------------------------------------------------------------------------------

BAD = [
    (["--coverage", "0.7", "--subnets", "4"], r"--coverage 0.7 is none of k/4"),
    (["--coverage"], "--coverage: expected one argument"),
    (["--subnets", "two"], "--subnets: invalid"),
    (["--model", "gpt5"], "invalid choice: 'gpt5'"),
    (["--data", "none.bin"], "no file none.bin: make it"),
    (["--data", "wikipedia"], "unknown --data wikipedia"),
    (["--data", ""], "unknown --data"),
    (["--data", "fineweb"], "no file .*fineweb_train_.*data.py fineweb"),
    (["--seq-len", "4096"], "--seq-len 4096 is longer than the context of llama-tiny"),
    (["--seed", "-1"], "--seed must be at least 0"),
    (["--lr", "fast"], "--lr: invalid float"),
    (["--device", "cuda"], "no CUDA device"),
    (["--resume", "--overwrite"], "not allowed with"),
    (["--sample", "x"], "--sample needs --resume"),
    (["--resume", "--sample", "x"], "--sample needs --resume and a checkpoint"),
    (["--compile"], "--compile and .* need real workers"),
    (["--checkpoint-activations"], "--checkpoint-activations need real workers"),
    (["--reduce-dtype", "bf16"], "--reduce-dtype bf16, .* need real workers"),
    (["--frobnicate"], "unrecognized arguments"),
    (["train"], "unrecognized arguments"),
    (["--model", "resnet18"],
     "resnet18 cannot read --data /.*: resnet18 reads images .cifar10, cifar100, shapes"),
    (["--data", "cifar10"], "llama-tiny cannot read --data cifar10"),
]
for value in "0", "9/8", "1e9", "-1/2", "1/0", "nan", "inf", "", "half", "0.0002", "1e999999999":
    BAD.append(([f"--coverage={value}"], "none of k/4, with k from 1 to 4"))
for flag in ("subnets", "steps", "batch-size", "seq-len", "grad-accum", "timeout",
             "eval-every", "save-every", "log-every"):
    for value in "0", "-1":
        BAD.append(([f"--{flag}", value], f"--{flag}: must be at least 1"))
BAD.append((["--timeout", "1" + "0" * 15], "--timeout: must be at least 1 and at most"))
for flag in "seed", "steps", "batch-size", "grad-accum", "timeout":
    BAD.append(([f"--{flag}", "1.5"], f"--{flag}: invalid"))
for value in "nan", "inf", "0", "-1", "1e38":
    BAD.append((["--lr", value], "--lr above 0 and below a million"))
for value in "tpu", "mps", "gpu", "cpu:x":
    BAD.append((["--device", value], "--device: invalid choice"))
for flag in "masking", "level", "parallel", "dtype", "reduce-dtype":
    BAD.append(([f"--{flag}", "sideways"], "invalid choice"))


@pytest.mark.parametrize("more,message", BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_input_is_one_clear_line_before_anything_happens(tmp_path, more, message):
    if more[-2:] == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    refused(tmp_path, message, *more)
    assert not (tmp_path / "out").exists()


def test_bad_input_under_torchrun_is_one_line_from_one_rank(tmp_path):
    code, out, err = Torchrun(2, "train.py", flags(tmp_path, "--subnets", 3)).end()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert lines == ["error: --subnets 3 does not divide the number of workers, 2"], out + err
    assert code and 'train.py", line' not in err and "exitcode  : 2" in err
    assert not (tmp_path / "out").exists()


def test_what_only_rank_0_can_see_ends_all_ranks(tmp_path):
    said = run_on(2, train_on_pool, flags(tmp_path, "--out-dir", "/dev/null/out"))
    assert said[0] == said[1] and "/dev/null/out" in said[0]


@pytest.mark.parametrize("output", ["a terminal of cp1252", when_asked("full")])
def test_as_a_program_it_ends_with_one_line(tmp_path, output):
    """It cannot show the masks, RANK was left in the environment, and an editor has left files beside it.

    test_data.py has all kinds of errors.
    """
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / ".#train.py").symlink_to("nobody@nowhere.1234")
    (tmp_path / "broken.py").write_bytes(b"\xff")
    script, arguments = small_program(tmp_path), flags(tmp_path, "--out-dir", "~/x/out", steps=1)
    script = Path(script)
    script.write_text(script.read_text().replace(str(ROOT), str(tmp_path)))
    more = {"HOME": str(tmp_path), "PYTHONIOENCODING": "cp1252", "RANK": "1"}
    with open("/dev/full" if output == "full" else tmp_path / "said", "w") as stdout:
        run = subprocess.run([sys.executable, script, *arguments], cwd=tmp_path, stdout=stdout,
                             stderr=subprocess.PIPE, env={**ENVIRONMENT, **more})
    if output == "full":
        assert run.returncode == 2 and re.fullmatch(b"error: .*No space left.*\n", run.stderr), run.stderr
    else:
        assert run.returncode == 0 and b"?? ??" in (tmp_path / "said").read_bytes(), run.stderr
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
    message = "is damaged" if kind == "zip of nothing" else "is not a checkpoint of this program: move it"
    for more in [], ["--sample", "x"]:
        refused(tmp_path, message, "--resume", *more)
    assert path.read_bytes() == before and os.listdir(tmp_path / "out") == ["ckpt.pt"]
    if kind != "zip of nothing":                                     # not even if there is one before it
        train.main(flags(tmp_path, out="other", steps=1))
        shutil.copy(tmp_path / "other" / "ckpt.pt", tmp_path / "out" / "ckpt.prev.pt")
        refused(tmp_path, message, "--resume")
        assert path.read_bytes() == before
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
    """A change of the first value of a dict."""
    def edit(values):
        name = next(iter(values))
        return {**values, name: change(values[name])}
    return edit


def without(key):
    return lambda values: {name: value for name, value in values.items() if name != key}


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
        "optimizer", of_first(lambda s: {**s, "exp_avg": s["exp_avg"].half()})),
    "no number of updates": edited("optimizer", of_first(without("step"))),
    "two numbers of updates": edited("optimizer", of_first(lambda s: {**s, "step": 2})),
    "more updates than steps": edited("step", lambda s: s - 1),
    "a step below 0": edited("step", lambda s: -5),
    "a step that is no integer": edited("step", float),
    "no model's name": edited("config", without("model")),
    "an unknown model": edited("config", lambda c: {**c, "model": "gpt5"}),
    "no flags": edited("config", lambda c: {"model": c["model"]}),
    "no dict as config": edited("config", lambda c: 3),
    "no digest of the data": edited("config", without("data_digest")),
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
        if what in ("a name is missing", "another shape", "no dict", "no model's name", "no flags"):
            with pytest.raises(data.UserError, match="checkpoint"):
                train.main(flags(tmp_path, "--resume", "--sample", "x"))
    path.write_bytes(raw)
    train.main(flags(tmp_path, "--resume", "--subnets", 2, steps=4))
    with pytest.raises(data.UserError, match="--model resnet18 contradicts the checkpoint"):
        train.main(["--resume", "--out-dir", str(tmp_path / "out"), "--model", "resnet18", "--sample", "x"])


def test_wrong_masks_in_a_checkpoint_are_not_used(tmp_path, capsys):
    train.main(flags(tmp_path, "--subnets", 2, steps=1))
    path, saved = tmp_path / "out" / "ckpt.pt", load(tmp_path)
    wrong = {b: torch.ones(len(mask), 3, dtype=torch.bool) for b, mask in saved["masks"].items()}
    for masks in wrong, {b: mask.int() for b, mask in saved["masks"].items()}, without_first(saved["masks"]):
        torch.save({**saved, "masks": masks}, path)
        train.main(flags(tmp_path, "--resume", "--subnets", 2, steps=2))
        assert "new masks" in capsys.readouterr().out
        assert all(torch.equal(mask, saved["masks"][b]) for b, mask in load(tmp_path)["masks"].items())


def nobody_holds_neuron_0(branches, *_):
    return {name: torch.arange(b[1])[:, None].repeat(1, 4) > 0 for name, b in branches.items()}


def test_an_out_dir_with_a_run_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    metrics = tmp_path / "out" / "metrics.jsonl"
    metrics.write_text("precious")
    refused(tmp_path, "already holds a run: --resume goes on with it, --overwrite replaces it")
    monkeypatch.setitem(sdp.MASKS, "own", nobody_holds_neuron_0)
    refused(tmp_path, "no subnet holds neuron 0", "--overwrite", "--level", "own")
    assert metrics.read_text() == "precious"

    def too_large(*_):
        raise MemoryError("too little memory")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(train, "build", too_large)
        train.main(flags(tmp_path, "--overwrite"))
    assert metrics.read_text() == "precious"
    (tmp_path / "file").write_text("")
    for out in "file", "file/out":
        refused(tmp_path, "(File exists|Not a directory): .*file", out=out)
    metrics.write_text("")                                           # of a run that never was
    train.main(flags(tmp_path, steps=1))


def train_with_more_on_rank_1(arguments, more, prepare=None):
    return train_on_pool(arguments + (more if dist.get_rank() == 1 else []), prepare)


def other_folder_on_rank_1(folder, patch):
    os.chdir(folder / "other" if dist.get_rank() == 1 else folder)


def other_masks_on_rank_1(folder, patch):
    """Another mask function, as where one host has other code."""
    os.chdir(folder)
    if dist.get_rank() == 1:
        patch.setitem(sdp.MASKS, "block", subnet_0_holds_all)


def subnet_0_holds_all(branches, *_):
    return {name: torch.tensor([[True, False]] * b[1]) for name, b in branches.items()}


def test_ranks_that_were_started_differently_are_told_apart(tmp_path):
    def check(name, more=(), prepare=None):
        arguments = [a.replace(f"{tmp_path}/", "") if prepare else a for a in flags(tmp_path, "--resume")]
        said = run_on(2, train_with_more_on_rank_1, arguments, list(more), prepare)
        assert said == [f"not all ranks were started with the same {name}"] * 2

    other = tmp_path / "other"
    other.mkdir()
    for more in ["--lr", "0.1"], ["--seed", "7"], ["--masking", "backward"], ["--batch-size", "3"]:
        check(more[0].strip("-").replace("-", "_"), more)
    data.write_bin(other / "text.bin", np.arange(6000) % 200, 256)
    check("contents of --data", prepare=partial(other_folder_on_rank_1, tmp_path))
    shutil.copy(tmp_path / "text.bin", other)
    check("masks", prepare=partial(other_masks_on_rank_1, tmp_path))
    assert not (tmp_path / "out").exists()
    train.main(flags(tmp_path, steps=1))
    (other / "out").mkdir()
    saved = load(tmp_path)
    next(iter(saved["optimizer"].values()))["exp_avg"][0] += 1       # of one number, in the same step
    torch.save(saved, other / "out" / "ckpt.pt")
    check("checkpoint", prepare=partial(other_folder_on_rank_1, tmp_path))


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
    for trial in range(90):
        broken = bytearray(raw)
        if trial % 3 == 0:
            del broken[rng.integers(2, len(raw)):]
        else:                           # a bit, anywhere or in the archive's own tables
            byte = rng.integers(2, len(raw)) if trial % 3 == 1 else -rng.integers(1, 9000)
            broken[byte] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        try:                            # a flip in a comment or time stamp does no harm
            found = train.open_checkpoint(tmp_path / "out")
            assert all(torch.equal(w, found["model"][n]) for n, w in whole.items())
        except data.UserError as e:
            assert "is damaged" in str(e)


def loss_is_nan_at(calls, patch):
    """In these forward passes of training, counted from 1."""
    real, done = llama.loss, [0]

    def loss(logits, y):
        trains = logits.requires_grad and logits.device.type == "cpu"            # on meta FLOPs are counted
        done[0] += trains
        return real(logits, y) * (math.nan if trains and done[0] in calls else 1)
    patch.setattr(llama, "loss", loss)


def loss_is_nan_on_rank_1_at(calls, patch):
    if dist.get_rank() == 1:
        loss_is_nan_at(calls, patch)


def test_an_update_that_is_not_finite_is_skipped_by_all_and_ten_end_the_run(tmp_path):
    prepare = partial(loss_is_nan_on_rank_1_at, [2, 4])
    assert run_on(2, train_on_pool, flags(tmp_path, "--coverage", "1/2"), prepare) == [None, None]
    assert [m["skipped"] for m in metrics(tmp_path)] == [0, 1, 1, 2, 2, 2]
    saved = load(tmp_path)
    assert all(t.isfinite().all() for t in saved["model"].values())
    assert {s["step"] for s in saved["optimizer"].values()} == {4}
    prepare = partial(loss_is_nan_on_rank_1_at, range(4, 99))
    said = run_on(2, train_on_pool, flags(tmp_path, "--coverage", "1/2", steps=20, out="lost"), prepare)
    assert said[0] == said[1] and "ten updates in a row, up to step 13" in said[0]
    assert load(tmp_path, "lost")["step"] == 12


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    def step(optimizer):
        for p in optimizer.param_groups[0]["params"]:
            p.data.fill_(math.inf)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    refused(tmp_path, "weights are not finite any more, so not saved")
    assert not (tmp_path / "out" / "ckpt.pt").exists()


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    out = tmp_path / "small" / "out"
    out.parent.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1300k", "tmpfs", out.parent]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:                                # a checkpoint has 0.5 MB: two fit, a third does not
        refused(tmp_path, "cannot write .*ckpt.pt: .*--resume", "--steps", "12", out="small/out")
        assert sorted(os.listdir(out)) == ["ckpt.prev.pt", "ckpt.pt", "lock", "metrics.jsonl"]
        assert load(tmp_path, "small/out")["step"] == 6
        (out / "ckpt.prev.pt").unlink()
        train.main(flags(tmp_path, "--resume", out="small/out", steps=7))
    finally:
        subprocess.run(["umount", "-l", out.parent])                 # lazily: the lock in it is still open


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


def break_and_finish(folder, how, breaks):
    """Workers hang or die at random moments.  Torchrun starts all again, and the run has the same result.

    -> what torchrun and its workers wrote to standard error
    """
    rng, path, steps = np.random.default_rng(breaks), folder / "broken" / "metrics.jsonl", 30 * breaks
    more = ["--coverage", "1/2", "--save-every", "3", "--eval-every", "10"]
    assert run_on(2, train_on_pool, flags(folder, *more, out="whole", steps=steps)) == [None, None]
    arguments = flags(folder, *more, "--resume", "--timeout", "5", out="broken", steps=steps)
    run = Torchrun(2, small_program(folder), arguments, restarts=breaks)
    for i in range(breaks):
        run.wait_for_line(path, 30 * i + rng.integers(2, 10))
        time.sleep(rng.uniform(0, 0.1))                              # in a step, an evaluation or a save
        workers = run.workers()
        victim = int(rng.choice(workers))
        os.kill(victim, how)
        start = time.monotonic()
        while any(alive(worker) for worker in workers if worker != victim):
            assert time.monotonic() < start + 40, "the other worker still waits"
            time.sleep(0.05)
        if how == signal.SIGSTOP:                                    # torchrun itself waits for it
            os.kill(victim, signal.SIGKILL)
        while alive(victim):
            time.sleep(0.05)
    code, out, err = run.end(60 * (2 + breaks))
    assert code == 0, out + err
    check_same(load(folder, "whole"), load(folder, "broken"))
    whole, broken = metrics(folder, "whole"), metrics(folder, "broken")
    assert [m["step"] for m in whole] == [m["step"] for m in broken]
    assert whole[-1]["val_loss"] == broken[-1]["val_loss"]
    return err


@pytest.mark.parametrize("how", [when_asked(signal.SIGKILL), signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_worker_that_dies_or_hangs_ends_the_others_with_a_line_and_the_run_goes_on(tmp_path, how):
    err = break_and_finish(tmp_path, how, 1)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert lines and all("lost the other workers" in line for line in lines), err
    assert 'train.py", line' not in err


def test_rank_0_notices_a_worker_that_hangs_while_rank_0_works_alone(tmp_path):
    run = Torchrun(2, small_program(tmp_path, SLOW_DISK), flags(tmp_path, "--timeout", 4))
    run.wait_for_line(tmp_path / "out" / "metrics.jsonl", 3)         # then it saves, for 6 seconds
    time.sleep(2)
    ranks = {re.search(rb"\0RANK=(\d)", Path(f"/proc/{pid}/environ").read_bytes())[1]: pid
             for pid in run.workers()}
    os.kill(ranks[b"1"], signal.SIGSTOP)
    start = time.monotonic()
    while alive(ranks[b"0"]):
        assert time.monotonic() < start + 20, "rank 0 still waits"
        time.sleep(0.05)
    os.kill(ranks[b"1"], signal.SIGKILL)                             # torchrun itself waits for it
    code, _, err = run.end()
    assert code == 1 and "error: rank 0 lost the other workers" in err


@slow
@only_when_asked
def test_twenty_kills(tmp_path):
    break_and_finish(tmp_path, signal.SIGKILL, 20)


def send_in_step(number, step, worker, patch):
    """The signal comes while this worker reads the batch of this step; a process has it once."""
    real = data.Tokens.batch

    def batch(self, split, i, its, workers):
        if (split, i, its) == ("train", step, worker):
            signal.raise_signal(number)
        return real(self, split, i, its, workers)
    patch.setattr(data.Tokens, "batch", batch)


@pytest.fixture
def heard():
    """Signals come through, which they do not under nohup.  Afterwards they do what they did."""
    numbers = signal.SIGTERM, signal.SIGHUP, signal.SIGINT
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_lets_the_update_end_and_saves(tmp_path, monkeypatch, capsys, heard, number):
    monkeypatch.setattr(train, "STOP", False)                        # and so it is again after the test
    send_in_step(number, 1, 0, monkeypatch)
    train.main(flags(tmp_path, steps=5))
    said = capsys.readouterr().out
    assert "stopped and saved after step 2" in said and "sample" not in said
    assert load(tmp_path)["step"] == 2


def test_one_worker_is_told_to_stop_and_all_do_and_the_run_goes_on_from_there(tmp_path):
    same = ["--coverage", "1/2"]
    assert run_on(2, train_on_pool, flags(tmp_path, *same, out="whole")) == [None, None]
    stop = partial(send_in_step, signal.SIGTERM, 1, 1)
    assert run_on(2, train_on_pool, flags(tmp_path, *same), stop) == [None, None]
    assert load(tmp_path)["step"] == 2
    assert run_on(2, train_on_pool, flags(tmp_path, *same, "--resume")) == [None, None]
    check_same(load(tmp_path, "whole"), load(tmp_path))


def test_coverage_can_rise_in_the_middle_of_a_run(tmp_path, capsys):
    first = ["--level", "ends", "--coverage", "1/4", "--subnets", 4]
    train.main(flags(tmp_path, *first, "--until", 3))
    assert "stopped and saved after step 3" in capsys.readouterr().out and load(tmp_path)["step"] == 3
    train.main(flags(tmp_path, *first, "--until", 3, "--resume"))
    assert "nothing to do: the checkpoint" in capsys.readouterr().out
    train.main(flags(tmp_path, "--level", "ends", "--coverage", "2/4", "--subnets", 4, "--resume"))
    assert "coverage 2/4 (was 1/4)" in capsys.readouterr().out
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    flops = np.diff([0, *(line["flops"] for line in lines)])
    assert flops[0] == flops[1] == flops[2] < flops[3] == flops[4] == flops[5]
    share = [mask.float().mean() for mask in load(tmp_path)["masks"].values()]
    assert share == [1, 1, 0.5, 0.5, 1, 1]                           # three blocks


def test_a_second_ctrl_c_does_not_wait_for_the_checkpoint(tmp_path, monkeypatch, heard):
    """test_data.py has what a KeyboardInterrupt becomes: a line, and exit code 130."""
    def write(*_):
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(train, "STOP", False)
    monkeypatch.setattr(train, "write_checkpoint", write)
    send_in_step(signal.SIGINT, 1, 0, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags(tmp_path))
    assert not (tmp_path / "out" / "ckpt.pt").exists()


@slow
@only_when_asked
def test_signals_under_torchrun_save_and_the_run_goes_on_from_there(tmp_path):
    """One worker is told to end or, as a cluster does it, torchrun, which tells all."""
    few, lines, saved = ["--coverage", "1/2", "--eval-every", 100, "--save-every", 100], 4, 0
    assert run_on(2, train_on_pool, flags(tmp_path, *few, out="whole", steps=600)) == [None, None]
    stops = ("torchrun", signal.SIGTERM), ("worker", signal.SIGTERM), ("worker", signal.SIGHUP)
    for target, number in stops:
        run = Torchrun(2, small_program(tmp_path), flags(tmp_path, *few, "--resume", steps=600))
        run.wait_for_line(tmp_path / "out" / "metrics.jsonl", lines)
        os.kill(run.workers()[1] if target == "worker" else run.process.pid, number)
        code, out, err = run.end()
        assert "stopped and saved after step" in out and "error:" not in err, err
        assert code == 0 or target == "torchrun"                     # torchrun says that it was interrupted
        saved, before = load(tmp_path)["step"], saved
        assert before < saved < 600
        lines = saved + 2
    assert run_on(2, train_on_pool, flags(tmp_path, *few, "--resume", steps=600)) == [None, None]
    check_same(load(tmp_path, "whole"), load(tmp_path))


SLOW_TO_SAVE = """
real = train.write_checkpoint

def slowly(*args):
    print("saving", flush=True)
    time.sleep({seconds})
    real(*args)

train.write_checkpoint = slowly
"""


@slow
@only_when_asked
@pytest.mark.parametrize("presses,code,said", [
    (1, 0, ""), (2, 130, "error: KeyboardInterrupt\n")])
def test_ctrl_c_of_a_program(tmp_path, presses, code, said):
    script = small_program(tmp_path, SLOW_TO_SAVE.format(seconds=60 * (presses - 1)))
    program = [sys.executable, script, *flags(tmp_path, "--save-every", 5000, steps=5000)]
    pipe = subprocess.PIPE
    run = subprocess.Popen(program, cwd=ROOT, text=True, stdout=pipe, stderr=pipe, env=ENVIRONMENT)
    lines = iter(run.stdout.readline, "")
    next(line for line in lines if line.startswith("step "))
    run.send_signal(signal.SIGINT)
    if presses == 2:
        next(line for line in lines if line == "saving\n")
        run.send_signal(signal.SIGINT)
    shown, errors = run.communicate(timeout=50)
    assert run.returncode == code and errors == said
    assert ("stopped and saved after step" in shown) == (presses == 1)
    assert (tmp_path / "out" / "ckpt.pt").exists() == (presses == 1)


def test_an_out_dir_has_one_owner_and_workers_end_with_torchrun(tmp_path):
    run = Torchrun(2, small_program(tmp_path), flags(tmp_path, "--save-every", 5000, steps=5000))
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
    assert step < 5000
    train.main(flags(tmp_path, "--resume", steps=step + 1))


@contextmanager
def two_hosts():
    """Two network namespaces joined by a cable, with half of the cores each.

    Yields torchrun(arguments): two ranks of train.py on each.
    """
    def run(command):
        return subprocess.run(command.split(), capture_output=True).returncode == 0

    hosts = [f"sdp{os.getpid()}{i}" for i in (0, 1)]
    if not shutil.which("ip") or not all([run(f"ip netns add {host}") for host in hosts]):
        pytest.skip("network namespaces are not allowed here")

    def torchrun_on_both(arguments):
        runs, cores = [], sorted(os.sched_getaffinity(0))
        try:
            for i, host in enumerate(hosts):                         # hosts do not share cores
                os.sched_setaffinity(0, cores[i::2] or cores)        # a process begins with its parent's
                command = f"""ip netns exec {host} {sys.executable} -m torch.distributed.run
                    --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=10.77.0.1:29400
                    --rdzv-conf=is_host={1 - i} --local-addr=10.77.0.{i + 1} train.py"""
                runs.append(subprocess.Popen(
                    [*command.split(), *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": f"sdp{i}"}))
        finally:
            os.sched_setaffinity(0, cores)
        said = [run.communicate(timeout=240)[0] for run in runs]
        assert all(run.returncode == 0 for run in runs), said
        return said[0] + said[1]
    try:
        assert run(f"ip link add sdp0 netns {hosts[0]} type veth peer name sdp1 netns {hosts[1]}")
        for i, host in enumerate(hosts):
            assert run(f"ip -n {host} addr add 10.77.0.{i + 1}/24 dev sdp{i}")
            assert run(f"ip -n {host} link set sdp{i} up") and run(f"ip -n {host} link set lo up")
        yield torchrun_on_both
    finally:
        for host in hosts:
            run(f"ip netns del {host}")


@slow
@only_when_asked
def test_two_hosts_give_the_losses_of_one(tmp_path, monkeypatch):
    """The command for several machines, the machines being two network namespaces joined by a cable."""
    monkeypatch.setitem(llama.PRESETS, "llama-tiny", llama.LlamaConfig())        # as train.py has it
    more = ["--level", "neuron", "--masking", "backward"]
    with two_hosts() as run:
        assert "4 workers, cpu" in run(flags(tmp_path, *more, out="two"))
    train.main(flags(tmp_path, *more, "--subnets", "4", out="one"))
    for two, one in zip(metrics(tmp_path, "two"), metrics(tmp_path, "one"), strict=True):
        for key in {"loss", "val_loss"} & one.keys():
            assert two[key] == pytest.approx(one[key], rel=1e-5)
