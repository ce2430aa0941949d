"""
Tests of data.py, on this machine alone: what would come from the network comes from a server on the loopback.

    python -m pytest -q experiments/test_data.py           from the repository's root, in less than a minute
"""

import hashlib
import http.server
import io
import math
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn as nn
from tiktoken_ext.openai_public import r50k_pat_str

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402  (the line above finds it)

torch.set_num_threads(1)
SOURCE = (ROOT / "data.py").read_bytes()                   # real text


def text_bin(folder, name="text", count=6000):
    data.write_bin(folder / f"{name}.bin", np.frombuffer(SOURCE[:count], np.uint8), 256)
    return folder / f"{name}.bin"


def command(monkeypatch, capsys, *arguments):
    """-> exit code, standard output and standard error of data.py with these arguments."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    code = data.run_program(data.main)
    return code, *capsys.readouterr()


# Token shards --------------------------------------------------------------------------------------------

def test_bin_shards_are_llm_c_s(tmp_path):
    tokens = np.array([5, 50256, 0, 7], np.uint16)
    data.write_bin(tmp_path / "a.bin", tokens, 50257)
    header = np.array([20240520, 1, 4, 0] + [0] * 252, "<i4")        # as llm.c's data_common.py writes it
    assert (tmp_path / "a.bin").read_bytes() == header.tobytes() + tokens.astype("<u2").tobytes()
    read, vocab = data.read_bin(tmp_path / "a.bin")
    assert vocab == 50257 and (read[:] == tokens).all()


HEAD = [20240520, 1, 6000, 256]
BAD_SHARDS = [  # header, number of tokens, a token
    (HEAD[:1], 6000, 5),
    ([20240521] + HEAD[1:], 6000, 5),
    (HEAD[:1] + [2] + HEAD[2:], 6000, 5),
    (HEAD, 5999, 5),
    (HEAD, 6001, 5),
    (HEAD[:2] + [-1, 256], 0, 5),
    (HEAD[:2] + [0, 256], 0, 5),
    (HEAD[:2] + [20, 256], 20, 5),
    (HEAD[:3] + [-1], 6000, 5),
    (HEAD[:3] + [70000], 6000, 5),
    (HEAD, 6000, 256),
    (HEAD[:3] + [0], 6000, 50257),
]


@pytest.mark.parametrize("header,count,token", BAD_SHARDS)
def test_bad_shards_are_one_clear_line(tmp_path, header, count, token):
    header = np.array(header + [0] * (256 - len(header)), "<i4")
    (tmp_path / "text.bin").write_bytes(header.tobytes() + np.full(count, token, "<u2").tobytes())
    with pytest.raises(data.UserError, match="text.bin|too short for one sequence") as caught:
        data.load(str(tmp_path / "text.bin"), 8, 64, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["wikipedia", "", "x.txt", "no.bin", "d/a_train.bin", "no_*.bin", "fineweb"])
def test_data_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.UserError, match="unknown --data|no file .*\\.bin: make it"):
        data.load(name, 4, 16, 0)


# Tokens as batches ---------------------------------------------------------------------------------------

def shapes_data(batch_size=7, seed=0):
    splits = {"train": data.shapes(50, data.seeded("t")), "val": data.shapes(20, data.seeded("v"))}
    return data.Images("shapes", splits, batch_size, seed)


@pytest.mark.parametrize("kind", ["text", "images"])
def test_batches_are_a_pure_function_and_differ_among_steps_workers_and_seeds(tmp_path, kind):
    def load(seed):
        return data.load(str(text_bin(tmp_path)), 7, 16, seed) if kind == "text" else shapes_data(7, seed)
    a = load(0)
    x, y = a.batch("train", 3, 1, 4)
    if kind == "text":
        assert x.shape == y.shape == (7, 16) and torch.equal(x[:, 1:], y[:, :-1]) and x.dtype == torch.int64
    else:
        assert x.shape == (7, 3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert torch.equal(x, a.batch("train", 3, 1, 4)[0]) and torch.equal(x, load(0).batch("train", 3, 1, 4)[0])
    assert not torch.equal(x, load(1).batch("train", 3, 1, 4)[0])
    for step, worker, workers in (4, 1, 4), (3, 2, 4), (3, 1, 8):
        assert not torch.equal(x, a.batch("train", step, worker, workers)[0])


def test_all_workers_together_validate_on_the_same_sequences_once(tmp_path):
    dataset = data.load(str(text_bin(tmp_path)), 3, 16, 0)
    seen = []
    for workers in 1, 2, 5:
        steps = math.ceil(dataset.val_count / (3 * workers))
        turns = [(step, worker) for worker in range(workers) for step in range(steps)]
        batches = [dataset.batch("val", step, worker, workers)[0] for step, worker in turns]
        seen.append(sorted(map(tuple, torch.cat(batches).tolist())))
        assert len(seen[-1]) == dataset.val_count == len(set(seen[-1]))
    assert seen[0] == seen[1] == seen[2]


def test_training_windows_cover_all_shards_evenly():
    a, b = np.arange(0, 300, dtype=np.uint16), np.arange(300, 400, dtype=np.uint16)
    dataset = data.Tokens({"train": [a, b], "val": [a]}, 400, 2, 20, 0)
    starts = torch.cat([dataset.batch("train", i, 0, 1)[0][:, 0] for i in range(2000)])
    assert set(starts.tolist()) == set(range(280)) | set(range(300, 380))
    assert (starts >= 300).float().mean() == pytest.approx(80 / 360, abs=0.03)
    for splits in {"train": [a, b[:20]], "val": [a]}, {"train": [a], "val": [b[:20]]}:
        with pytest.raises(data.UserError, match="has 20 tokens, too short for one sequence"):
            data.Tokens(splits, 400, 2, 20, 0)


def test_stdlib_is_read_as_bytes_and_split_by_file():
    splits = data.stdlib_splits()
    text = bytes(splits["train"][0]) + bytes(splits["val"][0])
    assert len(text) > 5e6 and 0.03 < len(splits["val"][0]) / len(text) < 0.2
    assert Path(os.__file__).read_bytes() in text
    assert data.load("stdlib", 2, 16, 0).validation == "a tenth of the library's files"


@pytest.mark.parametrize("train,beside,validation", [
    ("training_train.bin", ["training_val.bin"], "training_val.bin"),
    ("fineweb_train_000001.bin", ["fineweb_val_000000.bin", "fineweb_train_2.bin"], "fineweb_val_000000.bin"),
    ("x_train.bin", ["x_validation.bin", "y_val.bin", "x_val_0.bin", "x_val.bin.part"], "the last tenth of"),
    ("x[1]-train-7.bin", ["x[1]-val-0.bin", "x1-val-0.bin", "x[1]-val-0-old.bin"], "x[1]-val-0.bin"),
    ("text.bin", ["val.bin", "text_val.bin", "valtext.bin"], "the last tenth of"),
])
def test_validation_is_on_the_file_beside_or_the_last_tenth_and_says_so(tmp_path, train, beside, validation):
    data.write_bin(tmp_path / train, np.arange(1000), 3000)
    for name in beside:
        data.write_bin(tmp_path / name, np.arange(2000, 3000), 3000)
    dataset = data.load(str(tmp_path / train), 2, 16, 0)
    read = {split: [shard[:].tolist() for shard in dataset.splits[split]] for split in dataset.splits}
    if validation == "the last tenth of":
        assert dataset.validation == f"the last tenth of {tmp_path / train}"
        assert read == {"train": [list(range(900))], "val": [list(range(900, 1000))]}
    else:
        assert dataset.validation == str(tmp_path / validation)
        assert read == {"train": [list(range(1000))], "val": [list(range(2000, 3000))]}
        data.write_bin(tmp_path / validation, np.arange(1000), 4000)
        with pytest.raises(data.UserError, match=r"different vocabularies: \[3000, 4000\]"):
            data.load(str(tmp_path / train), 2, 16, 0)


def test_the_digest_is_of_contents_not_of_names(tmp_path):
    tokens = np.random.default_rng(0).integers(256, size=5000).astype(np.uint16)
    data.write_bin(tmp_path / "x_train.bin", tokens[:4000], 256)
    data.write_bin(tmp_path / "x_val.bin", tokens[4000:], 256)
    digests = [data.load(str(tmp_path / "x_train.bin"), 2, 16, 0).digest]

    def digest(tokens, edge=4000):
        return data.Tokens({"train": [tokens[:edge]], "val": [tokens[edge:]]}, 256, 2, 16, 0).digest
    assert digests[0] == digest(tokens) and re.fullmatch("[0-9a-f]{64}", digests[0])
    for changed in 0, 2500, 3999, 4000, 4999:              # one token, in training or validation data
        other = tokens.copy()
        other[changed] ^= 1
        digests.append(digest(other))
    digests += [digest(tokens, 3999), shapes_data().digest]
    for split in "train", "val":                           # a pixel, a label
        for change in 0, 1:
            splits = shapes_data().splits
            splits[split][change][-1] ^= 1
            digests.append(data.Images("shapes", splits, 7, 0).digest)
    assert len(set(digests)) == len(digests) and shapes_data(3, 5).digest in digests


def test_text_needs_no_torchvision():
    code = """if True:
        import sys
        sys.modules["torchvision"] = None                  # now an import of it fails
        import data, train
        print(data.load("stdlib", 2, 16, 0).unit)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "tokens\n"), done.stderr


