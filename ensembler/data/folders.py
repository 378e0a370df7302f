"""Folders of images: which files are taken, and how they are laid out. Loads no torch.

Names with a dot first, and what systems and archives leave behind, are left out. Links are followed, and no folder is
entered twice. Of the rest, the files whose suffix is one of a format that is read are taken.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ensembler.data.decoding import suffixes
from ensembler.errors import DataError
from ensembler.text import some

__all__ = ["Layout", "Part", "describe", "find_images", "place", "read_layout", "split_folder", "stat_files"]

_KINDS = 6  # of files left out that are named
_SYSTEM = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found"}
_SYSTEM |= {"system volume information"}
_ROLES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_AROUND = re.compile("set|data|images?")  # parts of a split's name, as in train_images, testset
_HIDDEN = "hidden or of the system"
_SHOWN = 3  # names after a count

LeftOut = dict[str, list[str]]
"""Names of files and folders that are left out, by the reason."""


@dataclass(frozen=True)
class Part:
    """The images of a split.

    Attributes:
        name: of its folder; empty where it is the whole.
        files: relative to the layout's folder.
        labels: of the files, indices of the layout's classes.
    """

    name: str
    files: list[str]
    labels: list[int]


@dataclass(frozen=True)
class Layout:
    """A folder of images by class, and its splits.

    Attributes:
        folder: where it is.
        classes: names in label order.
        train, validation, test: those that the folder has; ``train`` is everything where it has no splits.
        left_out: names by the reason.
    """

    folder: Path
    classes: tuple[str, ...]
    train: Part
    validation: Part | None = None
    test: Part | None = None
    left_out: LeftOut = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Part]:
        """The splits that the folder has, ``train`` first."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {role: part for role, part in found.items() if part is not None}


def find_images(folder: Path) -> tuple[list[Path], LeftOut]:
    """Return the images in a folder and below, in order, and the names of other files, relative to it.

    Raises:
        DataError: the name of an image is not UTF-8.
    """
    found: list[Path] = []
    left_out: LeftOut = defaultdict(list)
    entered: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        here = Path(root).stat()
        if (here.st_dev, here.st_ino) in entered:
            folders.clear()
            continue
        entered.add((here.st_dev, here.st_ino))
        hidden = [name for name in (*folders, *files) if _is_hidden(name)]
        left_out[_HIDDEN] += [_relative(Path(root, name), folder) for name in hidden]
        folders[:] = sorted(set(folders).difference(hidden))
        for name in sorted(set(files).difference(hidden)):
            path = Path(root, name)
            if path.suffix.lower() not in suffixes():
                left_out[path.suffix.lower() or "without a suffix"].append(_relative(path, folder))
            elif not path.is_file():
                left_out["linked to nothing"].append(_relative(path, folder))
            else:
                found.append(_readable(path))
    return sorted(found), {reason: names for reason, names in left_out.items() if names}


