"""`python -m llama lm_eval`: the command line of EleutherAI's lm-evaluation-harness, with this runner's models."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout

from llama.parallel.groups import broadcast_object, current_world, is_main_rank


def lm_eval(words: list[str]) -> None:
    """Run tasks of EleutherAI's lm-evaluation-harness: its command line, with `meta_llama` as the default --model.

    Under torchrun rank 0 runs the harness. The others read the command line as far as it names the model, then compute
    what rank 0 tells them. Raises ValueError without the harness's package, and what the harness raises.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry

        from llama.evaluate.lm_eval_adapter import Member, MetaLlama
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ValueError(f"lm_eval needs the Python package {package}: pip install 'llama-runner[eval]'") from error
    several = current_world().size > 1
    model_registry.register("meta_llama", target=Member if several else MetaLlama)
    sys.argv = ["lm_eval", *_with_model(words)]
    if is_main_rank():
        cli_evaluate()
        if Member.built:
            broadcast_object(None)  # not after an error: torchrun ends the others then
        return
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            cli_evaluate()
    except Exception as error:
        error.__dict__["reporting_rank"] = 0  # rank 0 has the same one, or a PeerError about it
        raise


def _with_model(words: list[str]) -> list[str]:
    """The command line with our model named. Other subcommands than run know no models."""
    named = any(word in ("--model", "-M") or word.startswith("--model=") for word in words)
    other = not words or words[0] in ("ls", "validate", "-h", "--help")
    return words if named or other else [*words, "--model", "meta_llama"]
