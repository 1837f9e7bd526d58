"""Check a checkpoint folder: everything for `python -m llama verify`, and a subset before loading."""

import logging
from pathlib import Path

from llama.chat.formats import find_chat_format
from llama.checkpoint.checksums import check_files, read_checklists
from llama.checkpoint.errors import CheckpointError, some_names
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.params_json import load_params
from llama.checkpoint.paths import describe_path, list_shards, misnamed_shards, renamed_note, shard_number
from llama.checkpoint.report import Report
from llama.checkpoint.shards import open_shard
from llama.checkpoint.tensor_checks import check_tensors
from llama.params import ModelArgs
from llama.tokenizer import Tokenizer, TokenizerError, find_tokenizer

log = logging.getLogger(__name__)


def check_folder(folder: Path) -> Report:
    """Check everything that needs no model: checklists, shards, params.json, tokenizer."""
    report = Report()
    paths = _list_shards(folder, report)
    if not paths:  # the other checks would only report more missing files
        report.problems.append(f"{folder} {describe_path(folder)}")
        return report
    report.notes += renamed_note(paths)
    params = folder / "params.json"
    try:
        tokenizer = find_tokenizer(folder)
    except TokenizerError as error:
        report.problems.append(str(error).replace("give --tokenizer_path", "put it there"))
        tokenizer = None
    files = [*paths.values(), params, *([tokenizer] if tokenizer else [])]
    intact = check_files(files, read_checklists(folder, report), folder, report)

    args, shards = None, {}
    if params in intact:
        try:
            keys, notes = load_params(folder)
            args = ModelArgs(**keys)
            report.notes += notes
        except CheckpointError as error:
            report.problems.append(str(error))
    for number, path in paths.items():
        if path in intact:
            try:
                shard = open_shard(path)
            except CheckpointError as error:
                report.problems.append(str(error))
                continue
            shards[number] = shard.tensors
            report.notes += [note for note in shard.notes if note not in report.notes]
    args = check_tensors(paths, shards, args, report)
    if tokenizer in intact:
        _check_tokenizer(tokenizer, args, report)
    return report


def check_before_loading(checkpoint: Checkpoint, part: int = 0, parts: int = 1) -> tuple[list[str], dict[str, str]]:
    """Check the shards of an opened checkpoint. Return (problems, a line each; `Report.digests`).

    Each of `parts` processes reads its part of the tensors' bytes. Every process makes the other checks. Checklists are
    not read.
    """
    report, folder = Report(), checkpoint.paths[0].parent
    paths = _list_shards(folder, report)
    intact = check_files(list(paths.values()), {}, folder, report, part, parts)
    shards = {}
    for number, path in paths.items():
        if checkpoint.needs_full_read(number):
            shards[number] = checkpoint[number]
        elif path in intact:
            # Map the shard again, and free that mapping after the check: this rank may not need the pages read here.
            shard = open_shard(path)
            shards[number] = shard.tensors
            for note in checkpoint.add_notes(shard.notes):
                log.info(f"note: {note}")
    check_tensors(paths, shards, checkpoint.params, report, part, parts)
    return report.problems, report.digests


def _list_shards(folder: Path, report: Report) -> dict[int, Path]:
    shards, duplicates = list_shards(folder)
    for path in duplicates:
        other = shards[shard_number(path) or 0].name
        report.add_problem(path, f"has the same number as {other}: remove one of them")
    ignored = [path.name for path in misnamed_shards(folder)]
    if shards and ignored:
        report.notes.append(f"{folder}: {some_names(ignored)} ignored: numbers of shards have up to four digits")
    return shards


def _check_tokenizer(path: Path, args: ModelArgs | None, report: Report) -> None:
    try:
        tokenizer = Tokenizer(path, use_scaled_rope=bool(args and args.use_scaled_rope))
        find_chat_format(tokenizer)
    except TokenizerError as error:
        report.problems.append(str(error))
        return
    if args and args.vocab_size not in (-1, tokenizer.n_words):
        problem = f"has {tokenizer.n_words} ids, expected the model's {args.vocab_size}"
        report.add_problem(path, f"{problem}: fetch the model's own")
    report.checked.append(f"{path.name} with {tokenizer.n_words} ids")
