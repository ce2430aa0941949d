"""
Data sets, each as `batch(split, step, worker, workers)`: a pure function of its arguments and the seed, so a
run that was resumed gets the batches of one that was not.  Each also has `val_count`, the number of sequences
or images to validate on, `validation`, where they are from, and `digest`, a fingerprint of its contents.
First tokens, then images, then fetching and tokenising:

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
    if Path(path).is_fifo():                               # to open it would wait for ever
        raise UserError(f"{path} is a pipe: write it to a file first")
    header = np.fromfile(path, np.int32, 256)
    if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION or not 0 <= header[3] <= 65536:
        raise UserError(f"{path} is not a token shard: make one with  python data.py text")
    size, wanted = os.path.getsize(path), HEADER + 2 * int(header[2])
    if size != wanted or size == HEADER:
        raise UserError(f"{path} should have {wanted} bytes but has {size}: fetch it again")
    tokens, vocab_size = np.memmap(path, np.uint16, "r", HEADER), int(header[3]) or GPT2
    largest = tokens.max()
    if largest >= vocab_size:
        raise UserError(f"{path} has token {largest}, but its vocabulary is {vocab_size}: tokenise it again")
    return tokens, vocab_size


class Tokens:
    """Text as a language model's batches.  splits: {"train": [arrays of tokens], "val": [one array]}"""

    unit = "tokens"

    def __init__(self, splits, vocab_size, batch_size, seq_len, seed, validation=""):
        shortest = min(map(len, splits["train"] + splits["val"]))
        if shortest <= seq_len:
            raise UserError(f"a part of the data has {shortest} tokens, too short for one sequence: use a "
                            f"smaller --seq-len, or more text")
        self.splits, self.vocab_size, self.validation = splits, vocab_size, validation
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self.val_count = min(VAL_SEQUENCES, (len(splits["val"][0]) - 1) // seq_len)      # sequences
        self.digest = fingerprint(splits["train"] + splits["val"])

    def batch(self, split, step, worker, workers):
        """-> inputs, targets: int64 [B, T].  train: random windows; val: this worker's share, maybe fewer."""
        shards = self.splits[split]
        if split == "train":
            lengths = torch.tensor([len(tokens) - self.seq_len for tokens in shards])
            ends = lengths.cumsum(0)
            rng = seeded(self.seed, step, worker, workers)
            starts = torch.randint(int(ends[-1]), (self.batch_size,), generator=rng)  # as if in one shard
            which = torch.searchsorted(ends, starts, right=True)     # the shard in which each window begins
            starts -= (ends - lengths)[which]                        # and where in it
        else:
            first = (step * workers + worker) * self.batch_size
            sequences = torch.arange(self.val_count)[first:first + self.batch_size]
            starts = sequences * ((len(shards[0]) - 1) // self.val_count)
            which = torch.zeros_like(sequences)
        windows = [shards[s][i:i + self.seq_len + 1] for s, i in zip(which, starts)]
        windows = torch.from_numpy(np.array(windows, np.int64).reshape(-1, self.seq_len + 1))
        return windows[:, :-1], windows[:, 1:]


def stdlib_splits():
    """The source of this Python's standard library, 11 MB, as bytes; a hash of the path picks the split."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {"train": [], "val": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not {"test", "tests", "idle_test", "site-packages"} & set(name.parts):
            digest = hashlib.sha256(name.as_posix().encode()).digest()
            files["val" if digest[0] < 26 else "train"].append(path.read_bytes())
    return {split: [np.frombuffer(b"".join(texts), np.uint8)] for split, texts in files.items()}


def load_text(name, batch_size, seq_len, seed):
    """stdlib, fineweb, or the path of a .bin shard: with the validation file beside it, or its last tenth."""
    if name == "stdlib":
        return Tokens(stdlib_splits(), 256, batch_size, seq_len, seed, "a tenth of the library's files")
    paths = sorted(FOLDER.glob("fineweb_train_*.bin")) if name == "fineweb" else [Path(name)]
    if not paths:
        raise UserError(f"no FineWeb shards in {FOLDER}: fetch some with  python data.py fineweb --shards 1")
    if paths[0].suffix != ".bin":
        raise UserError(f"unknown --data {name}: use stdlib, fineweb, a .bin token file, {', '.join(IMAGES)}")
    shards = [read_bin(path) for path in paths]
    # Validation: d/mine_val.bin beside d/mine_train.bin, fineweb_val_000000.bin beside ..._train_000001.bin
    before, word, after = paths[0].name.rpartition("train")
    beside = paths[0].with_name(f"{before}val" + re.sub(r"\d", "0", after))
    if word and beside.exists():
        shards.append(read_bin(beside))
        validation = str(beside)
    else:
        tokens, vocab_size = shards.pop()
        edge = len(tokens) * 9 // 10
        shards += [(tokens[:edge], vocab_size), (tokens[edge:], vocab_size)]
        validation = f"the last tenth of {paths[-1]}"
    *train, val = [tokens for tokens, _ in shards]
    vocab_sizes = {vocab_size for _, vocab_size in shards}
    if len(vocab_sizes) > 1:
        raise UserError(f"the shards of {name} have different vocabularies: {sorted(vocab_sizes)}")
    return Tokens({"train": train, "val": [val]}, vocab_sizes.pop(), batch_size, seq_len, seed, validation)


# Images --------------------------------------------------------------------------------------------------

# name -> (number of classes, mean and standard deviation of red, green, blue, for values from 0 to 1)
IMAGES = {
    "cifar10": (10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "shapes": (10, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}


class Images:
    """Images as a classifier's batches.  splits: {"train": (uint8 [N, 3, 32, 32], int64 [N]), "val": ...}"""

    unit = "images"

    def __init__(self, name, splits, batch_size, seed):
        self.num_classes, mean, std = IMAGES[name]
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        self.splits, self.batch_size, self.seed = splits, batch_size, seed
        self.val_count = len(splits["val"][1])                       # images
        self.validation = f"the {self.val_count} test images of {name}"
        self.digest = fingerprint(x.numpy() for split in splits for x in splits[split])

    def batch(self, split, step, worker, workers):
        """-> images float [B, 3, 32, 32], labels int64 [B].

        train: the workers walk through a permutation of all images together, then through another one; random
        shift and mirror image.  val: this worker's share, at the end fewer.
        """
        images, labels = self.splits[split]
        place = (step * workers + worker) * self.batch_size + torch.arange(self.batch_size)
        if split == "val":
            which = place[place < len(labels)]
        else:
            epochs = (place // len(labels)).unique().tolist()        # at an epoch's end also the next
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
    angle, size = between(-0.7, 0.7, 1, 1), between(0.4, 0.8, 1, 1)
    x = torch.linspace(-1, 1, 32).view(1, 1, 32) - between(-0.25, 0.25, 1, 1)
    y = torch.linspace(-1, 1, 32).view(1, 32, 1) - between(-0.25, 0.25, 1, 1)
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


def load(name, batch_size, seq_len, seed):
    """The data set of --data: text (stdlib, fineweb, a .bin shard) or images (cifar10, cifar100, shapes)."""
    if name not in IMAGES:
        return load_text(name, batch_size, seq_len, seed)
    if name == "shapes":
        splits = {"train": shapes(10000, seeded(name, "train")), "val": shapes(2000, seeded(name, "val"))}
    else:
        splits = {"train": cifar(name, True), "val": cifar(name, False)}
    return Images(name, splits, batch_size, seed)


# Fetching and tokenising ---------------------------------------------------------------------------------

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
    encoding, characters, bad = encoding_for(vocab_size), 0, 0
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
    """Writes OUT_train.bin and OUT_val.bin, the first nine tenths and the last of all files' tokens."""
    paths = {split: Path(f"{out}_{split}.bin") for split in ("train", "val")}
    if {path.resolve() for path in paths.values()} & {Path(file).resolve() for file in files}:
        raise UserError(f"--out {out} would overwrite a FILE: choose another")
    folder = paths["train"].parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:  # removed whatever happens
        everything = Path(work, "everything")
        with open(everything, "wb") as f:
            for file in files:
                for tokens in tokens_of(file, vocab_size):
                    f.write(tokens.astype(np.uint16))
            count = f.tell() // 2
        if not 10 <= count <= MOST_TOKENS:
            raise UserError(f"{count} tokens: one shard has 10 to {MOST_TOKENS}, give more or fewer files")
        tokens = np.memmap(everything, np.uint16, "r")
        splits = {"train": tokens[:count * 9 // 10], "val": tokens[count * 9 // 10:]}
        for split in splits:
            write_bin(Path(work, split), splits[split], vocab_size)
        for split in splits:
            os.replace(Path(work, split), paths[split])
            print(f"{paths[split]}: {len(splits[split])} tokens")


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
    fineweb.add_argument("--shards", type=int, choices=range(1, 104), default=1, metavar="N",
                         help="training shards, 1 to 103 [%(default)s]")
    text = commands.add_parser("text", help="tokenise text files")
    text.add_argument("files", nargs="+", metavar="FILE")
    text.add_argument("--out", type=os.path.expanduser, default=str(FOLDER / "text"),
                      help="beginning of the paths [%(default)s]")
    text.add_argument("--encoding", choices=["bytes", "gpt2"], default="bytes", help="[%(default)s]")
    args = parser.parse_args()
    if args.command == "text":
        tokenise(args.files, args.out, 256 if args.encoding == "bytes" else GPT2)
    else:
        fetch_fineweb(args.shards)


if __name__ == "__main__":
    sys.exit(run_program(main))
