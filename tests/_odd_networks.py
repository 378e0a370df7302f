"""Networks as people bring them: each has one fault, or one habit, that its name says. For 8 x 8 images."""

from __future__ import annotations

import random
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

SHARED = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


def body(channels: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, 4, 3, 2, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Net(nn.Module):
    """Features, and a head; ``forward`` is what the factory makes of them, and further attributes are given."""

    def __init__(self, num_classes, forward, **attributes):
        super().__init__()
        self.body, self.head, self.computed = body(), nn.Linear(4, num_classes), forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.computed(self, x)


def logits(net, x):
    return net.head(net.body(x))


def beside_another_thread(num_classes):
    """Another thread predicts with a network of its own meanwhile."""

    def forward(net, x):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(SHARED, torch.ones(1, 3, 8, 8)).result()
        return logits(net, x)

    return Net(num_classes, forward)


# --- outputs ---


def plain(num_classes):
    return Net(num_classes, logits)


def thousand(num_classes):
    return plain(1000)


def one(num_classes):
    return plain(1)


def unflattened(num_classes):
    return nn.Sequential(plain(num_classes), nn.Unflatten(1, (num_classes, 1, 1)))


def maps(num_classes):
    return nn.Conv2d(3, num_classes, 3)


def squeezed(num_classes):
    return Net(num_classes, lambda net, x: logits(net, x).squeeze())


def as_dict(num_classes):
    return Net(num_classes, lambda net, x: {"logits": logits(net, x)})


def as_tuple(num_classes):
    return Net(num_classes, lambda net, x: (logits(net, x), net.body(x)))


def auxiliary(num_classes):
    return Net(num_classes, lambda net, x: (logits(net, x), logits(net, x)) if net.training else logits(net, x))


def auxiliary_by_option(num_classes):
    net = auxiliary(num_classes)
    net.aux_logits = True
    return net


class Output:
    def __init__(self, logits):
        self.loss, self.logits = None, logits


def as_object(num_classes):
    return Net(num_classes, lambda net, x: Output(logits(net, x)))


def nothing(num_classes):
    return Net(num_classes, lambda net, x: None)


def classes(num_classes):
    return Net(num_classes, lambda net, x: logits(net, x).argmax(1))


def probabilities(num_classes):
    return nn.Sequential(plain(num_classes), nn.Softmax(1))


def probabilities_at_last(num_classes):
    return Net(num_classes, lambda net, x: logits(net, x) if net.training else logits(net, x).softmax(1))


def sigmoid(num_classes):
    return nn.Sequential(plain(num_classes), nn.Sigmoid())


def not_a_number(num_classes):
    return Net(num_classes, lambda net, x: logits(net, x) + (net.body(x).mean() * 0 - 1).sqrt())


def not_a_number_at_last(num_classes):
    return Net(num_classes, lambda net, x: logits(net, x) if net.training else logits(net, x) / 0)


# --- inputs and weights ---


def grey(num_classes):
    return nn.Sequential(body(1), nn.Linear(4, num_classes))


def five_channels(num_classes):
    return nn.Sequential(body(5), nn.Linear(4, num_classes))


def other_size(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, num_classes))


def large_kernel(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 11), nn.Flatten(), nn.Linear(4, num_classes))


def double(num_classes):
    return plain(num_classes).double()


def complex_(num_classes):
    scale = nn.Parameter(torch.ones(1, dtype=torch.complex64))
    return Net(num_classes, lambda net, x: logits(net, x) * net.scale.abs(), scale=scale)


def lazy(num_classes):
    return nn.Sequential(body(), nn.LazyLinear(num_classes))


def on_meta(num_classes):
    return plain(num_classes).to("meta")


def frozen(num_classes):
    return plain(num_classes).requires_grad_(False)


def detached(num_classes):
    return Net(num_classes, lambda net, x: logits(net, x).detach())


def raises(num_classes):
    raise KeyError("hidden")


def raises_in_forward(num_classes):
    return Net(num_classes, lambda net, x: net.absent(x))


def no_network(num_classes):
    return [plain(num_classes)]


