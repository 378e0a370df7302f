"""What ensembles would cost at sizes that were never run here: estimates from measured constants.

Three estimates: a 100-member ResNet-50 ensemble on ImageNet, 10^9 requests per day, 10 TB of photographs. The constants
are in ``scaling.json`` beside this script, each measured on one CPU core by ``--measure``; the rates of GPUs are
published ones, with their source. Preempted machines and queues of requests are simulated; the rest is arithmetic.

    python benchmarks/scaling.py              # the tables of docs/scaling.md
    python benchmarks/scaling.py --measure    # measure the constants on this machine first: about two minutes
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONSTANTS = Path(__file__).with_name("scaling.json")

# NVIDIA's published rates of ResNet-50 v1.5 in PyTorch, images/s (DeepLearningExamples, ConvNets/resnet50v1.5, README):
# training on one A100 80GB with mixed precision; inference on one V100 16GB with mixed precision, by batch size.
A100_TRAINING = 2470.0
V100_INFERENCE = {1: 78.0, 8: 595.0, 32: 2146.0, 64: 2984.0, 128: 3249.0, 256: 3382.0}

IMAGENET, IMAGENET_VALIDATION, CLASSES = 1_281_167, 50_000, 1000
RESNET50 = 25_557_032  # parameters
CELLS = 95
DAY = 86_400.0
GB, TB = 1e9, 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure the constants and write scaling.json")
    if parser.parse_args().measure:
        CONSTANTS.write_text(json.dumps(measure(), indent=2) + "\n")
    print("\n".join(tables(json.loads(CONSTANTS.read_text())["constants"])))


def tables(constants: dict[str, float]) -> list[str]:
    """Return all estimates as Markdown tables."""
    found = {
        "Constants, of one core": {name: f"{value:.3g}" for name, value in constants.items()},
        "A 100-member ImageNet ensemble": imagenet(constants),
        "Preempted machines": preemption(),
        "10^9 requests per day": requests(constants),
        "10 TB of photographs": photographs(constants),
    }
    return [
        "\n".join([f"| {title} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in table.items()), ""])
        for title, table in found.items()
    ]


# --- the estimates --------------------------------------------------------------------------------------------------


def imagenet(c: dict[str, float], members: int = 100, epochs: int = 90) -> dict[str, str]:
    """Training, storage and scores of the ensemble; an added vertex takes a quarter of a solution's budget."""
    passes = epochs * IMAGENET
    solution = passes / A100_TRAINING / 3600
    ratio = c["forward_seconds_per_image"] / c["train_seconds_per_image"]  # of a forward pass to a training step
    forward = A100_TRAINING / ratio
    run = 4 * members * RESNET50
    looks = members * CELLS * IMAGENET_VALIDATION
    corrupted = CELLS * IMAGENET_VALIDATION * c["corrupt_seconds_per_image"] / 3600
    cell = IMAGENET_VALIDATION * (4 * CLASSES + 4 + 8 * members)
    every = 4 * members * IMAGENET_VALIDATION * CLASSES
    reduced = looks * CLASSES * c["reduce_seconds_per_value"] / 3600
    return {
        "deep ensemble: example passes": f"{members * passes:.3g}",
        "deep ensemble: A100 hours": f"{members * solution:,.0f}",
        "25 simplexes of 4 vertices (ESPRO): A100 hours": f"{25 * 1.75 * solution:,.0f}",
        "one simplex of 4 vertices, 100 members sampled: A100 hours": f"{1.75 * solution:,.0f}",
        "the same deep ensemble on one core of the measured machine: years": (
            f"{members * passes * c['train_seconds_per_image'] / DAY / 365:,.0f}"
        ),
        "the run on disk (deep ensemble)": f"{run / GB:.1f} GB",
        "the run on disk (one simplex; its members are sampled)": f"{4 * 4 * RESNET50 / GB:.2f} GB",
        "to write it to disk": f"{run / c['write_bytes_per_second']:,.0f} s",
        "to hash it, on every load": f"{run / c['hash_bytes_per_second']:,.0f} s",
        "memory of the process that gathers the members": f"{2 * run / GB:.0f} GB (twice the run, to stack them)",
        "memory of a training step of a simplex with 4 vertices, beyond activations": f"{4 * 7 * RESNET50 / GB:.2f} GB",
        "shift table: forward passes": f"{looks:.3g}",
        "shift table: A100 hours, forward passes": f"{looks / forward / 3600:,.0f}",
        "shift table: core hours, corruptions": f"{corrupted:,.0f} (once for all runs)",
        "shift table: core hours, reducing probabilities to scores": f"{reduced:,.1f}",
        "cached predictions of a cell": f"{cell / GB:.2f} GB; of all {CELLS}: {CELLS * cell / GB:.0f} GB",
        "every member's probabilities on the clean images": f"{every / GB:.0f} GB",
    }