# Tokenising ----------------------------------------------------------------------------------------------

@pytest.fixture
def gpt2(monkeypatch):
    """An encoding with GPT-2's rules for words and a few of its merges, which needs no network."""
    ranks = {bytes([i]): i for i in range(256)}
    for merge in b"  ", b"\n\n", b" t", b"he", b" the", b"    ", b"an", b"and", b"\xef\xbf", b"\xef\xbf\xbd":
        ranks[merge] = len(ranks)
    small = tiktoken.Encoding("small", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(data, "encoding_for", lambda vocab_size: small)
    return small


def test_text_command_writes_the_bytes_of_all_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "PIECE", 1000)
    raw = np.random.default_rng(0).integers(256, size=25_001, dtype=np.uint8).tobytes()      # as a .gz
    out = tmp_path / "b" / "mine"
    (tmp_path / "a.gz").write_bytes(raw[:9999])
    (tmp_path / "b.gz").write_bytes(raw[9999:])
    arguments = ["text", tmp_path / "a.gz", tmp_path / "b.gz", "--out", out]
    code, said, error = command(monkeypatch, capsys, *arguments)
    assert (code, error) == (0, "") and said == f"{out}_train.bin: 22500 tokens\n{out}_val.bin: 2501 tokens\n"
    assert sorted(p.name for p in out.parent.iterdir()) == ["mine_train.bin", "mine_val.bin"]
    dataset = data.load(f"{out}_train.bin", 1, 8, 0)
    assert b"".join(bytes(dataset.splits[s][0][:].astype(np.uint8)) for s in ("train", "val")) == raw
    assert dataset.vocab_size == 256 and data.encoding_for(256).decode(list(b"d\xc3\xa9f")) == "d\u00e9f"


