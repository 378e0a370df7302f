"""``ensembler export``, ``verify``, ``serve``, ``predict``, ``drift``, ``bento`` and ``triton``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ensembler.errors import ShapeError, UsageError
from ensembler.serve.client import is_url
from ensembler.storage.transfers import push_finished
from ensembler.storage.urls import destination, place
from ensembler.text import cell, counted, echo, print_rows, some

if TYPE_CHECKING:
    from ensembler.serve.runtime.manifest import BundleManifest

__all__ = ["app"]

app = typer.Typer()

_OneFile = Literal["single"]  # no method of training, but the layout of one file


@app.command()
def export(
    run: Annotated[
        Path | None,
        typer.Argument(parser=place, help="The run's folder. (default: the newest in runs/)"),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|URL",
            help="The bundle's folder, or a URL to push it to when finished. (default: bundles/ and the run's name)",
        ),
    ] = None,
    layout: Annotated[
        Literal["vertices", "members", _OneFile] | None,
        typer.Option(
            help="vertices: one graph, and the vertices from which our runtime makes the members. members: a "
            "self-contained file for each, for any runtime. single: beside them ensemble.onnx, one file with all "
            "members, their mean and their uncertainty. (default: vertices where there are fewer)"
        ),
    ] = None,
    members: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of new members to sample from the simplexes. (default: the run's own members)"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the sampled members.")] = 0,
    pixels: Annotated[
        Literal["uint8", "float"],
        typer.Option("--input", help="Input of the graphs: pixels from 0 to 255, or floats from 0 to 1."),
    ] = "uint8",
    precision: Annotated[
        Literal["float32", "tf32", "float16", "int8"],
        typer.Option(
            help="Precision of weights and activations; a lower one is compared with float32 on validation images. "
            "tf32: float32 whose products a GPU computes in TF32."
        ),
    ] = "float32",
    data: Annotated[
        Path | None, typer.Option(help="Folder of the dataset, if it has moved. (default: its usual place)")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Name of the run's dataset, if it is another now: package.module:NAME.")
    ] = None,
    no_data: Annotated[bool, typer.Option("--no-data", help="Do not look for the dataset.")] = False,
    examples: Annotated[int, typer.Option(min=1, help="Largest number of validation images.")] = 1000,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure which way of running members is the fastest on this machine.")
    ] = False,
    sign: Annotated[
        Path | None, typer.Option(metavar="KEY", help="PEM file of an Ed25519 private key to sign the bundle with.")
    ] = None,
) -> None:
    """Export a run's members to ONNX, each compared with PyTorch."""
    from rich.console import Console

    from ensembler.run import latest
    from ensembler.serve.export.bundle import export_run
    from ensembler.serve.runtime.manifest import read_bundle

    console = Console()
    run = (run or latest(Path("runs"))).resolve()
    folder, url = destination(out, "bundles")
    folder = folder or Path("bundles") / run.name
    started = time.perf_counter()
    with console.status("exporting"):
        export_run(
            run,
            folder,
            layout=layout,
            members=members,
            seed=seed,
            pixels=pixels,
            precision=precision,
            data=data,
            dataset=dataset,
            use_data=not no_data,
            examples=examples,
            tune=tune,
            key=sign,
            say=lambda sentence: console.print(cell(sentence)),
        )
    print_rows(_of_bundle(folder, read_bundle(folder), time.perf_counter() - started))
    echo(f"next: ensembler serve {quote(str(folder))}")
    push_finished(folder, url)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(parser=place, help="The bundle's folder.")],
    key: Annotated[
        Path | None, typer.Option(help="PEM file of the Ed25519 public key that the bundle must be signed with.")
    ] = None,
) -> None:
    """Check every byte of a bundle, run every member, and compare its answers with PyTorch's."""
    from ensembler.serve.runtime.verify import verify_bundle

    found = verify_bundle(bundle, key)
    manifest = found.manifest
    largest = max(found.differences)
    stored = "PyTorch's" if manifest.precision == "float32" else "those stored at export"
    rows = [("bundle", f"{bundle}, format {manifest.format}")]
    rows.append(("files", f"{len(manifest.files)}, all with their SHA-256 as written"))
    if key is not None:
        rows.append(("signed", f"with the private key of {key}"))
    rows.append(("members", f"{manifest.members}, {manifest.precision}, all run on this machine's {found.device}"))
    allowed = f"{found.images} images ({found.allowed:.0e} allowed)"
    rows.append(("answers", f"within {largest:.1e} of {stored} on {allowed}"))
    if found.merged is not None:
        rows.append(("in one graph", f"within {found.merged:.1e}"))
    if found.single is not None:
        rows.append(("in one file", f"within {found.single:.1e}, with the mean and the uncertainty"))
    print_rows(rows)


