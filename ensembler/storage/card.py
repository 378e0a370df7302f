"""The Hugging Face model card of a run or bundle, made from its manifest alone.

The card is Markdown with the Hub's YAML metadata (https://huggingface.co/docs/hub/model-cards). It says explicitly what
the manifest does not record. It needs no torch, so that a bundle can be pushed from where it is served.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["card"]

_UNKNOWN = "not recorded"
_CLASSES = 20  # names of classes, at most


def card(manifest: Mapping[str, Any], sha256: str, url: str, name: str, *, calibrated: bool = False) -> str:
    """Return the model card of a run or bundle.

    Args:
        manifest: its manifest's content.
        sha256: of the manifest's file.
        url: of the run or bundle.
        name: the URL's last part.
        calibrated: whether it has a calibration.
    """
    bundle = manifest["kind"] == "bundle"
    parts = [
        _front_matter(manifest, name, bundle),
        f"# {name}",
        _introduction(manifest, bundle),
        _table(("", ""), _facts(manifest, sha256, bundle).items()),
        "## Scores",
        _scores(manifest, bundle),
        "No score under corruptions or on out-of-distribution images is recorded: `ensembler eval --shift` measures "
        "them.",
        "## Calibration",
        "Calibrated (`calibration.json`): a map of the probabilities, prediction sets and, if requested, a threshold "
        "for abstention, fitted on validation images. Its guarantees hold only for images like those."
        if calibrated
        else "Not calibrated: the probabilities are the members' mean.",
        "## Use",
        _use(manifest, url, name, bundle),
        "## Unknown",
        _not_known(manifest, bundle),
        "## Files",
        "`manifest.json` has the SHA-256 of every file, and `manifest.sha256` that of the manifest. "
        "`ensembler` refuses files that differ.",
        _table(("file", "SHA-256"), ((f"`{file}`", f"`{hash_}`") for file, hash_ in manifest["files"].items())),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(manifest: Mapping[str, Any], name: str, bundle: bool) -> str:
    import yaml  # type: ignore[import-untyped]

    content: dict[str, Any] = {
        "library_name": "ensembler",
        "pipeline_tag": "image-classification",
        "tags": ["ensemble", "uncertainty", _line(manifest.get("method", "ensemble")), *(["onnx"] if bundle else [])],
    }
    test = (manifest.get("metrics") or {}).get("test") or {}
    kinds = {"accuracy": "Accuracy", "nll": "Negative log-likelihood (nats)"}
    metrics = [
        {"type": kind, "name": title, "value": test[kind]}
        for kind, title in kinds.items()
        if test.get(kind) is not None
    ]
    if metrics:
        record = manifest["dataset"]
        dataset = {"name": _line(record["title"]), "type": _line(record["name"]).partition(":")[0], "split": "test"}
        task = {"type": "image-classification"}
        content["model-index"] = [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---"


def _introduction(manifest: Mapping[str, Any], bundle: bool) -> str:
    what = (
        f"An ensemble of {_plain(manifest.get('members', '?'))} networks ({_plain(manifest.get('method', '?'))}, "
        f"{_plain(manifest.get('architecture', '?'))}) that classifies images with uncertainties"
    )
    kind = (
        "exported to ONNX as a bundle, which can be served without PyTorch."
        if bundle
        else "as a run, with its vertices, coefficients and normalisation."
    )
    return f"{what}; {kind}"


def _facts(manifest: Mapping[str, Any], sha256: str, bundle: bool) -> dict[str, str]:
    record = manifest.get("dataset")
    dataset = record if isinstance(record, Mapping) else {"title": record}
    classes = manifest.get("classes") if bundle else dataset.get("classes")
    cost = manifest.get("training_cost" if bundle else "cost") or {}
    shape = manifest.get("image_shape") if bundle else dataset.get("shape")
    vertices, members = manifest.get("vertices"), manifest.get("members")
    facts = {
        "method": manifest.get("method"),
        "members, M": f"{members}, each one forward pass per prediction",
        "vertices, K": vertices,
        "network": f"{manifest.get('architecture')}, {_count(manifest.get('parameters'))} parameters",
        "dataset": dataset.get("title"),
        "training images": _count(dataset.get("train_examples")),
        "images": " x ".join(map(str, shape)) + " (height, width, channels), uint8" if shape else None,
        "classes": _classes(classes),
        "training cost": _cost(cost),
        "trained on": cost.get("device"),
        "seed": manifest.get("seed"),
    }
    if bundle:
        origin = manifest.get("run") or {}
        facts |= {
            "precision": manifest.get("precision", "float32"),
            "agreement with PyTorch": f"within {manifest['max_difference']:.1e} in any probability"
            if manifest.get("max_difference") is not None
            else None,
            "exported from": f"run {origin.get('name')}, SHA-256 `{origin.get('sha256')}`",
        }
        del facts["seed"]  # in the run's manifest
    versions = manifest.get("versions") or {}
    facts |= {
        "created": manifest.get("created"),
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items()) or None,
        "format": f"{manifest['kind']} {manifest.get('format')}",
        "SHA-256 of the manifest": f"`{sha256}`",
    }
    return {name: _UNKNOWN if value is None else _plain(value) for name, value in facts.items()}


def _scores(manifest: Mapping[str, Any], bundle: bool) -> str:
    if bundle:
        scores = {"validation, as exported": manifest.get("validation") or {}}
    else:
        scores = {split: (manifest.get("metrics") or {}).get(split) or {} for split in ("validation", "test")}
    rows = [
        (
            split,
            _count(of.get("examples")),
            _figure(of["accuracy"] * 100, 2),
            _figure(of.get("nll"), 4),
            _figure(None if of.get("member_accuracy") is None else of["member_accuracy"] * 100, 2),
            _figure(of.get("disagreement"), 4),
        )
        for split, of in scores.items()
        if of.get("accuracy") is not None
    ]
    if not rows:
        return "No score is recorded."
    header = ("split", "images", "accuracy %", "NLL, nats", "members' mean accuracy %", "disagreement")
    return _table(header, rows)


def _use(manifest: Mapping[str, Any], url: str, name: str, bundle: bool) -> str:
    extra = {"hf": "[hub]", "s3": "[s3]", "gs": "[gcs]", "gcs": "[gcs]"}.get(url.partition("://")[0], "")
    lines = [f"pip install 'ensembler{extra}'"]
    if bundle:
        lines += [
            f"ensembler pull {url} --out bundles/{name}",
            f"ensembler verify bundles/{name}   # every byte, and every member's predictions",
            f"ensembler serve bundles/{name}    # or ensembler predict bundles/{name} IMAGE",
        ]
    else:
        lines += [
            f"ensembler pull {url} --out runs/{name}",
            f"ensembler eval runs/{name}",
            f"ensembler export runs/{name} --out bundles/{name}",
            f"ensembler serve bundles/{name}",
        ]
    return "```sh\n" + "\n".join(lines) + "\n```"


def _not_known(manifest: Mapping[str, Any], bundle: bool) -> str:
    facts = [
        "The licence of the weights and of the training images: add it before publishing.",
        "Intended uses and the harm of errors: none of this was measured.",
    ]
    cost = manifest.get("training_cost" if bundle else "cost") or {}
    entries = (cost.get("entries") or {}).values()
    origins = [entry.get("origin") for entry in entries if isinstance(entry, Mapping)]
    facts += [f"The training cost of {_plain(origin)}." for origin in origins if origin]
    of_run = manifest.get("metrics") or {}
    if any("examples" not in (of_run.get(split) or {"examples": 0}) for split in ("validation", "test")):
        facts.append("The number of images that the scores were measured on.")
    if bundle:
        facts.append("Scores on test images: they are in the run.")
    return "\n".join(f"- {fact}" for fact in facts)


def _cost(cost: Mapping[str, Any]) -> str | None:
    origins = [entry.get("origin") for entry in (cost.get("entries") or {}).values() if isinstance(entry, Mapping)]
    elsewhere = ", ".join(origin for origin in origins if origin)
    if cost.get("example_passes") is None:
        return f"unknown: trained elsewhere ({elsewhere})" if elsewhere else None
    texts = [f"{cost['example_passes']:,} example passes (one image, forward and backward)"]
    if cost.get("forward_passes"):
        texts.append(f"{cost['forward_passes']:,} images forward only")
    if cost.get("seconds") is not None:
        texts.append(f"{cost['seconds']:,.0f} s")
    if cost.get("peak_memory") is not None:
        texts.append(f"{cost['peak_memory'] / 2**30:.2f} GiB of peak memory")
    if elsewhere:
        texts.append(f"and the unknown cost of {elsewhere}")
    return ", ".join(texts)


def _classes(classes: Sequence[str] | None) -> str | None:
    if not classes:
        return None
    more = f" and {len(classes) - _CLASSES:,} more" if len(classes) > _CLASSES else ""
    return f"{len(classes):,}: {', '.join(classes[:_CLASSES])}{more}"


def _count(number: int | None) -> str:
    return _UNKNOWN if number is None else f"{number:,}"


def _figure(value: float | None, places: int) -> str:
    return _UNKNOWN if value is None else f"{value:.{places}f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(value: Any) -> str:
    """Escape text for a table in Markdown: a dataset's folder may have any name."""
    return _line(value).replace("|", "\\|").replace("<", "&lt;")


def _line(value: Any) -> str:
    return " ".join(str(value).split())
