"""
Tests of data.py, on this machine alone: what would come from the network comes from a server on the loopback.

    python -m pytest -q experiments/test_data.py           from the repository's root, in less than a minute
"""

import hashlib
import http.server
import io
import os
import pickle
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
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


def text_bin(folder, name="text", count=6000, vocab=256):
    """A shard of real text (this project's), or of random tokens where the vocabulary is not bytes."""
    tokens = np.frombuffer((ROOT / "data.py").read_bytes()[:count], np.uint8)
    if vocab != 256:
        tokens = np.random.default_rng(0).integers(vocab, size=count)
    path = folder / f"{name}.bin"
    data.write_bin(path, tokens, vocab)
    return path


def command(monkeypatch, capsys, *arguments):
    """-> exit code, standard output and standard error of data.py with these arguments."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    code = data.run_program(data.main)
    return code, *capsys.readouterr()


def shell(line, folder):
    """Runs a line of bash in which `data.py` is the program -> exit code, stdout, stderr."""
    line = line.replace("data.py", f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'data.py'))}")
    line = ["bash", "-c", f"set -o pipefail; {line}"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


# ---------------------------------------------------------------------------------------------------------
# Token shards
# ---------------------------------------------------------------------------------------------------------

def test_bin_shards_are_llm_c_s(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 3)
    tokens = np.array([5, 50256, 0, 7], np.uint16)
    data.write_bin(tmp_path / "a.bin", tokens, 50257)
    raw = (tmp_path / "a.bin").read_bytes()              # as llm.c's data/data_common.py writes it
    header = np.array([20240520, 1, 4, 0] + [0] * 252, "<i4")
    assert raw == header.tobytes() + tokens.astype("<u2").tobytes()
    read, vocab = data.read_bin(tmp_path / "a.bin")
    assert vocab == 50257 and (read[:] == tokens).all()
    assert (data.Shard(tmp_path / "a.bin", 1, 4)[1:3] == [0, 7]).all()


def test_bin_reader_refuses_every_cut_and_every_flipped_header(tmp_path):
    path = text_bin(tmp_path, count=40)
    raw = path.read_bytes()
    for end in [0, 1, 7, 1023, 1024, 1025, len(raw) - 1]:
        path.write_bytes(raw[:end])
        with pytest.raises(data.UserError):
            data.read_bin(path)
    for byte in range(16):                                           # magic, version, count, vocabulary
        path.write_bytes(raw[:byte] + bytes([raw[byte] ^ 0x41]) + raw[byte + 1:])
        try:
            vocab = data.read_bin(path)[1]
            assert byte >= 12 and vocab != 256             # a larger vocabulary is no damage to be seen
        except data.UserError:
            pass
    with pytest.raises(data.UserError, match="vocabulary is 100"):
        data.write_bin(path, [5, 100], 100)
        data.read_bin(path)
    for unreadable in tmp_path / "none.bin", tmp_path:
        with pytest.raises(data.UserError, match="cannot read|not a token shard"):
            data.read_bin(unreadable)


def test_bin_reader_survives_random_damage(tmp_path):
    path, rng = text_bin(tmp_path, count=500), np.random.default_rng(0)
    raw = path.read_bytes()
    refused = 0
    for _ in range(300):
        broken = bytearray(raw)
        for _ in range(rng.integers(1, 4)):
            broken[rng.integers(len(raw)) if rng.random() < 0.5 else rng.integers(16)] ^= 1 << rng.integers(8)
        path.write_bytes(broken[:rng.integers(len(raw))] if rng.random() < 0.2 else broken)
        try:
            tokens, vocab = data.read_bin(path)
            assert len(tokens) == 500 and tokens[:].max() < vocab
        except data.UserError as e:
            assert "\n" not in str(e)
            refused += 1
    assert 100 < refused < 300


HEAD = [20240520, 1, 6000, 256]
BAD_SHARDS = [  # header, number of tokens, a token
    (HEAD[:1], 6000, 5),
    ([20240521] + HEAD[1:], 6000, 5),
    (HEAD[:1] + [2] + HEAD[2:], 6000, 5),
    (HEAD, 5999, 5),
    (HEAD, 6001, 5),
    (HEAD, 0, 5),
    (HEAD[:2] + [-1, 256], 0, 5),
    (HEAD[:2] + [0, 256], 0, 5),
    (HEAD[:2] + [20, 256], 20, 5),
    (HEAD[:3] + [-1], 6000, 5),
    (HEAD[:3] + [70000], 6000, 5),
    (HEAD, 6000, 256),
    (HEAD[:3] + [4], 6000, 5),
    (HEAD[:3] + [0], 6000, 50257),
]


@pytest.mark.parametrize("header,count,token", BAD_SHARDS)
def test_bad_shards_are_one_clear_line(tmp_path, header, count, token):
    header = np.array(header + [0] * (256 - len(header)), "<i4")
    (tmp_path / "text.bin").write_bytes(header.tobytes() + np.full(count, token, "<u2").tobytes())
    with pytest.raises(data.UserError, match="text.bin|too short for one batch") as caught:
        data.load(str(tmp_path / "text.bin"), 8, 64, 0)
    assert "\n" not in str(caught.value)


def test_a_shard_that_shrinks_while_in_use_is_one_line(tmp_path):
    path = text_bin(tmp_path)
    dataset = data.load(str(path), 4, 16, 0)
    os.truncate(path, 1100)
    with pytest.raises(data.UserError, match="text.bin became shorter while in use"):
        for step in range(20):
            dataset.batch("train", step, 0, 1)


# ---------------------------------------------------------------------------------------------------------
# Tokens as batches
# ---------------------------------------------------------------------------------------------------------

def test_batches_are_a_pure_function_and_differ_among_steps_and_workers(tmp_path):
    path = str(text_bin(tmp_path))
    a, b = data.load(path, 4, 16, 0), data.load(path, 4, 16, 1)
    x, y = a.batch("train", 3, 1, 4)
    assert x.shape == y.shape == (4, 16) and torch.equal(x[:, 1:], y[:, :-1]) and x.dtype == torch.int64
    assert torch.equal(x, a.batch("train", 3, 1, 4)[0])
    assert torch.equal(x, data.load(path, 4, 16, 0).batch("train", 3, 1, 4)[0])
    assert not torch.equal(x, b.batch("train", 3, 1, 4)[0])
    for step, worker, workers in (4, 1, 4), (3, 2, 4), (3, 1, 8):
        assert not torch.equal(x, a.batch("train", step, worker, workers)[0])


def test_all_workers_together_validate_on_the_same_sequences_once(tmp_path):
    dataset = data.load(str(text_bin(tmp_path)), 3, 16, 0)
    seen = []
    for workers in 1, 2, 5:
        turns = [(step, worker) for worker in range(workers) for step in range(dataset.val_steps(workers))]
        batches = [dataset.batch("val", step, worker, workers)[0] for step, worker in turns]
        rows = sorted(map(tuple, torch.cat(batches).tolist()))
        seen.append(rows)
        assert len(rows) == dataset.val_count == len(set(rows))
    assert seen[0] == seen[1] == seen[2]


def test_training_windows_cover_all_shards_evenly():
    a, b = np.arange(0, 300, dtype=np.uint16), np.arange(300, 400, dtype=np.uint16)
    short = np.arange(20, dtype=np.uint16)                           # has no window of 21
    dataset = data.Tokens({"train": [short, a, b], "val": [a]}, 400, 10, 20, 0)
    starts = torch.cat([dataset.batch("train", i, 0, 1)[0][:, 0] for i in range(400)])
    assert set(starts.tolist()) == set(range(280)) | set(range(300, 380))
    assert (starts >= 300).float().mean() == pytest.approx(80 / 360, abs=0.03)


def test_a_validation_shard_shorter_than_a_sequence_gives_way_to_the_next(tmp_path):
    a, short = np.arange(1000, dtype=np.uint16), np.arange(16, dtype=np.uint16)
    for name, tokens in ("x_train_1", a), ("x_val_0", short), ("x_val_1", a[500:]), ("x_val_2", a):
        data.write_bin(tmp_path / f"{name}.bin", tokens, 1000)
    dataset = data.load(str(tmp_path / "x_train_1.bin"), 2, 16, 0)
    assert dataset.val_count == 499 // 16 and dataset.batch("val", 0, 0, 1)[0].min() == 500
    assert dataset.validation == str(tmp_path / "x_val_1.bin")
    with pytest.raises(data.UserError, match="the val data has 16 tokens, too short"):
        data.Tokens({"train": [a], "val": [short]}, 1000, 2, 16, 0)
    with pytest.raises(data.UserError, match="the train data has 1000 tokens, too short"):
        data.Tokens({"train": [a], "val": [a]}, 1000, 100, 16, 0)


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
    ("train.bin", ["val.bin"], "val.bin"),
    ("text.bin", ["val.bin", "text_val.bin"], "the last tenth of"),
])
def test_validation_is_on_the_file_beside_or_the_last_tenth_and_says_so(tmp_path, train, beside, validation):
    path = tmp_path / train
    data.write_bin(path, np.arange(1000), 3000)
    for name in beside:
        data.write_bin(tmp_path / name, np.arange(2000, 3000), 3000)
    dataset = data.load(str(path), 2, 16, 0)
    if validation == "the last tenth of":
        assert dataset.validation == f"the last tenth of {path}"
        assert dataset.splits["val"][0][:].tolist() == list(range(900, 1000))
        assert dataset.splits["train"][0][:].tolist() == list(range(900))
    else:
        assert dataset.validation == str(tmp_path / validation)
        assert dataset.batch("val", 0, 0, 1)[0].min() == 2000
        assert len(dataset.splits["train"]) == 1 and len(dataset.splits["train"][0]) == 1000


def test_the_digest_is_of_contents_not_of_names(tmp_path):
    tokens = np.random.default_rng(0).integers(256, size=5000)
    digests = []
    for folder, names in ("a", ("x_train", "x_val")), ("b", ("y_train_000001", "y_val_000000")):
        (tmp_path / folder).mkdir()
        for name, part in zip(names, (tokens[:4000], tokens[4000:])):
            data.write_bin(tmp_path / folder / f"{name}.bin", part, 256)
        digests.append(data.load(str(tmp_path / folder / f"{names[0]}.bin"), 2, 16, 0).digest)
    assert digests[0] == digests[1] and re.fullmatch("[0-9a-f]{64}", digests[0])
    for changed in 0, 1, 2500, 3999, 4000, 4999:           # one token, in training or validation data
        other = tokens.copy()
        other[changed] ^= 1
        digests.append(data.Tokens({"train": [other[:4000]], "val": [other[4000:]]}, 256, 2, 16, 0).digest)
    digests.append(data.Tokens({"train": [tokens[:3999]], "val": [tokens[4000:]]}, 256, 2, 16, 0).digest)
    assert len(set(digests)) == len(digests) - 1


def test_the_digest_of_a_large_shard_reads_little_and_sees_a_change_anywhere_in_what_it_reads(tmp_path):
    tokens = np.random.default_rng(0).integers(65536, size=1_000_000).astype(np.uint16)

    class Counting:
        read = 0

        def __len__(self):
            return len(tokens)

        def __getitem__(self, part):
            self.read += len(tokens[part])
            return tokens[part]
    counting = Counting()
    digest = data.fingerprint([counting])
    assert digest == data.fingerprint([tokens]) and counting.read < 70_000
    other = tokens.copy()
    other[500_000:520_000] += 1                            # longer than what is left out between two windows
    assert data.fingerprint([other]) != digest != data.fingerprint([tokens[:-1]])


def test_text_needs_no_torchvision():
    code = """if True:
        import sys
        sys.modules["torchvision"] = None                  # now an import of it fails
        import data
        print(data.load("stdlib", 2, 16, 0).unit)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "tokens\n"), done.stderr


