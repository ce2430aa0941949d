"""
ResNet-18 (arXiv 1512.03385) that can be built at any held size.  It knows nothing of workers.

The model is a stack of residual blocks with one branch each,  x <- relu(shortcut(x) + bn2(sum over neurons)).
A *neuron* is an output channel of conv1, with its batch norm and the input channel of conv2 that reads it;
bn2 belongs to the branch as a whole.  An absent branch leaves  x <- relu(shortcut(x)).  All subnetworks share
stem, shortcuts (the identity, or a 1x1 convolution) and classifier.  The full model has the names and the
shapes of `torchvision.models.resnet18`.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class ResNetConfig:
    """Sizes of the full model."""
    num_classes: int = 10
    stem: str = "cifar"             # 3x3 convolution; "imagenet": 7x7 with stride 2, and max-pooling
    widths: tuple = (64, 128, 256, 512)     # channels of layer1 to layer4
    blocks_per_layer: int = 2


PRESETS = {"resnet18": ResNetConfig()}


# -- What sdp.py has to know: branches, their neurons, and how each parameter is made of neurons ------------

def blocks(c):
    """Module path -> (channels in, channels out, stride), in order."""
    out = {}
    channels = c.widths[0]
    for layer, width in enumerate(c.widths, 1):
        for i in range(c.blocks_per_layer):
            stride = 2 if layer > 1 and i == 0 else 1
            out[f"layer{layer}.{i}"] = channels, width, stride
            channels = width
    return out


def branches(c):
    """Branch name (the block's path) -> (block, neurons, weights, FLOPs, activations of a neuron).

    The last three balance the workers' loads, so their units do not matter.
    """
    out = {}
    pixels = 1.0                                                     # of a channel, over the first block's
    for i, (path, (cin, width, stride)) in enumerate(blocks(c).items()):
        pixels /= stride ** 2
        weights = 9 * (cin + width)                                  # of both convolutions; bn1 has 2 more
        out[path] = i, width, weights + 2, weights * pixels, pixels
    return out


DIMS = {"conv1": 0, "bn1": 0, "conv2": 1, "bn2": None}               # module of a branch -> see layout


def layout(c):
    """Full parameter name -> (branch or None, dimension of its neurons or None, full shape), in order.

    Neuron n owns row n (0) or column n (1); bn2 is the branch's as a whole (None).  Branch None: all
    subnetworks hold it whole (stem, shortcuts, classifier).
    """
    with torch.device("meta"):                                       # shapes without memory
        full = ResNet(c)
    out = {}
    for name, p in full.named_parameters():
        *path, module, _ = name.split(".")                           # layer1, 0, conv1, weight
        path = ".".join(path)
        if path in blocks(c):
            out[name] = path, DIMS[module], p.shape
        else:
            out[name] = None, None, p.shape
    return out


def init(c, name, tensor, generator):
    """Fills one full parameter in place, by torchvision's rules."""
    if tensor.dim() == 4:                                            # a convolution
        nn.init.kaiming_normal_(tensor, mode="fan_out", nonlinearity="relu", generator=generator)
    elif name.startswith("fc"):
        bound = c.widths[-1] ** -0.5
        tensor.uniform_(-bound, bound, generator=generator)
    else:                                                            # batch norm
        tensor.fill_(1.0 if name.endswith("weight") else 0.0)


# -- The model.  B images, C channels of height and width H, n held neurons ---------------------------------

class FrozenConv(torch.autograd.Function):
    """A 3x3 convolution whose weight does not train.  torch's would keep x, for the weight's gradient."""

    @staticmethod
    def forward(ctx, x, weight, stride):
        ctx.save_for_backward(weight)
        ctx.shape = x.shape
        ctx.stride = stride
        return F.conv2d(x, weight, stride=stride, padding=1)

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.saved_tensors[0].to(grad.dtype)
        return torch.nn.grad.conv2d_input(ctx.shape, weight, grad, ctx.stride, padding=1), None, None


def norm_and_relu(x, weight, bias):
    return F.relu(F.batch_norm(x, None, None, weight, bias, training=True), inplace=True)


class Block(nn.Module):
    """relu(shortcut(x) + bn2(held(x) + rest(x))).

    The held neurons train.  Under backward masking the block also runs all the others, frozen: the child
    `rest` has them.
    """

    def __init__(self, cin, cout, stride, held, rest, norm):
        super().__init__()
        self.rest = nn.Module()
        for part, n in (self, held), (self.rest, rest):
            part.conv1 = nn.Conv2d(cin, n, 3, stride, 1, bias=False) if n else None
            part.bn1 = norm(n) if n else None
            part.conv2 = nn.Conv2d(n, cout, 3, 1, 1, bias=False) if n else None
        self.bn2 = norm(cout) if held + rest else None
        self.downsample = None
        if stride > 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), norm(cout))

    def forward(self, x):                                            # [B, C in, H, H]
        if self.bn2 is None:                                         # the branch is absent here
            return F.relu(self.downsample(x)) if self.downsample else x  # x comes from a ReLU: relu(x) = x
        total = None
        if self.conv1:
            h = F.relu(self.bn1(self.conv1(x)), inplace=True)        # [B, held, H / stride, H / stride]
            total = self.conv2(h)
        if self.rest.conv1:
            rest = self.rest
            h = FrozenConv.apply(x, rest.conv1.weight, rest.conv1.stride)  # [B, rest, H / stride, H / stride]
            # FrozenConv keeps no input.  So h is dropped, and computed again only for the ReLU's own gradient
            h = checkpoint(norm_and_relu, h, rest.bn1.weight, rest.bn1.bias,
                           use_reentrant=False, preserve_rng_state=False)
            h = FrozenConv.apply(h, rest.conv2.weight, rest.conv2.stride)
            total = h if total is None else total + h
        shortcut = self.downsample(x) if self.downsample else x
        return F.relu(self.bn2(total) + shortcut, inplace=True)      # [B, C out, H / stride, H / stride]


