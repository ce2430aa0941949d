"""
Data sets.  train.py needs of each:

    batch(split, step, worker, workers)  inputs and targets, by these arguments, the data and the seed alone:
                                         a resumed run gets the batches of an uninterrupted one
    batch_size, unit                     examples in a worker's batch; "tokens" or "images"
    vocab_size or num_classes            what the model must have
    val_count, validation                how many sequences or images validate, and where they are from
    digest                               a fingerprint of the contents

First tokens, then images, then fetching and tokenising:

    python data.py fineweb --shards 10                     fetch FineWeb, tokenised with GPT-2's vocabulary
    python data.py text a.txt b.txt --out datasets/mine    tokenise files: mine_train.bin and mine_val.bin

Token files are the .bin shards of llm.c and modded-nanogpt: a header of 256 int32 (20240520, 1, number of
tokens, vocabulary size or 0 for GPT-2's 50257, zeros), then the tokens as uint16.
"""

import argparse
import contextlib
import glob
import hashlib
import http.client
import math
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import ConcatDataset

MAGIC, VERSION, HEADER = 20240520, 1, 256 * 4              # HEADER in bytes
GPT2 = 50257                                               # size of GPT-2's vocabulary
MOST_TOKENS = 2**31 - 1                                    # of one shard: its header counts with an int32
FOLDER = Path("datasets")                                  # where fetched and tokenised files go
VAL_SEQUENCES = 256                                        # at most so many validate, always the same ones
PIECE = 2**20                                              # text is read in pieces of this size
MOST_BYTES = 250_000_000                                   # of one fetched shard; FineWeb's have 200 MB


class UserError(Exception):
    """Something the user can mend.  The message is one line that says what is wrong and what to do."""


