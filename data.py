"""
Data sets, each as `batch(split, step, worker, workers)`: a pure function of its arguments and the seed.

A loader without state: the batch of step 1000 is the same whether the run came there in one go or resumed.
A data set also has `validation`, what it validates on, and `digest`, a fingerprint of its contents.
First tokens, then images, then the command line that fetches and tokenises:

    python data.py fineweb --shards 10                     fetch FineWeb, tokenised with GPT-2's vocabulary
    python data.py text a.txt b.txt --out datasets/mine    tokenise files: mine_train.bin and mine_val.bin

Token files are the .bin shards of llm.c and modded-nanogpt: a header of 256 int32 (20240520, 1, number of
tokens, vocabulary size or 0 for GPT-2's 50257, zeros), then the tokens as uint16.
"""

import argparse
import contextlib
import hashlib
import http.client
import os
import re
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

MAGIC, VERSION, HEADER = 20240520, 1, 256 * 4              # HEADER in bytes
GPT2 = 50257                                               # size of GPT-2's vocabulary
MOST_TOKENS = 2**31 - 1                                    # of one shard: its header counts with an int32
FOLDER = Path("datasets")                                  # where fetched and tokenised files go
VAL_SEQUENCES = 256                                        # validation reads so many, always the same ones
PIECE = 2**20                                              # files are read and written in pieces of this size
MOST_BYTES = 250_000_000                                   # of one fetched shard; FineWeb's have 200 MB
FETCH_SECONDS = 1800                                       # for one file
VOCABULARY_SECONDS = 60                                    # for GPT-2's vocabulary, 1.5 MB


class UserError(Exception):
    """Something the user can mend.  The message is one line that says what is wrong and what to do."""


