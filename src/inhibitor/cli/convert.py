"""``inhibitor convert``: a model folder in, an inhibitor model folder out."""

from pathlib import Path
from typing import Annotated

import typer

from inhibitor.errors import RunError

NAME = "convert"


def run(
    model: Annotated[str, typer.Option(help="A model folder, a hub id or minilm.")],
    output: Annotated[Path, typer.Option(help="Where the converted model goes; a new or empty folder.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="key=value of an InhibitorConfig, for example layers=[0,1] per=layer reach=null."),
    ] = None,
) -> None:
    """Give a pretrained model inhibitor attention. Its weights stay; distil it before you use it."""
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    from inhibitor.cli import quiet
    from inhibitor.config import user_path
    from inhibitor.models.attention import inhibitor_layers
    from inhibitor.models.config import InhibitorConfig
    from inhibitor.models.convert import convert
    from inhibitor.models.loading import load_pretrained
    from inhibitor.runs import check_folder

    config = InhibitorConfig.parse({}, settings or [], source="convert")
    quiet()
    output = user_path(output)
    check_folder(output)
    if output.exists() and any(output.iterdir()):
        raise RunError(str(output), expected="a new or empty folder", got="one in use", remedy="Choose another output.")
    architectures = load_pretrained(AutoConfig, model).architectures or []
    auto_class = (
        getattr(transformers, architectures[0], transformers.AutoModel) if architectures else transformers.AutoModel
    )
    tokenizer, student = load_pretrained(AutoTokenizer, model), convert(load_pretrained(auto_class, model), config)
    student.save_pretrained(output)
    tokenizer.save_pretrained(output)
    typer.echo(f"{output}: {type(student).__name__}, inhibitor attention in layers {list(inhibitor_layers(student))}")
    typer.echo("It is not trained yet: start from it, or let `inhibitor distill` convert and train in one run.")