@pytest.mark.parametrize("most", [22_501, 22_500, 22_499, 7500, 4000, 2501])
def test_text_too_long_for_one_shard_becomes_several(tmp_path, monkeypatch, capsys, most):
    (tmp_path / "a").write_bytes(np.random.default_rng(0).bytes(25_001))
    data.tokenise([tmp_path / "a"], str(tmp_path / "one"), 256)
    one = data.load(str(tmp_path / "one_train.bin"), 5, 16, 0)
    monkeypatch.setattr(data, "MOST_TOKENS", most)
    capsys.readouterr()
    data.tokenise([tmp_path / "a"], str(tmp_path / "x"), 256)
    count = -(-22_500 // most)
    names = ["x_train.bin"]
    if count > 1:
        names = [f"x_train_{i:06d}.bin" for i in range(1, count + 1)] + ["x_val_000000.bin"]
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()][:len(names)] == [
        str(tmp_path / name) for name in names]
    several = data.load(str(tmp_path / "x_train*.bin"), 5, 16, 0)
    shards = several.splits["train"]
    assert len(shards) == count and max(map(len, shards)) <= most
    assert np.concatenate(shards).tolist() == one.splits["train"][0].tolist()
    # No window goes over the end of a shard: the batches are those of the same shards in memory
    cut = np.array_split(one.splits["train"][0], count)
    in_memory = data.Tokens({"train": cut, "val": one.splits["val"]}, 256, 5, 16, 0)
    for split in "train", "val":
        for got, expected in zip(several.batch(split, 3, 1, 2), in_memory.batch(split, 3, 1, 2)):
            assert torch.equal(got, expected)
    # A pattern that also finds the validation file does not train on it
    assert data.load(str(tmp_path / "x_*.bin"), 5, 16, 0).digest == several.digest == in_memory.digest
    # Shards of an older text would be read too
    monkeypatch.setattr(data, "MOST_TOKENS", 22_500 if count > 1 else 2501)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(data.UserError, match="would mix with other files"):
        data.tokenise([tmp_path / "a"], str(tmp_path / "x"), 256)
    assert sorted(tmp_path.iterdir()) == before


