"""``normswap push``: an output folder onto the Hugging Face Hub."""

from pathlib import Path
from typing import Any

import click

from . import next_command
from .console import Console, NormswapCommand
from .options import output_options

_MESSAGE = "Add a model converted by normswap"
_SENT = ("private", "revision", "base_model", "message")


@click.command(cls=NormswapCommand)
@click.argument("folder", metavar="OUT", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("repo_id", metavar="REPO_ID")
@click.option("--private", is_flag=True, help="make the repository private, if it is made now")
@click.option("--revision", metavar="BRANCH", help="push to this branch  [the main one]")
@click.option("--base-model", metavar="ID", help="the original's id on the Hub, if the model card does not name it")
@click.option("--message", default=_MESSAGE, show_default=True, help="of the commit")
@click.option("--dry-run", is_flag=True, help="show the files and the model card's metadata, and send nothing")
@output_options()
def push(folder: Path, repo_id: str, dry_run: bool, as_json: bool, quiet: bool, verbose: int, **options: Any) -> None:
    """Send a folder that `normswap convert` wrote to the Hugging Face Hub, in one commit.

    The token comes from the environment variable HF_TOKEN, or from `hf auth login`; it is no option, so that it does
    not end up in a shell's history. The model card names the base model, the licence of the original and the line
    that loads the model from the Hub.

    \b
    normswap push out user/vit-without-layernorm --dry-run
    normswap push out user/vit-without-layernorm --private
    """
    console = Console(as_json, quiet)
    from normswap.push import prepare
    from normswap.push import push as send
    from normswap.report import table

    message = options.pop("message")
    upload = prepare(folder, repo_id, **options)
    record = {**upload.to_json(), "dry_run": dry_run, "url": None if dry_run else send(upload, message)}
    metadata = {key: value for key, value in record["card"].items()}
    rows = [[name, f"{size:,}"] for name, size in upload.sizes.items()]
    console.result(record, table(["file", "bytes"], rows, right=["bytes"]))
    console.say("card", ", ".join(f"{key}: {value}" for key, value in metadata.items()))
    if "base_model" not in metadata:
        console.say("note", "the card names no base model; --base-model ID does")
    if upload.kept:
        console.say("note", f"{len(upload.kept)} LayerNorms stay, so it loads with normswap: {', '.join(upload.kept)}")
    if upload.met is False:
        console.say("note", "this model misses the accuracy budget it was converted with")
    console.say("note", "normswap.json holds the command line that made it, with its paths")
    if dry_run:
        again = next_command.flags({**options, "message": message if message != _MESSAGE else None}, _SENT)
        console.say("next", f"{next_command.line('push', folder, repo_id, *again)}   (nothing was sent)")
    else:
        console.say("pushed", str(record["url"]))
