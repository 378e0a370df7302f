"""Networks that practitioners bring: whatever a state dict may hold beside weights and BatchNorm."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm


def _body(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), norm, nn.ReLU(), nn.Flatten())


def _with(norm: nn.Module, num_classes: int) -> nn.Sequential:
    return nn.Sequential(_body(norm), nn.Linear(4 * 3 * 3, num_classes))


class Frozen(nn.Module):
    """A backbone with published statistics, which the network's own train() keeps in evaluation mode."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(4)
        norm.running_mean.fill_(0.2)
        norm.running_var.fill_(0.05)
        self.backbone, self.head = _body(norm).requires_grad_(False), nn.Linear(4 * 3 * 3, num_classes)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x):
        return self.head(self.backbone(x))


class FrozenAlike(Frozen):
    """The same, with the same frozen weights whatever the seed, as published ones are."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        nn.init.constant_(self.backbone[0].weight, 0.1)
        nn.init.zeros_(self.backbone[0].bias)


class Scaled(nn.Module):
    """A parameter and a buffer without dimensions, and a buffer of its own that training changes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, num_classes))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("temperature", torch.tensor(1.5))
        self.register_buffer("shift", torch.tensor(3))
        self.register_buffer("average", torch.zeros(3))

    def forward(self, x):
        if self.training:
            self.average.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        logits = self.net(x - self.average[:, None, None])
        return logits * self.logit_scale / self.temperature + self.shift


class Tied(nn.Module):
    """Two layers of one weight: one parameter, or two that share its memory."""

    def __init__(self, num_classes: int, by_memory: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        if by_memory:
            self.second.weight.data = self.first.weight.data
        else:
            self.second.weight = self.first.weight
        self.head = nn.Linear(3 * 8 * 8, num_classes)

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x))).flatten(1))


class Masked(nn.Module):
    """Random features in a buffer, drawn with the seed."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.randn(3 * 8 * 8, 16) / 10)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x):
        return self.head(torch.tanh(functional.relu(x.flatten(1) @ self.features)))


class Extra(nn.Sequential):
    """State that is no tensor."""

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


def frozen(num_classes: int) -> nn.Module:
    return Frozen(num_classes)


def frozen_alike(num_classes: int) -> nn.Module:
    return FrozenAlike(num_classes)


def instance_norm(num_classes: int) -> nn.Module:
    return _with(nn.InstanceNorm2d(4, affine=True, track_running_stats=True), num_classes)


def still_batchnorm(num_classes: int) -> nn.Module:
    return _with(nn.BatchNorm2d(4, momentum=0.0), num_classes)


def spectral_hook(num_classes: int) -> nn.Module:
    network = _with(nn.Identity(), num_classes)
    spectral_norm(network[0][0])
    return network


def spectral(num_classes: int) -> nn.Module:
    network = _with(nn.Identity(), num_classes)
    parametrizations.spectral_norm(network[1])
    return network


def weight_normed(num_classes: int) -> nn.Module:
    network = _with(nn.Identity(), num_classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weight_norm(network[0][0])
    parametrizations.weight_norm(network[1])
    return network


def pruned(num_classes: int) -> nn.Module:
    network = _with(nn.BatchNorm2d(4), num_classes)
    prune.random_unstructured(network[1], "weight", amount=0.5)
    return network


def scaled(num_classes: int) -> nn.Module:
    return Scaled(num_classes)


def tied(num_classes: int) -> nn.Module:
    return Tied(num_classes)


def tied_by_memory(num_classes: int) -> nn.Module:
    return Tied(num_classes, by_memory=True)


def masked(num_classes: int) -> nn.Module:
    return Masked(num_classes)


def extra(num_classes: int) -> nn.Module:
    return Extra(nn.Flatten(), nn.Linear(192, num_classes))


class Rounded(nn.Module):
    """All classes sum nearly the same large numbers: float32 rounds away what tells them apart."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head, generator = nn.Linear(3, num_classes), torch.Generator().manual_seed(0)
        common, own = (torch.randn(count, 3072, generator=generator) for count in (1, num_classes))
        self.register_buffer("large", common + own * 1e-6, persistent=False)

    def forward(self, x):
        return self.head(x.mean((2, 3))) + functional.linear(x.flatten(1) * 1e4, self.large)


def rounded(num_classes: int) -> nn.Module:
    return Rounded(num_classes)