def stat_files(folder: Path, files: Iterable[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Yield each file's name, relative to the folder, with its size and times.

    Raises:
        OSError: one is not there.
    """
    root = str(folder)
    for file in files:
        yield file, os.stat(f"{root}{os.sep}{file}")  # noqa: PTH116  three times as fast as a Path


def describe(left_out: Mapping[str, list[str]]) -> str:
    """Return how many files are left out, by the first few reasons, with the names of the first few."""
    kinds = [f"{len(names)} {reason} ({some(names, _SHOWN)})" for reason, names in left_out.items()]
    others = sum(map(len, left_out.values())) - sum(map(len, list(left_out.values())[:_KINDS]))
    return ", ".join(kinds[:_KINDS] + ([f"{others} others"] if others else []))


def place(folder: Path, root: Path | None) -> Path:
    """Return where a folder of images is.

    Args:
        folder: where it was.
        root: where it is now, or the folder that holds it under the same name. One that has no folder in it, as one of
            generated corruptions, is not meant.
    """
    if root is None or (folder.is_dir() and root.is_dir() and not _folders(root)):
        return folder
    root = root.expanduser().resolve()
    return root / folder.name if (root / folder.name).is_dir() else root


def read_layout(folder: Path) -> Layout:
    """Find the classes, splits and images of a folder.

    The folder holds one folder for each class, or ``train/``, ``val/`` and ``test/`` (also ``training/``, ``valid/``,
    ``validation/``, ``dev/``, ``testing/``, in any case of letters), each with one folder for each class.

    Raises:
        DataError: neither of these, a class without images, or splits whose classes differ.
    """
    _check_folder(folder, "; if the images of a run have moved, give --data PATH")
    names = _folders(folder)
    roles = _roles(folder, names)
    if not _is_split(folder, names, roles):
        return _read(folder, {"train": folder}, [])
    if "train" not in roles:
        raise DataError(f"{folder} has {_and(roles.values())} but no train/: add it, or name a folder of classes")
    others = [name for name in names if name not in roles.values()]
    return _read(folder, {role: folder / name for role, name in roles.items()}, others)


def split_folder(folder: Path, role: str) -> Path:
    """Return the folder of a split where a folder has splits, or else the folder itself.

    Raises:
        DataError: there is no such folder.
    """
    _check_folder(folder)
    names = _folders(folder)
    roles = _roles(folder, names)
    return folder / roles[role] if "train" in roles and role in roles else folder


def _check_folder(folder: Path, mend: str = "") -> None:
    if folder.is_file():
        raise DataError(f"{folder} is a file: name a folder of images; unpack an archive first")
    if not folder.is_dir():
        raise DataError(f"no folder of images at {folder}: check the path{mend}")


def _read(folder: Path, places: Mapping[str, Path], others: list[str]) -> Layout:
    left_out: LeftOut = defaultdict(list)
    train = _class_folders(places["train"])
    parts: dict[str, Part] = {}
    for role, path in places.items():
        classes = train if role == "train" else _class_folders(path, least=0)
        if not classes:
            images, _ = find_images(path)
            names = [_relative(image, folder) for image in images] or [f"{path.name}/"]
            left_out["in a split without a folder for each class"] += names
            continue
        if unknown := [f"{name!r}" for name in classes if name not in train]:
            known = "class" if len(unknown) == 1 else "classes"
            raise DataError(
                f"{path} has the {known} {some(unknown, _SHOWN)}, which {places['train']} has not: give every split "
                "the same classes"
            )
        parts[role] = _part(folder, path, list(train), classes, left_out)
    for path in dict.fromkeys((folder, *(places[role] for role in parts))):
        _add_loose(folder, path, left_out)
    left_out["neither train, validation nor test"] += [f"{name}/" for name in others]
    left = {reason: names for reason, names in left_out.items() if names}
    return Layout(folder, tuple(train), parts["train"], parts.get("validation"), parts.get("test"), left)


def _part(folder: Path, path: Path, names: list[str], classes: Mapping[str, Path], left_out: LeftOut) -> Part:
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        if name not in classes:
            continue
        images, others = find_images(classes[name])
        for reason, found in others.items():
            left_out[reason] += [_relative(classes[name] / one, folder) for one in found]
        if not images:
            held = f"; it holds {describe(others)}" if others else ""
            raise DataError(
                f"{classes[name]} holds no image that is read ({', '.join(sorted(suffixes()))}){held}: add some, or "
                "remove the folder"
            )
        files += [_relative(image, folder) for image in images]
        labels += [label] * len(images)
    return Part("" if path == folder else path.name, files, labels)


def _class_folders(folder: Path, least: int = 2) -> dict[str, Path]:
    """Return a folder's classes in order: names, composed as Unicode's NFC, and folders.

    Raises:
        DataError: fewer than ``least``, two of the same name, or each class has its own splits.
    """
    found: dict[str, Path] = {}
    for name in _folders(folder):
        _readable(folder / name)
        composed = unicodedata.normalize("NFC", name)
        if composed in found:
            raise DataError(f"{folder} has two folders that both read {composed!r}: rename or join them")
        found[composed] = folder / name
    if len(found) < least:
        one = next(iter(found.values()), None)
        mend = ": sort the images into folders, or give them with their labels from Python (ensembler.as_dataset)"
        raise DataError(
            f"{folder} must hold one folder of images for each class, at least two; found {len(found)}"
            + (f"; is {one} meant?" if one and _folders(one) else mend)
        )
    if found and all(map(_has_splits, found.values())):
        first = next(iter(found.values()))
        inner = _folders(first)
        raise DataError(
            f"{first} holds {_and(inner)}: put the splits first, {inner[0]}/{first.name} instead of "
            f"{first.name}/{inner[0]}"
        )
    return dict(sorted(found.items()))


def _is_split(folder: Path, names: list[str], roles: Mapping[str, str]) -> bool:
    """Whether a folder's folders are splits rather than classes.

    Raises:
        DataError: they can be read as either.
    """
    if roles and (len(roles) == len(names) or ("train" in roles and len(roles) > 1)):
        return True
    _check_names(folder, names)
    if "train" not in roles or not _folders(folder / roles["train"]) or _has_images(folder / roles["train"]):
        return False  # a class of this name
    others = [name for name in names if name not in roles.values() and find_images(folder / name)[0]]
    if not others:
        return True
    raise DataError(
        f"{folder} holds {roles['train']}/, which holds folders, beside {_and(others)}: if it is a split, move the "
        f"others away; if it is a class, put its images into {roles['train']}/ itself"
    )


def _check_names(folder: Path, names: list[str]) -> None:
    """Refuse folders that read like splits and are not called so, such as ``training_set`` and ``test_set``."""
    read: dict[str, str] = {}
    for name in names:
        words = set(re.findall("[a-z]+", _AROUND.sub(" ", name.lower())))
        role = next((role for role, known in _ROLES.items() if words.intersection(known)), None)
        if role and _folders(folder / name) and not _has_images(folder / name):
            read[name] = role
    if "train" in read.values() and len({*read.values()}) > 1:
        raise DataError(
            f"{folder} holds {_and(read)}, which hold folders: if they are splits, call them train/, val/ and test/, "
            "with one folder for each class in each; if they are classes, put their images into them directly"
        )


def _has_splits(folder: Path) -> bool:
    names = _folders(folder)
    roles = _roles(folder, names)
    return "train" in roles and len(roles) > 1 and len(roles) == len(names)


def _roles(folder: Path, names: list[str]) -> dict[str, str]:
    """Return the splits among folders: role and name.

    Raises:
        DataError: two folders of one role.
    """
    found: dict[str, str] = {}
    for role, known in _ROLES.items():
        own = [name for name in names if name.lower() in known]
        if len(own) > 1 and len(names) > len(own):
            raise DataError(f"{folder} has {_and(own)}: keep one of them as the {role} split")
        if own:
            found[role] = own[0]
    return found


def _add_loose(folder: Path, path: Path, left_out: LeftOut) -> None:
    """Add the files that lie beside the folders of classes or splits."""
    for entry in sorted(_entries(path), key=lambda entry: entry.name):
        name = _relative(path / entry.name, folder)
        if _is_hidden(entry.name):
            left_out[_HIDDEN].append(name)
        elif not entry.is_dir():
            suffix = Path(entry.name).suffix.lower() or "without a suffix"
            left_out["in no folder of a class" if suffix in suffixes() else suffix].append(name)


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir() and not _is_hidden(entry.name))


def _has_images(folder: Path) -> bool:
    return any(Path(entry.name).suffix.lower() in suffixes() and entry.is_file() for entry in _entries(folder))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError as error:
        _refuse(error)
        raise


def _refuse(error: OSError) -> None:
    raise DataError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM


def _readable(path: Path) -> Path:
    try:
        path.name.encode()
    except UnicodeEncodeError as error:
        shown = path.name.encode(errors="surrogateescape")
        raise DataError(f"the name of {shown!r} in {path.parent} is not UTF-8: rename it") from error
    return path


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _and(names: Iterable[str]) -> str:
    *most, last = [f"{name}/" for name in names]
    return f"{', '.join(most)} and {last}" if most else last
