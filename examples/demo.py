"""All steps in a few minutes: train, evaluate under shift, export, serve, predict. Offline; writes to one folder.

python examples/demo.py [FOLDER] [--quick]
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path

ENSEMBLER = Path(sysconfig.get_path("scripts")) / "ensembler"


def step(title: str, *arguments: str) -> None:
    """Run one command as a user would type it."""
    print(f"\n\033[1m{title}\033[0m\n$ ensembler {shlex.join(arguments)}", flush=True)
    subprocess.run([ENSEMBLER, *arguments], check=True)


def wait_until_ready(address: str, server: subprocess.Popen[bytes], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit("the service stopped before it was ready: see above")
        try:
            with urllib.request.urlopen(f"{address}/readyz", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    sys.exit(f"the service was not ready within {seconds:.0f} s")


def ask(address: str) -> None:
    """Predict images of increasing uncertainty, and print the results."""
    import bentoml
    import torch
    from rich.console import Console
    from rich.table import Table

    from ensembler import load_dataset
    from ensembler.eval import corrupt

    test = load_dataset("digits").test
    digit = test.images[:1]
    noise = torch.randint(0, 256, digit.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = {
        f"a {test.labels[0]}": digit,
        "+ impulse noise": corrupt(digit, "impulse_noise", 5),
        "+ low contrast": corrupt(digit, "contrast", 5),
        "only noise": noise,
    }
    with bentoml.SyncHTTPClient(address) as client:
        answer = client.predictive_uncertainty(images=torch.cat(list(images.values())).tolist())
    table = Table(title="POST /predictive-uncertainty", title_justify="left", title_style="bold")
    for name in ("image", "class", "probability", "entropy", "mutual inf.", "disagreement"):
        table.add_column(name)
    for name, row in zip(images, answer["predictions"], strict=True):
        numbers = (max(row["probabilities"]), row["predictive_entropy"], row["mutual_information"])
        table.add_row(name, row["label"], *(f"{n:.4f}" for n in numbers), f"{row['disagreement']:.2f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo-output"), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="run all steps in a minute, with meaningless scores")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if folder.exists():
        sys.exit(f"{folder} already exists: remove it, or name another folder")
    folder.mkdir(parents=True)
    os.chdir(folder)
    start = time.monotonic()
    short = ["--epochs", "1"] if options.quick else []
    long = ["--epochs", "2" if options.quick else "35"]
    shift = ["--shift", "cifar10c", *(["--examples", "10"] if options.quick else [])]

    step(
        "1. Train a simplex of four vertices, which are its members",
        *("train-simplex", "--vertices", "4", *short, "--out", "runs/simplex"),
    )
    step(
        "2. Train a deep ensemble of about the same cost, the baseline",
        *("train-deep-ensemble", "--members", "2", *short, "--out", "runs/deep"),
    )
    step(
        "3. Train a single network of the same cost, the control",
        *("train-deep-ensemble", "--members", "1", *long, "--out", "runs/single"),
    )
    step(
        "4. Compare all three, clean and under shift",
        *("compare", "runs/simplex", "runs/deep", "runs/single", "--baseline", "runs/single", *shift),
        *("--out", "report"),
    )
    step("5. Export the simplex's members to ONNX", "export", "runs/simplex", "--out", "bundle")

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    arguments = ["serve", "bundle", "--port", port]
    print(f"\n\033[1m6. Serve them, and predict over HTTP\033[0m\n$ ensembler {shlex.join(arguments)}", flush=True)
    with Path("service.log").open("wb") as log:
        server = subprocess.Popen([ENSEMBLER, *arguments], stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", server)
        ask(f"http://127.0.0.1:{port}")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    print(f"\nAll steps took {time.monotonic() - start:.0f} s. The results are in {folder}:")
    print("  runs/      the three runs, each a folder of safetensors and a manifest")
    print("  report/    report.html (open it), report.md, report.csv, report.json and the figures")
    print("  bundle/    the members as ONNX; to serve them again: ensembler serve bundle")


if __name__ == "__main__":
    main()