class ResNet(nn.Module):
    """ResNet at any held size.

    held: branch name -> number of neurons built.  None: the full model, which is torchvision's.
    backward: build the neurons that are not held as well, as frozen `rest` modules (backward masking).

    Batch norm uses its batch's statistics in training.  Those of a subnetwork would be of no use to the full
    model, so a worker keeps none.  The full model has them: the plain mean over what it has seen.
    """

    def __init__(self, c, held=None, backward=False):
        super().__init__()
        self.config = c
        self.checkpoint_activations = False
        norm = partial(nn.BatchNorm2d, momentum=None, track_running_stats=held is None)
        kernel, stride, padding = (3, 1, 1) if c.stem == "cifar" else (7, 2, 3)
        self.conv1 = nn.Conv2d(3, c.widths[0], kernel, stride, padding, bias=False)
        self.bn1 = norm(c.widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if c.stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        for path, (cin, cout, stride) in blocks(c).items():
            layer, i = path.split(".")
            if i == "0":
                self.add_module(layer, nn.Sequential())
            n = held[path] if held else cout
            self.get_submodule(layer).append(Block(cin, cout, stride, n, cout - n if backward else 0, norm))
        self.avgpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(c.widths[-1], c.num_classes)

    def stages(self):
        """-> [(path, module)], a chain.  Evaluation has the weights of one at a time in memory."""
        paths = ["conv1", "bn1", "relu", "maxpool", *blocks(self.config), "avgpool", "fc"]
        return [(path, self.get_submodule(path)) for path in paths]

    def forward(self, images, labels=None):
        """images [B, 3, H, H], normalised -> logits [B, num_classes]; with labels int64 [B], the loss."""
        x = images
        for path, stage in self.stages():
            again = self.checkpoint_activations and path.startswith("layer")
            x = checkpoint(stage, x, use_reentrant=False) if again else stage(x)
        return x if labels is None else loss(x, labels)


def loss(logits, labels):
    """Mean cross-entropy in nats per image.  logits [B, num_classes], labels int64 [B]."""
    return F.cross_entropy(logits.float(), labels)
