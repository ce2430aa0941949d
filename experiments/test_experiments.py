"""
Tests of plan.py, bench.py and kernels.py, against real tensors, the allocator's count, and bytes by hand.

    python -m pytest -q experiments/test_experiments.py
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path[:0] = [str(Path(__file__).resolve().parent)]
import bench
import data
import kernels
import model_llama as llama
import model_resnet as resnet
import plan
import sdp
import train
from test_sdp import run_on, saved_bytes
from test_train import (
    ENVIRONMENT,
    ROOT,
    make_small,
    only_when_asked,
    slow,
    text_bin,
    train_on_pool,
    when_asked,
)

RESULTS = ROOT / "experiments" / "results"
NAMES = [name for name in plan.VARIANTS if name != "ddp-bf16-hook"]  # what there is in float32
IMAGES = ["--model", "resnet18", "--data", "shapes"]


def settled(*arguments):
    """The flags as plan.py completes them, and the model's sizes (of vocabulary 256)."""
    args = plan.flags("", "none.jsonl").parse_args(
        ["--subnets", "4", "--device", "cpu", *map(str, arguments)]
    )
    train.settle(args, {})
    return args, train.FAMILIES[args.model].module.PRESETS[args.model]


def batch_of(args, config):
    if args.model == "resnet18":
        return torch.randn(args.batch_size, 3, 32, 32), torch.randint(10, (args.batch_size,))
    return torch.randint(config.vocab_size, (2, args.batch_size, args.seq_len)).unbind()


def measured(design, rank, fake=False, batch=None):
    """first_update of worker `rank` -> memory, bytes sent, what it has made."""
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    batch, cpu = batch or batch_of(design.args, design.config), torch.device("cpu")
    if fake:
        with mode:
            batch = [torch.empty(t.shape, dtype=t.dtype) for t in batch]
        module = plan.fake_model(design, rank, cpu, mode)
    else:
        module = bench.real_model(design, rank, cpu)
    sync, optimizer, memory, sent = plan.first_update(design, module, plan.Batches(*batch), mode)
    return memory, sent, sync, optimizer


