"""Copy a random part of a folder of images by class (train/CLASS/FILE, test/CLASS/FILE), always the same one.

python examples/image_subset.py CIFAR-10-images cifar-small --train 200 --test 200

With ``--held-out`` the test images are training images of the source that are not taken for training: to choose a
method's options on, before the source's test images are looked at.
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path


def choose(names: list[str], count: int, seed: str) -> list[str]:
    """Return ``count`` of the names, drawn with a seed."""
    return random.Random(seed).sample(sorted(names), count)


def main() -> None:
    """Read the command line and copy the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the folder that holds train/ and test/")
    parser.add_argument("out", type=Path, help="the new folder")
    parser.add_argument("--train", type=int, default=200, help="training images of each class (default: 200)")
    parser.add_argument("--test", type=int, default=200, help="test images of each class (default: 200)")
    parser.add_argument("--held-out", action="store_true", help="take the test images from the source's train/")
    asked = parser.parse_args()
    classes = sorted(folder.name for folder in (asked.source / "train").iterdir() if folder.is_dir())
    for name in classes:
        names = {split: [file.name for file in (asked.source / split / name).iterdir()] for split in ("train", "test")}
        train = choose(names["train"], asked.train, name)
        left = [file for file in names["train"] if file not in set(train)]
        test = choose(left, asked.test, f"{name}choose") if asked.held_out else choose(names["test"], asked.test, name)
        for split, origin, taken in (("train", "train", train), ("test", "train" if asked.held_out else "test", test)):
            (asked.out / split / name).mkdir(parents=True)
            for file in taken:
                shutil.copy(asked.source / origin / name / file, asked.out / split / name / file)


if __name__ == "__main__":
    main()
