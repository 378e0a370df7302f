"""Published weights of torchvision and timm: fetched once, checked, and never unpickled."""

from __future__ import annotations

import io
import sys
import urllib.error
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision import models

from ensembler.errors import ArtefactError, CorruptError, UsageError
from ensembler.networks import matching, pretrained
from ensembler.networks.architectures import build
from tests._checkpoints import Makes, noted, same


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch.hub's, and a network that is down."""

    def down(request):
        raise urllib.error.URLError(OSError(-3, "Temporary failure in name resolution"))

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", down)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


URL = models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.url
SHUFFLENET = "torchvision:shufflenet_v2_x0_5"


def test_published_weights_from_the_cache(hub):
    published = build(SHUFFLENET, 1000, seed=5).state_dict()
    torch.save(published, hub / Path(URL).name)
    torch.manual_seed(0)
    following = torch.rand(3)
    torch.manual_seed(0)
    for weights in ("DEFAULT", "IMAGENET1K_V1"):
        found = pretrained.pretrained(SHUFFLENET, weights)
        assert same(found.states[""], published)
    assert torch.equal(torch.rand(3), following)
    network = build(SHUFFLENET, 7)
    assert matching.load(network, found).fresh == ["fc.weight", "fc.bias"]
    assert torch.equal(network.conv1[0].weight, published["conv1.0.weight"])


def test_published_files_with_older_names(hub):
    """DenseNet's are of 2017: ``norm.1`` for what is ``norm1`` today, and no ``num_batches_tracked``."""
    published = build("torchvision:densenet121", 1000).state_dict()
    older = {}
    for name, tensor in published.items():
        for part in ("norm1", "norm2", "conv1", "conv2"):
            if "denselayer" in name:
                name = name.replace(f".{part}.", f".{part[:4]}.{part[4]}.")  # noqa: PLW2901
        if not name.endswith("num_batches_tracked"):
            older[name] = tensor
    assert older.keys() != published.keys()
    torch.save(older, hub / Path(models.DenseNet121_Weights.DEFAULT.url).name)
    assert same(pretrained.pretrained("torchvision:densenet121").states[""], published)


def test_published_weights_without_a_network(hub):
    with pytest.raises(ArtefactError) as caught:
        pretrained.pretrained(SHUFFLENET)
    where = hub / "shufflenetv2_x0.5-f707e7126e.pth"
    assert str(caught.value) == (
        f"cannot fetch {URL} ([Errno -3] Temporary failure in name resolution): put that file at {where}"
    )


class Response(io.BytesIO):
    def info(self):
        return Message()


def test_a_download_that_is_not_the_published_file(hub, monkeypatch):
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Response(b"<html>"))
    with pytest.raises(CorruptError, match=r"^.*\.pth is damaged \(invalid hash value .*\): remove it, then https://"):
        pretrained.pretrained(SHUFFLENET)
    assert not list(hub.iterdir())


def test_a_cached_file_is_damaged_or_holds_objects_that_are_not_run(hub, tmp_path):
    file = hub / Path(URL).name
    file.write_bytes(b"half a file")
    with pytest.raises(CorruptError, match=r"^.*\.pth is damaged \(.*\): remove it, then https://.* is fetched again$"):
        pretrained.pretrained(SHUFFLENET)
    torch.save({"weight": Makes(tmp_path / "ran")}, file)
    with pytest.raises(CorruptError, match=r"is damaged \(Weights only load failed\)"):
        pretrained.pretrained(SHUFFLENET)
    assert not (tmp_path / "ran").exists()


def test_no_such_published_weights(hub):
    for architecture, weights, message in (
        (
            "resnet20",
            "DEFAULT",
            "resnet20 has no published weights: use torchvision:NAME, timm:NAME or a file of",
        ),
        ("a.module:make", "DEFAULT", "a.module:make has no published weights: use torchvision:NAME"),
        (SHUFFLENET, "V9", "torchvision has no weights 'V9' of shufflenet_v2_x0_5: use IMAGENET1K_V1 or DEFAULT"),
        ("torchvision:nothing", "DEFAULT", "torchvision has no network 'nothing': see torchvision.models.list_models"),
        ("torchvision:fcn_resnet50", "DEFAULT", "torchvision has no classifier 'fcn_resnet50': see"),
        ("timm:small", "V9", "timm:small has no weights 'V9': use DEFAULT, or timm:NAME.TAG for others"),
    ):
        with pytest.raises(UsageError) as caught:
            pretrained.pretrained(architecture, weights)
        assert str(caught.value).startswith(message)


def test_timm_weights(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"^timm:small needs timm: pip install timm$"):
        pretrained.pretrained("timm:small")

    def create_model(name, pretrained=False):
        if name == "offline":
            raise FileNotFoundError("We cannot find it. Check your connection.")
        network = noted(seed=3)
        return network if pretrained else network.requires_grad_(False).zero_()

    timm = SimpleNamespace(
        is_model=lambda name: True,
        is_model_pretrained=lambda name: name != "untrained",
        create_model=create_model,
        get_pretrained_cfg=lambda name: SimpleNamespace(hf_hub_id=f"timm/{name}.a1", url=None),
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert same(pretrained.pretrained("timm:small").states[""], noted(seed=3).state_dict())
    with pytest.raises(UsageError, match=r"^timm has no weights of 'untrained': see timm\.list_pretrained\(\)$"):
        pretrained.pretrained("timm:untrained")
    with pytest.raises(ArtefactError) as caught:
        pretrained.pretrained("timm:offline")
    assert str(caught.value) == (
        "cannot fetch https://huggingface.co/timm/offline.a1 (We cannot find it): "
        "fetch it on a machine with a network, and copy that machine's cache (HF_HOME, TORCH_HOME) here"
    )
