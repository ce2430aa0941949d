"""
Data sets, each as `batch(split, step, worker, workers)`: a pure function of its arguments and the seed.

A loader without state: the batch of step 1000 is the same whether the run came there in one go or was resumed, so a
checkpoint has nothing to say about data.  First text, then images, then the command line that fetches and tokenises.

Token files are the .bin shards of llm.c and modded-nanogpt: a header of 256 int32 (20240520, 1, number of tokens,
vocabulary size or 0 for GPT-2's 50257, zeros), then the tokens as uint16.

    python data.py fineweb --shards 10                     fetch FineWeb, tokenised with GPT-2's vocabulary
    python data.py text a.txt b.txt --out datasets/mine    tokenise your own files into mine_train.bin and mine_val.bin
"""

import argparse
import hashlib
import http.client
import os
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

MAGIC, VERSION, HEADER = 20240520, 1, 256 * 4                        # HEADER in bytes
FOLDER = Path("datasets")                                            # where fetched and tokenised files go
VAL_SEQUENCES = 256                                                  # validation reads this many sequences, always the same


class UserError(Exception):
    """Something the user can mend.  The message is one line that says what is wrong and what to do."""


def seeded(*what):
    """A CPU random generator that is a function of `what` alone (Python's own `hash` differs between processes)."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------

def byte_encoding():
    """The simplest tokenizer there is: 256 tokens, one for each byte."""
    return tiktoken.Encoding("bytes", pat_str=r"(?s).+", special_tokens={},
                             mergeable_ranks={bytes([i]): i for i in range(256)})


def encoding_for(vocab_size):
    """The tiktoken encoding of a vocabulary of this size: bytes (256) or GPT-2 (50257; fetched on first use)."""
    if vocab_size == 256:
        return byte_encoding()
    if vocab_size != 50257:
        raise UserError(f"no tokenizer is known for a vocabulary of {vocab_size}; known are 256 (bytes) and 50257 (GPT-2)")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as e:
        raise UserError(f"GPT-2's tokenizer could not be fetched ({type(e).__name__}); is there a network?") from None


def write_bin(path, tokens, vocab_size):
    """Writes tokens (integers below 65536) as a .bin shard; the file appears whole or not at all."""
    header = np.zeros(256, np.int32)
    header[:4] = MAGIC, VERSION, len(tokens), 0 if vocab_size == 50257 else vocab_size
    part = Path(f"{path}.part")
    with open(part, "wb") as f:
        f.write(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())
    os.replace(part, path)


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
        try:
            tokens = np.fromfile(self.path, np.uint16, last - first, offset=HEADER + 2 * (self.start + first))
        except OSError as e:
            raise UserError(f"cannot read {self.path}: {e.strerror}") from None
        if len(tokens) < last - first:
            raise UserError(f"{self.path} became shorter while it was in use: bring it back and go on with --resume")
        return tokens


def read_bin(path):
    """-> (Shard of all its tokens, vocabulary size).  Raises UserError for anything but a whole, valid shard."""
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, np.int32, 256) if size >= HEADER else np.zeros(256, np.int32)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    magic, version, count, vocab = map(int, header[:4])
    if (magic, version) != (MAGIC, VERSION) or count < 0 or not 0 <= vocab <= 65536:
        raise UserError(f"{path} is not a token shard: its header should begin {MAGIC}, {VERSION}; make one with data.py text")
    if size != HEADER + 2 * count:
        raise UserError(f"{path} should have {HEADER + 2 * count} bytes ({count} tokens) but has {size}: fetch or write it again")
    tokens, vocab = Shard(path, 0, count), vocab or 50257
    largest = max((int(tokens[i:i + 2**24].max()) for i in range(0, count, 2**24)), default=0)
    if largest >= vocab:
        raise UserError(f"{path} has token {largest}, but its vocabulary is {vocab}: tokenise it again")
    return tokens, vocab


class Tokens:
    """Text as a language model's batches.  splits: {"train": [arrays of tokens], "val": [...]}"""

    unit = "tokens"

    def __init__(self, splits, vocab_size, batch_size, seq_len, seed):
        self.splits, self.vocab_size = splits, vocab_size
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        for split, need in ("train", batch_size * seq_len + 1), ("val", seq_len + 1):
            have = max(map(len, splits[split]), default=0)
            if have < need:
                raise UserError(f"the {split} data has {have} tokens, too short for one batch, which needs {need}: "
                                f"use a smaller --batch-size or --seq-len, or more text")
        # Validation reads windows spread evenly over the first val shard
        self.val_count = min(VAL_SEQUENCES, (len(splits["val"][0]) - 1) // seq_len)

    def val_steps(self, workers):
        """Number of "val" batches of each worker; all workers together read every validation sequence once."""
        return -(-self.val_count // (self.batch_size * workers))

    def batch(self, split, step, worker, workers):
        """-> inputs, targets: int64 [B, T].  train: random windows; val: this worker's share, the last ones may be short."""
        if split == "train":
            lengths = torch.tensor([len(tokens) - self.seq_len for tokens in self.splits[split]])
            rng = seeded(self.seed, step, worker, workers)
            starts = torch.randint(int(lengths.sum()), (self.batch_size,), generator=rng)
            shards = torch.searchsorted(lengths.cumsum(0), starts, right=True)
            starts -= (lengths.cumsum(0) - lengths)[shards]
        else:
            first = (step * workers + worker) * self.batch_size
            which = torch.arange(self.val_count)[first:first + self.batch_size]
            stride = (len(self.splits[split][0]) - 1) // self.val_count
            starts, shards = which * stride, torch.zeros_like(which)
        windows = [self.splits[split][s][i:i + self.seq_len + 1].astype(np.int64) for s, i in zip(shards, starts)]
        windows = torch.from_numpy(np.array(windows, np.int64).reshape(-1, self.seq_len + 1))
        return windows[:, :-1], windows[:, 1:]


def stdlib_splits():
    """The source of this Python's standard library, about 11 MB that is on every machine, as byte tokens.

    Every tenth file or so, chosen by a hash of its path, is for validation.
    """
    root, encoding = Path(sysconfig.get_path("stdlib")), byte_encoding()
    splits = {"train": [], "val": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not {"test", "tests", "idle_test", "site-packages"} & set(name.parts):
            tokens = encoding.encode_ordinary(path.read_bytes().decode("utf-8", "replace"))
            digest = hashlib.sha256(name.as_posix().encode()).digest()
            splits["val" if digest[0] < 26 else "train"].append(np.array(tokens, np.uint8))
    return {split: [np.concatenate(files)] if files else [] for split, files in splits.items()}


def load_text(name, batch_size, seq_len, seed):
    if name == "stdlib":
        return Tokens(stdlib_splits(), 256, batch_size, seq_len, seed)
    if name == "fineweb":
        paths = {split: sorted(FOLDER.glob(f"fineweb_{split}_*.bin")) for split in ("train", "val")}
        if not all(paths.values()):
            raise UserError(f"no FineWeb shards in {FOLDER}: fetch some with  python data.py fineweb --shards 1")
    elif not name.endswith(".bin"):
        raise UserError(f"unknown --data {name}: use stdlib, fineweb, the path of a .bin token file, cifar10, cifar100 or shapes")
    else:
        paths = {"train": [Path(name)], "val": []}
        twin = Path(name).with_name(Path(name).name.replace("train", "val"))
        if twin.name != Path(name).name and twin.exists():
            paths["val"] = [twin]
    shards = {split: [read_bin(p) for p in paths[split]] for split in paths}
    vocab_sizes = {vocab for split in shards.values() for _, vocab in split}
    if len(vocab_sizes) > 1:
        raise UserError(f"the shards of {name} have different vocabularies: {sorted(vocab_sizes)}")
    splits = {split: [tokens for tokens, _ in shards[split]] for split in shards}
    if not splits["val"]:                                            # no validation file: the last tenth
        edge = len(splits["train"][0]) * 9 // 10
        splits = {"train": [Shard(name, 0, edge)], "val": [Shard(name, edge, len(splits["train"][0]))]}
    return Tokens(splits, vocab_sizes.pop(), batch_size, seq_len, seed)


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------

# name -> (number of classes, mean and standard deviation of the colours red, green, blue, for values from 0 to 1)
IMAGES = {
    "cifar10": (10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "shapes": (10, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}


class Images:
    """Images as a classifier's batches.  splits: {"train": (uint8 [N, 3, 32, 32], labels int64 [N]), "val": ...}"""

    unit = "images"

    def __init__(self, name, splits, batch_size, seed, device="cpu"):
        self.num_classes, mean, std = IMAGES[name]
        self.splits, self.batch_size, self.seed, self.device = splits, batch_size, seed, device
        self.mean, self.std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (mean, std))
        for split, (images, labels) in splits.items():
            if images.shape != (len(labels), 3, 32, 32) or not len(labels):
                raise UserError(f"the {split} images of {name} have shape {list(images.shape)} for {len(labels)} labels; wanted "
                                f"are 32x32 colour images, [{len(labels)}, 3, 32, 32]: fetch the data again")
            if not 0 <= labels.min() <= labels.max() < self.num_classes:
                raise UserError(f"the {split} labels of {name} go from {labels.min()} to {labels.max()}, but it has "
                                f"{self.num_classes} classes: fetch the data again")

    def val_steps(self, workers):
        """Number of "val" batches of each worker; all workers together see every validation image once."""
        return -(-len(self.splits["val"][1]) // (self.batch_size * workers))

    def batch(self, split, step, worker, workers):
        """-> images float [B, 3, 32, 32], labels int64 [B], on the device.

        train: the workers walk through a permutation of all images together, then through another one; random shift and
        mirror image.  val: this worker's share, the last ones may be short.
        """
        images, labels = self.splits[split]
        place = (step * workers + worker) * self.batch_size + torch.arange(self.batch_size)
        if split == "val":
            which = place[place < len(labels)]
        else:
            epoch = place // len(labels)
            which = torch.cat([torch.randperm(len(labels), generator=seeded(self.seed, "epoch", e))[place[epoch == e] % len(labels)]
                               for e in epoch.unique().tolist()])
        x, y = images[which].to(self.device), labels[which].to(self.device)
        if split == "train":
            x = shift_and_mirror(x, seeded(self.seed, "augment", step, worker, workers))
        return (x / 255 - self.mean) / self.std, y


def shift_and_mirror(x, rng, most=4):
    """Moves each image of x [B, C, H, W] by up to `most` pixels each way, black coming in, and mirrors half of them."""
    B, _, H, W = x.shape
    down, right = torch.randint(2 * most + 1, (2, B, 1), generator=rng)
    rows, columns = down + torch.arange(H), right + torch.arange(W)           # [B, H], [B, W]: where each pixel comes from
    columns = torch.where(torch.rand(B, 1, generator=rng) < 0.5, columns, columns.flip(1))
    rows, columns, image = rows.to(x.device), columns.to(x.device), torch.arange(B, device=x.device)
    padded = F.pad(x, (most,) * 4)
    return padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def download_images(name):
    """Puts CIFAR into FOLDER unless it is there; torchvision checks it against its known checksums."""
    if name not in CIFAR:
        return
    kind = CIFAR[name]
    try:
        kind(FOLDER, download=True)
    except Exception as e:                                           # no route, time-out, wrong bytes, full disk
        archive = FOLDER / kind.filename
        if archive.exists() and not check_integrity(archive, kind.tgz_md5):
            archive.unlink()                                         # half a download is of no use to anyone
        what = " ".join(str(getattr(e, "reason", e)).split())
        raise UserError(f"cannot fetch and read {name} in {FOLDER} ({what}); --data shapes needs no network") from None


def cifar_splits(name):
    """-> {"train": (uint8 [N, 3, 32, 32], int64 [N]), "val": ...}, the test images being for validation."""
    try:
        sets = {split: CIFAR[name](FOLDER, train=split == "train") for split in ("train", "val")}
        return {split: (torch.from_numpy(s.data).permute(0, 3, 1, 2), torch.tensor(s.targets)) for split, s in sets.items()}
    except Exception as e:
        raise UserError(f"{name} in {FOLDER} cannot be read ({' '.join(str(e).split())}): delete it there and fetch it again") from None


def shapes(count, rng):
    """SYNTHETIC: drawings of ten bright shapes on dark ground; size, place, angle and colours vary, and there is noise.

    -> uint8 [count, 3, 32, 32], labels int64 [count].  A linear classifier gets less than 60 % right.
    """
    def between(low, high, *more):
        return low + (high - low) * torch.rand(count, *more, generator=rng)

    labels, line = torch.randint(10, (count,), generator=rng), torch.linspace(-1, 1, 32)
    angle, size = between(-0.7, 0.7, 1, 1), between(0.4, 0.8, 1, 1)
    x, y = line.view(1, 1, 32) - between(-0.25, 0.25, 1, 1), line.view(1, 32, 1) - between(-0.25, 0.25, 1, 1)
    u, v = (x * angle.cos() + y * angle.sin()) / size, (y * angle.cos() - x * angle.sin()) / size     # [count, 32, 32]
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
    image = torch.where(inside[:, None], colour, ground) + 0.1 * torch.randn(count, 3, 32, 32, generator=rng)
    return (image.clamp(0, 1) * 255).to(torch.uint8), labels


def load(name, batch_size, seq_len, seed, device="cpu"):
    """The data set of --data: text (stdlib, fineweb, the path of a .bin shard) or images (cifar10, cifar100, shapes)."""
    if name not in IMAGES:
        return load_text(name, batch_size, seq_len, seed)
    if name == "shapes":
        splits = {split: shapes(count, seeded("shapes", split)) for split, count in (("train", 10000), ("val", 2000))}
    else:
        splits = cifar_splits(name)
    return Images(name, splits, batch_size, seed, device)


# ---------------------------------------------------------------------------------------------------------------------
# Fetching and tokenising ahead of time
# ---------------------------------------------------------------------------------------------------------------------

def fetch(url, path, tries=5):
    """Downloads a token shard, going on where a broken transfer stopped; `path` appears only when whole and checked."""
    part = Path(f"{path}.part")
    for attempt in range(tries):
        have = part.stat().st_size if part.exists() else 0
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=60) as reply:
                resumed = reply.status == 206                        # 200: the server sends all of it again
                with open(part, "ab" if resumed else "wb") as f:
                    while chunk := reply.read(1 << 20):
                        f.write(chunk)
                wanted = (have if resumed else 0) + int(reply.headers["Content-Length"])
            if part.stat().st_size == wanted:
                break
            problem = "the transfer broke off"
        except urllib.error.HTTPError as e:
            if e.code == 416:                                        # nothing is left to send
                break
            problem = f"the server answers {e.code}"
            if 400 <= e.code < 500:
                raise UserError(f"cannot fetch {url}: {problem}") from None
        except (OSError, ValueError, TypeError, http.client.HTTPException) as e:      # no route, time-out, reset, nonsense
            problem = str(getattr(e, "reason", e))
        if attempt < tries - 1:
            time.sleep(min(2 ** attempt, 10) * 0.1)
    else:
        raise UserError(f"cannot fetch {url}: {problem} ({tries} tries); run the command again to go on from here")
    try:
        read_bin(part)
    except UserError as e:
        part.unlink()
        raise UserError(f"{url} sent something else than a whole token shard: {e}") from None
    os.replace(part, path)


def fetch_fineweb(shards):
    """The first `shards` of 103 training shards, 100M tokens and 200 MB each, and the validation shard."""
    FOLDER.mkdir(exist_ok=True)
    site = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    for name in ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)]:
        if not (FOLDER / name).exists():
            print(f"fetching {name}", flush=True)
            fetch(f"{site}/datasets/kjj0/fineweb10B-gpt2/resolve/main/{name}", FOLDER / name)


def tokenise(files, out, encoding):
    """Writes OUT_train.bin and OUT_val.bin, the first nine tenths and the last of all files' tokens."""
    encoding = encoding_for({"bytes": 256, "gpt2": 50257}[encoding])
    tokens = []
    for file in files:
        try:
            tokens.append(np.array(encoding.encode_ordinary(Path(file).read_bytes().decode("utf-8", "replace")), np.uint16))
        except OSError as e:
            raise UserError(f"cannot read {file}: {e.strerror}") from None
    tokens = np.concatenate(tokens)
    edge = len(tokens) * 9 // 10
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    for split, part in ("train", tokens[:edge]), ("val", tokens[edge:]):
        write_bin(f"{out}_{split}.bin", part, encoding.n_vocab)
        print(f"{out}_{split}.bin: {len(part)} tokens")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message):
        raise UserError(message)


def main():
    parser = Parser(description="Fetch or tokenise training text ahead of time.")
    commands = parser.add_subparsers(dest="command", required=True)
    fineweb = commands.add_parser("fineweb", help="fetch FineWeb, tokenised with GPT-2's vocabulary")
    fineweb.add_argument("--shards", type=int, default=1, help="training shards of 100M tokens, 1 to 103 [%(default)s]")
    text = commands.add_parser("text", help="tokenise text files")
    text.add_argument("files", nargs="+", metavar="FILE")
    text.add_argument("--out", default=str(FOLDER / "text"), help="beginning of the two files' paths [%(default)s]")
    text.add_argument("--encoding", choices=["bytes", "gpt2"], default="bytes", help="[%(default)s]")
    try:
        args = parser.parse_args()
        if args.command == "text":
            tokenise(args.files, args.out, args.encoding)
        elif not 1 <= args.shards <= 103:
            raise UserError(f"--shards must be from 1 to 103, not {args.shards}")
        else:
            fetch_fineweb(args.shards)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