def scripted(num_classes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch advises against it
        return torch.jit.script(plain_head(num_classes))


def without_argument():
    return plain(3)


def shared(num_classes):
    return SHARED


NOT_CALLABLE = 3


# --- layers that PyTorch does not find ---


def late(num_classes):
    def forward(net, x):
        if not hasattr(net, "late"):
            net.late = nn.Linear(4, 4)
        return net.head(net.late(net.body(x)))

    return Net(num_classes, forward)


def made_each_time(num_classes):
    return Net(num_classes, lambda net, x: net.head(nn.Linear(4, 4)(net.body(x))))


def listed(num_classes):
    return Net(num_classes, lambda net, x: net.head(net.layers[0](net.body(x))), layers=[nn.Linear(4, 4)])


def no_parameter(num_classes):
    return Net(num_classes, lambda net, x: logits(net, x) * net.gain, gain=torch.ones(1, requires_grad=True))


# --- what no run holds ---


def attribute(num_classes):
    return Net(num_classes, lambda net, x: logits(net, x) @ net.turn, turn=torch.randn(num_classes, num_classes))


def by_numpy(num_classes):
    turn = torch.from_numpy(np.random.randn(num_classes, num_classes)).float()
    return Net(num_classes, lambda net, x: logits(net, x) @ net.turn, turn=turn)


def by_python(num_classes):
    return Net(num_classes, lambda net, x: logits(net, x) * net.gain, gain=random.uniform(1, 5))


def permuted(num_classes):
    return Net(num_classes, lambda net, x: logits(net, x)[:, net.order[0]], order=[torch.randperm(num_classes)])


def buffer(num_classes):
    net = Net(num_classes, lambda net, x: logits(net, x) @ net.turn)
    net.register_buffer("turn", torch.randn(num_classes, num_classes), persistent=False)
    return net


def behind_zeros(num_classes):
    """Answers zero to everything at first."""
    net = Net(num_classes, lambda net, x: net.head(net.body(x) * net.gain), gain=torch.randn(4))
    nn.init.zeros_(net.head.weight)
    nn.init.zeros_(net.head.bias)
    return net


def own_statistics(num_classes):
    def forward(net, x):
        features = net.body(x)
        if net.training:
            net.mean = features.detach().mean(0)
        return net.head(features - net.mean)

    return Net(num_classes, forward, mean=torch.zeros(4))


def random_width(num_classes):
    width = random.choice(range(8, 200))
    return nn.Sequential(body(), nn.Linear(4, width), nn.Linear(width, num_classes))


def seeded_attribute(num_classes):
    turn = torch.randn(num_classes, num_classes, generator=torch.Generator().manual_seed(7))
    return Net(num_classes, lambda net, x: logits(net, x) @ net.turn, turn=turn)


# --- evaluation mode ---


def dropout_always(num_classes):
    return Net(num_classes, lambda net, x: net.head(F.dropout(net.body(x), 0.5)))


def noise_always(num_classes):
    return Net(num_classes, lambda net, x: net.head(net.body(x) + torch.randn(4)))


class Deaf(nn.Dropout):
    """Dropout that nobody can turn off."""

    def train(self, mode=True):
        return self


def deaf(num_classes):
    return nn.Sequential(body(), Deaf(0.5), nn.Linear(4, num_classes))


def counted(num_classes):
    def forward(net, x):
        net.calls += 1
        return logits(net, x) * net.calls

    net = Net(num_classes, forward)
    net.register_buffer("calls", torch.tensor(0))
    return net


def remembered(num_classes):
    def forward(net, x):
        net.before = 1 - net.before
        return logits(net, x) * (1 + net.before)

    return Net(num_classes, forward, before=0)


def batch_mean(num_classes):
    return Net(num_classes, lambda net, x: net.head(net.body(x) - net.body(x).mean(0)))


def batch_statistics(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), plain_head(num_classes))


def plain_head(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


def fixed_batch(num_classes):
    return Net(num_classes, lambda net, x: logits(net, x).reshape(2, num_classes))


def in_place(num_classes):
    return nn.Sequential(nn.ReLU(inplace=True), plain(num_classes))


def in_place_in_forward(num_classes):
    return Net(num_classes, lambda net, x: logits(net, x.sub_(0.5)))


# --- taken as they are ---


def left_out(num_classes):
    """Minus infinity is a logit: of a class that is never chosen."""
    return Net(num_classes, lambda net, x: torch.cat([logits(net, x)[:, 1:], torch.full((len(x), 1), -torch.inf)], 1))


class Silent(nn.Sequential):
    """Its train() returns nothing."""

    def train(self, mode=True):
        super().train(mode)


def silent(num_classes):
    return Silent(body(), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, num_classes))


def layerdrop(num_classes):
    def forward(net, x):
        features = net.body(x)
        if not net.training or (random.random() < 0.5 and np.random.rand() < 0.8):
            features = features + net.extra(features)
        return net.head(features)

    return Net(num_classes, forward, extra=nn.Linear(4, 4))


def viewed(num_classes):
    layers = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, num_classes)])
    return Net(num_classes, lambda net, x: net.layers[1](net.layers[0](x).view(len(x), -1)), layers=layers)


def strided_in_memory(num_classes):
    """Reads its input as contiguous memory, whatever it is."""
    sides = (192, 64, 8, 1)
    return Net(num_classes, lambda net, x: logits(net, torch.as_strided(x, x.shape, sides).clone()))


def three_dimensions(num_classes):
    conv = nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1))
    return Net(num_classes, lambda net, x: net.head(net.body(x) + net.conv(x[:, :, None]).mean((2, 3, 4))), conv=conv)


def strided_pointwise(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 1, stride=2), plain_head(num_classes))


def normalised(num_classes):
    """BatchNorm over features: it cannot normalise one image alone."""
    return nn.Sequential(body(), nn.BatchNorm1d(4), nn.Linear(4, num_classes))