@app.command()
def serve(
    bundle: Annotated[Path, typer.Argument(parser=place, help="The bundle's folder.")],
    host: Annotated[str, typer.Option(help="IP address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 3000,
    workers: Annotated[
        int,
        typer.Option(min=1, envvar="ENSEMBLER_WORKERS", help="Number of worker processes, which share the CPUs."),
    ] = 1,
    members: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of members; further ones are made from the bundle's vertices. (default: the bundle's own)",
        ),
    ] = None,
    log_answers: Annotated[
        Path | None,
        typer.Option(help="File to append answers to, without their images, as JSON lines: see ensembler drift."),
    ] = None,
    log_sample: Annotated[
        float, typer.Option(help="Share of images whose answers are logged, at random, above 0 and at most 1.")
    ] = 1.0,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin whose pages may ask from a browser, such as https://example.org, or * for all; repeatable. "
            "(default: none)"
        ),
    ] = None,
    require_signature: Annotated[
        Path | None,
        typer.Option(metavar="KEY", help="PEM file of the Ed25519 public key that the bundle must be signed with."),
    ] = None,
) -> None:
    """Serve a bundle over HTTP with BentoML until Ctrl-C; docs/serving.md lists the routes and settings."""
    from ensembler.serve.answer_log import check_appendable
    from ensembler.serve.http.settings import Settings
    from ensembler.serve.runtime.manifest import read_bundle
    from ensembler.serve.runtime.runtime import Runtime
    from ensembler.serve.starting import listen, start

    if log_sample != 1 and log_answers is None:
        raise typer.BadParameter("is a share of the answers of --log-answers: give both", param_hint="--log-sample")
    manifest = read_bundle(bundle, require_signature)
    host = "127.0.0.1" if host == "localhost" else host
    given = {
        "bundle": bundle.resolve(),
        "workers": workers,
        "members": members,
        "log_answers": log_answers and log_answers.resolve(),
        "log_sample": log_sample if log_answers else None,
        "cors_origin": ",".join(cors_origin) if cors_origin else None,
        "require_signature": require_signature and require_signature.resolve(),
    }
    environment = os.environ | {"BENTOML_DO_NOT_TRACK": "True"}
    environment |= {f"ENSEMBLER_{name.upper()}": str(value) for name, value in given.items() if value is not None}
    with _refusing({"ENSEMBLER_LOG_SAMPLE": "--log-sample", "ENSEMBLER_CORS_ORIGIN": "--cors-origin"}):
        settings = Settings.read(environment)
        Runtime.check(bundle, manifest, settings.members, settings)
    if settings.log_answers is not None:
        check_appendable(settings.log_answers)
    with _refusing():
        public = listen(host, port)
    start(public, environment, f"{counted(members or manifest.members, 'member')} of {bundle}")


