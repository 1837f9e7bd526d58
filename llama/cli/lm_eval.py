"""`llama lm_eval`: the command line of EleutherAI's lm-evaluation-harness, with `meta_llama` as a model."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout

import click

from llama.parallel.groups import broadcast_object, current_world, is_main_rank


@click.command(
    "lm_eval",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def lm_eval(args: tuple[str, ...]) -> None:
    """Run lm-evaluation-harness (extra "eval") with its own flags. The default --model is `meta_llama`.

    Under torchrun rank 0 runs the harness. The other ranks follow the same command line until the model is built, then
    compute what rank 0 broadcasts.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry

        from llama.evaluate.lm_eval_adapter import DistributedMetaLlama, MetaLlama
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ValueError(f"lm_eval needs the Python package {package}: pip install 'llama-runner[eval]'") from error
    target = DistributedMetaLlama if current_world().size > 1 else MetaLlama
    model_registry.register("meta_llama", target=target)
    sys.argv = ["lm_eval", *_with_model(list(args))]
    if is_main_rank():
        cli_evaluate()
        if DistributedMetaLlama.is_built:
            broadcast_object(None)  # ends the other ranks; after an error torchrun ends them
        return
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            cli_evaluate()
    except Exception as error:
        error.__dict__["reporting_rank"] = 0  # rank 0 raises the same error, or a PeerError about this rank
        raise


def _with_model(args: list[str]) -> list[str]:
    """The command line with `--model meta_llama`, unless it names a model or a subcommand that takes none."""
    has_model = any(arg in ("--model", "-M") or arg.startswith("--model=") for arg in args)
    takes_none = not args or args[0] in ("ls", "validate", "-h", "--help")
    return args if has_model or takes_none else [*args, "--model", "meta_llama"]
