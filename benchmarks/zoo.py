"""Whether networks off the shelf go through: one small one of each family of torchvision and timm.

Each is trained as a simplex of two vertices for one epoch on 24 images (224 x 224 pixels; 299 x 299 for Inception),
then exported, in processes of its own, so that one that crashes or hangs does not end the sweep. Prints a table.

    python benchmarks/zoo.py                                # all of them: hours on two CPUs
    python benchmarks/zoo.py torchvision:resnet18 timm:levit_128s
    python benchmarks/zoo.py --quick                        # three of the smallest

timm is needed for its own networks only: pip install -e '.[zoo]'
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TORCHVISION = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18"),
    *("resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn", "vit_b_32"),
    "wide_resnet50_2",
)
TIMM = (
    *("beit_base_patch16_224", "botnet26t_256", "cait_xxs24_224", "coat_tiny", "coatnet_nano_rw_224", "convit_tiny"),
    *("convmixer_768_32", "convnext_atto", "convnextv2_atto", "crossvit_tiny_240", "cspresnet50", "davit_tiny"),
    *("deit_tiny_patch16_224", "densenet121", "dla34", "dpn48b", "edgenext_xx_small", "efficientformer_l1"),
    *("efficientformerv2_s0", "efficientvit_b0", "efficientvit_m0", "fastvit_t8", "focalnet_tiny_srf", "gernet_s"),
    *("ghostnet_050", "ghostnetv2_100", "hardcorenas_a", "hgnetv2_b0", "hrnet_w18_small", "inception_next_tiny"),
    *("lcnet_050", "levit_128s", "maxvit_pico_rw_256", "mixer_s32_224", "mobilenetv4_conv_small", "mobileone_s0"),
    *("mobilevit_xxs", "mobilevitv2_050", "mvitv2_tiny", "nest_tiny", "nf_resnet26", "nfnet_l0", "pit_ti_224"),
    *("poolformer_s12", "pvt_v2_b0", "regnetx_002", "repghostnet_050", "repvgg_a0", "repvit_m0_9", "res2net50_26w_4s"),
    *("resmlp_12_224", "resnest14d", "resnetv2_50", "rexnet_100", "selecsls42", "sequencer2d_s", "skresnet18"),
    *("starnet_s1", "swiftformer_xs", "swin_tiny_patch4_window7_224", "tiny_vit_5m_224", "tinynet_e"),
    *("tresnet_m", "twins_svt_small", "vgg11", "visformer_tiny", "vit_tiny_patch16_224", "vovnet39a", "xception41"),
    "xcit_nano_12_p16_224",
)
NAMES = (*(f"torchvision:{name}" for name in TORCHVISION), *(f"timm:{name}" for name in TIMM))
QUICK = ("torchvision:squeezenet1_1", "torchvision:shufflenet_v2_x0_5", "torchvision:mobilenet_v3_small")

_CLASSES, _IMAGES = ("top", "bottom"), 24
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SIDES = {"inception": 299, "botnet26t_256": 256, "maxvit_pico_rw_256": 256, "crossvit_tiny_240": 240}


@dataclass(frozen=True)
class Outcome:
    """What came of one network.

    Attributes:
        parameters: P; ``None`` where it was not trained.
        trained, exported: whether the command ended well.
        seconds: of both commands.
        sentence: why not; empty where both did.
    """

    name: str
    parameters: int | None
    trained: bool
    exported: bool
    seconds: float
    sentence: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="torchvision:NAME or timm:NAME; by default all")
    parser.add_argument("--quick", action="store_true", help="three of the smallest")
    parser.add_argument("--timeout", type=float, default=900, metavar="SECONDS", help="of one command (default: 900)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes here, after each network")
    options = parser.parse_args()
    names = options.names or (QUICK if options.quick else NAMES)
    print("| network | parameters | trained | exported | seconds, or what was said |")
    print("|---|---|---|---|---|", flush=True)
    outcomes = []
    for name in names:
        outcomes.append(sweep(name, options.timeout))
        print(row(outcomes[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=2) + "\n")
    through = sum(outcome.exported for outcome in outcomes)
    print(f"\n{through} of {len(outcomes)} go through.")


def sweep(name: str, timeout: float) -> Outcome:
    """Train and export one network in a folder of its own."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_images(folder / "images", next((side for part, side in _SIDES.items() if part in name), 224))
        dataset = ["--dataset", f"folder:{folder / 'images'}", "--batch-size", "8", "--device", "cpu"]
        simplex = ["train-simplex", "--vertices", "2", "--members", "2", "--epochs", "1", "--arch", name, *dataset]
        sentence = ensembler([*simplex, "--out", "run"], folder, timeout)
        trained, parameters = not sentence, None
        if trained:
            parameters = json.loads((folder / "run" / "manifest.json").read_text())["parameters"]
            sentence = ensembler(["export", "run", "--out", "bundle"], folder, timeout)
        return Outcome(name, parameters, trained, not sentence, round(time.monotonic() - began, 1), sentence)


def ensembler(arguments: list[str], folder: Path, timeout: float) -> str:
    """Run a command; return what it said where it failed, else nothing."""
    environment = os.environ | {"COLUMNS": "1000", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "ensembler", *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{arguments[0]}: no end after {timeout:g} s"
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"{arguments[0]}: died by {signal.Signals(-done.returncode).name}"
    lines = [line.strip() for line in _COLOUR.sub("", done.stderr or done.stdout).splitlines() if line.strip()]
    said = lines[-1] if lines else f"exit code {done.returncode}, and nothing said"
    return f"{arguments[0]}: {said.replace(str(folder) + '/', '')}"


def write_images(folder: Path, side: int) -> None:
    """Write noisy images of two classes, told apart by where they are bright."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(_IMAGES):
        label = number % len(_CLASSES)
        pixels = rng.integers(0, 120, (side, side, 3), dtype=np.uint8)
        half = side // len(_CLASSES)
        pixels[label * half : (label + 1) * half] += 120
        file = folder / _CLASSES[label] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)


def row(outcome: Outcome) -> str:
    """Return one line of the Markdown table."""
    parameters = "" if outcome.parameters is None else f"{outcome.parameters / 1e6:.1f} M"
    marks = ("yes" if done else "no" for done in (outcome.trained, outcome.exported))
    last = outcome.sentence.replace("|", "\\|") or f"{outcome.seconds:.0f}"
    return f"| `{outcome.name}` | {parameters} | {' | '.join(marks)} | {last} |"


if __name__ == "__main__":
    main()
