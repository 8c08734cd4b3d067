"""`graft weights import`: a weight file from elsewhere into the operator's folder, whole or not at all.

What the file holds is looked at by a program of its own, which is confined and may be killed: see
app/vision/weight_import.py.
"""

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Annotated

import typer

from app.cli.server import load_settings
from app.cli.terminal import EXIT_USAGE, Failure, print_line
from app.storage import file_sha256, sync

PROGRAM = (sys.executable, "-m", "app.vision.weight_import")
# Importing torch included; the largest network's file takes seconds.
LONGEST_SECONDS = 300.0

weights = typer.Typer(help="Pretrained weights: import.", no_args_is_help=True)


def add_to(cli: typer.Typer) -> None:
    weights.callback()(lambda: None)  # so that the one command keeps its name
    cli.add_typer(weights, name="weights")


@weights.command("import")
def import_weights(
    file: Annotated[Path, typer.Argument(help="A .safetensors file, or a .pth with a state dict alone.")],
    backbone: Annotated[str, typer.Option(help="Whose weights they are; GET /v1/backbones lists the names.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Check a weight file, and put it into GRAFT_WEIGHTS_DIR as <backbone>.safetensors."""
    if not file.is_file():
        raise Failure(f"There is no file {file}.", exit_code=EXIT_USAGE)
    folder = load_settings().weights_dir
    if folder is None:
        raise Failure("Set GRAFT_WEIGHTS_DIR to the folder that weights are to be in; servers look there, too.")
    if not backbone.isidentifier():
        raise Failure("There is no backbone of this name.")
    target = folder / f"{backbone}.safetensors"
    if os.path.lexists(target) and not force:
        raise Failure(f"{target} is there already; --force replaces it.")
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f".{backbone}.{uuid.uuid4().hex}.part"
    try:
        check(file, backbone, staged)
        digest = file_sha256(staged)
        sync(staged)
        _publish(staged, target, is_replacing=force)
    except OSError as error:
        raise Failure(f"{target} could not be written: {error.strerror}.") from error
    finally:
        staged.unlink(missing_ok=True)
    print_line(f"{digest}  {target}")


def check(file: Path, backbone: str, target: Path, *, longest_seconds: float = LONGEST_SECONDS) -> None:
    """Has the program read `file` and write `target`. Raises Failure with what is wrong with it."""
    order = json.dumps({"path": str(file.absolute()), "backbone": backbone, "target": str(target.absolute())})
    # The packages of an installation, and never a folder called "app" where the command is called.
    environment = os.environ | {"PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    try:
        ran = subprocess.run(
            PROGRAM, input=order, capture_output=True, text=True, timeout=longest_seconds, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"Reading the file took longer than {longest_seconds:.0f} s; it was given up.") from None
    if ran.returncode == -signal.SIGXCPU:
        raise Failure("Reading the file took more of the processor than weights do; it was given up.")
    try:
        answer = json.loads(ran.stdout)
    except ValueError:
        said = ran.stderr.strip().splitlines()
        raise Failure(
            f"Reading the file ended its process ({said[-1][:200] if said else f'exit status {ran.returncode}'}); "
            "it is damaged, or made to do harm."
        ) from None
    if "refused" in answer:
        raise Failure(f"{file.name} was not imported: {answer['refused']}")


def _publish(staged: Path, target: Path, *, is_replacing: bool) -> None:
    if is_replacing:
        staged.replace(target)
    else:
        try:
            target.hardlink_to(staged)  # unlike a rename it does not replace what came meanwhile
        except FileExistsError:
            raise Failure(f"{target} is there already; --force replaces it.") from None
    sync(target.parent)