def seeded(*what):
    """A CPU random generator that depends on `what` alone (Python's `hash` differs between processes)."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fingerprint(arrays):
    """-> hexadecimal digest of contents"""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} ".encode())
        digest.update(array.reshape(-1))
    return digest.hexdigest()


# Tokens --------------------------------------------------------------------------------------------------

def write_bin(path, tokens, vocab_size):
    """Writes `tokens` (an array or list of integers below 65536) as a .bin shard."""
    header = np.zeros(256, np.int32)
    header[:4] = MAGIC, VERSION, len(tokens), 0 if vocab_size == GPT2 else vocab_size
    with open(path, "wb") as f:
        f.write(header)
        f.write(np.asarray(tokens, np.uint16))


def read_bin(path):
    """-> (tokens: uint16 [count], mapped into memory; vocabulary size).  Raises UserError for other files."""
    if not Path(path).is_file():                           # a pipe would wait for ever
        raise UserError(f"{path} is no file")
    header = np.fromfile(path, np.int32, 256)
    if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION or not 0 <= header[3] <= 65536:
        raise UserError(f"{path} is not a token shard: make one with  python data.py text")
    size = os.path.getsize(path)
    wanted = HEADER + 2 * int(header[2])
    if size != wanted or size == HEADER:
        raise UserError(f"{path} should have {wanted} bytes but has {size}: fetch it again")
    tokens = np.memmap(path, np.uint16, "r", HEADER)
    vocab_size = int(header[3]) or GPT2
    largest = tokens.max()
    if largest >= vocab_size:
        raise UserError(f"{path} has token {largest}, but its vocabulary is {vocab_size}: tokenise it again")
    return tokens, vocab_size


@dataclass
class Tokens:
    """Text as a language model's batches."""
    splits: dict                    # {"train": [arrays of tokens], "val": [one array]}
    vocab_size: int
    batch_size: int
    seq_len: int
    seed: int
    validation: str = ""            # where the validation text is from
    unit = "tokens"

    def __post_init__(self):
        parts = self.splits["train"] + self.splits["val"]
        shortest = min(map(len, parts))
        if shortest <= self.seq_len:
            raise UserError(f"a part of the data has {shortest} tokens, too short for one sequence: use a "
                            f"smaller --seq-len, or more text")
        self.val_count = min(VAL_SEQUENCES, (len(parts[-1]) - 1) // self.seq_len)
        self.digest = fingerprint(parts)

    def batch(self, split, step, worker, workers):
        """-> inputs, targets: int64 [B, T].  train: random windows; val: this worker's share, maybe fewer."""
        length = self.seq_len + 1                          # the targets are the inputs, one token later
        # All windows of all shards, as if they were in one list.  Nothing is read or copied yet
        windows = ConcatDataset([sliding_window_view(tokens, length) for tokens in self.splits[split]])
        if split == "train":
            rng = seeded(self.seed, step, worker, workers)
            starts = torch.randint(len(windows), (self.batch_size,), generator=rng)
        else:
            first = (step * workers + worker) * self.batch_size
            apart = (len(self.splits["val"][0]) - 1) // self.val_count
            starts = torch.arange(self.val_count)[first:first + self.batch_size] * apart
        rows = np.array([windows[i] for i in starts.tolist()], np.int64)
        rows = torch.from_numpy(rows.reshape(-1, length))  # there may be none
        return rows[:, :-1], rows[:, 1:]


def stdlib_splits():
    """The source of this Python's standard library, 11 MB, as bytes; a hash of the path picks the split."""
    root = Path(os.__file__).parent
    files = {"train": [], "val": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not {"test", "tests", "idle_test", "site-packages"} & set(name.parts):
            digest = hashlib.sha256(name.as_posix().encode()).digest()
            files["val" if digest[0] < 26 else "train"].append(path.read_bytes())
    return {split: [np.frombuffer(b"".join(texts), np.uint8)] for split, texts in files.items()}


def load_text(name, batch_size, seq_len, seed):
    """stdlib, fineweb, the path of a .bin shard, or a pattern like d/mine_train_*.bin, for several."""
    if name == "stdlib":
        return Tokens(stdlib_splits(), 256, batch_size, seq_len, seed, "a tenth of the library's files")
    pattern = str(FOLDER / "fineweb_train_*.bin") if name == "fineweb" else name
    if not pattern.endswith(".bin"):
        raise UserError(f"unknown --data {name}: use stdlib, fineweb, a .bin token file, "
                        f"{', '.join(IMAGE_SETS)}")
    paths = [Path(path) for path in sorted(glob.glob(pattern))]
    if Path(pattern).exists():                             # not a pattern, even if its name looks like one
        paths = [Path(pattern)]
    if not paths:
        raise UserError(f"no file {pattern}: make it with  python data.py fineweb  or  python data.py text")
    # Validation: d/mine_val.bin beside d/mine_train.bin, fineweb_val_000000.bin beside ..._train_000001.bin;
    # else the last tenth of the last shard
    before, word, after = paths[0].name.rpartition("train")
    beside = paths[0].with_name(f"{before}val" + re.sub(r"\d", "0", after))
    has_val = word and beside.exists()
    if has_val:
        paths = [path for path in paths if path != beside] + [beside]
    shards, vocab_sizes = zip(*map(read_bin, paths))
    if len(set(vocab_sizes)) > 1:
        raise UserError(f"the shards of {name} have different vocabularies: {sorted(set(vocab_sizes))}")
    *train, val = shards
    if has_val:
        validation = str(beside)
    else:
        edge = len(val) * 9 // 10
        train.append(val[:edge])
        val = val[edge:]
        validation = f"the last tenth of {paths[-1]}"
    return Tokens({"train": train, "val": [val]}, vocab_sizes[0], batch_size, seq_len, seed, validation)


# Images --------------------------------------------------------------------------------------------------

# name -> (number of classes, mean and standard deviation of red, green, blue, for values from 0 to 1)
IMAGE_SETS = {
    "cifar10": (10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "shapes": (10, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}


@dataclass
class Images:
    """Images as a classifier's batches."""
    name: str
    splits: dict                    # {"train": (uint8 [N, 3, 32, 32], labels int64 [N]), "val": the same}
    batch_size: int
    seed: int
    unit = "images"

    def __post_init__(self):
        self.num_classes, mean, std = IMAGE_SETS[self.name]
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)
        self.val_count = len(self.splits["val"][1])
        self.validation = f"the {self.val_count} test images of {self.name}"
        self.digest = fingerprint(x.numpy() for split in self.splits.values() for x in split)

    def batch(self, split, step, worker, workers):
        """-> images float [B, 3, 32, 32], labels int64 [B].

        train: all workers together go through all images in a random order, then in another one; each image
        is shifted at random, and mirrored or not.  val: this worker's share, at the end fewer images or none.
        """
        images, labels = self.splits[split]
        place = (step * workers + worker) * self.batch_size + torch.arange(self.batch_size)
        if split == "val":
            which = place[place < len(labels)]
        else:
            epochs = (place // len(labels)).unique().tolist()        # several, where one ends in this batch
            seeds = [seeded(self.seed, "epoch", epoch) for epoch in epochs]
            order = torch.cat([torch.randperm(len(labels), generator=rng) for rng in seeds])
            which = order[place - epochs[0] * len(labels)]
        x = images[which]
        if split == "train":
            x = shift_and_mirror(x, seeded(self.seed, "augment", step, worker, workers))
        return (x / 255 - self.mean) / self.std, labels[which]


def shift_and_mirror(x, rng):
    """Moves images x [B, 3, H, W] by up to 4 pixels, black coming in, and mirrors half of them."""
    B, _, H, W = x.shape
    shifts = torch.randint(9, (2, B), generator=rng).T.tolist()
    mirror = torch.rand(B, 1, 1, 1, generator=rng) < 0.5
    padded = F.pad(x, (4, 4, 4, 4))
    x = torch.stack([padded[i, :, down:down + H, right:right + W] for i, (down, right) in enumerate(shifts)])
    return torch.where(mirror, x, x.flip(3))


def cifar(name, train):
    """-> uint8 [N, 3, 32, 32], labels int64 [N].  torchvision fetches and checks what is not in FOLDER."""
    import torchvision                                     # here, as text needs no torchvision
    try:
        with time_limit(1800, f"fetching {name}"):
            images = getattr(torchvision.datasets, name.upper())(FOLDER, train=train, download=True)
    except (OSError, RuntimeError) as e:
        raise UserError(f"cannot fetch {name} into {FOLDER} ({e}); --data shapes needs no network") from None
    return torch.from_numpy(images.data).permute(0, 3, 1, 2), torch.tensor(images.targets)


def shapes(count, rng):
    """SYNTHETIC: drawings of ten bright shapes on dark ground; size, place, angle, colours vary, with noise.

    -> uint8 [count, 3, 32, 32], labels int64 [count].  A linear classifier gets less than 60 % right.
    """
    def between(low, high, *more):
        return low + (high - low) * torch.rand(count, *more, generator=rng)

    labels = torch.randint(10, (count,), generator=rng)
    angle = between(-0.7, 0.7, 1, 1)
    size = between(0.4, 0.8, 1, 1)
    x = torch.linspace(-1, 1, 32).view(1, 1, 32) - between(-0.25, 0.25, 1, 1)
    y = torch.linspace(-1, 1, 32).view(1, 32, 1) - between(-0.25, 0.25, 1, 1)
    u = (x * angle.cos() + y * angle.sin()) / size                   # [count, 32, 32]
    v = (y * angle.cos() - x * angle.sin()) / size
    r = (u ** 2 + v ** 2).sqrt()
    a = u.abs()
    b = v.abs()
    disc = r < 1
    most = torch.maximum(a, b)
    inside = torch.stack([
        disc,                                                        # 0 disc
        disc & (r > 0.6),                                            # 1 ring
        most < 0.85,                                                 # 2 square
        (most < 0.85) & (most > 0.5),                                # 3 frame
        (v > -0.6) & (v < 1.1 - 1.9 * a),                            # 4 triangle
        (torch.minimum(a, b) < 0.3) & (most < 1),                    # 5 cross
        (b < 0.9) & (a > 0.25) & (a < 0.75),                         # 6 two bars
        disc & ((u - 0.5) ** 2 + v ** 2 > 0.6),                      # 7 crescent
        disc & (u > 0),                                              # 8 half disc
        disc & (u * v > 0),                                          # 9 two opposite quarters
    ])[labels, torch.arange(count)]                                  # bool [count, 32, 32]
    colour = between(0.5, 1, 3, 1, 1)
    ground = between(0, 0.5, 3, 1, 1)
    noise = 0.1 * torch.randn(count, 3, 32, 32, generator=rng)
    image = torch.where(inside[:, None], colour, ground) + noise
    return (image.clamp(0, 1) * 255).to(torch.uint8), labels


def load(name, batch_size, seq_len, seed):
    """The data set of --data: text (see load_text) or images (cifar10, cifar100, shapes)."""
    if name not in IMAGE_SETS:
        return load_text(name, batch_size, seq_len, seed)
    if name == "shapes":
        splits = {"train": shapes(10000, seeded(name, "train")), "val": shapes(2000, seeded(name, "val"))}
    else:
        splits = {"train": cifar(name, True), "val": cifar(name, False)}
    return Images(name, splits, batch_size, seed)


# Fetching and tokenising ---------------------------------------------------------------------------------

@contextlib.contextmanager
def time_limit(seconds, what):
    """Stops the block after so many seconds, whatever it waits for: a host's address, a header, a byte."""
    def stop(*_):
        raise UserError(f"{what} took more than {seconds} seconds: try again when the network is better")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def fetch(url, path):
    """Fetches a shard of FineWeb, in five tries; `path` appears when it is whole and checked."""
    part = Path(f"{path}.part")
    for pause in 0.5, 1, 2, 4, 0:
        try:
            with urllib.request.urlopen(url, timeout=60) as reply:
                if not reply.url.startswith(("https://", "http://localhost:", "http://127.0.0.1:")):
                    raise UserError(f"{reply.url} is not safe: only what comes over https is taken")
                part.write_bytes(reply.read(MOST_BYTES))
                if reply.length:                           # less came than announced
                    raise ConnectionError("the transfer broke off")
            break
        except (OSError, ValueError, http.client.HTTPException) as e:
            problem = e
            after = getattr(e, "headers", {}).get("Retry-After", "")     # of a server that is busy
            time.sleep(int(after) if re.fullmatch("[0-9]{1,4}", after) else pause)
    else:
        raise UserError(f"cannot fetch {url}: {problem} (5 tries)")
    tokens, vocab_size = read_bin(part)
    if vocab_size != GPT2 or len(tokens) < 10**6:
        raise UserError(f"{url} has {len(tokens)} tokens of {vocab_size} kinds: no shard of FineWeb")
    os.replace(part, path)


def fetch_fineweb(shards):
    """The first `shards` of 103 training shards, 100M tokens and 200 MB each, and the validation shard."""
    FOLDER.mkdir(exist_ok=True)
    site = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    for name in ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)]:
        if not (FOLDER / name).exists():
            print(f"fetching {name}", flush=True)
            with time_limit(1800, f"fetching {name}"):
                fetch(f"{site}/datasets/kjj0/fineweb10B-gpt2/resolve/main/{name}", FOLDER / name)


def encoding_for(vocab_size):
    """The tiktoken encoding for a vocabulary of this size: bytes (256) or GPT-2 (50257, fetched at first)."""
    if vocab_size == 256:
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str="(?s).+", mergeable_ranks=ranks, special_tokens={})
    if vocab_size != GPT2:
        raise UserError(f"no tokenizer is known for a vocabulary of {vocab_size}, only for 256 and {GPT2}")
    with time_limit(60, "fetching GPT-2's vocabulary"):
        return tiktoken.get_encoding("gpt2")


def tokens_of(file, vocab_size):
    """Yields the tokens of a text file as arrays, piece by piece: it may be larger than the memory."""
    if vocab_size == 256:
        with open(file, "rb") as f:
            while piece := f.read(PIECE):
                yield np.frombuffer(piece, np.uint8)       # bytes need no decoding
        return
    encoding = encoding_for(vocab_size)
    characters = 0
    bad = 0
    with open(file, encoding="utf-8", errors="replace", newline="") as f:
        while piece := f.read(PIECE) + f.readline(PIECE):  # up to the end of a line, to cut no word
            characters += len(piece)
            bad += piece.count("\ufffd") + piece.count("\0")             # UTF-16 has many zeros
            yield np.array(encoding.encode_ordinary(piece), np.uint16)
    if bad > characters / 10:
        raise UserError(f"{file} is mostly not UTF-8 text: unpack or convert it")
    if bad:
        print(f"{file}: {bad / characters:.3%} of the characters are not UTF-8 text")


def tokenise(files, out, vocab_size):
    """Writes the first nine tenths of all files' tokens to OUT_train.bin, and the last to OUT_val.bin.

    Too many for one shard: to OUT_train_000001.bin, OUT_train_000002.bin, ..., and OUT_val_000000.bin.
    """
    folder = Path(f"{out}_train.bin").parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:  # removed whatever happens
        everything = Path(work, "everything")
        with open(everything, "wb") as f:
            for file in files:
                for tokens in tokens_of(file, vocab_size):
                    f.write(tokens.astype(np.uint16))
            count = f.tell() // 2
        if count < 10:
            raise UserError(f"{count} tokens are too few to divide: give more text")
        tokens = np.memmap(everything, np.uint16, "r")
        edge = max(count * 9 // 10, count - MOST_TOKENS)
        train = np.array_split(tokens[:edge], math.ceil(edge / MOST_TOKENS))
        shards = {"train": train[0], "val": tokens[edge:]}
        if len(train) > 1:
            shards = {f"train_{i:06d}": shard for i, shard in enumerate(train, 1)}
            shards["val_000000"] = tokens[edge:]
        paths = {name: Path(f"{out}_{name}.bin") for name in shards}
        others = {*glob.glob(f"{glob.escape(out)}_train*.bin"), *glob.glob(f"{glob.escape(out)}_val*.bin")}
        others -= set(map(str, paths.values()))
        if others or {path.resolve() for path in paths.values()} & {Path(file).resolve() for file in files}:
            raise UserError(f"--out {out} would mix with other files of that name: choose another")
        for name, shard in shards.items():
            write_bin(Path(work, name), shard, vocab_size)
        for name, shard in shards.items():
            os.replace(Path(work, name), paths[name])
            print(f"{paths[name]}: {len(shard)} tokens")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message):
        raise UserError(message)


def run_program(main):
    """Runs main() -> exit code.  What the user or the system did wrong is one line."""
    try:
        main()
        sys.stdout.flush()                                 # if it is closed or full, this shows here
        return 0
    except (UserError, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as e:
        # Too little memory is a RuntimeError of torch; all others are faults of the program
        no_memory = isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)
        if isinstance(e, RuntimeError) and not no_memory:
            raise
        if os.environ.get("SDP_TRACEBACK"):                # shows where it happened
            traceback.print_exc()
        print("error:", " ".join(str(e).split()) or type(e).__name__, file=sys.stderr)
        code = 130 if isinstance(e, KeyboardInterrupt) else 2
    try:
        sys.stdout.flush()
    except OSError:                                        # Python would try again at its end, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def main():
    parser = Parser(description="Fetch or tokenise training text ahead of time.")
    commands = parser.add_subparsers(dest="command", required=True)
    fineweb = commands.add_parser("fineweb", help="fetch FineWeb, tokenised with GPT-2's vocabulary")
    fineweb.add_argument("--shards", type=int, default=1, help="training shards, 1 to 103 [%(default)s]")
    text = commands.add_parser("text", help="tokenise text files")
    text.add_argument("files", nargs="+", metavar="FILE")
    text.add_argument("--out", type=os.path.expanduser, default=str(FOLDER / "text"),
                      help="beginning of the paths [%(default)s]")
    text.add_argument("--encoding", choices=["bytes", "gpt2"], default="bytes", help="[%(default)s]")
    args = parser.parse_args()
    if args.command == "text":
        tokenise(args.files, args.out, 256 if args.encoding == "bytes" else GPT2)
    elif 1 <= args.shards <= 103:
        fetch_fineweb(args.shards)
    else:
        raise UserError(f"--shards must be from 1 to 103, not {args.shards}")


if __name__ == "__main__":
    sys.exit(run_program(main))