def test_a_pipe_is_no_shard_and_no_file_overwrites_itself(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.bin")
    with pytest.raises(data.UserError, match="fifo.bin is no file"):
        data.load(str(tmp_path / "fifo.bin"), 2, 16, 0)
    monkeypatch.chdir(tmp_path)
    for name in "mine_train.bin", "mine_val.bin":
        Path(name).write_text("some longer text")
        with pytest.raises(data.UserError, match="--out mine would mix with other files"):
            data.tokenise([str(tmp_path / name)], "mine", 256)
        assert Path(name).read_text() == "some longer text"


def test_pieces_of_text_end_with_lines_or_within_very_long_ones(tmp_path, monkeypatch, gpt2):
    rng, path = np.random.default_rng(0), tmp_path / "a.txt"
    for lines in (["the and", "thean", "\u00e9\u4e2d he"], ["x" * 1000, "the " * 200]):
        text = "".join(f"{line}\r\n" for line in rng.choice(lines, size=100))
        path.write_bytes(text.encode())
        monkeypatch.setattr(data, "PIECE", 200)
        pieces = [tokens.tolist() for tokens in data.tokens_of(path, 50257)]
        assert gpt2.decode(sum(pieces, [])) == text and len(pieces) > 3
        if len(lines) == 3:                                # neither blank lines nor indentation
            assert sum(pieces, []) == gpt2.encode_ordinary(text)


def test_text_that_is_not_utf_8_is_reported_or_refused_for_gpt2(tmp_path, capsys, gpt2):
    text = "Voil\u00e0 un texte assez fran\u00e7ais. " * 100
    (tmp_path / "good").write_text(text)
    (tmp_path / "latin").write_bytes(text.encode("latin-1"))
    data.tokenise([tmp_path / "good"], str(tmp_path / "out"), 50257)
    assert "UTF-8" not in capsys.readouterr().out
    data.tokenise([tmp_path / "latin"], str(tmp_path / "out"), 50257)
    assert f"latin: {200 / len(text):.3%} of the characters are not UTF-8 text\n" in capsys.readouterr().out
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    russian = ("\u043c\u0438\u0440 " * 99).encode("koi8-r")
    compressed = np.random.default_rng(0).bytes(9999)
    for content in text.encode("utf-16"), text.encode("utf-32"), russian, compressed:
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(data.UserError, match="bad is mostly not UTF-8 text"):
            data.tokenise([tmp_path / "good", tmp_path / "bad"], str(tmp_path / "out"), 50257)
        (tmp_path / "bad").unlink()
        assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before     # what was there is left alone


@pytest.mark.parametrize("vocab_size", [256, 50257])
def test_memory_of_tokenising_does_not_grow_with_the_text(tmp_path, monkeypatch, gpt2, vocab_size):
    monkeypatch.setattr(data, "PIECE", 2**14)
    peaks = []
    for size in 200_000, 2_000_000:
        (tmp_path / "a").write_bytes((SOURCE * 200)[:size])
        tracemalloc.start()
        data.tokenise([tmp_path / "a"], str(tmp_path / "out"), vocab_size)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 3_000_000


# Fetching ------------------------------------------------------------------------------------------------

class Hub(http.server.BaseHTTPRequestHandler):
    """A loopback stand-in for the hub, which misbehaves as its attributes say."""
    breaks = 0                                             # so many replies break off half way
    length = True                                          # Content-Length; False: none; else a wrong one
    endless = False
    drip = ""                                              # "headers" or "body": a byte now and then

    def do_GET(self):
        hub = type(self)
        hub.requests.append(self.path)
        if hub.answers:                                    # (status, headers) instead of the first replies
            status, headers = hub.answers.pop(0)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            return self.end_headers()
        if hub.drip == "headers":
            self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        while hub.drip == "headers" and not hub.stop.wait(0.1):
            self.wfile.write(b"x")
        self.send_response(200)
        if hub.length is not False:
            self.send_header("Content-Length", str(len(hub.body) if hub.length is True else hub.length))
        self.end_headers()
        while hub.drip == "body" and not hub.stop.wait(0.1):
            self.wfile.write(b"x")
        end = len(hub.body) // 2 if hub.breaks else len(hub.body)
        hub.breaks = max(hub.breaks - 1, 0)
        self.wfile.write(hub.body[:end])
        while hub.endless and not hub.stop.is_set():
            self.wfile.write(bytes(2**16))

    def handle(self):
        try:
            super().handle()
        except OSError:                                    # the other side hung up
            pass

    def log_message(self, *args):
        pass


def shard(count, vocab):
    header = np.array([20240520, 1, count, vocab] + [0] * 252, "<i4")
    return header.tobytes() + (np.arange(count) % 256).astype("<u2").tobytes()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    class Fresh(Hub):
        body, requests, answers, stop = shard(10**6, 0), [], [], threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    Fresh.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", Fresh.address)
    monkeypatch.setattr(data, "FOLDER", tmp_path / "shards")
    yield Fresh
    Fresh.stop.set()
    server.shutdown()
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0    # no time limit outlives its fetch


def hurry(monkeypatch):
    """Makes every time limit one second."""
    real = data.time_limit
    monkeypatch.setattr(data, "time_limit", lambda seconds, what: real(1, what))


def fetched(hub):
    """-> names of the shards in the folder, which are whole."""
    assert all(path.read_bytes() == hub.body for path in data.FOLDER.glob("*.bin"))
    return sorted(path.name for path in data.FOLDER.glob("*.bin"))


NAMES = ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]