def seeded(*what):
    """A CPU random generator that depends on `what` alone (Python's `hash` differs between processes)."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fingerprint(arrays):
    """-> hexadecimal digest of contents: each array's size, and 64 windows of 1024 rows all over it."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{len(array)} ".encode())
        for i in range(0, len(array), len(array) // 64 + 1):
            digest.update(array[i:i + 1024].tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------

def write_bin(path, tokens, vocab_size):
    """Writes `tokens` (integers below 65536, anything that can be sliced) as a .bin shard."""
    header = np.zeros(256, np.int32)
    header[:4] = MAGIC, VERSION, len(tokens), 0 if vocab_size == GPT2 else vocab_size
    with open(path, "wb") as f:
        f.write(header.tobytes())
        for i in range(0, len(tokens), PIECE):
            f.write(np.asarray(tokens[i:i + PIECE], np.uint16).tobytes())


class Shard:
    """Tokens `start` to `stop` of a .bin file, read when asked for: shard[i:j] -> uint16 array.

    Not mapped into memory: a mapped file that shrinks under a running job kills it without a word.
    """

    def __init__(self, path, start, stop):
        self.path, self.start, self.stop = path, start, stop

    def __len__(self):
        return self.stop - self.start

    def __getitem__(self, part):
        first, last, _ = part.indices(len(self))
        tokens = np.fromfile(self.path, np.uint16, last - first, offset=HEADER + 2 * (self.start + first))
        if len(tokens) < last - first:
            raise UserError(f"{self.path} became shorter while in use: bring it back and go on with --resume")
        return tokens


def read_bin(path):
    """-> (Shard of all its tokens, vocabulary size).  Raises UserError for anything but a whole shard."""
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, np.int32, 256)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION or not 0 <= header[3] <= 65536:
        raise UserError(f"{path} is not a token shard: its header should begin {MAGIC}, {VERSION}; "
                        f"make one with data.py text")
    count, vocab_size = int(header[2]), int(header[3]) or GPT2
    if size != HEADER + 2 * count:
        raise UserError(f"{path} should have {HEADER + 2 * count} bytes ({count} tokens) but has {size}: "
                        f"fetch or write it again")
    tokens = Shard(path, 0, count)
    largest = max((int(tokens[i:i + PIECE].max()) for i in range(0, count, PIECE)), default=0)
    if largest >= vocab_size:
        raise UserError(f"{path} has token {largest}, but its vocabulary is {vocab_size}: tokenise it again")
    return tokens, vocab_size


class Tokens:
    """Text as a language model's batches.  splits: {"train": [arrays of tokens], "val": [...]}"""

    unit = "tokens"

    def __init__(self, splits, vocab_size, batch_size, seq_len, seed, validation=""):
        for split, need in ("train", batch_size * seq_len + 1), ("val", seq_len + 1):
            have = max(map(len, splits[split]), default=0)
            if have < need:
                raise UserError(f"the {split} data has {have} tokens, too short for one batch, which needs "
                                f"{need}: use a smaller --batch-size or --seq-len, or more text")
        # Shards shorter than a sequence are left out.  Validation reads windows over the first that stays
        self.splits = {split: [t for t in shards if len(t) > seq_len] for split, shards in splits.items()}
        self.val_count = min(VAL_SEQUENCES, (len(self.splits["val"][0]) - 1) // seq_len)
        self.vocab_size, self.batch_size, self.seq_len, self.seed = vocab_size, batch_size, seq_len, seed
        self.validation = validation
        self.digest = fingerprint(splits["train"] + splits["val"])

    def val_steps(self, workers):
        """Number of "val" batches of each worker; together they read every validation sequence once."""
        return -(-self.val_count // (self.batch_size * workers))

    def batch(self, split, step, worker, workers):
        """-> inputs, targets: int64 [B, T].  train: random windows; val: this worker's share, maybe fewer."""
        shards = self.splits[split]
        if split == "train":
            lengths = torch.tensor([len(tokens) - self.seq_len for tokens in shards])
            ends = lengths.cumsum(0)
            rng = seeded(self.seed, step, worker, workers)
            starts = torch.randint(int(ends[-1]), (self.batch_size,), generator=rng)
            which = torch.searchsorted(ends, starts, right=True)
            starts -= (ends - lengths)[which]
        else:
            first = (step * workers + worker) * self.batch_size
            sequences = torch.arange(self.val_count)[first:first + self.batch_size]
            starts = sequences * ((len(shards[0]) - 1) // self.val_count)
            which = torch.zeros_like(sequences)
        windows = [shards[s][i:i + self.seq_len + 1].astype(np.int64) for s, i in zip(which, starts)]
        windows = torch.from_numpy(np.array(windows, np.int64).reshape(-1, self.seq_len + 1))
        return windows[:, :-1], windows[:, 1:]


def stdlib_splits():
    """The source of this Python's standard library, 11 MB that every machine has.  The tokens are its bytes.

    Every tenth file or so, chosen by a hash of its path, is for validation.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = {"train": [], "val": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not {"test", "tests", "idle_test", "site-packages"} & set(name.parts):
            digest = hashlib.sha256(name.as_posix().encode()).digest()
            files["val" if digest[0] < 26 else "train"].append(path.read_bytes())
    return {split: [np.frombuffer(b"".join(texts), np.uint8)] for split, texts in files.items()}


def validation_files(path):
    """The files beside `path` with val for train and any number: x_val_000000.bin for x_train_000001.bin."""
    before, train, after = path.name.rpartition("train")
    pattern = re.escape(f"{before}val") + re.sub(r"\d+", r"\\d+", re.escape(after))
    return sorted(p for p in path.parent.glob("*.bin") if train and re.fullmatch(pattern, p.name))


def load_text(name, batch_size, seq_len, seed):
    """stdlib, fineweb, or the path of a .bin shard; a * in its name means several: mine_train_*.bin"""
    if name == "stdlib":
        return Tokens(stdlib_splits(), 256, batch_size, seq_len, seed, "a tenth of the library's files")
    path = FOLDER / "fineweb_train_*.bin" if name == "fineweb" else Path(name)
    if path.suffix != ".bin":
        raise UserError(f"unknown --data {name}: use stdlib, fineweb, the path of a .bin token file, "
                        f"{', '.join(IMAGES)}")
    paths = {"train": sorted(path.parent.glob(path.name)) or [path]}
    paths["val"] = validation_files(paths["train"][0])
    if name == "fineweb" and not paths["val"]:
        raise UserError(f"no FineWeb shards in {FOLDER}: fetch some with  python data.py fineweb --shards 1")
    shards = {split: [read_bin(p) for p in paths[split]] for split in paths}
    vocab_sizes = {vocab_size for split in shards for _, vocab_size in shards[split]}
    if len(vocab_sizes) > 1:
        raise UserError(f"the shards of {name} have different vocabularies: {sorted(vocab_sizes)}")
    splits = {split: [tokens for tokens, _ in shards[split]] for split in shards}
    if not splits["val"]:                                  # the last tenth of the last file
        last = splits["train"].pop()
        edge = len(last) * 9 // 10
        splits["train"].append(Shard(last.path, 0, edge))
        splits["val"].append(Shard(last.path, edge, len(last)))
    dataset = Tokens(splits, vocab_sizes.pop(), batch_size, seq_len, seed)
    used = dataset.splits["val"][0]
    dataset.validation = f"the last tenth of {used.path}" if used.start else str(used.path)
    return dataset


# ---------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------

# name -> (number of classes, mean and standard deviation of red, green, blue, for values from 0 to 1)
IMAGES = {
    "cifar10": (10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "shapes": (10, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}


class Images:
    """Images as a classifier's batches.  splits: {"train": (uint8 [N, 3, 32, 32], int64 [N]), "val": ...}"""

    unit = "images"

    def __init__(self, name, splits, batch_size, seed, device="cpu"):
        self.num_classes, mean, std = IMAGES[name]
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, device=device).view(3, 1, 1)
        self.splits, self.batch_size, self.seed, self.device = splits, batch_size, seed, device
        self.validation = f"the {len(splits['val'][1])} test images of {name}"
        self.digest = fingerprint(x.numpy() for split in splits for x in splits[split])

    def val_steps(self, workers):
        """Number of "val" batches of each worker; together they see every validation image once."""
        return -(-len(self.splits["val"][1]) // (self.batch_size * workers))

    def batch(self, split, step, worker, workers):
        """-> images float [B, 3, 32, 32], labels int64 [B], on the device.

        train: the workers walk through a permutation of all images together, then through another one; random
        shift and mirror image.  val: this worker's share, at the end fewer.
        """
        images, labels = self.splits[split]
        place = (step * workers + worker) * self.batch_size + torch.arange(self.batch_size)
        if split == "val":
            which = place[place < len(labels)]
        else:
            epoch = place // len(labels)
            seeds = [seeded(self.seed, "epoch", e) for e in epoch.unique().tolist()]
            orders = torch.stack([torch.randperm(len(labels), generator=rng) for rng in seeds])
            which = orders[epoch - epoch[0], place % len(labels)]
        x, y = images[which].to(self.device), labels[which].to(self.device)
        if split == "train":
            x = shift_and_mirror(x, seeded(self.seed, "augment", step, worker, workers))
        return (x / 255 - self.mean) / self.std, y


def shift_and_mirror(x, rng, most=4):
    """Moves images x [B, C, H, W] by up to `most` pixels, black coming in, and mirrors half of them."""
    B, _, H, W = x.shape
    down, right = torch.randint(2 * most + 1, (2, B, 1), generator=rng)
    rows, columns = down + torch.arange(H), right + torch.arange(W)      # [B, H], [B, W]: where from
    columns = torch.where(torch.rand(B, 1, generator=rng) < 0.5, columns, columns.flip(1))
    rows, columns = rows.to(x.device)[:, :, None], columns.to(x.device)[:, None, :]
    image = torch.arange(B, device=x.device)[:, None, None]
    return F.pad(x, (most,) * 4)[image, :, rows, columns].permute(0, 3, 1, 2).contiguous()


def cifar(name, train):
    """-> uint8 [N, 3, 32, 32], labels int64 [N].  Fetched unless they are in FOLDER, by their checksums."""
    from torchvision.datasets import CIFAR10, CIFAR100     # here, as text needs no torchvision
    kind = CIFAR10 if name == "cifar10" else CIFAR100
    try:
        with time_limit(FETCH_SECONDS, f"fetching {name}"):
            images = kind(FOLDER, train=train, download=True)
    except (OSError, RuntimeError) as e:
        raise UserError(f"cannot fetch and read {name} in {FOLDER} ({getattr(e, 'reason', e)}): "
                        f"try again; --data shapes needs no network") from None
    return torch.from_numpy(images.data).permute(0, 3, 1, 2), torch.tensor(images.targets)


def download_images(name):
    """Puts CIFAR into FOLDER unless it is there.  (The shapes are drawn.)"""
    if name in ("cifar10", "cifar100"):
        cifar(name, True)


def shapes(count, rng):
    """SYNTHETIC: drawings of ten bright shapes on dark ground; size, place, angle, colours vary, with noise.

    -> uint8 [count, 3, 32, 32], labels int64 [count].  A linear classifier gets less than 60 % right.
    """
    def between(low, high, *more):
        return low + (high - low) * torch.rand(count, *more, generator=rng)

    labels, line = torch.randint(10, (count,), generator=rng), torch.linspace(-1, 1, 32)
    angle, size = between(-0.7, 0.7, 1, 1), between(0.4, 0.8, 1, 1)
    x = line.view(1, 1, 32) - between(-0.25, 0.25, 1, 1)
    y = line.view(1, 32, 1) - between(-0.25, 0.25, 1, 1)
    u = (x * angle.cos() + y * angle.sin()) / size                   # [count, 32, 32]
    v = (y * angle.cos() - x * angle.sin()) / size
    r, a, b = (u ** 2 + v ** 2).sqrt(), u.abs(), v.abs()
    disc, square = r < 1, torch.maximum(a, b) < 0.85
    inside = torch.stack([
        disc,                                                        # 0 disc
        disc & (r > 0.6),                                            # 1 ring
        square,                                                      # 2 square
        square & (torch.maximum(a, b) > 0.5),                        # 3 frame
        (v > -0.6) & (v < 1.1 - 1.9 * a),                            # 4 triangle
        (torch.minimum(a, b) < 0.3) & (torch.maximum(a, b) < 1),     # 5 cross
        (b < 0.9) & (a > 0.25) & (a < 0.75),                         # 6 two bars
        disc & ((u - 0.5) ** 2 + v ** 2 > 0.6),                      # 7 crescent
        disc & (u > 0),                                              # 8 half disc
        disc & (u * v > 0),                                          # 9 two opposite quarters
    ])[labels, torch.arange(count)]                                  # bool [count, 32, 32]
    colour, ground = between(0.5, 1, 3, 1, 1), between(0, 0.5, 3, 1, 1)
    noise = 0.1 * torch.randn(count, 3, 32, 32, generator=rng)
    image = torch.where(inside[:, None], colour, ground) + noise
    return (image.clamp(0, 1) * 255).to(torch.uint8), labels


def load(name, batch_size, seq_len, seed, device="cpu"):
    """The data set of --data: text (stdlib, fineweb, a .bin shard) or images (cifar10, cifar100, shapes)."""
    if name not in IMAGES:
        return load_text(name, batch_size, seq_len, seed)
    if name == "shapes":
        splits = {"train": shapes(10000, seeded(name, "train")), "val": shapes(2000, seeded(name, "val"))}
    else:
        splits = {"train": cifar(name, True), "val": cifar(name, False)}
    return Images(name, splits, batch_size, seed, device)


# ---------------------------------------------------------------------------------------------------------
# Fetching and tokenising ahead of time
# ---------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def time_limit(seconds, what):
    """Ends the block after so many seconds, whatever it waits for: a name, a header, a byte now and then."""
    def stop(*_):
        raise UserError(f"{what} took more than {seconds} seconds: try again when the network is better")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def check_address(url):
    """https, so that nobody on the way changes what comes; within this machine http will do."""
    url = urllib.parse.urlsplit(url)
    if url.scheme != "https" and url.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise UserError(f"{url.geturl()} is not safe: fetching needs an address that begins with https://")


def receive(url, part):
    """Appends to the file `part` what is missing.  Raises OSError or HTTPException if the network fails."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as reply:
        check_address(reply.url)                           # where redirections led
        with open(part, "ab" if reply.status == 206 else "wb") as f:     # 200: it sends all of it again
            end = f.tell() + int(reply.headers["Content-Length"] or 0)   # no length: the contents tell
            while chunk := reply.read(PIECE):
                f.write(chunk)
                if max(end, f.tell()) > MOST_BYTES:
                    part.unlink()
                    raise UserError(f"{url} sends more than {MOST_BYTES} bytes, too much for a token shard")
            if f.tell() < end:
                raise ConnectionError("the transfer broke off")


def fetch(url, path):
    """Fetches a shard of FineWeb, going on where a transfer broke off; `path` appears whole and checked."""
    check_address(url)
    part = Path(f"{path}.part")
    for pause in 0.1, 0.2, 0.4, 0.8, 0:                    # five tries
        try:
            receive(url, part)
            break
        except urllib.error.HTTPError as e:
            if e.code == 416:                              # nothing is left to send
                break
            problem = f"the server answers {e.code}"
            if e.code < 500 and e.code != 429:
                raise UserError(f"cannot fetch {url}: {problem}") from None
            after = e.headers.get("Retry-After", "")
            if after.isdecimal():
                pause = min(int(after[:9]), 300)
        except (OSError, ValueError, http.client.HTTPException) as e:    # no route, time-out, reset, nonsense
            problem = getattr(e, "reason", e)
        time.sleep(pause)
    else:
        raise UserError(f"cannot fetch {url}: {problem} (5 tries); run the command again to go on from here")
    try:
        tokens, vocab_size = read_bin(part)
        if vocab_size != GPT2 or not 10**6 <= len(tokens) <= 10**8:
            raise UserError(f"{len(tokens)} tokens of a vocabulary of {vocab_size}")
    except UserError as e:
        part.unlink()
        raise UserError(f"{url} sent something else than a whole token shard of FineWeb: {e}") from None
    os.replace(part, path)


def fetch_fineweb(shards):
    """The first `shards` of 103 training shards, 100M tokens and 200 MB each, and the validation shard."""
    if not 1 <= shards <= 103:
        raise UserError(f"--shards must be from 1 to 103, not {shards}")
    FOLDER.mkdir(exist_ok=True)
    site = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    for name in ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)]:
        if not (FOLDER / name).exists():
            print(f"fetching {name}", flush=True)
            with time_limit(FETCH_SECONDS, f"fetching {name}"):
                fetch(f"{site}/datasets/kjj0/fineweb10B-gpt2/resolve/main/{name}", FOLDER / name)


def encoding_for(vocab_size):
    """The tiktoken encoding for a vocabulary of this size: bytes (256) or GPT-2 (50257, fetched at first)."""
    if vocab_size == 256:
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str="(?s).+", mergeable_ranks=ranks, special_tokens={})
    if vocab_size != GPT2:
        raise UserError(f"no tokenizer is known for a vocabulary of {vocab_size}; "
                        f"known are 256 (bytes) and {GPT2} (GPT-2)")
    try:
        with time_limit(VOCABULARY_SECONDS, "fetching GPT-2's vocabulary"):
            return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:                     # ValueError: a wrong checksum
        raise UserError(f"GPT-2's vocabulary could not be fetched ({type(e).__name__}): try again") from None


def tokens_of(file, vocab_size):
    """Yields the tokens of a text file as arrays, each of a piece of the text."""
    if vocab_size == 256:
        with open(file, "rb") as f:
            while piece := f.read(PIECE):
                yield np.frombuffer(piece, np.uint8)       # bytes need no decoding
        return
    encoding = encoding_for(vocab_size)
    rest, characters, bad = "", 0, 0
    with open(file, encoding="utf-8", errors="replace", newline="") as f:
        while piece := f.read(PIECE):
            characters += len(piece)
            bad += piece.count("\ufffd") + piece.count("\0")             # UTF-16 has many zeros
            if bad > characters / 10:
                raise UserError(f"{file} is mostly not UTF-8 text: unpack or convert it")
            text = rest + piece
            words = re.match(r"(?s).*\S(?=[ \n])", text)   # no token of GPT-2 reaches over a word's end
            edge = words.end() if words else len(text)
            yield np.array(encoding.encode_ordinary(text[:edge]), np.uint16)
            rest = text[edge:]
    yield np.array(encoding.encode_ordinary(rest), np.uint16)
    if bad:
        print(f"{file}: {bad / characters:.3%} of the characters are not UTF-8 text")


def tokenise(files, out, vocab_size):
    """Writes OUT_train.bin and OUT_val.bin, the first nine tenths and the last of all files' tokens.

    Where they are too many for one shard, its name gets a number: OUT_train_000000.bin
    """
    if out.endswith("/") or not Path(out).name:
        raise UserError(f"--out {out} names a folder: add the beginning of the files' names, as in {out}text")
    for file in files:
        if not os.access(file, os.R_OK):
            raise UserError(f"cannot read {file}")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    sizes = {}
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.part-") as work:    # always removed
        everything = Path(work, "everything")
        with open(everything, "wb") as f:
            f.write(bytes(HEADER))
            for file in files:
                for tokens in tokens_of(file, vocab_size):
                    f.write(tokens.astype(np.uint16).tobytes())
            count = (f.tell() - HEADER) // 2
        edge = count * 9 // 10
        for split, start, stop in ("train", 0, edge), ("val", edge, count):
            for i, first in enumerate(range(start, stop, MOST_TOKENS)):
                name = f"{out.name}_{split}_{i:06d}.bin" if edge > MOST_TOKENS else f"{out.name}_{split}.bin"
                tokens = Shard(everything, first, min(first + MOST_TOKENS, stop))
                write_bin(Path(work, name), tokens, vocab_size)
                sizes[name] = len(tokens)
        for name in sizes:
            os.replace(Path(work, name), out.parent / name)
    for name in sizes:
        print(f"{out.parent / name}: {sizes[name]} tokens")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message):
        raise UserError(message)


def run_program(main, quiet=False):
    """Runs main() -> exit code.  What the user or the operating system did wrong is one line (none if quiet).

    SDP_TRACEBACK=1 in the environment shows where it happened.
    """
    try:
        main()
        print(end="", flush=True)                          # a closed or full standard output shows here
        return 0
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError, KeyboardInterrupt) as e:
        if os.environ.get("SDP_TRACEBACK"):
            traceback.print_exc()
        if not quiet:
            print("error:", " ".join(str(e).split()) or type(e).__name__, file=sys.stderr)
        code = 130 if isinstance(e, KeyboardInterrupt) else 2
    try:
        print(end="", flush=True)
    except OSError:                                        # Python would try again at its end, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def main():
    parser = Parser(description="Fetch or tokenise training text ahead of time.")
    commands = parser.add_subparsers(dest="command", required=True)
    fineweb = commands.add_parser("fineweb", help="fetch FineWeb, tokenised with GPT-2's vocabulary")
    fineweb.add_argument("--shards", type=int, default=1, help="training shards of 100M tokens [%(default)s]")
    text = commands.add_parser("text", help="tokenise text files")
    text.add_argument("files", nargs="+", metavar="FILE")
    text.add_argument("--out", default=str(FOLDER / "text"), help="beginning of the paths [%(default)s]")
    text.add_argument("--encoding", choices=["bytes", "gpt2"], default="bytes", help="[%(default)s]")
    args = parser.parse_args()
    if args.command == "fineweb":
        fetch_fineweb(args.shards)
    else:
        tokenise(args.files, args.out, 256 if args.encoding == "bytes" else GPT2)


if __name__ == "__main__":
    sys.exit(run_program(main))