def cpu_allocator_peak(work, *alive):
    """Bytes in use at most while work() runs, counted by the profiler in the allocator, on top of `alive`."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    now = most = sum(t.nbytes for t in alive)
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most


# -- The plan --------------------------------------------------------------------------------------


QUICK = ("ddp", "fsdp", "sdp-forward-block")
PLANNED = [(name, []) if name in QUICK else when_asked(name, []) for name in NAMES]
PLANNED += [when_asked(name, IMAGES) for name in ("sdp-forward-block", "sdp-backward-neuron", "fsdp")]
PLANNED += [when_asked(name, ["--grad-accum", 2]) for name in ("ddp", "sdp-forward-neuron")]


@pytest.mark.parametrize("name,more", PLANNED)
def test_the_plan_is_what_the_tracker_sees_on_real_tensors_and_what_the_allocator_says(name, more):
    args, config = settled("--batch-size", 8, *([] if more == IMAGES else ["--seq-len", 32]), *more)
    design = plan.designs(args, config)[name]
    batch = batch_of(args, config)
    for rank in plan.largest(design, 4)[:1]:
        with plan.alone(rank, 4):
            planned, sent, *_ = measured(design, rank, fake=True)
            real, really_sent, sync, optimizer = measured(design, rank, batch=batch)
            assert planned["peak"] == pytest.approx(real["peak"], rel=0.02)
            assert sum(planned.values()) == 2 * planned["peak"] and min(planned.values()) >= 0
            assert sent == really_sent
            if name.startswith("fsdp") or name == "ddp-zero1":
                continue  # the allocator's count of their own start is not known
            assert sent == pytest.approx(sync.sent_bytes, abs=1)
            # The next updates have no tracker, but the allocator's count.  DDP's buckets are there throughout
            weights = list(sync.module.parameters())
            alive = [
                *weights,
                *(t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)),
            ]
            alive += weights if args.parallel == "ddp" or name.startswith("ddp") else []
            autocast = plan.autocast_of(design, torch.device("cpu"))

            def again():
                plan.update(sync, optimizer, plan.Batches(*batch), design, autocast)

            again()
            if name.startswith("sdp"):
                sync.arrive()  # or what is on its way would be freed, but not counted
            # the second with what the first refreshes
            peak = cpu_allocator_peak(lambda: [again(), again()], *alive)
            # It also sees what a kernel uses inside, such as a convolution's weight in another order
            assert -0.02 * peak < peak - planned["peak"] < 0.02 * peak + max(p.nbytes for p in weights)


@slow
@only_when_asked
@pytest.mark.parametrize("name,more", [("sdp-forward-block", ["--coverage", "5/8"]),
                                       ("sdp-backward-neuron", [*IMAGES, "--coverage", "3/8"])])
def test_no_worker_needs_more_than_the_ones_that_are_planned(name, more):
    args, config = settled("--subnets", 8, *more)
    design = plan.designs(args, config)[name]
    peaks = []
    for rank in range(8):
        with plan.alone(rank, 8):
            peaks.append(measured(design, rank, fake=True)[0]["peak"])
    assert max(peaks) == pytest.approx(max(peaks[rank] for rank in plan.largest(design, 8)), rel=0.003)


@pytest.mark.parametrize("level,more", [("neuron", []), when_asked("block", IMAGES)])
def test_a_worker_needs_no_more_than_ddp_on_a_model_of_its_size(level, more):
    """At most 1.02 times, says the plan; in fact less, since DDP's buckets outlive the update."""
    args, config = settled(*more)
    design, rank = plan.designs(args, config)[f"sdp-forward-{level}"], 0
    with plan.alone(rank, 4):
        ours = measured(design, rank, fake=True)[0]
        dense = plan.designs(args, config)["ddp"]
        module = design.model(rank)
        dense.model = design.model
        dense.masks = {
            name: torch.ones(int(mask[:, rank].sum()), 1, dtype=torch.bool)
            for name, mask in design.masks.items()
            if mask[:, rank].any()
        }
        dense.layout = {name: (None, None, p.shape) for name, p in module.named_parameters()}
        theirs = measured(dense, rank, fake=True)[0]
    assert ours["parameters"] == theirs["parameters"]
    assert ours["peak"] <= 1.02 * theirs["peak"]