@contextmanager
def _refusing(flags: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Refuse options as mistakes of what was typed, exit code 2, under the names that were typed.

    Args:
        flags: what each environment variable is called on the command line.
    """
    try:
        yield
    except UsageError as error:
        sentence = str(error)
        for variable, flag in flags.items():
            sentence = sentence if os.environ.get(variable) else sentence.replace(variable, flag)
        raise typer.BadParameter(sentence) from error


def _target(text: str) -> Path | str:
    """A service's address, or a bundle's place."""
    return text if is_url(text) else place(text)


@app.command()
def predict(
    target: Annotated[
        str, typer.Argument(parser=_target, metavar="BUNDLE|URL", help="A bundle's folder, or a service's address.")
    ],
    images: Annotated[list[str], typer.Argument(help="Image files, folders of them, or patterns.")],
    mode: Annotated[
        Literal["full", "exact", "confidence"],
        typer.Option(
            help="full: ask all members; exact: until the class cannot change; confidence: until it is probable enough."
        ),
    ] = "full",
    members: Annotated[int | None, typer.Option(min=1, help="Largest number of members to ask. (default: all)")] = None,
    token: Annotated[
        str | None,
        typer.Option(envvar="ENSEMBLER_TOKEN", help="Token of the service; better given in the environment."),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE|-", help="Write CSV to this file instead, or with - to the terminal.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead, one line per image.")] = False,
) -> None:
    """Predict images, a line each, with a bundle or a service; exits with 1 where one cannot be read.

    Uncertainty is the entropy of the mean prediction, in nats; only an ensemble calibrated with --risk abstains.
    """
    import shutil

    from ensembler.serve.client import as_csv, as_json_lines, as_lines, find_images, predict_files
    from ensembler.storage.artefact import check_writable, replace_file

    if csv is not None and as_json:
        raise typer.BadParameter("excludes --json: give one of them", param_hint="--csv")
    file = None if csv is None or str(csv) == "-" else csv
    if file is not None:
        check_writable(file.parent, "choose another --csv")
    answer = predict_files(str(target), find_images(images), mode=mode, members=members, token=token)
    if file is not None:
        replace_file(file, as_csv(answer).encode(errors="surrogateescape"))
        echo(f"predictions: {file}")
    elif csv is not None:
        typer.echo(as_csv(answer), nl=False)
    elif as_json:
        typer.echo(as_json_lines(answer), nl=False)
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        typer.echo("\n".join(as_lines(answer, width)))
    _say_of(answer)


def _say_of(answer: dict[str, Any]) -> None:
    """Say on standard error what abstains, and which images have no answer.

    Raises:
        ShapeError: there are some.
    """
    known = [one["abstain"] for one in answer["predictions"] if one.get("abstain") is not None]
    if len(known) > 1:
        echo(f"abstains from {sum(known):,} of {len(known):,} images", err=True)
    for one in answer["errors"]:
        echo(f"{one['image']}: {one['error']}", err=True)
    if count := len(answer["errors"]):
        asked = counted(count + len(answer["predictions"]), "image")
        raise ShapeError(f"{count} of {asked} could not be read and {'has' if count == 1 else 'have'} no answer")


@app.command()
def drift(
    log: Annotated[Path, typer.Argument(help="Log of answers, of ensembler serve --log-answers.")],
    window: Annotated[int, typer.Option(min=50, help="Images of each window.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")] = False,
) -> None:
    """Compare logged answers with what the ensemble answered on its validation images."""
    from rich.console import Console
    from rich.table import Table

    from ensembler.serve.answer_log import drift_of

    found = drift_of(log, window)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("from (UTC)", "to (UTC)", *found.bound):
        measured = name in found.bound
        table.add_column(name.replace("_", "\n") if measured else name, justify="right" if measured else "left")
    for one in found.windows:
        marked = [f"{index:.3f}{'*' if index > found.bound[measure] else ' '}" for measure, index in one.index.items()]
        table.add_row(*(cell(time.removesuffix("+00:00").replace("T", " ")) for time in (one.first, one.last)), *marked)
    table.add_row("bound", "", *(f"{value:.3f} " for value in found.bound.values()), style="dim")
    console = Console()
    console.print(table)
    left_out = f"; {counted(found.left_out, 'other')} left out" if found.left_out else ""
    typer.echo(
        f"population stability index of windows of {found.window} images; {counted(found.answers, 'answer')}{left_out}"
    )
    drifted = f"the last window has drifted: {', '.join(found.drifted)}"
    typer.echo(drifted if found.drifted else "no drift in the last window")


@app.command()
def bento(
    bundle: Annotated[Path, typer.Argument(parser=place, help="The bundle's folder.")],
    tag: Annotated[
        str | None, typer.Option(help="Tag of the Bento, NAME or NAME:VERSION. (default: the run's name)")
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Use the ONNX Runtime for GPUs.")] = False,
) -> None:
    """Build a Bento from a bundle, for a container: without torch, with pinned packages."""
    from ensembler.serve.bento import build_bento

    built = build_bento(bundle, tag, gpu=gpu)
    echo(f"bento: {built}")
    echo(f"try it: bentoml serve {built}")
    echo(f"as an image: bentoml containerize {built}")


@app.command()
def triton(
    bundle: Annotated[Path, typer.Argument(parser=place, help="The bundle's folder.")],
    out: Annotated[Path, typer.Option(metavar="REPOSITORY", help="Folder of Triton's models.")],
    name: Annotated[str | None, typer.Option(help="Name of the model. (default: the run's)")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Largest number of images in a forward pass.")] = 64,
) -> None:
    """Write a bundle into a model repository of Triton: one ONNX file with the mean and the uncertainty, no Python."""
    from ensembler.serve.export.triton import write_triton

    folder = write_triton(bundle, out, name, max_batch)
    echo(f"model: {folder}")
    echo(f"serve it: tritonserver --model-repository {quote(str(out))}")


def _of_bundle(out: Path, bundle: BundleManifest, seconds: float) -> list[tuple[str, object]]:
    """A bundle that ``export`` made, as rows of a table."""
    rows: list[tuple[str, object]] = [("bundle", out)]
    rows.append(("members", f"{bundle.members} x {bundle.architecture} ({bundle.method}, {bundle.dataset})"))
    megabytes = sum((out / name).stat().st_size for name in bundle.files) / 1e6
    held = f"{bundle.vertices} vertices" if bundle.layout == "vertices" else "a file for each member"
    rows.append(("size", f"{megabytes:.1f} MB, {held}, {bundle.precision}, ONNX opset {bundle.opset}"))
    allowed = f" ({bundle.tolerance:.0e} allowed)" if bundle.precision == "float32" else ""
    images = " and ".join(bundle.compared_on)
    rows.append(("agreement", f"within {bundle.max_difference:.1e} of PyTorch's probabilities on {images}{allowed}"))
    if (check := bundle.precision_check) is not None:
        ranks = check.rank_correlation
        kept = "" if ranks is None else f"rank correlation {ranks:.4f} (at least {check.least_rank_correlation}), "
        drop = f"accuracy drop {check.accuracy_drop:.4f} (at most {check.most_accuracy_drop})"
        rows.append((bundle.precision, f"on {check.examples} validation images: mutual information's {kept}{drop}"))
    rows.append(("calibration", "the run's" if bundle.calibration else "none"))
    if (known := bundle.validation) is not None:
        rows.append(("validation", f"accuracy {known.accuracy:.3f}, NLL {known.nll:.3f} on {known.examples} images"))
    order = some([str(member + 1) for member in bundle.order], 8)
    rows.append(("order", f"by {bundle.ordered_by}: {order}"))
    if (tuning := bundle.tuning) is not None:
        for batch, winner in tuning.winners.items():
            times = [f"{row.strategy} {row.seconds * 1e3:.2f} ms" for row in tuning.table if row.batch == batch]
            rows.append((f"batch {batch}", f"{winner} ({', '.join(times)})"))
        if tuning.load is not None and tuning.load > 0.5:
            rows.append(("", f"the machine was shared: {tuning.load:.1f} processes wanted a CPU at the start"))
    rows.append(("time", f"{seconds:.1f} s"))
    return rows