@pytest.fixture
def waits(monkeypatch):
    """The pauses between tries, which are not made."""
    pauses = []
    monkeypatch.setattr(data.time, "sleep", pauses.append)
    return pauses


def test_fineweb_is_fetched_with_broken_transfers_repeated(hub, waits):
    hub.breaks = 3
    data.fetch_fineweb(2)
    assert fetched(hub) == [NAMES[0], "fineweb_train_000002.bin", NAMES[1]]
    assert hub.requests[0] == f"/datasets/kjj0/fineweb10B-gpt2/resolve/main/{NAMES[1]}"
    assert len(hub.requests) == 6 and waits == [0.5, 1, 2]
    data.fetch_fineweb(2)                                  # nothing left to do
    assert len(hub.requests) == 6
    dataset = data.load("fineweb", 2, 16, 0)
    assert dataset.vocab_size == 50257 and dataset.validation == str(data.FOLDER / NAMES[1])
    assert len(dataset.splits["train"]) == 2


@pytest.mark.parametrize("length", [False, "many"])
def test_a_server_that_says_no_length(hub, length):
    hub.length = length
    data.fetch_fineweb(1)
    assert fetched(hub) == NAMES


def test_giving_up_is_one_line(hub, waits):
    hub.breaks = 100
    with pytest.raises(data.UserError, match="cannot fetch .* broke off \\(5 tries\\)$"):
        data.fetch_fineweb(1)
    assert fetched(hub) == []
    hub.breaks = 0
    data.fetch_fineweb(1)
    assert fetched(hub) == NAMES