def preemption(members: int = 100, machines: int = 25, hours: float = 13.0, repeats: int = 200) -> dict[str, str]:
    """Members of 13 hours on 25 machines that are preempted at random: a job starts again, or resumes."""
    found = {}
    for mean in (math.inf, 168, 24, 6):
        for kind, kept in (("lost jobs start again", math.inf), ("a checkpoint per minute", 1 / 60)):
            if math.isinf(mean) and kept != math.inf:
                continue
            runs = [simulate(members, machines, hours, mean, kept, random.Random(seed)) for seed in range(repeats)]
            wall, used = (statistics.mean(column) for column in zip(*runs, strict=True))
            name = "no preemption" if math.isinf(mean) else f"a machine lasts {mean} h on average, {kind}"
            found[name] = f"{wall:,.0f} h, {used / (members * hours):.2f} times the machine hours"
    return found


def simulate(
    count: int, machines: int, hours: float, mean: float, kept: float, draw: random.Random
) -> tuple[float, float]:
    """Return the hours until the last job is done, and the machine hours used; ``kept``: hours between checkpoints."""
    free, left, used, end = [0.0] * machines, [hours] * count, 0.0, 0.0
    waiting = list(range(count))
    while waiting:
        now = heapq.heappop(free)
        job = waiting.pop(0)
        lasts = math.inf if math.isinf(mean) else draw.expovariate(1 / mean)
        took = min(lasts, left[job])
        used += took
        if lasts < left[job]:
            left[job] -= 0.0 if math.isinf(kept) else took - took % kept
            waiting.append(job)
        end = max(end, now + took)
        heapq.heappush(free, now + took)
    return end, used


def requests(c: dict[str, float], day: float = 1e9, peak: float = 3.0) -> dict[str, str]:
    """One image per request, three times the mean rate at the peak; one replica's queue is simulated."""
    rate = peak * day / DAY
    found = {"average and peak rate": f"{day / DAY:,.0f} and {rate:,.0f} requests/s"}

    def small(batch: int) -> float:
        return c["pass_seconds"] + batch * (c["pass_seconds_per_image"] + c["request_seconds"])

    best = highest_rate(small)
    found["4 x resnet20, 32 x 32, one core per replica: highest rate at p99 < 100 ms, requests/s"] = f"{best:,.0f}"
    found["replicas at the peak"] = f"{rate / best:,.0f}"
    found["of these, cores for HTTP alone"] = f"{rate * c['request_seconds']:,.0f}"

    def together(batch: int) -> float:
        return c["pass_seconds"] + batch * (c["pass_seconds_per_image"] + c["request_seconds"] / 16)

    found["the same with 16 images per request"] = f"{rate / highest_rate(together):,.0f} replicas"
    for members in (4, 100):

        def large(batch: int, members: int = members) -> float:
            sizes = sorted(V100_INFERENCE)
            size = next((one for one in sizes if one >= batch), sizes[-1])  # padded, as on CUDA
            return members * size / V100_INFERENCE[size] + batch * c["request_seconds"]

        best = highest_rate(large, most=256, limit=0.25)
        name = f"{members} x ResNet-50, 224 x 224, one V100 per replica, p99 < 250 ms"
        if best:
            found[name] = f"{best:,.0f} requests/s, {rate / best:,.0f} replicas at the peak"
        else:
            found[name] = f"impossible: one image alone takes {1000 * large(1):,.0f} ms"
    found["bytes per day, raw 32 x 32 and 224 x 224"] = f"{day * 3072 / TB:.1f} and {day * 150_528 / TB:.0f} TB"
    return found