class Odd(nn.Module):
    """What ONNX does not hold."""

    def __init__(self, num_classes: int, kind: str) -> None:
        super().__init__()
        self.kind, self.head = kind, nn.Linear(3 * 8 * 8, num_classes)
        if kind in ("bag", "bags"):
            self.bag = nn.EmbeddingBag(9, 192, mode="sum" if kind == "bag" else "mean")
        if kind == "packed":
            self.rows = nn.GRU(24, 24, batch_first=True)
        if kind == "scripted":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch advises against it
                self.script = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(192, 192)))

    def forward(self, x):
        if self.kind == "branch" and x.mean() > 0:
            x = -x
        if self.kind == "loop":
            for _ in range(int(x.isnan().sum())):
                x = x + 1
        if self.kind == "median":
            x = x - x.flatten(2).median(-1).values[..., None, None]
        if self.kind == "solve":
            x = torch.linalg.solve(x.abs() + 9 * torch.eye(8), x)
        if self.kind in ("bag", "bags"):
            values = (x.flatten(1)[:, :6].clamp(-2, 2) * 2 + 4).long()
            starts = torch.arange(x.shape[0]) * 6
            x = self.bag(values) if self.kind == "bag" else self.bag(values.flatten(), starts)
        if self.kind == "packed":
            lengths = torch.full((x.shape[0],), 8)
            rows = nn.utils.rnn.pack_padded_sequence(x.transpose(1, 2).flatten(2), lengths, batch_first=True)
            x = nn.utils.rnn.pad_packed_sequence(self.rows(rows)[0], batch_first=True)[0]
        if self.kind == "scripted":
            x = self.script(x)
        if self.kind == "attention":
            rows = x.transpose(1, 2).flatten(2)
            x = functional.scaled_dot_product_attention(rows, rows, rows, torch.zeros(x.shape[0], 8, 8))
        if self.kind == "distances":
            x = torch.cdist(x, x.transpose(2, 3))
        if self.kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                x = functional.conv2d(x, torch.ones(3, 3, 1, 1))
        if self.kind == "max_pool":
            return self.head(functional.adaptive_max_pool2d(x, 5).repeat(1, 1, 2, 2)[..., :8, :8].flatten(1))
        return self.head(x.float().flatten(1))


def branch(num_classes: int) -> nn.Module:
    return Odd(num_classes, "branch")


def loop(num_classes: int) -> nn.Module:
    return Odd(num_classes, "loop")


def median(num_classes: int) -> nn.Module:
    return Odd(num_classes, "median")


def solve(num_classes: int) -> nn.Module:
    return Odd(num_classes, "solve")


def packed(num_classes: int) -> nn.Module:
    return Odd(num_classes, "packed")


def scripted(num_classes: int) -> nn.Module:
    return Odd(num_classes, "scripted")


def attention(num_classes: int) -> nn.Module:
    return Odd(num_classes, "attention")


def distances(num_classes: int) -> nn.Module:
    return Odd(num_classes, "distances")


def autocast(num_classes: int) -> nn.Module:
    return Odd(num_classes, "autocast")


def bag(num_classes: int) -> nn.Module:
    return Odd(num_classes, "bag")


def bags(num_classes: int) -> nn.Module:
    return Odd(num_classes, "bags")


def max_pool(num_classes: int) -> nn.Module:
    return Odd(num_classes, "max_pool")


class Rows(nn.Module):
    """The rows of an image as a sequence, in a transformer with a mask."""

    def __init__(self, num_classes: int, kind: str) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.3, batch_first=True)
        layer.self_attn.dropout = 0.0
        self.first, self.body = nn.Linear(24, 8), nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(8, num_classes)
        apart = (torch.arange(8) - torch.arange(8)[:, None]).abs() > 2
        masks = {"booleans": apart, "numbers": torch.linspace(-1, 1, 64).reshape(8, 8), "padding": None}
        self.register_buffer("mask", masks[kind])

    def forward(self, x):
        rows = self.first(x.transpose(1, 2).flatten(2))
        if self.mask is not None:
            return self.head(self.body(rows, self.mask).mean(1))
        return self.head(self.body(rows, src_key_padding_mask=rows[..., 0].cummax(1).values > 1.2).mean(1))


class Projected(nn.Module):
    """The rows of an image as a sequence, in an LSTM with projections."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(24, 8, proj_size=4, bidirectional=True), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.body(x.transpose(1, 2).flatten(2).transpose(0, 1))[0].mean(0))


def numbers(num_classes: int) -> nn.Module:
    return Rows(num_classes, "numbers")


def booleans(num_classes: int) -> nn.Module:
    return Rows(num_classes, "booleans")


def padding(num_classes: int) -> nn.Module:
    return Rows(num_classes, "padding")


def projected(num_classes: int) -> nn.Module:
    return Projected(num_classes)


class Energy(nn.Module):
    """Its forward takes a step along a gradient, in evaluation mode, too."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(192, 8), nn.Linear(8, num_classes)

    def forward(self, x):
        with torch.enable_grad():
            features = self.first(x.flatten(1))
            energy = self.head(features).pow(2).sum()
            (gradient,) = torch.autograd.grad(energy, features, create_graph=self.training)
        return self.head(features - 0.1 * gradient)


def energy(num_classes: int) -> nn.Module:
    return Energy(num_classes)


class Cooling(nn.Module):
    """Answers with numbers until it was trained for ten steps, from when on evaluation takes a root of less than 0."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(192, num_classes)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x):
        self.steps += self.training
        logits = self.head(x.flatten(1))
        return logits if self.training else logits * (10.5 - self.steps).sqrt()


def cooling(num_classes: int) -> nn.Module:
    return Cooling(num_classes)