@pytest.mark.parametrize("how,message", [
    ({"body": b"<html>" * 500}, "not a token shard"),
    ({"body": shard(10**6, 0)[:-200]}, "should have"),
    ({"body": shard(10**6, 256)}, "1000000 tokens of 256 kinds"),
    ({"body": shard(999, 0)}, "999 tokens"),
    ({"breaks": 1, "length": False}, "should have"),
    ({"endless": True, "length": False}, "has [34]......:"),
    ({"endless": True, "length": 2**50}, "broke off"),
])
def test_what_is_no_shard_of_fineweb_is_refused(hub, waits, monkeypatch, how, message):
    monkeypatch.setattr(data, "MOST_BYTES", 3_000_000)
    for name, value in how.items():
        setattr(hub, name, value)
    with pytest.raises(data.UserError, match=message):
        data.fetch_fineweb(1)
    assert not fetched(hub) and sum(path.stat().st_size for path in data.FOLDER.iterdir()) < 5_000_000


def test_a_busy_server_is_given_the_time_it_asks_for(hub, waits):
    for status, after in (429, "7"), (503, "9" * 5000), (503, "soon"):
        hub.answers.append((status, {"Retry-After": after}))
    data.fetch_fineweb(1)
    assert waits == [7, 1, 2] and fetched(hub) == NAMES
    (data.FOLDER / NAMES[1]).unlink()
    hub.answers += [(404, {})] * 5
    with pytest.raises(data.UserError, match="Error 404"):
        data.fetch_fineweb(1)


@pytest.mark.parametrize("what", ["headers", "body"])
def test_a_byte_now_and_then_does_not_hold_a_fetch_for_ever(hub, monkeypatch, what):
    hurry(monkeypatch)
    hub.drip = what
    with pytest.raises(data.UserError, match="took more than 1 seconds"):
        data.fetch_fineweb(1)
    assert NAMES[1] not in fetched(hub)


def test_another_machine_needs_https_also_where_redirected(hub, waits, monkeypatch):
    other = hub.address.replace("127.0.0.1", "127.1")      # the loopback's other name is not taken for it
    hub.answers.append((302, {"Location": f"{other}/elsewhere"}))
    for address in hub.address, other, "file:///etc/hosts?":
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(data.UserError, match="is not safe.*https|cannot fetch"):
            data.fetch_fineweb(1)
        assert fetched(hub) == []


def test_the_vocabulary_from_a_host_that_never_answers(tmp_path, monkeypatch):
    silent = socket.create_server(("127.0.0.1", 0))        # it takes calls and says nothing
    for name in "https_proxy", "HTTPS_PROXY":
        monkeypatch.setenv(name, f"http://127.0.0.1:{silent.getsockname()[1]}")
    for name in "no_proxy", "NO_PROXY":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    hurry(monkeypatch)
    with pytest.raises(data.UserError, match="fetching GPT-2's vocabulary took more than 1 seconds"):
        data.encoding_for(50257)
    silent.close()                                         # now calls are refused
    with pytest.raises(OSError):
        data.encoding_for(50257)
    with pytest.raises(data.UserError, match="no tokenizer is known for a vocabulary of 1000"):
        data.encoding_for(1000)


# Images --------------------------------------------------------------------------------------------------