# ---------------------------------------------------------------------------------------------------------
# Tokenising
# ---------------------------------------------------------------------------------------------------------

def small_gpt2():
    """An encoding with GPT-2's rules for words and a few of its merges, which needs no network."""
    ranks = {bytes([i]): i for i in range(256)}
    for merge in b"  ", b"\n\n", b" t", b"he", b" the", b"    ", b"an", b"and", b"\xef\xbf", b"\xef\xbf\xbd":
        ranks[merge] = len(ranks)
    return tiktoken.Encoding("small", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


@pytest.fixture
def gpt2(monkeypatch):
    encoding = small_gpt2()
    monkeypatch.setattr(data, "encoding_for", lambda vocab_size: encoding)
    return encoding


def all_tokens(prefix, split):
    paths = sorted(prefix.parent.glob(f"{prefix.name}_{split}*.bin"))
    return np.concatenate([data.read_bin(path)[0][:] for path in paths])


def test_text_command_writes_train_and_val(tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "a.txt", tmp_path / "b" / "mine"
    source.write_text("h\u00e9llo " * 100)
    code, said, error = command(monkeypatch, capsys, "text", source, "--out", out)
    assert (code, error) == (0, "") and said == f"{out}_train.bin: 630 tokens\n{out}_val.bin: 70 tokens\n"
    assert sorted(p.name for p in out.parent.iterdir()) == ["mine_train.bin", "mine_val.bin"]
    dataset = data.load(f"{out}_train.bin", 1, 8, 0)
    train, val = dataset.splits["train"][0][:], dataset.splits["val"][0][:]
    assert bytes(np.concatenate([train, val]).astype(np.uint8)) == source.read_bytes() and len(val) == 70
    assert dataset.vocab_size == 256 and data.encoding_for(256).decode(list(b"d\xc3\xa9f")) == "d\u00e9f"


def test_bytes_are_tokens_whatever_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 1000)
    raw = np.random.default_rng(0).integers(256, size=25_001, dtype=np.uint8).tobytes()
    (tmp_path / "a.gz").write_bytes(raw[:9999])
    (tmp_path / "b").write_bytes(raw[9999:])
    data.tokenise([tmp_path / "a.gz", tmp_path / "b"], str(tmp_path / "out"), 256)
    train, val = all_tokens(tmp_path / "out", "train"), all_tokens(tmp_path / "out", "val")
    assert bytes(np.concatenate([train, val]).astype(np.uint8)) == raw and len(train) == 22_500


def test_tokens_do_not_depend_on_the_pieces(tmp_path, monkeypatch, gpt2):
    rng, alphabet = np.random.default_rng(0), list("  \n\tthean1'!\u00e9\u4e2d\u00a0\x1c\u2003\r")
    path = tmp_path / "a.txt"
    for size in 200, 201, 333:                             # among 200 such letters a word ends
        monkeypatch.setattr(data, "PIECE", size)
        for _ in range(50):
            text = "".join(rng.choice(alphabet, size=1000))
            path.write_bytes(text.encode())
            tokens = np.concatenate(list(data.tokens_of(path, 50257)))
            assert tokens.tolist() == gpt2.encode_ordinary(text)
    text = "x" * 1000 + "\n" * 1000                        # a word longer than many pieces is cut up
    path.write_bytes(text.encode())
    assert gpt2.decode(np.concatenate(list(data.tokens_of(path, 50257))).tolist()) == text


def test_text_that_is_not_utf_8_is_reported_or_refused_for_gpt2(tmp_path, monkeypatch, capsys, gpt2):
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


def test_too_many_tokens_for_one_shard_become_several(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST_TOKENS", 1000)
    raw = (ROOT / "data.py").read_bytes()[:5005]
    (tmp_path / "a").write_bytes(raw)
    data.tokenise([tmp_path / "a"], str(tmp_path / "out"), 256)
    names = [f"out_train_{i:06d}.bin" for i in range(5)] + ["out_val_000000.bin"]
    assert sorted(p.name for p in tmp_path.glob("*.bin")) == names
    dataset = data.load(str(tmp_path / "out_train_*.bin"), 4, 16, 0)
    assert [len(shard) for shard in dataset.splits["train"]] == [1000, 1000, 1000, 1000, 504]
    written = [all_tokens(tmp_path / "out", split) for split in ("train", "val")]
    assert bytes(np.concatenate(written).astype(np.uint8)) == raw
    assert dataset.validation == str(tmp_path / "out_val_000000.bin")


@pytest.mark.parametrize("vocab_size", [256, 50257])
def test_memory_of_tokenising_does_not_grow_with_the_text(tmp_path, monkeypatch, gpt2, vocab_size):
    monkeypatch.setattr(data, "PIECE", 2**14)
    peaks = []
    for size in 200_000, 2_000_000:
        (tmp_path / "a").write_bytes(((ROOT / "data.py").read_bytes() * 100)[:size])
        tracemalloc.start()
        data.tokenise([tmp_path / "a"], str(tmp_path / "out"), vocab_size)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 3_000_000


# ---------------------------------------------------------------------------------------------------------
# Fetching
# ---------------------------------------------------------------------------------------------------------

class Hub(http.server.BaseHTTPRequestHandler):
    """A loopback stand-in for the hub: honours Range, and misbehaves as its attributes say."""
    body, requests = b"", []
    breaks = 0                                             # so many replies break off half way
    replays = False                                        # it ignores Range and sends all of it again
    lies = False                                           # it says 206 and sends the beginning
    answers = []                                           # (status, headers) instead of the first replies
    length = True                                          # False: none; a number: a wrong one
    endless = False
    drip = ""                                              # "headers" or "body": a byte now and then
    stop = threading.Event()

    def do_GET(self):
        hub = type(self)
        hub.requests.append((self.path, self.headers.get("Range")))
        if hub.answers:
            status, headers = hub.answers.pop(0)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if hub.drip == "headers":
            self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
            return self.write_slowly()
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        start = 0 if hub.replays else start
        if start >= len(hub.body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        start = 0 if hub.lies else start
        if hub.length is not False:
            length = len(hub.body) - start if hub.length is True else hub.length
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if hub.drip == "body":
            return self.write_slowly()
        end = len(hub.body)
        if hub.breaks:
            hub.breaks -= 1
            end = start + (end - start) // 2
        self.wfile.write(hub.body[start:end])
        while hub.endless and not hub.stop.is_set():
            self.wfile.write(bytes(2**16))

    def write_slowly(self):
        while not type(self).stop.wait(0.1):
            self.wfile.write(b"x")

    def handle(self):
        try:
            super().handle()
        except OSError:                                              # the other side hung up
            pass

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def shard_bytes(tmp_path_factory):
    return text_bin(tmp_path_factory.mktemp("hub"), "source", 1_000_000, 50257).read_bytes()


@pytest.fixture
def hub(tmp_path, monkeypatch, shard_bytes):
    class Fresh(Hub):
        body, requests, answers, stop = shard_bytes, [], [], threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Fresh.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", Fresh.address)
    monkeypatch.setattr(data, "FOLDER", tmp_path / "shards")
    yield Fresh
    Fresh.stop.set()
    server.shutdown()
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0              # no time limit outlives its fetch


def fetched():
    return sorted(path.name for path in data.FOLDER.iterdir())


def test_fineweb_is_fetched_broken_transfers_resumed(hub):
    hub.breaks = 3
    data.fetch_fineweb(2)
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert fetched() == sorted(names)
    assert all((data.FOLDER / name).read_bytes() == hub.body for name in names)
    assert hub.requests[0] == ("/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_val_000000.bin", None)
    assert hub.requests[1][1] == f"bytes={len(hub.body) // 2}-" and len(hub.requests) == 6
    data.fetch_fineweb(2)                                            # nothing left to do
    assert len(hub.requests) == 6
    dataset = data.load("fineweb", 2, 16, 0)
    assert dataset.vocab_size == 50257 and dataset.validation == str(data.FOLDER / names[0])
    assert len(dataset.splits["train"]) == 2
    (data.FOLDER / names[0]).unlink()
    with pytest.raises(data.UserError, match="no FineWeb shards.*data.py fineweb"):
        data.load("fineweb", 2, 16, 0)


def test_a_server_that_sends_everything_again_or_the_wrong_part(hub):
    hub.breaks, hub.replays = 1, True
    data.fetch_fineweb(1)
    assert all(path.read_bytes() == hub.body for path in data.FOLDER.iterdir())
    for path in data.FOLDER.iterdir():
        path.unlink()
    hub.breaks, hub.replays, hub.lies = 1, False, True
    with pytest.raises(data.UserError, match="sent something else than a whole token shard"):
        data.fetch_fineweb(1)
    assert fetched() == []


def test_giving_up_is_one_line_and_the_next_start_goes_on(hub):
    hub.breaks = 100
    with pytest.raises(data.UserError, match="broke off \\(5 tries\\).*go on from here"):
        data.fetch_fineweb(1)
    assert fetched() == ["fineweb_val_000000.bin.part"]
    hub.breaks = 0
    data.fetch_fineweb(1)
    assert fetched() == ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    assert (data.FOLDER / "fineweb_val_000000.bin").read_bytes() == hub.body


def other_shard(count, vocab):
    header = np.array([20240520, 1, count, vocab] + [0] * 252, "<i4")
    return header.tobytes() + np.zeros(count, "<u2").tobytes()


@pytest.mark.parametrize("body,message", [
    (b"<html>" * 500, "header"),
    (other_shard(10**6, 0)[:-200], "should have"),
    (other_shard(10**6, 256), "1000000 tokens of a vocabulary of 256"),
    (other_shard(999, 0), "999 tokens"),
])
def test_what_is_no_shard_of_fineweb_is_refused(hub, body, message):
    hub.body = body
    with pytest.raises(data.UserError, match=message):
        data.fetch_fineweb(1)
    assert fetched() == []                                           # nothing half-written stays


def test_without_a_length_the_contents_decide(hub):
    hub.length = False
    data.fetch_fineweb(1)
    assert all(path.read_bytes() == hub.body for path in data.FOLDER.iterdir())
    (data.FOLDER / "fineweb_val_000000.bin").unlink()
    hub.breaks = 1
    with pytest.raises(data.UserError, match="sent something else than a whole token shard"):
        data.fetch_fineweb(1)
    assert fetched() == ["fineweb_train_000001.bin"]


def test_a_busy_server_is_given_the_time_it_asks_for_within_reason(hub, monkeypatch):
    waits = []
    monkeypatch.setattr(data.time, "sleep", waits.append)
    for status, after in (429, "7"), (503, "9" * 5000), (503, "soon"):
        hub.answers.append((status, {"Retry-After": after}))
    hub.answers.append((500, {}))
    data.fetch_fineweb(1)
    assert waits == [7, 300, 0.4, 0.8] and len(fetched()) == 2
    (data.FOLDER / "fineweb_val_000000.bin").unlink()
    hub.answers += [(404, {})]
    with pytest.raises(data.UserError, match="answers 404$"):
        data.fetch_fineweb(1)
    assert len(waits) == 4


@pytest.mark.parametrize("endless,length", [(True, False), (False, 2**50), (True, 2**50)])
def test_no_more_is_written_than_a_shard_can_have(hub, monkeypatch, endless, length):
    monkeypatch.setattr(data, "MOST_BYTES", 3_000_000)
    hub.endless, hub.length = endless, length
    with pytest.raises(data.UserError, match="sends more than 3000000 bytes"):
        data.fetch_fineweb(1)
    assert fetched() == [] and len(hub.requests) == 1


@pytest.mark.parametrize("length", ["many", "1e9"])
def test_a_length_that_is_no_number_is_one_line(hub, length):
    hub.length = length
    with pytest.raises(data.UserError) as caught:
        data.fetch_fineweb(1)
    assert "\n" not in str(caught.value) and "fineweb_val_000000.bin" not in fetched()


@pytest.mark.parametrize("what", ["headers", "body"])
def test_a_byte_now_and_then_does_not_hold_a_fetch_for_ever(hub, monkeypatch, what):
    monkeypatch.setattr(data, "FETCH_SECONDS", 1)
    hub.drip = what
    began = time.monotonic()
    with pytest.raises(data.UserError, match="took more than 1 seconds"):
        data.fetch_fineweb(1)
    assert time.monotonic() - began < 5 and "fineweb_val_000000.bin" not in fetched()


def test_another_machine_needs_https_also_where_redirected(hub, monkeypatch):
    port = hub.address.rpartition(":")[2]
    hub.answers.append((302, {"Location": f"http://127.1:{port}/elsewhere"}))      # the loopback's other name
    with pytest.raises(data.UserError, match="127.1.*https://"):
        data.fetch_fineweb(1)
    assert fetched() == [] and len(hub.requests) == 2
    disguised = "http://127.0.0.1:1@192.0.2.1"
    for address in "http://192.0.2.1", "ftp://192.0.2.1", disguised, "192.0.2.1", "file:///etc":
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(data.UserError, match="https://"):
            data.fetch_fineweb(1)
    assert len(hub.requests) == 2


def test_the_vocabulary_from_a_host_that_never_answers(tmp_path, monkeypatch):
    silent = socket.create_server(("127.0.0.1", 0))                  # it takes calls and says nothing
    for name in "https_proxy", "HTTPS_PROXY":
        monkeypatch.setenv(name, f"http://127.0.0.1:{silent.getsockname()[1]}")
    for name in "no_proxy", "NO_PROXY":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(data, "VOCABULARY_SECONDS", 1)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(data.UserError, match="fetching GPT-2's vocabulary took more than 1 seconds"):
        data.encoding_for(50257)
    silent.close()                                                   # now calls are refused
    with pytest.raises(data.UserError, match="GPT-2's vocabulary could not be fetched"):
        data.encoding_for(50257)
    with pytest.raises(data.UserError, match="no tokenizer is known for a vocabulary of 1000"):
        data.encoding_for(1000)


# ---------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------

def shapes_data(batch_size=7, seed=0):
    splits = {"train": data.shapes(50, data.seeded("t")), "val": data.shapes(20, data.seeded("v"))}
    return data.Images("shapes", splits, batch_size, seed)


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
        turns = [(step, worker) for step in range(dataset.val_steps(workers)) for worker in range(workers)]
        val = [dataset.batch("val", step, worker, workers)[1] for step, worker in turns]
        assert torch.equal(torch.cat(val), dataset.splits["val"][1])
    y = shapes_data(batch_size=100).batch("train", 3, 0, 1)[1]       # a batch of two whole epochs
    assert torch.equal(y.bincount(minlength=10), 2 * labels.bincount(minlength=10))


def test_image_batches_are_a_pure_function_and_differ_among_steps_workers_and_seeds():
    a, b = shapes_data(), shapes_data(seed=1)
    x, y = a.batch("train", 3, 1, 4)
    assert x.shape == (7, 3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert torch.equal(x, shapes_data().batch("train", 3, 1, 4)[0])
    assert not torch.equal(x, b.batch("train", 3, 1, 4)[0])
    for step, worker, workers in (4, 1, 4), (3, 2, 4), (3, 1, 8):
        assert not torch.equal(x, a.batch("train", step, worker, workers)[0])
    assert a.validation == "the 20 test images of shapes"


def test_the_digest_of_images_sees_a_pixel_and_a_label():
    digest = shapes_data().digest
    assert digest == shapes_data(batch_size=3, seed=5).digest        # contents, not how they are read
    for split in "train", "val":
        for change in 0, 1:
            splits = {s: tuple(t.clone() for t in shapes_data().splits[s]) for s in ("train", "val")}
            splits[split][change][-1] ^= 1
            assert data.Images("shapes", splits, 7, 0).digest != digest


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
    seen = {image.numpy().tobytes() for image in moved}
    assert seen == cuts and len(cuts) == 162


def test_shapes_are_deterministic_balanced_and_beyond_a_linear_classifier():
    (x, y), (vx, vy) = data.shapes(4000, data.seeded("a")), data.shapes(1000, data.seeded("b"))
    again = data.shapes(4000, data.seeded("a"))
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert x.dtype == torch.uint8 and x.shape == (4000, 3, 32, 32) and np.bincount(y).min() > 300
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
    rng, classes, files = np.random.default_rng(0), data.IMAGES[name][0], {}
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
    return files, kind


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_once_and_read_through_torchvision(hub, monkeypatch, name):
    files, kind = cifar_archive(hub, name, monkeypatch)
    data.download_images(name)
    requests = len(hub.requests)
    data.download_images(name)
    dataset = data.load(name, 4, None, 0)
    assert len(hub.requests) == requests > 0
    first = pickle.loads(files[kind.train_list[0][0]])
    images, labels = dataset.splits["train"]
    assert images[0].numpy().tobytes() == bytes(first["data"][0])    # red, green, blue plane, row by row
    assert labels[:6].tolist() == first["labels" if name == "cifar10" else "fine_labels"]
    assert len(labels) == (30 if name == "cifar10" else 6) and len(dataset.splits["val"][1]) == 6
    assert dataset.validation == f"the 6 test images of {name}"
    assert dataset.num_classes == data.IMAGES[name][0]
    assert dataset.batch("train", 0, 0, 1)[0].shape == (4, 3, 32, 32)
    damaged = data.FOLDER / kind.base_folder / kind.train_list[0][0]
    damaged.write_bytes(b"x")                                        # it is unpacked again
    assert torch.equal(data.load(name, 4, None, 0).splits["train"][1], labels)


def test_bad_cifar_is_one_clear_line(hub, monkeypatch):
    _, kind = cifar_archive(hub, "cifar10", monkeypatch)
    whole = hub.body
    for damage in "bytes", "drip", "network":
        if damage == "bytes":
            hub.body = whole[:1000] + b"x" + whole[1001:]
        elif damage == "drip":
            hub.drip = "body"
            monkeypatch.setattr(data, "FETCH_SECONDS", 1)
        else:
            hub.drip = ""
            monkeypatch.setattr(kind, "url", "http://127.0.0.1:9/none")
        with pytest.raises(data.UserError, match="cifar10") as caught:
            data.download_images("cifar10")
        assert "\n" not in str(caught.value)
    hub.body = whole                                                 # what is left of those does no harm
    monkeypatch.setattr(kind, "url", f"{hub.address}/{kind.filename}")
    data.download_images("cifar10")
    assert len(data.load("cifar10", 4, None, 0).splits["train"][1]) == 30


# ---------------------------------------------------------------------------------------------------------
# The command line: what goes wrong is one line
# ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments,message", [
    ([], "required"),
    (["text"], "required"),
    (["text", "none.txt"], "cannot read none.txt"),
    (["fineweb", "--shards", "0"], "from 1 to 103"),
    (["fineweb", "--shards", "104"], "from 1 to 103"),
    (["fineweb", "--shards", "x"], "invalid int"),
    (["text", "none.txt", "--encoding", "morse"], "invalid choice"),
    (["text", "none.txt", "--out", "d/"], "--out d/ names a folder"),
    (["text", "none.txt", "--out", ""], "names a folder"),
    (["imagenet"], "invalid choice"),
])
def test_bad_commands_of_data_py(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, error = command(monkeypatch, capsys, *arguments)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert out == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["wikipedia", "", "x.txt", "no.bin", "d/a_train.bin", "no_*.bin", "fineweb"])
def test_data_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.UserError, match="unknown --data|cannot read|no FineWeb shards") as caught:
        data.load(name, 4, 16, 0)
    assert "\n" not in str(caught.value)


def test_shards_of_two_vocabularies(tmp_path):
    text_bin(tmp_path, "x_train"), text_bin(tmp_path, "x_val", vocab=300)
    with pytest.raises(data.UserError, match=r"different vocabularies: \[256, 300\]"):
        data.load(str(tmp_path / "x_train.bin"), 4, 16, 0)


@pytest.mark.parametrize("case", ["datasets is a file", "dangling link", "out under a file", "folder as text",
                                  "read-only"])
def test_what_the_operating_system_refuses_is_one_line(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "a.txt"
    text.write_text("text " * 100)
    arguments = ["text", "a.txt"]
    if case == "datasets is a file":
        (tmp_path / "datasets").write_text("mine")
    elif case == "dangling link":
        (tmp_path / "datasets").symlink_to("nowhere")
    elif case == "out under a file":
        arguments += ["--out", "a.txt/b/c"]
    elif case == "folder as text":
        arguments = ["text", str(tmp_path)]
    else:
        arguments += ["--out", "/proc/nobody/writes"]                # as on a disk that is read-only
    code, out, error = command(monkeypatch, capsys, *arguments)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and out == ""
    assert text.read_text() == "text " * 100 and not list(tmp_path.glob("*/*"))
    if "datasets" in os.listdir(tmp_path) and case != "folder as text":
        code, out, error = command(monkeypatch, capsys, "fineweb")
        assert code == 2 and error.count("\n") == 1 and "datasets" in error


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").write_bytes(bytes(200_000))
    old = text_bin(tmp_path, "out_train").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in 250_000, 370_000:                         # bytes a file: half of the tokens; nine tenths
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
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
        code, _, error = shell(f"data.py text a --out out {output}", tmp_path)
        assert code == 2 and re.fullmatch(f"error: .*{message}\n", error)


def test_control_c_is_one_line_and_leaves_nothing(tmp_path):
    program = [sys.executable, ROOT / "data.py", "text", "/dev/stdin", "--out", tmp_path / "out"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    while not list(tmp_path.iterdir()):                              # now it waits for text
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    code = process.wait(timeout=20)
    assert (code, process.stdout.read(), process.stderr.read()) == (130, "", "error: KeyboardInterrupt\n")
    assert not list(tmp_path.iterdir())


def test_run_program_says_one_line_or_none(monkeypatch, capsys):
    monkeypatch.delenv("SDP_TRACEBACK", raising=False)
    cases = [(data.UserError("a\nb"), 2, "a b"), (OSError(28, "No space"), 2, "[Errno 28] No space"),
             (MemoryError(), 2, "MemoryError"), (torch.OutOfMemoryError("CUDA"), 2, "CUDA"),
             (KeyboardInterrupt(), 130, "KeyboardInterrupt")]
    for wrong, code, said in cases:
        def main():
            raise wrong
        assert data.run_program(main) == code and capsys.readouterr().err == f"error: {said}\n"
        assert data.run_program(main, quiet=True) == code and capsys.readouterr().err == ""

    monkeypatch.setenv("SDP_TRACEBACK", "1")
    data.run_program(main)
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.endswith("\nerror: KeyboardInterrupt\n")

    def ours():
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):                 # a fault of the program is not the user's
        data.run_program(ours)
