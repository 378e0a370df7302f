"""The contact sheet of docs/corruptions.md: every corruption at every severity, each on an image of its own.

    python benchmarks/contact_sheet.py cifar10/test/*/0001.jpg --out docs/images/corruptions.png

takes images of 32 x 32 pixels in the order given, and begins again where there are fewer than 19.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ensembler.eval.shift.corruptions import AVAILABLE, HEADLINE, SEVERITIES, corrupt

SCALE = 3
CELL = 32 * SCALE + 4
LABEL = 150
ROWS = 10  # in each of two blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    options = parser.parse_args()
    clean = [np.asarray(Image.open(path).convert("RGB")) for path in options.images]
    block = LABEL + 6 * CELL + 12
    sheet = Image.new("RGB", (2 * block, 28 + ROWS * CELL), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for number, name in enumerate(AVAILABLE):
        left, top = number // ROWS * block + 8, 28 + number % ROWS * CELL
        image = torch.from_numpy(clean[number % len(clean)].copy())[None]
        draw.text((left, top + CELL // 2 - 18), name if name in HEADLINE else f"{name}\n(validation)", "black", font)
        shown = [image, *(corrupt(image, name, severity, indices=[number]) for severity in SEVERITIES)]
        for column, one in enumerate(shown):
            enlarged = Image.fromarray(one[0].numpy()).resize((32 * SCALE, 32 * SCALE), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + LABEL + column * CELL, top))
            if number % ROWS == 0:
                draw.text((left + LABEL + column * CELL, 6), f"severity {column}" if column else "clean", "black", font)
    draw.text((block + 8, 28 + 9 * CELL + 40), "generated, seed 0; not the official files", "black", font)
    sheet.save(options.out, optimize=True)


if __name__ == "__main__":
    main()