def test_an_epoch_shows_every_image_once_whatever_the_workers(monkeypatch):
    monkeypatch.setattr(data, "shift_and_mirror", lambda x, rng: x)
    dataset = shapes_data()
    images = [bytes(x.numpy()) for x in dataset.splits["train"][0]]
    labels = dataset.splits["train"][1]
    assert len(set(images)) == 50
    for workers in 1, 2, 5, 11:                            # 11 workers read more than an epoch at each step
        steps = -(-3 * 50 // (7 * workers))                # three epochs; batches reach over their edges
        turns = [(step, worker) for step in range(steps) for worker in range(workers)]
        batches = [dataset.batch("train", step, worker, workers) for step, worker in turns]
        x = torch.cat([x for x, _ in batches])[:150] * dataset.std + dataset.mean
        order = [images.index(image.numpy().tobytes()) for image in (x * 255).round().to(torch.uint8)]
        for epoch in range(3):
            assert sorted(order[50 * epoch:50 * epoch + 50]) == list(range(50))
        assert order[:50] != order[50:100]
        assert torch.equal(torch.cat([y for _, y in batches])[:150], labels[order])
        steps = math.ceil(dataset.val_count / (7 * workers))
        turns = [(step, worker) for step in range(steps) for worker in range(workers)]
        val = [dataset.batch("val", step, worker, workers)[1] for step, worker in turns]
        assert torch.equal(torch.cat(val), dataset.splits["val"][1])


def test_images_are_shifted_and_mirrored():
    """Each is one of the 9 x 9 x 2 pictures that numpy cuts out of the padded image, and all occur."""
    x = torch.arange(3 * 8 * 8).view(1, 3, 8, 8).to(torch.uint8) + 1
    padded = np.pad(x[0].numpy(), ((0, 0), (4, 4), (4, 4)))
    cuts = set()
    for i in range(9):
        for j in range(9):
            cut = padded[:, i:i + 8, j:j + 8]
            cuts |= {cut.tobytes(), cut[:, :, ::-1].tobytes()}
    moved = data.shift_and_mirror(x.expand(3000, -1, -1, -1), data.seeded(0))
    assert {image.numpy().tobytes() for image in moved} == cuts and len(cuts) == 162


def test_shapes_are_deterministic_balanced_and_beyond_a_linear_classifier():
    (x, y), (vx, vy) = data.shapes(4000, data.seeded("a")), data.shapes(1000, data.seeded("b"))
    assert torch.equal(x, data.shapes(4000, data.seeded("a"))[0]) and np.bincount(y).min() > 300
    f, vf = (torch.cat([t.flatten(1) / 255, torch.ones(len(t), 1)], 1) for t in (x, vx))
    squares, products = f.T @ f, f.T @ nn.functional.one_hot(y, 10).float()
    best = 0                                               # ridge regression, the best of several penalties
    for penalty in 1, 10, 100, 1000:
        w = torch.cholesky_solve(products, torch.linalg.cholesky(squares + penalty * torch.eye(len(squares))))
        best = max(best, ((vf @ w).argmax(1) == vy).float().mean().item())
    assert 0.2 < best < 0.6


def cifar_archive(hub, name, monkeypatch, per_file=6):
    """An archive in the format of the real one, served from this machine; its checksums in torchvision."""
    import torchvision
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    rng, classes, files = np.random.default_rng(0), data.IMAGE_SETS[name][0], {}
    key = "labels" if name == "cifar10" else "fine_labels"
    for file, _ in kind.train_list + kind.test_list:
        rows = rng.integers(256, size=(per_file, 3072), dtype=np.uint8)
        files[file] = pickle.dumps({"data": rows, key: rng.integers(classes, size=per_file).tolist()})
    files[kind.meta["filename"]] = pickle.dumps({kind.meta["key"]: [f"class {i}" for i in range(classes)]})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for file, content in files.items():
            info = tarfile.TarInfo(f"{kind.base_folder}/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    md5 = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    for attribute in "train_list", "test_list":
        monkeypatch.setattr(kind, attribute, [[file, md5[file]] for file, _ in getattr(kind, attribute)])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5[kind.meta["filename"]]})
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(buffer.getvalue()).hexdigest())
    monkeypatch.setattr(kind, "url", f"{hub.address}/{kind.filename}")
    hub.body = buffer.getvalue()
    return pickle.loads(files[kind.train_list[0][0]]), key


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_once_and_read_through_torchvision(hub, monkeypatch, name):
    first, key = cifar_archive(hub, name, monkeypatch)
    data.cifar(name, True)
    requests = len(hub.requests)
    dataset = data.load(name, 4, None, 0)
    assert len(hub.requests) == requests > 0
    images, labels = dataset.splits["train"]
    assert images[0].numpy().tobytes() == bytes(first["data"][0])    # red, green, blue plane, row by row
    assert labels[:6].tolist() == first[key]
    assert len(labels) == (30 if name == "cifar10" else 6) and len(dataset.splits["val"][1]) == 6
    assert dataset.validation == f"the 6 test images of {name}"
    assert dataset.num_classes == data.IMAGE_SETS[name][0]