def test_plan_writes_its_rows_and_says_where_28_percent_are_saved(tmp_path, capsys, monkeypatch):
    for name in "fsdp-zero2", "sdp-forward-neuron", "sdp-backward-neuron":       # other tests plan them
        monkeypatch.delitem(plan.VARIANTS, name)
    results = tmp_path / "plan.jsonl"
    plan.main(["--subnets", "4", "--batch-size", "2", "--results", str(results), "--device", "cpu",
               "--level", "ends"])
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "plan.jsonl").read_text().splitlines()]
    names = [name for name in plan.VARIANTS if name in NAMES]
    assert [r["variant"] for r in rows] == [*names, *(f"sdp-forward-ends at {k}/4" for k in range(1, 5))]
    by_name = {r["variant"]: r for r in rows}
    keys = "variant params flops memory sent_bytes communicators model subnets coverage".split()
    kinds = "parameters gradients optimizer activations temporary peak".split()
    assert all(set(keys) <= set(r) and set(kinds) == set(r["memory"]) for r in rows)
    layout = llama.layout(replace(llama.PRESETS["llama-tiny"], vocab_size=32000)).values()
    whole = sum(shape.numel() for _, _, shape in layout)
    largest = max(shape.numel() for _, _, shape in layout)
    ddp = by_name["ddp"]
    assert ddp["params"] == whole and by_name["fsdp"]["params"] == -(-whole // 4)
    state = {name: row["memory"]["optimizer"] for name, row in by_name.items()}
    assert state["fsdp"] == pytest.approx(state["ddp"] / 4, rel=0.01)
    # ZeRO-1 deals out whole parameters: the embedding, nearly half of this model, is one
    assert state["ddp-zero1"] == pytest.approx(largest / whole * state["ddp"], rel=0.02)
    assert ddp["sent_bytes"] == round(4 * whole * 2 * 3 / 4) == by_name["sdp at coverage 1"]["sent_bytes"]
    # and a broadcast of the weights
    assert by_name["ddp-zero1"]["sent_bytes"] == pytest.approx(1.5 * ddp["sent_bytes"], rel=0.01)
    assert by_name["ddp-checkpoint"]["memory"]["peak"] < ddp["memory"]["peak"]
    names = "ddp-checkpoint", "ddp", "sdp-backward-block", "sdp-forward-block"
    order = [by_name[name]["flops"] for name in names]
    assert order == sorted(order, reverse=True) and len(set(order)) == 4
    same = "sdp-forward-ends at 4/4", "sdp at coverage 1"
    assert all(by_name[name]["flops"] == ddp["flops"] for name in same)
    assert ddp["communicators"] == by_name["sdp at coverage 1"]["communicators"] == 1
    assert by_name["sdp-forward-block"]["communicators"] == 4  # the world, and the 3 of 4 sets that it is in
    assert "block 0  " in said
    peak = {k: by_name[f"sdp-forward-ends at {k}/4"]["memory"]["peak"] for k in range(1, 5)}
    for part in 28, 60:
        enough = [k for k in peak if peak[k] <= (1 - part / 100) * ddp["memory"]["peak"]]
        assert f"{part}% less: at " + (f"coverage {max(enough)}/4" if enough else "none") in said


def test_in_bfloat16_ddp_s_hook_and_fsdp_send_half(monkeypatch):
    """FSDP2 that keeps its gathered weights sends as much as DDP with bfloat16 messages."""
    monkeypatch.setitem(llama.PRESETS, "llama-tiny", llama.LlamaConfig(num_hidden_layers=2))
    args, config = settled("--dtype", "bf16", "--batch-size", 2, "--seq-len", 16)
    rows = {}
    for name in "ddp", "ddp-bf16-hook", "fsdp-zero2":
        batch = [torch.empty(2, 16, dtype=torch.int64, device="meta")] * 2
        rows[name] = plan.planned(name, plan.designs(args, config)[name], 4, batch, torch.device("cpu"))
    assert rows["ddp-bf16-hook"]["sent_bytes"] == rows["ddp"]["sent_bytes"] / 2
    assert rows["fsdp-zero2"]["sent_bytes"] == pytest.approx(rows["ddp"]["sent_bytes"] / 2, rel=0.01)
    assert rows["fsdp-zero2"]["memory"]["peak"] < rows["ddp"]["memory"]["peak"]


@slow
@only_when_asked
def test_plan_of_the_1b_model_takes_less_than_three_minutes_and_2_gib(tmp_path):
    start = time.time()
    program = (
        "import resource, sys; sys.path.insert(0, 'experiments'); import plan; plan.main(sys.argv[1:]); "
        "print('KIB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", program, "--model", "llama-1b", "--subnets", "8"]
    run = subprocess.run([*command, "--results", tmp_path / "plan.jsonl"], cwd=ROOT, capture_output=True,
                         text=True)
    assert run.returncode == 0 and time.time() - start < 180, run.stderr
    assert int(run.stdout.split("KIB")[1]) < 2 * 2**20


# -- The bench -------------------------------------------------------------------------------------

UNBENCHED = "ddp-zero1", "ddp-checkpoint", "sdp at coverage 1", "sdp-forward-block", "sdp-backward-neuron"


def fewer_variants(patch):
    for name in UNBENCHED:
        patch.delitem(plan.VARIANTS, name)


@pytest.mark.parametrize("more", [[], when_asked(["--dtype", "bf16", *IMAGES])], ids=["llama", "resnet-bf16"])
def test_bench_on_real_workers(tmp_path, monkeypatch, more):
    make_small(monkeypatch)
    results, traces = tmp_path / "bench.jsonl", tmp_path / "traces"
    arguments = f"--updates 1 --batch-size 2 --subnets 2 --coverage 1/2 --device cpu --results {results}"
    more_flags = more or ["--seq-len", "16", "--data", text_bin(tmp_path)]
    arguments = [*arguments.split(), "--traces", str(traces), *more_flags]
    assert run_on(4, train_on_pool, arguments, None if more else fewer_variants, bench.main) == [None] * 4
    rows = {r["variant"]: r for r in map(json.loads, results.read_text().splitlines())}
    wanted = list(plan.VARIANTS) if more else [name for name in NAMES if name not in UNBENCHED]
    assert list(rows) == wanted and rows["ddp"]["step_ratio"] == 1
    assert all(0 < r["step_ms_range"][0] <= r["step_ms"] <= r["step_ms_range"][1] for r in rows.values())
    assert all(r["memory"]["peak"] > 0 < r["flops"] and r["world"] == 4 for r in rows.values())
    # two subnetworks with two replicas each, half of every branch's neurons in each of them
    args, config = settled("--subnets", 2, "--coverage", "1/2", *more)
    neurons = whole = 0
    for _, dim, shape in train.FAMILIES[args.model].module.layout(config).values():
        whole += 4 * shape.numel()
        neurons += 4 * shape.numel() * (dim is not None)
    assert rows["ddp"]["sent_bytes"] == pytest.approx(whole * 2 * 3 / 4, rel=1e-6)
    wire = 2 if more else 1                                          # FSDP2 sends in bfloat16 then
    # it pads the first dimension
    assert rows["fsdp"]["sent_bytes"] > rows["fsdp-zero2"]["sent_bytes"] >= whole * 2 * 3 / 4 / wire
    if not more:                                                     # equal halves, of two holders each
        wanted = (whole - neurons) * 2 * 3 / 4 + neurons / 2
        assert rows["sdp-forward-neuron"]["sent_bytes"] == pytest.approx(wanted, rel=1e-6)
    for name in rows:
        trace = json.loads((traces / f"trace-{name.replace(' ', '-')}.json").read_text())
        assert any(e["name"] == "gloo:all_reduce" for e in trace["traceEvents"])


@slow
@only_when_asked
def test_bench_alone(tmp_path, capsys):
    arguments = "--updates 1 --subnets 2 --batch-size 2 --seq-len 16 --compile --device cpu --results"
    bench.main([*arguments.split(), str(tmp_path / "bench.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [r["variant"] for r in rows] == NAMES
    assert "of which one at a time is here, without communication" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ddp-zero1", "fsdp", "sdp-backward-block"])
def test_a_variant_that_was_torn_down_leaves_nothing(name):
    def alive():
        gc.collect()
        tensors = [
            o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and o.device.type == "cpu"
        ]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    args, config = settled("--batch-size", 2, "--seq-len", 8)
    design, batch = plan.designs(args, config)[name], batch_of(args, config)
    before = alive()
    with plan.alone(0, 4):
        bench.take_turn(design, plan.Batches(*batch), torch.device("cpu"), 1, None)
    assert alive() < before + 50_000                                 # of the model's 7 MB


@pytest.mark.parametrize("script,more,message", [
    (plan, ["--coverage", "0.7"], "--coverage 0.7 is none of k/4"),
    (bench, ["--updates", "0"], "must be at least 1"),
    (plan, ["--resume"], "unrecognized arguments"),
    (bench, ["--steps", "3"], "unrecognized arguments"),
    (bench, ["--data", "none.bin"], "no file none.bin: make it"),
])
def test_bad_input_is_one_line(tmp_path, script, more, message):
    with pytest.raises((data.UserError, OSError), match=message) as caught:
        script.main(["--subnets", "4", "--results", str(tmp_path / "x.jsonl"), *more])
    assert "\n" not in str(caught.value) and not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize("script", [when_asked("plan"), "bench"])
def test_as_a_program_bad_input_is_one_line(script):
    command = [sys.executable, f"experiments/{script}.py", "--subnets", "x"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


# -- Numbers of the README that do not depend on the machine ---------------------------------------

def test_kernels_of_an_update_are_few(monkeypatch):
    """llama-134m, S = 8, 6/8, one worker on the fake process group.

    Here matrices and buckets have a sixteenth of its bytes: as many kernels, in less time.
    """
    small = replace(llama.PRESETS["llama-134m"], vocab_size=8000, hidden_size=192, intermediate_size=512)
    monkeypatch.setitem(llama.PRESETS, "llama-134m", small)
    bucketed = partial(sdp.SubnetDataParallel, bucket_bytes=25 * 2**20 // 16)
    monkeypatch.setattr(sdp, "SubnetDataParallel", bucketed)
    rows = {row["variant"]: row for row in kernels.count_all("llama-134m", n_subnets=8, held=6)}
    total = {name: sum(row["kernels"].values()) for name, row in rows.items()}
    messages = rows["sdp-forward-block"]["messages"]
    assert total["sdp-forward-block"] <= total["dense-block"] + 5 * messages
    for name, most in ("forward-block", 1.15), ("forward-neuron", 1.15), ("backward-block", 1.15):
        assert total[f"sdp-{name}"] <= most * total["ddp"], name
    assert total["sdp-backward-neuron"] <= 1.4 * total["ddp"]


def test_activations_that_a_worker_of_resnet18_keeps_are_as_the_readme_says():
    config, (x, y) = resnet.PRESETS["resnet18"], (torch.randn(1, 3, 32, 32), torch.tensor([3]))
    full = {name: neurons for name, (_, neurons, *_) in resnet.branches(config).items()}

    def kept(part, backward=False):
        module = resnet.ResNet(config, {name: round(n * part) for name, n in full.items()}, backward)
        for name, p in module.named_parameters():
            p.requires_grad_(".rest." not in name)
        return saved_bytes(module, resnet.loss, x, y)
    whole = kept(1)
    assert whole == pytest.approx(4.7e6, rel=0.01)
    for part, forward, backward in (1 / 2, 0.79, 0.90), (3 / 4, 0.90, 0.95):
        assert kept(part) / whole == pytest.approx(forward, abs=0.01)
        assert kept(part, True) / whole == pytest.approx(backward, abs=0.01)


def test_resnet18_has_the_known_sizes_and_torchvision_s_names():
    from torchvision.models import resnet18
    count = {}
    for stem, classes in ("cifar", 10), ("imagenet", 1000):
        config = resnet.ResNetConfig(num_classes=classes, stem=stem)
        count[stem] = sum(shape.numel() for _, _, shape in resnet.layout(config).values())
    assert count == {"cifar": 11_173_962, "imagenet": 11_689_512}
    theirs = {name: p.shape for name, p in resnet18().named_parameters()}
    assert [(name, shape) for name, (_, _, shape) in resnet.layout(config).items()] == list(theirs.items())


# -- Measurements, when they are asked for: python -m pytest -m slow -k NAME experiments/test_experi

def write_result(name, rows):
    (RESULTS / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of_script(script, folder, *arguments, **environment):
    """Runs plan.py or bench.py -> its rows"""
    results = folder / "rows.jsonl"
    results.unlink(missing_ok=True)
    subprocess.run(
        [sys.executable, ROOT / "experiments" / f"{script}.py", "--results", results, *map(str, arguments)],
        check=True,
        env={**os.environ, **environment},
    )
    return [json.loads(line) for line in results.read_text().splitlines()]


@slow
@only_when_asked
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of 40 GB")
def test_the_plan_agrees_with_a_gpu_s_allocator(tmp_path):
    """To 5 %, every variant, S = 8; and how long an update takes there, without communication."""
    rows, text = [], text_bin(tmp_path, count=200_000, vocab=32000)
    for model, dtype, more in [
        ("llama-134m", "fp32", []),
        ("llama-500m", "fp32", []),
        ("llama-1b", "fp32", []),
        ("llama-134m", "bf16", []),
        ("llama-134m", "bf16", ["--compile"]),
    ]:
        same = ["--model", model, "--subnets", 8, "--data", text, "--dtype", dtype, "--device", "cuda"]
        made = rows_of_script("bench", tmp_path, "--updates", 3, *same, *more)
        planned = (
            {row["variant"]: row["memory"]["peak"] for row in rows_of_script("plan", tmp_path, *same)}
            if dtype == "fp32"
            else {}
        )
        for row in made:
            rows.append(
                {
                    "model": model,
                    "dtype": dtype,
                    "compile": bool(more),
                    "variant": row["variant"],
                    "peak": row["memory"]["peak"],
                    "device": row["memory"]["device"],
                    **{key: row[key] for key in ("step_ms", "step_ms_range", "step_ratio")},
                }
            )
            if planned:
                rows[-1]["planned_peak"] = planned[row["variant"]]
    write_result("gpu.jsonl", rows)
    for row in rows:
        assert row["peak"] == pytest.approx(row.get("planned_peak", row["peak"]), rel=0.05), row
