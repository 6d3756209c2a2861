"""``normswap push``: an output folder onto the Hugging Face Hub."""

from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option

from . import next_command
from . import options as o
from .console import Console, NormswapCommand


@cloup.command(cls=NormswapCommand)
@click.argument("folder", metavar="OUT", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("repo_id", metavar="REPO_ID")
@cloup.option_group(
    "Repository",
    option("--private", is_flag=True, help="make the repository private if it is created now"),
    option("--revision", metavar="BRANCH", help="branch to push to  [main]"),
    option("--base-model", metavar="ID", help="id of the original on the Hub, if the model card does not name it"),
    option("--message", default="Add a model converted by normswap", show_default=True, help="commit message"),
    option("--dry-run", is_flag=True, help="show the files and the model card's metadata without sending them"),
)
@o.messages_group()
def push(folder: Path, repo_id: str, **options: Any) -> None:
    """Upload a converted model to the Hugging Face Hub.

    OUT is a folder that `normswap convert` wrote; it is sent in one commit. The token comes from the environment
    variable HF_TOKEN or from `hf auth login`; it is no option, so that it does not end up in a shell's history. The
    model card names the base model, the licence of the original and the line that loads the model from the Hub.

    \b
    normswap push out user/vit-without-layernorm --dry-run
    normswap push out user/vit-without-layernorm --private
    """
    console = Console(options["as_json"], options["quiet"])
    from normswap.outputs.hub import prepare
    from normswap.outputs.hub import push as send
    from normswap.tables import table

    dry_run = options["dry_run"]
    given = {name: options[name] for name in ("private", "revision", "base_model")}
    upload = prepare(folder, repo_id, **given)
    record = {**upload.to_json(), "dry_run": dry_run, "url": None if dry_run else send(upload, options["message"])}
    metadata = record["card"]
    rows = [[name, f"{size:,}"] for name, size in upload.sizes.items()]
    console.result(record, table(["file", "bytes"], rows, right=["bytes"]))
    console.say("card", ", ".join(f"{key}: {value}" for key, value in metadata.items()))
    if "base_model" not in metadata:
        console.say("note", "the card names no base model; --base-model ID does")
    if upload.kept:
        console.say("note", f"{len(upload.kept)} LayerNorms are kept, so it needs normswap: {', '.join(upload.kept)}")
    if upload.met is False:
        console.say("note", "this model misses the accuracy budget it was converted with")
    console.say("note", "normswap.json contains the command line of the conversion, with its paths")
    if dry_run:
        console.say("dry run", "nothing was sent")
        console.say("next", next_command.line("push", options, folder, repo_id))
    else:
        console.say("pushed", str(record["url"]))