def test_bad_cifar_is_one_clear_line_and_does_no_harm(hub, monkeypatch):
    cifar_archive(hub, "cifar10", monkeypatch)
    whole = hub.body
    hub.body = whole[:1000] + b"x" + whole[1001:]
    with pytest.raises(data.UserError, match="cannot fetch cifar10 .*--data shapes needs no network"):
        data.cifar("cifar10", True)
    hub.drip = "body"
    with monkeypatch.context() as patch:
        hurry(patch)
        with pytest.raises(data.UserError, match="fetching cifar10 took more than"):
            data.cifar("cifar10", True)
    hub.body, hub.drip = whole, ""
    assert len(data.load("cifar10", 4, None, 0).splits["train"][1]) == 30


# The command line: what goes wrong is one line -----------------------------------------------------------

@pytest.mark.parametrize("arguments,message", [
    ([], "required"),
    (["text"], "required"),
    (["text", "none.txt", "--out", "out"], "none.txt"),
    (["text", "/proc", "--out", "out"], "Is a directory: '/proc'"),
    (["text", "a.txt", "--out", "a.txt/b/c"], "a.txt"),
    (["text", "a.txt", "--out", "/proc/nobody/writes"], "/proc/nobody"),
    (["text", "a.txt", "--encoding", "morse"], "invalid choice"),
    (["text", "a.txt"], "datasets"),                       # a file stands where the folder should be
    (["fineweb"], "datasets"),
    (["fineweb", "--shards", "x"], "invalid int"),
    (["fineweb", "--shards", "104"], "--shards must be from 1 to 103, not 104"),
    (["imagenet"], "invalid choice"),
])
def test_bad_commands_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text " * 100)
    Path("datasets").write_text("mine")
    code, out, error = command(monkeypatch, capsys, *arguments)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert out == "" and sorted(os.listdir()) == ["a.txt", "datasets"]
    assert Path("datasets").read_text() == "mine"


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").write_bytes(bytes(200_000))
    old = text_bin(tmp_path, "out_train").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, hard))
    try:
        code, out, error = command(monkeypatch, capsys, "text", tmp_path / "a", "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, out) == (2, "") and re.fullmatch("error: .*File too large\n", error)
    assert (tmp_path / "out_train.bin").read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out_train.bin"]


def test_a_full_or_closed_output_is_one_line(tmp_path):
    (tmp_path / "a").write_bytes(bytes(2000))
    for output, message in ("> /dev/full", "No space left on device"), ("| true", "Broken pipe"):
        line = f"set -o pipefail; '{sys.executable}' '{ROOT}/data.py' text a --out out {output}"
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and re.fullmatch(f"error: .*{message}\n", done.stderr)


def test_control_c_is_one_line_and_leaves_nothing(tmp_path):
    program = [sys.executable, ROOT / "data.py", "text", "/dev/stdin", "--out", tmp_path / "out"]
    pipe = subprocess.PIPE
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)    # as it would not under nohup
    process = subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=pipe, text=True, preexec_fn=hears)
    while not list(tmp_path.iterdir()):                    # now it waits for text
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    code = process.wait(timeout=20)
    assert (code, process.stdout.read(), process.stderr.read()) == (130, "", "error: KeyboardInterrupt\n")
    assert not list(tmp_path.iterdir())


def test_run_program_says_one_line(monkeypatch, capsys):
    monkeypatch.delenv("SDP_TRACEBACK", raising=False)
    cases = [(data.UserError("a\nb"), 2, "a b"), (OSError(28, "No space"), 2, "[Errno 28] No space"),
             (MemoryError(), 2, "MemoryError"), (torch.OutOfMemoryError("CUDA"), 2, "CUDA"),
             (RuntimeError("you can't allocate memory"), 2, "you can't allocate memory"),
             (KeyboardInterrupt(), 130, "KeyboardInterrupt")]
    for wrong, code, said in cases:
        def main():
            raise wrong
        assert data.run_program(main) == code and capsys.readouterr().err == f"error: {said}\n"
    monkeypatch.setenv("SDP_TRACEBACK", "1")
    data.run_program(main)
    assert re.fullmatch("(?s)Traceback.*\nerror: KeyboardInterrupt\n", capsys.readouterr().err)

    for fault in ZeroDivisionError, RuntimeError:          # a fault of the program is not the user's
        def ours():
            raise fault
        with pytest.raises(fault):
            data.run_program(ours)