def highest_rate(service: Callable[[int], float], most: int = 64, limit: float = 0.1) -> float:
    """Return the highest rate of single images with 99 % of the answers within ``limit`` seconds; 0 for none."""
    low, high = 0.0, most / service(most)
    if p99(service, 0.01 / service(1), most) >= limit:
        return 0.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if p99(service, middle, most) < limit else (low, middle)
    return low


def p99(service: Callable[[int], float], rate: float, most: int) -> float:
    """Return the 99th percentile of the latency in seconds, without the first tenth of the requests."""
    found = latencies(service, rate, most)
    return statistics.quantiles(found[len(found) // 10 :], n=100)[-1]


def latencies(service: Callable[[int], float], rate: float, most: int, count: int = 20_000) -> list[float]:
    """Return the seconds from arrival to answer: Poisson arrivals; each pass takes all that wait, at most ``most``."""
    draw = random.Random(0)
    arrivals, now = [], 0.0
    for _ in range(count):
        now += draw.expovariate(rate)
        arrivals.append(now)
    waits, free, place = [], 0.0, 0
    while place < count:
        start = max(free, arrivals[place])
        end = place
        while end < count and end - place < most and arrivals[end] <= start:
            end += 1
        free = start + service(end - place)
        waits += [free - arrival for arrival in arrivals[place:end]]
        place = end
    return waits


def photographs(c: dict[str, float], size: float = 10 * TB, each: float = 110_000) -> dict[str, str]:
    """A folder of JPEG files of 500 x 375 pixels, read from files, cropped to 224."""
    count = size / each
    return {
        "files": f"{count:,.0f}",
        "to list and split the folder": f"{count * c['list_seconds_per_file'] / 3600:.1f} h on one core, a local disk",
        "memory of that list": f"{count * c['list_bytes_per_file'] / GB:.0f} GB, at the peak",
        "the order of an epoch": f"{8 * count / GB:.1f} GB",
        "an epoch on one A100, at its published rate": f"{count / A100_TRAINING / 3600:.1f} h",
        "cores that decode and crop for one A100": f"{A100_TRAINING * c['decode_seconds_per_image']:.0f}",
        "to read it once at 1 GB/s": f"{size / 1e9 / 3600:.1f} h",
        "held in memory at 224 x 224": f"{count * 150_528 / TB:.1f} TB",
    }


# --- the constants --------------------------------------------------------------------------------------------------


def measure() -> dict[str, Any]:
    """Measure each on one core: the least of three, which is what the work itself takes."""
    import numpy as np
    import torch

    from ensembler.device import keep_freed
    from ensembler.eval.shift.corruptions import AVAILABLE, corrupt
    from ensembler.networks import architectures
    from ensembler.run import versions
    from ensembler.storage.artefact import sha256
    from ensembler.uncertainty import entropy, expected_entropy

    torch.set_num_threads(1)
    keep_freed(torch.device("cpu"))
    c: dict[str, float] = {}
    network = architectures.build("torchvision:resnet50", CLASSES, 0).to(memory_format=torch.channels_last)
    images = torch.rand(8, 3, 224, 224).to(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (8,))

    def step() -> None:
        torch.nn.functional.cross_entropy(network(images), labels).backward()

    def look() -> None:
        with torch.inference_mode():
            network(images)

    c["train_seconds_per_image"] = least(step) / 8
    network.eval()
    c["forward_seconds_per_image"] = least(look) / 8
    found = np.random.default_rng(0).dirichlet(np.ones(CLASSES), (10, 256)).astype(np.float32)
    c["reduce_seconds_per_value"] = least(lambda: (entropy(found.mean(0)), expected_entropy(found))) / found.size
    photos = torch.randint(256, (4, 224, 224, 3), dtype=torch.uint8)
    taken = [least(lambda name=name: corrupt(photos, name, 3), 1) for name in AVAILABLE]  # type: ignore[misc]
    c["corrupt_seconds_per_image"] = statistics.mean(taken) / len(photos)
    with tempfile.TemporaryDirectory() as folder:
        file, content = Path(folder) / "file", os.urandom(2**28)

        def write() -> None:
            with file.open("wb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())

        c["write_bytes_per_second"] = len(content) / least(write)
        c["hash_bytes_per_second"] = len(content) / least(lambda: sha256(file))
        c |= _folder(Path(folder) / "photos")
        c |= _passes(Path(folder))
    context = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, one thread",
        "load average": round(os.getloadavg()[0], 2),
        "versions": versions(),
    }
    return {"constants": c, "context": context}


def least(work: Callable[[], Any], repeats: int = 3) -> float:
    """Return the least seconds of several calls, after one that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def _folder(folder: Path, files: int = 20_000) -> dict[str, float]:
    """A folder of hard links to one photograph of ImageNet's usual size, a part of one that frost is made of."""
    import tracemalloc
    from importlib import resources

    import torch
    from PIL import Image

    from ensembler.data import datasets
    from ensembler.data.images import read_images

    frost = resources.files("torch_uncertainty_assets") / "frost" / "frost4.jpg"
    with resources.as_file(frost) as path, Image.open(path) as opened:
        photo = opened.convert("RGB").resize((500, 375), box=(0, 0, *(side // 2 for side in opened.size)))
    one = folder / "class0" / "0.jpg"
    for label in range(10):
        (folder / f"class{label}").mkdir(parents=True)
    photo.save(one, quality=90)
    for number in range(1, files):
        (folder / f"class{number % 10}" / f"{number}.jpg").hardlink_to(one)

    def load() -> None:
        datasets.load(f"folder:{folder}", in_memory=False, image_size=224, corrupt="refuse")

    seconds = least(load, 1)
    tracemalloc.start()
    load()
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    batch, choices = [one] * 32, torch.arange(32)
    decode = least(lambda: read_images(batch, (224, 224), "resized-crop-flip", choices, threads=1)) / len(batch)
    return {
        "list_seconds_per_file": seconds / files,
        "list_bytes_per_file": held / files,
        "decode_seconds_per_image": decode,
    }


def _passes(folder: Path) -> dict[str, float]:
    """A pass of 4 x resnet20 through ONNX Runtime by batch size, and what a request costs the service beside it."""
    from serving import bare, client, make_bundle, running

    bundle = make_bundle(folder, "resnet20", 4)
    on = sorted(os.sched_getaffinity(0))
    took = {b: statistics.median(bare(bundle, on[:1], batch=b, seconds=3)["ms"]) / 1000 for b in (1, 64)}
    each = (took[64] - took[1]) / 63
    tiny = make_bundle(folder / "tiny", "cnn", 1)
    alone = statistics.median(bare(tiny, on[:1], batch=8, seconds=3)["ms"]) / 8000  # the passes under this load
    with running("ensembler", tiny, on[:1]) as port:
        told = client(on[1:] or on, port=port, shape=[1, 32, 32, 3], connections=8, seconds=6)
    return {
        "pass_seconds": took[1] - each,
        "pass_seconds_per_image": each,
        "request_seconds": max(0.0, 1 / told["rate"] - alone),
    }


if __name__ == "__main__":
    main()
