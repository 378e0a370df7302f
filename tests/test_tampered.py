"""Bundles from elsewhere: whatever was done to one, a command ends in one sentence, and no number comes of it."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import socket
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import onnx
import pytest
from fsspec import AbstractFileSystem
from onnx import TensorProto, helper
from PIL import Image
from typer.testing import CliRunner

from ensembler.cli import app
from ensembler.serve.export.graphs import without_weights
from ensembler.serve.runtime.external_data import external_files
from ensembler.serve.runtime.manifest import GIVEN, read_bundle
from ensembler.serve.runtime.vertices import Vertices
from ensembler.storage import artefact
from ensembler.storage.artefact import MANIFEST, SEAL
from tests._runs import make_bundle, tiny_weights
from tests._service import make_calibrated

MEMBERS, VERTICES, CALIBRATED = "members", "vertices", "calibrated"
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    members = make_bundle(folder / MEMBERS, members=4)
    return {
        MEMBERS: members,
        VERTICES: of_vertices(folder / VERTICES, members),
        CALIBRATED: make_calibrated(folder / CALIBRATED),
    }


def of_vertices(path: Path, members: Path) -> Path:
    """The same four members in the other layout: each is a vertex."""
    manifest = read_bundle(members).model_copy(update={"layout": "vertices", "graphs": ["graph.onnx"]})
    with artefact.write(path, manifest.model_dump()) as folder:
        shutil.copy(members / "probe.npz", folder)
        model = onnx.load(members / "member-000.onnx")
        onnx.save(without_weights(model, ["weights"]), folder / "graph.onnx")
        Vertices(np.eye(4, dtype=np.float32), {"weights": tiny_weights(4)}, {}, {}).save(folder / "weights.npz")
    return path


def reseal(folder: Path, manifest: bytes | None = None) -> None:
    """Make every hash true again, as whoever can write a bundle can."""
    if manifest is None:
        content = json.loads((folder / MANIFEST).read_text())
        content["files"] = {
            name: artefact.sha256(folder / name) if (folder / name).is_file() else digest
            for name, digest in content["files"].items()
        }
        manifest = json.dumps(content).encode()
    (folder / MANIFEST).write_bytes(manifest)
    (folder / SEAL).write_text(f"{artefact.sha256(folder / MANIFEST)}  {MANIFEST}\n")


def setting(**fields: Any) -> Change:
    """Fields of the manifest, with true hashes; dots go into records."""

    def change(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        for path, value in fields.items():
            *outer, last = path.split("__")
            place = content
            for name in outer:
                place = place[name]
            place[last] = value(place[last]) if callable(value) else value
        reseal(folder, json.dumps(content).encode())

    return change


def text(old: str, new: str) -> Change:
    """Other text in the manifest, with a true seal."""

    def change(folder: Path) -> None:
        content = (folder / MANIFEST).read_text()
        assert old in content
        reseal(folder, content.replace(old, new, 1).encode())

    return change


def writing(name: str, content: bytes | Callable[[bytes], bytes], *, sealed: bool = True) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        before = path.read_bytes() if path.exists() else b""
        path.write_bytes(content(before) if callable(content) else content)
        if sealed:
            reseal(folder)

    return change


def instead(name: str, put: Callable[[Path], object]) -> Change:
    """Something else than a file of that name; the manifest is untouched."""

    def change(folder: Path) -> None:
        (folder / name).rename(folder.with_name(f"{folder.name}-{name}"))
        put(folder / name)

    return change


def link_elsewhere(path: Path) -> None:
    """A link to the file as it was: its bytes are right."""
    path.symlink_to(f"../{path.parent.name}-{path.name}")


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            bound.bind(path.name)
        finally:
            os.chdir(here)


def graph(change: Callable[[onnx.ModelProto], object], name: str = "member-000.onnx") -> Change:
    def edit(content: bytes) -> bytes:
        model = onnx.ModelProto.FromString(content)
        change(model)
        return model.SerializeToString()

    return writing(name, edit)


def external(location: str, *, put: bool = True, depth: int = 0) -> Change:
    """The first weight comes from another file: of the graph itself, or of a constant in nested graphs."""

    def change(folder: Path) -> None:
        path = folder / "member-000.onnx"
        model = onnx.ModelProto.FromString(path.read_bytes())
        tensor = next(one for one in model.graph.initializer if len(one.raw_data) > 8)
        content = tensor.raw_data
        if depth:
            tensor = model.graph.node.add(op_type="Constant", output=["unused"]).attribute.add(name="value").t
            tensor.data_type, content = TensorProto.FLOAT, b"1234"
            tensor.dims.append(1)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", str(len(content)))):
            tensor.external_data.add(key=key, value=value)
        path.write_bytes(model.SerializeToString())
        if put:
            (folder / location).write_bytes(content)
        reseal(folder)

    return change


def arrays(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    def edit(content: bytes) -> bytes:
        with np.load(io.BytesIO(content)) as file:
            found = {key: file[key] for key in file.files}
        change(found)
        written = io.BytesIO()
        np.savez(written, **found)
        return written.getvalue()

    return writing(name, edit)


def archive(*entries: tuple[str, bytes], packed: bool = False) -> bytes:
    written = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED if packed else 0) as file:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, content in entries:
            file.writestr(name, content)
    return written.getvalue()


def weights(shape: str, kind: str = "<f4") -> Change:
    return writing("weights.npz", archive(("coefficients.npy", header(shape, kind))))


def header(shape: str, kind: str = "<f4") -> bytes:
    """A ``.npy`` file that claims a shape and holds four bytes."""
    words = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(words).to_bytes(2, "little") + words + b"\0\0\0\0"


def calibrated(change: Callable[[dict[str, Any]], object]) -> Change:
    def edit(content: bytes) -> bytes:
        import hashlib

        found = json.loads(content)
        del found["sha256"]
        change(found)
        found["sha256"] = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
        return json.dumps(found).encode()

    return writing("calibration.json", edit)


NESTED = b"[" * 100_000 + b"]" * 100_000

TAMPERED: dict[str, tuple[str, Change]] = {
    # files, not sealed again
    "no manifest": (MEMBERS, lambda folder: (folder / MANIFEST).unlink()),
    "no seal": (MEMBERS, lambda folder: (folder / SEAL).unlink()),
    "another seal": (MEMBERS, writing(SEAL, b"0" * 64 + b"  manifest.json\n", sealed=False)),
    "seal of no text": (MEMBERS, writing(SEAL, b"\xff\xfe", sealed=False)),
    "manifest edited": (MEMBERS, writing(MANIFEST, lambda content: content + b" ", sealed=False)),
    "manifest cut short": (MEMBERS, writing(MANIFEST, lambda content: content[:-40], sealed=False)),
    "graph missing": (MEMBERS, lambda folder: (folder / "member-001.onnx").unlink()),
    "graph edited": (MEMBERS, writing("member-001.onnx", lambda content: content[:-1] + b"\0", sealed=False)),
    "graph cut short": (MEMBERS, writing("member-001.onnx", lambda content: content[:100], sealed=False)),
    "weights cut short": (VERTICES, writing("weights.npz", lambda content: content[:100], sealed=False)),
    "probe empty": (VERTICES, writing("probe.npz", b"", sealed=False)),
    # what is no file
    "manifest is a link": (
        MEMBERS,
        instead(MANIFEST, link_elsewhere),
    ),
    "seal is a link": (MEMBERS, instead(SEAL, link_elsewhere)),
    "graph is a link": (
        MEMBERS,
        instead("member-000.onnx", link_elsewhere),
    ),
    "graph is a link to nowhere": (MEMBERS, instead("member-000.onnx", lambda path: path.symlink_to("nowhere"))),
    "graph is a link to itself": (MEMBERS, instead("member-000.onnx", lambda path: path.symlink_to(path.name))),
    "graph is a device": (MEMBERS, instead("member-000.onnx", lambda path: path.symlink_to("/dev/zero"))),
    "graph is a pipe": (MEMBERS, instead("member-000.onnx", os.mkfifo)),
    "graph is a socket": (MEMBERS, instead("member-000.onnx", socket_at)),
    "graph is a folder": (MEMBERS, instead("member-000.onnx", Path.mkdir)),
    "manifest is a pipe": (MEMBERS, instead(MANIFEST, os.mkfifo)),
    "manifest is a folder": (MEMBERS, instead(MANIFEST, Path.mkdir)),
    "seal is a pipe": (MEMBERS, instead(SEAL, os.mkfifo)),
    "manifest of a gigabyte": (MEMBERS, lambda folder: os.truncate(folder / MANIFEST, 2**30)),
    # the manifest as JSON, sealed again
    "manifest empty": (MEMBERS, lambda folder: reseal(folder, b"")),
    "manifest is a list": (MEMBERS, lambda folder: reseal(folder, b"[]")),
    "manifest is a number": (MEMBERS, lambda folder: reseal(folder, b"7")),
    "manifest is no UTF-8": (MEMBERS, lambda folder: reseal(folder, b'{"kind": "\xff"}')),
    "manifest is nested": (MEMBERS, lambda folder: reseal(folder, NESTED)),
    "manifest with a key twice": (MEMBERS, text('"kind": "bundle"', '"kind": "bundle", "kind": "bundle"')),
    "a file twice": (MEMBERS, text('"files": {', '"files": {"probe.npz": "0",')),
    "NaN": (MEMBERS, text('"tolerance": 0.0001', '"tolerance": NaN')),
    "infinity": (MEMBERS, text('"tolerance": 0.0001', '"tolerance": Infinity')),
    "1e999": (MEMBERS, text('"tolerance": 0.0001', '"tolerance": 1e999')),
    "a number of 10,000 digits": (MEMBERS, text('"opset": ', f'"opset": {"9" * 10_000}')),
    "a lone surrogate": (MEMBERS, text('"files": {', '"files": {"\\ud800": "0",')),
    "kind is a list": (MEMBERS, setting(kind=["bundle"])),
    "kind of a run": (MEMBERS, setting(kind="run")),
    "format unknown": (MEMBERS, setting(format=99)),
    "format is an object": (MEMBERS, setting(format={})),
    "format missing": (MEMBERS, text('"format": 1,', "")),
    "files is a list": (MEMBERS, setting(files=[["probe.npz", "0"]])),
    "files is null": (MEMBERS, setting(files=None)),
    "a hash is a number": (MEMBERS, setting(files=lambda files: {**files, "probe.npz": 3})),
    "a file outside": (MEMBERS, setting(files=lambda files: {**files, "../outside": "0"})),
    "an absolute file": (MEMBERS, setting(files=lambda files: {**files, "/etc/passwd": "0"})),
    "a file of Windows": (MEMBERS, setting(files=lambda files: {**files, "C:\\x": "0"})),
    "a field unknown": (MEMBERS, setting(surprise=1)),
    "a field missing": (MEMBERS, text('"method"', '"methods"')),
    "no member": (MEMBERS, setting(members=0, graphs=[], order=[])),
    "members is a text": (MEMBERS, setting(members="four")),
    "a member more": (MEMBERS, setting(members=5)),
    "10^15 members": (VERTICES, setting(members=10**15)),
    "a member more, of vertices": (VERTICES, setting(members=5, order=[0, 1, 2, 3, 4])),
    "a member twice": (MEMBERS, setting(order=[0, 0, 1, 2])),
    "a graph twice": (MEMBERS, setting(graphs=lambda graphs: [graphs[0], *graphs[:-1]])),
    "a graph that is the probe": (MEMBERS, setting(graphs=lambda graphs: ["probe.npz", *graphs[1:]])),
    "a graph outside": (MEMBERS, setting(graphs=lambda graphs: ["../member-000.onnx", *graphs[1:]])),
    "members in another order": (MEMBERS, setting(graphs=lambda graphs: graphs[::-1])),
    "another layout": (MEMBERS, setting(layout="vertices")),
    "huge images": (MEMBERS, setting(image_shape=[10**6, 10**6, 3])),
    "negative images": (MEMBERS, setting(image_shape=[-4, -6, 3])),
    "flat images": (MEMBERS, setting(image_shape=[4, 6])),
    "four channels": (MEMBERS, setting(image_shape=[4, 6, 4])),
    "other images": (MEMBERS, setting(image_shape=[6, 4, 3])),
    "a class less": (MEMBERS, setting(classes=lambda classes: classes[1:])),
    "no class": (MEMBERS, setting(classes=[])),
    "another input": (MEMBERS, setting(input="float")),
    "another precision": (MEMBERS, setting(precision="int8")),
    "a precision unknown": (MEMBERS, setting(precision="float8")),
    "tolerance negative": (MEMBERS, setting(tolerance=-1.0)),
    "calibration missing": (MEMBERS, setting(calibration="calibration.json")),
    "calibration outside": (MEMBERS, setting(calibration="../calibration.json")),
    "calibration is the probe": (MEMBERS, setting(calibration="probe.npz")),
    "quantiles fall": (CALIBRATED, setting(validation__predictive_entropy=[1.0, 0.5, 0.4, 0.3])),
    "quantiles of other lengths": (CALIBRATED, setting(validation__levels=[0.0, 1.0])),
    # graphs
    "graph of other bytes": (MEMBERS, writing("member-000.onnx", b"location" * 100)),
    "graph empty": (MEMBERS, writing("member-000.onnx", b"")),
    "graph cut, sealed": (MEMBERS, writing("member-000.onnx", lambda content: content[: len(content) // 2])),
    "opset unknown": (MEMBERS, graph(lambda model: setattr(model.opset_import[0], "version", 9999))),
    "an operator unknown": (MEMBERS, graph(lambda model: setattr(model.graph.node[0], "op_type", "Evil"))),
    "another name of the input": (MEMBERS, graph(lambda model: setattr(model.graph.input[0], "name", "pixels"))),
    "an input more": (
        MEMBERS,
        graph(lambda m: m.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))),
    ),
    "an output more": (
        MEMBERS,
        graph(lambda m: m.graph.output.append(helper.make_tensor_value_info("images", TensorProto.UINT8, None))),
    ),
    "a weight edited": (
        MEMBERS,
        graph(lambda m: setattr(m.graph.initializer[1], "raw_data", bytes(len(m.graph.initializer[1].raw_data)))),
    ),
    "the weights of another member": (
        MEMBERS,
        lambda folder: (shutil.copy(folder / "member-002.onnx", folder / "member-000.onnx"), reseal(folder))[1],
    ),
    "tensors of a file not named": (MEMBERS, external("secret.bin")),
    "tensors of a file not named, in a node": (MEMBERS, external("secret.bin", depth=1)),
    "tensors of a file that is missing": (MEMBERS, external("secret.bin", put=False)),
    "tensors of a file outside": (MEMBERS, external("../secret.bin", put=False)),
    "tensors of /etc/passwd": (MEMBERS, external("/etc/passwd", put=False)),
    "tensors through a name that goes up": (MEMBERS, external("x/../probe.npz", put=False)),
    "a file where weights are given from memory": (VERTICES, writing(GIVEN, b"0" * 4096)),
    # arrays
    "weights packed": (VERTICES, writing("weights.npz", archive(("coefficients.npy", bytes(10**7)), packed=True))),
    "weights twice": (
        VERTICES,
        writing("weights.npz", archive(*2 * [("coefficients.npy", header("(1,1)"))])),
    ),
    "weights of a name outside": (
        VERTICES,
        writing("weights.npz", archive(("../../x.npy", header("()")), ("coefficients.npy", header("(1,1)")))),
    ),
    "coefficients of a terabyte": (
        VERTICES,
        weights(f"({10**12},)"),
    ),
    "coefficients of objects": (VERTICES, weights("(1,)", "|O")),
    "coefficients negative": (VERTICES, weights("(-1,-1)")),
    "a header of brackets": (VERTICES, weights("(" * 3000)),
    "no coefficients": (VERTICES, arrays("weights.npz", lambda found: found.pop("coefficients"))),
    "coefficients of one axis": (
        VERTICES,
        arrays("weights.npz", lambda found: found.update(coefficients=found["coefficients"][0])),
    ),
    "fewer coefficients": (
        VERTICES,
        arrays("weights.npz", lambda found: found.update(coefficients=found["coefficients"][:2])),
    ),
    "coefficients NaN": (
        VERTICES,
        arrays("weights.npz", lambda found: found.update(coefficients=found["coefficients"] * np.nan)),
    ),
    "a vertex less": (
        VERTICES,
        arrays(
            "weights.npz", lambda found: found.update({n: a[:2] for n, a in found.items() if n.startswith("vertex/")})
        ),
    ),
    "weights transposed": (
        VERTICES,
        arrays(
            "weights.npz",
            lambda found: found.update({n: a.swapaxes(-1, -2) for n, a in found.items() if n == "vertex/weights"}),
        ),
    ),
    "a weight missing": (
        VERTICES,
        arrays("weights.npz", lambda found: found.pop(next(n for n in found if n.startswith("vertex/")))),
    ),
    "a weight of nobody": (VERTICES, arrays("weights.npz", lambda found: found.update({"other/x": np.zeros(1)}))),
    "answers of other members": (
        MEMBERS,
        arrays("probe.npz", lambda found: found.update(probabilities=found["probabilities"][::-1])),
    ),
    "answers of fewer": (
        MEMBERS,
        arrays("probe.npz", lambda found: found.update(probabilities=found["probabilities"][:1])),
    ),
    "answers NaN": (
        MEMBERS,
        arrays("probe.npz", lambda found: found.update(probabilities=found["probabilities"] * np.nan)),
    ),
    "images of floats": (MEMBERS, arrays("probe.npz", lambda found: found.update(images=found["images"] / 255))),
    "no images": (MEMBERS, arrays("probe.npz", lambda found: found.pop("images"))),
    "probe of no archive": (MEMBERS, writing("probe.npz", b"PK\x03\x04 nothing")),
    # calibration
    "calibration edited": (
        CALIBRATED,
        writing("calibration.json", lambda text: text.replace(b"lac", b"aps", 1)),
    ),
    "calibration nested": (CALIBRATED, writing("calibration.json", NESTED)),
    "calibration of another run": (CALIBRATED, calibrated(lambda found: found.update(run_sha256="1" * 64))),
    "calibration of other classes": (CALIBRATED, calibrated(lambda found: found.update(classes=7))),
    "calibration of a temperature of 0": (CALIBRATED, calibrated(lambda found: found["map"].update(temperature=0))),
    "calibration by an unknown map": (CALIBRATED, calibrated(lambda found: found.update(map={"method": "magic"}))),
    "calibration by a map of other classes": (
        CALIBRATED,
        calibrated(lambda found: found.update(map={"method": "beta", "a": [1.0], "b": [1.0, 2.0], "c": [1.0]})),
    ),
    "calibration by a map of no point": (
        CALIBRATED,
        calibrated(lambda found: found.update(map={"method": "isotonic", "x": [[]] * 5, "y": [[]] * 5})),
    ),
    "calibration of no alpha": (CALIBRATED, calibrated(lambda found: found["conformal"].update(alpha=2.0))),
}


def copied(bundles: dict[str, Path], which: str, path: Path) -> Path:
    return shutil.copytree(bundles[which], path)


def assert_one_sentence(result: Any) -> None:
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1, result.stderr
    assert 20 < len(result.stderr) < 700 and ": " in result.stderr.removeprefix("error: ")
    assert result.stdout == ""


@pytest.mark.parametrize("name", [MEMBERS, VERTICES, CALIBRATED])
def test_what_was_not_tampered_with_is_verified(name: str, bundles: dict[str, Path]) -> None:
    assert CliRunner().invoke(app, ["verify", str(bundles[name])]).exit_code == 0


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_bundle_ends_in_one_sentence(name: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    which, change = TAMPERED[name]
    folder = copied(bundles, which, tmp_path / "bundle")
    change(folder)
    assert_one_sentence(CliRunner().invoke(app, ["verify", str(folder)]))


@pytest.mark.parametrize(
    "name", ["graph is a pipe", "tensors of a file not named", "other images", "weights transposed"]
)
def test_no_other_command_uses_one(name: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    which, change = TAMPERED[name]
    folder = copied(bundles, which, tmp_path / "bundle")
    change(folder)
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    assert_one_sentence(CliRunner().invoke(app, ["predict", str(folder), str(tmp_path / "image.png")]))


@pytest.mark.parametrize("name", ["graph cut, sealed", "a class less", "opset unknown"])
def test_no_model_of_triton_is_made_of_one(name: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    which, change = TAMPERED[name]
    folder = copied(bundles, which, tmp_path / "bundle")
    change(folder)
    assert_one_sentence(CliRunner().invoke(app, ["triton", str(folder), "--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()


def test_files_of_tensors_are_found_wherever_a_graph_names_them(tmp_path: Path) -> None:
    def tensor(location: str) -> onnx.TensorProto:
        found = onnx.TensorProto(data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
        found.external_data.add(key="location", value=location)
        return found

    model = onnx.ModelProto()
    model.graph.initializer.append(tensor("initializer"))
    model.graph.sparse_initializer.add().values.CopyFrom(tensor("sparse"))
    node = model.graph.node.add()
    node.attribute.add().t.CopyFrom(tensor("attribute"))
    node.attribute.add().tensors.append(tensor("attributes"))
    node.attribute.add().g.node.add().attribute.add().graphs.add().initializer.append(tensor("nested graph"))
    model.functions.add().node.add().attribute.add().sparse_tensor.indices.CopyFrom(tensor("function"))
    model.training_info.add().algorithm.initializer.append(tensor("training"))
    (tmp_path / "graph.onnx").write_bytes(model.SerializeToString())
    assert external_files(tmp_path / "graph.onnx") == {
        *("initializer", "sparse", "attribute", "attributes", "nested graph", "function", "training")
    }
    real = onnx.helper.make_model(onnx.helper.make_graph([], "location", [], []))
    (tmp_path / "graph.onnx").write_bytes(real.SerializeToString())
    assert external_files(tmp_path / "graph.onnx") == set()


# --- hostile URLs ----------------------------------------------------------------------------------------------------


class Endless(AbstractFileSystem):
    """Lies about sizes, and never stops sending the files whose names are in ``endless``."""

    protocol = "endless"
    content: ClassVar[dict[str, bytes]] = {}
    endless: ClassVar[set[str]] = set()
    listed: ClassVar[int | None] = None
    cachable = False

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        name = path.rpartition("/")[2]
        if name in Endless.endless:
            return _Zeros()
        if name not in Endless.content:
            raise FileNotFoundError(path)
        return io.BytesIO(Endless.content[name])

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {"name": path, "size": Endless.listed, "type": "file"}

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        return [self.info(f"{path}/{name}") for name in Endless.content]

    def find(self, path: str, **options: Any) -> dict[str, Any]:
        if Endless.listed is None:
            raise NotImplementedError
        return {f"{path}/{name}": self.info(f"{path}/{name}") for name in Endless.content}


class _Zeros(io.RawIOBase):
    sent = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        assert size > 0, "everything is read at once"
        self.sent += size
        assert self.sent < 2**30, "it is read without end"
        return bytes(size)


OUTSIDE = [
    "../x",
    "/etc/x",
    "a/../../x",
    "..",
    ".",
    "a/..",
    "C:x",
    "a\\..\\x",
    "",
    "a//b",
    ".bashrc",
    "x\n",
    "~/x",
    "a/",
]
OUTSIDE += ["manifest.json", "manifest.sha256", "README.md", "\u202ex", "x\x1b[2J", "nul\x00x", "x" * 300]

HOSTILE: dict[str, Change] = {
    **{
        f"a file called {name[:20]!r}": setting(files=lambda files, name=name: {**files, name: "0"}) for name in OUTSIDE
    },
    **{
        name: TAMPERED[name][1]
        for name in (
            "no seal",
            "seal of no text",
            "manifest edited",
            "graph missing",
            "graph edited",
            "manifest is a link",
            "seal is a pipe",
            "graph is a link",
            "graph is a device",
            "graph is a pipe",
            "graph is a folder",
            "manifest of a gigabyte",
            "manifest is a list",
            "manifest is nested",
            "manifest with a key twice",
            "kind is a list",
            "files is a list",
            "a lone surrogate",
        )
    },
    "a file that is a folder, too": setting(files=lambda files: {**files, "probe.npz/x": "0"}),
}


def held(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_url_ends_in_one_sentence_and_leaves_nothing(
    name: str, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    there = copied(bundles, MEMBERS, tmp_path / "there")
    HOSTILE[name](there)
    before = held(tmp_path)
    assert_one_sentence(CliRunner().invoke(app, ["pull", f"file://{there}", "--out", "here", "--quiet"]))
    assert held(tmp_path) == before


@pytest.mark.parametrize("endless", [MANIFEST, SEAL, "calibration.json", "probe.npz", "listed"])
def test_a_url_that_sends_without_end_is_left(
    endless: str, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("endless", Endless, clobber=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Endless, "content", {path.name: path.read_bytes() for path in bundles[MEMBERS].iterdir()})
    monkeypatch.setattr(Endless, "endless", {endless})
    monkeypatch.setattr(Endless, "listed", 10**15 if endless == "listed" else None)
    result = CliRunner().invoke(app, ["pull", "endless://host/bundle", "--out", "here", "--quiet", "--largest", "0.1"])
    assert_one_sentence(result)
    words = "holds more than 0.1 GB" if endless in ("probe.npz", "listed") else "is larger than 64 MiB"
    assert words in result.stderr
    assert held(tmp_path) == set()


# --- what is printed -------------------------------------------------------------------------------------------------

EVIL = "\x1b[2J\x07[bold]:cat:\n\u202efake: all is well\x9b\u2028"


def test_what_a_bundle_says_is_printed_as_it_is(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # short paths, which take one line
    folder = copied(bundles, MEMBERS, tmp_path / "bundle")
    labels = [f"{EVIL}{number}" for number in range(5)]
    setting(classes=labels, dataset=EVIL, architecture=EVIL, method=EVIL, compared_on=[EVIL])(folder)
    image = tmp_path / "[red]a\x1b[31m:dog:.png"
    Image.new("RGB", (6, 4), "navy").save(image)
    (tmp_path / "not\x1b[2Jan\nimage.png").write_bytes(b"nothing")
    for arguments in (
        ["verify", str(folder)],
        ["predict", "bundle", image.name],
        ["predict", "bundle", "."],
    ):
        result = CliRunner().invoke(app, arguments, terminal_width=300)
        for stream in (result.stdout, result.stderr):
            assert all(character.isprintable() for character in stream.replace("\n", "")), repr(stream)
            assert "\nfake" not in stream
        if arguments[0] == "predict":
            shown = result.stdout.replace("\n", "").replace(" ", "")
            assert "\\x1b[2J\\x07[bold]:cat:\\n\\u202efake" in shown
            assert "[red]" in shown and ":dog:" in shown


def test_an_error_is_one_line_whatever_it_names(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(tmp_path / EVIL.replace("/", ""))])
    assert_one_sentence(result)
    assert all(character.isprintable() for character in result.stderr.rstrip("\n"))


def test_logs_have_a_line_for_each_message(caplog: pytest.LogCaptureFixture) -> None:
    import ensembler.serve  # noqa: F401  gives the loggers their filter

    for name in ("ensembler.serve", "ensembler.access"):
        logging.getLogger(name).warning("path %s, label %s", "/a\nb\x1b[2J", EVIL)
    for record in caplog.records:
        assert record.getMessage().isprintable() and "/a\\nb\\x1b[2J" in record.getMessage()
    assert len(caplog.records) == 2
