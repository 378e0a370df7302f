"""Runs on S3, as moto's server imitates it: skipped where moto[server] and s3fs are not installed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ensembler.errors import ArtefactError, CorruptError, UsageError
from ensembler.storage import artefact, urls
from ensembler.storage.artefact import MANIFEST, SEAL

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")
pytestmark = pytest.mark.filterwarnings("default")  # theirs are no errors of ours


@pytest.fixture
def s3(tmp_path, monkeypatch):
    import boto3
    from s3fs import S3FileSystem

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{address}:{port}",
        "AWS_ACCESS_KEY_ID": "one",
        "AWS_SECRET_ACCESS_KEY": "two",
        "AWS_DEFAULT_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    server.stop()
    S3FileSystem.clear_instance_cache()


def made(path: Path, seed: int = 0) -> Path:
    with artefact.write(path, {"kind": "run", "format": 1}) as folder:
        (folder / "vertices.safetensors").write_bytes(random.Random(seed).randbytes(7_000_000))  # more than one part
        (folder / "history.jsonl").write_bytes(b"")
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_there_and_back(s3, tmp_path):
    source, url = made(tmp_path / "source"), "s3://bucket/runs/mine"
    sent = urls.push(source, url)
    assert (sent[0], sent[-1]) == (MANIFEST, SEAL)
    keys = {entry["Key"] for entry in s3.list_objects_v2(Bucket="bucket")["Contents"]}
    assert keys == {f"runs/mine/{name}" for name in sent}
    assert content(urls.local(url)) == content(source)
    assert content(urls.pull(url, tmp_path / "back")) == content(source)
    assert urls.push(source, url) == []
    with pytest.raises(UsageError, match="holds another run or bundle"):
        urls.push(made(tmp_path / "other", 1), url)


def test_what_is_missing_is_said_and_mended(s3, tmp_path):
    source, url = made(tmp_path / "source"), "s3://bucket/runs/mine"
    urls.push(source, url)
    for name in ("vertices.safetensors", MANIFEST, SEAL):
        s3.delete_object(Bucket="bucket", Key=f"runs/mine/{name}")
        with pytest.raises(CorruptError, match="push"):
            urls.pull(url, tmp_path / "back")
        assert name in urls.push(source, url)
    s3.put_object(Bucket="bucket", Key="runs/mine/vertices.safetensors", Body=b"short")
    with pytest.raises(CorruptError, match=r"vertices.safetensors is not what was pushed"):
        urls.pull(url, tmp_path / "back")
    assert urls.push(source, url) == ["vertices.safetensors"]
    assert content(urls.pull(url, tmp_path / "back")) == content(source)


def test_a_bucket_that_is_not_there_is_not_made(s3, tmp_path):
    source = made(tmp_path / "source")
    for use in (lambda url: urls.push(source, url), urls.local, urls.check_free):  # the last before hours of training
        with pytest.raises(ArtefactError, match="its bucket or folder does not exist: check the URL, or create it"):
            use("s3://nowhere/mine")
    with pytest.raises(ArtefactError, match="no run or bundle at"):
        urls.local("s3://bucket/nothing")
    assert [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]] == ["bucket"]
