"""The adapter for lm-evaluation-harness: its results against the harness's own `hf` model on the same weights, how it
encodes texts and dialogs, and its command line.

The tasks are in tests/tasks. Nothing is downloaded.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# These packages read the variables when they are imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import datasets.config
import lm_eval.__main__
from lm_eval import evaluator, simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from golden.make_checkpoint import TOKENIZER
from helpers.paths import LLAMA3, ROOT
from helpers.ranks import run_ranks, torchrun
from helpers.tolerance import logprob_sum
from llama import Llama
from llama.chat.formats import Message, find_chat_format
from llama.cli.lm_eval import lm_eval as lm_eval_command
from llama.cli.main import main
from llama.convert import convert
from llama.engine.requests import Row
from llama.engine.scheduler import Scheduler
from llama.evaluate import lm_eval_adapter
from llama.evaluate.lm_eval_adapter import MetaLlama
from llama.tokenizer import Tokenizer

FACTS, PROSE, COMPLETIONS = TASKS = "meta_llama_facts", "meta_llama_prose", "meta_llama_completions"
LENGTH = 128  # max_seq_len: the longest text of PROSE has two windows


@pytest.fixture(autouse=True, scope="module")
def at_the_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run in the project's root, because the tasks' paths are relative to it, with a temporary cache for `datasets`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        # Reading the harness's own thousands of tasks takes seconds.
        patch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
        patch.setattr(evaluator, "add_env_info", lambda _: None)  # it runs pip, for example
        patch.setattr(lm_eval.__main__, "setup_logging", lambda: None)  # it would log to pytest's stderr
        yield


@pytest.fixture(scope="module")
def ours(demo: Path) -> Iterator[MetaLlama]:
    lm = MetaLlama(ckpt_dir=str(demo), max_seq_len=LENGTH, batch_size=8, device="cpu", dtype="float32")
    yield lm
    lm.llama.close()


@pytest.fixture(scope="module")
def theirs(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> HFLM:
    folder = tmp_path_factory.mktemp("harness") / "hf"
    convert(demo, folder, to="hf")
    # Computed in float32, like ours. The softmax in float64: torch's float32 one is off by 7e-6 with this vocabulary,
    # always with the same sign, which adds up to 2e-3 over 300 tokens.
    common = {"device": "cpu", "dtype": "float32", "batch_size": 8, "max_length": LENGTH}
    return HFLM(str(folder), softmax_dtype="float64", **common)


@pytest.fixture(scope="module")
def both(ours: MetaLlama, theirs: HFLM) -> dict[str, tuple[Any, Any]]:
    """Task -> (our results and samples, theirs)."""
    return evaluated(ours, theirs, TASKS)


def evaluated(ours: MetaLlama, theirs: HFLM, tasks: Any, **arguments: Any) -> dict[str, tuple[Any, Any]]:
    found = [
        simple_evaluate(
            lm, tasks=list(tasks), task_manager=TaskManager(include_path=str(ROOT / "tests" / "tasks")),
            bootstrap_iters=0, **arguments,
        )
        for lm in (ours, theirs)
    ]  # fmt: skip
    return {task: tuple((each["results"][task], each["samples"][task]) for each in found) for task in tasks}  # type: ignore[misc]


def responses(samples: list[dict[str, Any]]) -> list[Any]:
    """The model's response to each request."""
    return [response for sample in samples for (response,) in sample["resps"]]


def close(pairs: Any, lm: HFLM, samples: list[dict[str, Any]]) -> float:
    """The largest difference of two log-likelihoods, divided by the tolerance for their number of tokens."""
    continuations = [arguments[-1] for sample in samples for arguments in sample["arguments"]]
    return max(
        abs(a - b) / logprob_sum(len(lm.tok_encode(text))) for (a, b), text in zip(pairs, continuations, strict=True)
    )


def requests(*arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance("loglikelihood", {}, each, i) for i, each in enumerate(arguments)]


# Against the harness's own backend ----------------------------------------------------------------


def test_multiple_choice_equals_hf(
    both: dict[str, tuple[Any, Any]], theirs: HFLM, measured: Callable[[str, object], None]
) -> None:
    (our_results, our_samples), (results, samples) = both[FACTS]
    assert len(responses(samples)) == 60
    pairs = list(zip(responses(our_samples), responses(samples), strict=True))
    assert [our_greedy for (_, our_greedy), _ in pairs] == [greedy for _, (_, greedy) in pairs]
    assert {greedy for _, (_, greedy) in pairs} == {True, False}
    worst = close([(our_sum, their_sum) for (our_sum, _), (their_sum, _) in pairs], theirs, samples)
    measured("harness: log-likelihoods of answers, worst difference from hf, part of the bound", worst)
    assert worst <= 1
    for metric in ("acc,none", "acc_norm,none"):
        assert our_results[metric] == results[metric]
    assert 0.5 < results["acc,none"] < 1


def test_rolling_equals_hf(
    both: dict[str, tuple[Any, Any]], theirs: HFLM, measured: Callable[[str, object], None]
) -> None:
    (our_results, our_samples), (results, samples) = both[PROSE]
    pairs = list(zip(responses(our_samples), responses(samples), strict=True))
    worst = close(pairs, theirs, samples)
    measured("harness: log-likelihoods of texts, worst difference from hf, part of the bound", worst)
    assert len(pairs) == 3 and worst <= 1
    for metric in ("word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"):
        assert our_results[metric] == pytest.approx(results[metric], rel=1e-5)


def test_generation_equals_hf(both: dict[str, tuple[Any, Any]]) -> None:
    (our_results, our_samples), (results, samples) = both[COMPLETIONS]
    answers = responses(our_samples)
    assert answers == responses(samples)
    assert not any("\n" in answer or "," in answer for answer in answers)
    assert our_results["exact_match,stripped"] == results["exact_match,stripped"] > 0


def test_chat_template_equals_hf(ours: MetaLlama, theirs: HFLM) -> None:
    arguments: dict[str, Any] = {"limit": 2, "num_fewshot": 1, "apply_chat_template": True}
    arguments |= {"system_instruction": "Answer in one word.", "fewshot_as_multiturn": True}
    for task, ((_, our_samples), (_, samples)) in evaluated(ours, theirs, (FACTS, COMPLETIONS), **arguments).items():
        assert [sample["arguments"] for sample in our_samples] == [sample["arguments"] for sample in samples]
        assert "<|im_end|>\n<|im_start|>assistant\n" in samples[0]["arguments"][0][0]
        if task == COMPLETIONS:
            assert responses(our_samples) == responses(samples)
        else:
            pairs = list(zip(responses(our_samples), responses(samples), strict=True))
            assert close([(mine[0], other[0]) for mine, other in pairs], theirs, samples) <= 1
            assert all(our_greedy == greedy for (_, our_greedy), (_, greedy) in pairs)


def test_awkward_pairs_equal_hf(ours: MetaLlama, theirs: HFLM) -> None:
    pairs = requests(
        ("The capital of France is ", "Paris"),  # the space goes to the continuation
        ("Two lines\n\n", "and a third"),
        ("", " Once upon a time"),  # an empty context is BOS
        ("", "<|im_start|>user"),  # BOS is not doubled
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello!<|im_end|>"),
        ("Café: naïve ", "façade \N{SNOWMAN}"),
    )
    long = requests(("1 2 3 " * 50, "4"))  # longer than max_seq_len: cut at its beginning
    for instances in (pairs, long):
        for each, (our_sum, our_greedy), (their_sum, greedy) in zip(
            instances, ours.loglikelihood(instances), theirs.loglikelihood(instances, disable_tqdm=True), strict=True
        ):
            within = logprob_sum(len(theirs.tok_encode(each.args[1])))
            assert our_sum == pytest.approx(their_sum, rel=0, abs=within) and our_greedy == greedy


def test_an_empty_context_is_bos(ours: MetaLlama) -> None:
    empty, bos = ours.generate_until(requests(*((text, {"max_gen_toks": 4}) for text in ("", "<|im_start|>"))))
    assert empty == bos != ""


def test_long_contexts_keep_their_end(ours: MetaLlama, theirs: HFLM) -> None:
    requested = [("word " * 200 + "1, 2, 3,", {"until": ["6"], "max_gen_toks": 12}), ("a b c d", {"max_gen_toks": 4})]
    assert ours.generate_until(requests(*requested)) == theirs.generate_until(requests(*requested), disable_tqdm=True)


# Texts and ids ------------------------------------------------------------------------------------


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Callable[..., MetaLlama]:
    """adapter(file, format): an adapter whose model is a stub with a tokenizer and a chat format."""

    def make(file: Path, name: str | None = None, **changes: Any) -> MetaLlama:
        tokenizer = Tokenizer(file)
        for key, value in changes.items():
            setattr(tokenizer, key, value)
        if name is None:
            tokenizer.chat_format = None
        stub = SimpleNamespace(
            tokenizer=tokenizer,
            chat_format=find_chat_format(tokenizer, name),
            model=SimpleNamespace(params=SimpleNamespace(max_seq_len=64)),
            executor=SimpleNamespace(device=torch.device("cpu")),
        )
        monkeypatch.setattr(lm_eval_adapter.Llama, "build", lambda *_, **__: stub)
        return MetaLlama(ckpt_dir="none")

    return make


def test_bos_goes_first_once(adapter: Callable[..., MetaLlama]) -> None:
    lm = adapter(TOKENIZER)
    words = lm.llama.tokenizer.encode("The licence", bos=False, eos=False)
    assert lm.prefix_token_id == 1 and lm.eot_token_id == 2
    assert lm.tok_encode("The licence") == lm.tok_encode("The licence", add_special_tokens=True) == [1, *words]
    assert lm.tok_encode("<s>The licence") == [1, *words]
    assert lm.tok_encode("The licence", add_special_tokens=False) == words
    assert lm.tok_encode("<s>The licence</s>", add_special_tokens=False) == [1, *words, 2]


def test_ids_of_texts_equal_hf(ours: MetaLlama, theirs: HFLM) -> None:
    for text in ("", " ", "The licence", " a\n\nb  ", "<|im_start|>user\nHi<|im_end|>\n", "né <|endoftext|>"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(text, add_special_tokens=False)


def test_rolling_puts_bos_in_front_once(build: Callable[..., Llama], checkpoint: Callable[..., Path]) -> None:
    lm = MetaLlama(ckpt_dir=str(checkpoint("mha")), max_seq_len=64)
    llama = lm.llama
    text = "The licence says what may be done with it. " * 8
    ids = llama.tokenizer.encode(text, bos=True, eos=False)
    assert len(ids) > 128
    # Computed window by window from the model's logits.
    expected = 0.0
    for begin, done, end in ((0, 1, 65), (64, 65, 129), (len(ids) - 65, 129, len(ids))):
        window = torch.tensor([ids[begin:end]])
        scores = llama.model.forward(window[:, :-1], 0).double().log_softmax(-1)[0]
        expected += float(scores.gather(-1, window[0, 1:, None])[done - begin - 1 :].sum())
    assert len(ids) <= 193
    assert lm.loglikelihood_rolling(requests((text,), ("",), ("<s>" + text,))) == pytest.approx(
        [expected, 0.0, expected], rel=0, abs=logprob_sum(len(ids))
    )
    llama.close()


TURNS: list[Message] = [
    {"role": "user", "content": " Two  spaces\n"},
    {"role": "assistant", "content": "An answer.  "},
    {"role": "user", "content": "And now?"},
]
SYSTEM: Message = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("file", "format"),
    [(TOKENIZER, "llama2"), (TOKENIZER, "zephyr"), (TOKENIZER, "mistral"), (LLAMA3, "llama3"), (None, "chatml")],
)
def test_a_dialog_as_text_has_its_ids(
    adapter: Callable[..., MetaLlama], demo: Path, file: Path | None, format: str
) -> None:
    lm = adapter(file or demo / "tokenizer.json", format)
    for history in (TURNS[:1], TURNS, [SYSTEM, *TURNS]):
        text = lm.apply_chat_template(history)
        ids = lm._format.encode(history)
        assert lm.tok_encode(text) == ids
        assert "\0" not in text
        # Later messages do not change the text before them.
        begun: Message = {"role": "assistant", "content": "Yes, it"}
        longer = lm.apply_chat_template([*history, begun], add_generation_prompt=False)
        assert longer.endswith("Yes, it") and longer.startswith(text)
        following: Message = {"role": "user", "content": "x"}
        continued = lm.apply_chat_template([*history, begun, following])
        if format != "mistral" or history[0]["role"] != "system":
            assert continued.startswith(longer)
    assert lm.chat_template(True) == lm.chat_template(format) == format
    assert lm.chat_template(False) is None
    assert lm.tokenizer_name.startswith(f"{format}-")
    with pytest.raises(ValueError, match="chat_format=chatty"):
        lm.chat_template("chatty")


def test_dialogs_equal_hf(ours: MetaLlama, theirs: HFLM) -> None:
    begun: Message = {"role": "assistant", "content": "Now it is\n "}
    for history in (TURNS[:1], [SYSTEM, *TURNS]):
        assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
        longer = [*history, begun]
        assert ours.apply_chat_template(longer, False) == theirs.apply_chat_template(longer, False)


def test_tokenizer_name_differs_with_the_dialogs(adapter: Callable[..., MetaLlama], demo: Path) -> None:
    file = demo / "tokenizer.json"
    changes: list[dict[str, Any]] = [{}, {"default_system": "A"}, {"system_prefix": "A"}, {"dialog_bos": True}]
    assert len({adapter(file, "chatml", **change).tokenizer_name for change in changes}) == 4


def test_a_model_without_a_format(adapter: Callable[..., MetaLlama]) -> None:
    lm = adapter(TOKENIZER)
    for ask in (lambda: lm.chat_template(True), lambda: lm.tokenizer_name, lambda: lm.apply_chat_template([])):
        with pytest.raises(ValueError, match=r"--model_args chat_format=\.\.\.: llama2"):
            ask()


def test_an_empty_continuation_has_probability_1(ours: MetaLlama) -> None:
    assert ours.loglikelihood(requests(("", ""), ("A context", ""), ("", ""))) == [(0.0, True)] * 3


def test_a_continuation_that_joins_the_context(ours: MetaLlama) -> None:
    assert len(ours.tok_encode("the")) == len(ours.tok_encode("th")) == 1
    ((total, _),) = ours.loglikelihood(requests(("th", "e")))
    assert total == ours.loglikelihood(requests(("", "the")))[0][0] < -1


# Settings -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeded(checkpoint: Callable[..., Path]) -> Iterator[MetaLlama]:
    given: dict[str, Any] = {"max_seq_len": "64", "batch_size": 3.0, "max_batch_size": None, "prefill_chunk": "16"}
    lm = MetaLlama(ckpt_dir=str(checkpoint("gqa")), **given)
    yield lm
    lm.llama.close()


def test_generation_settings(seeded: MetaLlama) -> None:
    assert seeded.llama.model.params.max_batch_size == 3 and seeded.max_length == 64
    assert seeded.llama.executor.prefill_chunk == 16

    def generate(*settings: dict[str, Any], context: str = "The licence") -> list[str]:
        return seeded.generate_until(requests(*((context, {"max_gen_toks": 8} | each) for each in settings)))

    plain = seeded.llama.text_completion(["The licence"], temperature=0, max_gen_len=8)[0]["generation"]
    greedy, cold, four, sampled, again, other = generate(
        {},
        {"temperature": 1.0, "do_sample": False},
        {"max_new_tokens": 4, "max_gen_toks": None},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 1.0, "seed": 4},
        {"temperature": 1.0, "seed": 5},
    )
    assert greedy == cold == plain != sampled and plain.startswith(four) and four != plain
    assert sampled == again != other  # request i draws with seed + i
    assert generate({"temperature": 1.0, "top_k": 1, "do_sample": True}) == [plain]
    assert generate({"temperature": 1.0, "top_p": 0.0}) == [plain]
    assert generate({"repetition_penalty": 1e6, "max_gen_toks": 40}) != generate({"max_gen_toks": 40})
    middle = plain[3]
    assert generate({"until": middle}) == generate({"until": ["nowhere", middle, ""]}) == [plain.split(middle)[0]]
    with pytest.raises(ValueError, match="holds num_beams, which"):
        generate({"num_beams": 4})
    with pytest.raises(ValueError, match="max_gen_toks is 64, and max_seq_len 64 leaves no room"):
        generate({"max_gen_toks": 64})


def test_stop_ids(seeded: MetaLlama, ours: MetaLlama) -> None:
    until = {"until": ["</s>", "stop"], "max_gen_toks": 4}
    assert seeded._read_generation(0, "x", until)["stop_token_ids"] == [2]
    dialog = ours.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert ours._read_generation(0, "x", until)["stop_token_ids"] == []
    assert ours._read_generation(0, dialog, until)["stop_token_ids"] == sorted(ours.llama.dialogs.stop_tokens) != []


def test_order_is_kept(seeded: MetaLlama) -> None:
    contexts = ["a" * n for n in (3, 30, 1, 12, 7)]
    instances = requests(*((context, {"max_gen_toks": 5}) for context in contexts))
    assert seeded.generate_until(instances) == [seeded.generate_until([each])[0] for each in instances]


def test_many_requests_share_a_call(seeded: MetaLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a row that takes long does not keep the other rows of the cache empty."""
    calls, submit = list[int](), Scheduler.submit

    def watched(self: Scheduler, rows: list[Row], **options: Any) -> Any:
        calls.append(len(rows))
        return submit(self, rows, **options)

    monkeypatch.setattr(Scheduler, "submit", watched)
    settings = ({"max_gen_toks": 1 + i % 5} for i in range(50))
    assert len(seeded.generate_until(requests(*(("a b", each) for each in settings)))) == 50
    assert calls == [48, 2]


def test_answers_reach_the_cache(seeded: MetaLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[tuple[Any, ...]] = []
    monkeypatch.setattr(seeded, "cache_hook", SimpleNamespace(add_partial=lambda *entry: added.append(entry)))
    settings = {"max_gen_toks": 2}
    (scored,) = seeded.loglikelihood(requests(("a", "b")))
    (rolled,) = seeded.loglikelihood_rolling(requests(("a b",)))
    (written,) = seeded.generate_until(requests(("a", settings)))
    assert added == [
        ("loglikelihood", ("a", "b"), scored),
        ("loglikelihood_rolling", ("a b",), rolled),
        ("generate_until", ("a", settings), written),
    ]


# The command --------------------------------------------------------------------------------------


def run_main(patch: pytest.MonkeyPatch, *args: str) -> Any:
    """Run `llama lm_eval ...` in this process; returns its exit status or message, None if it does not exit."""
    patch.setattr(sys, "argv", ["llama", "lm_eval", *args])
    try:
        main()
    except SystemExit as done:
        return done.code
    return None


def arguments(checkpoint: Path, out: Path, *tasks: str) -> list[str]:
    model = f"ckpt_dir={checkpoint},max_seq_len={LENGTH}"
    args = ["--model_args", model, "--batch_size", "4", "--tasks", ",".join(tasks), "--include_path", "tests/tasks"]
    return [*args, "--output_path", str(out), "--log_samples"]


def results(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """The numbers in the results file of a folder, and the model's response to each request."""
    (file,) = folder.rglob("*results_*.json")
    samples = sorted(folder.rglob("*samples_*.jsonl"))
    found = [json.loads(line)["resps"] for path in samples for line in path.read_text().splitlines()]
    table = json.loads(file.read_text())["results"]
    return {
        f"{task} {metric}": value
        for task, values in table.items()
        for metric, value in values.items()
        if isinstance(value, float)
    }, found


@pytest.mark.slow
@pytest.mark.usefixtures("built")  # the harness closes nothing
def test_the_command_on_one_rank_and_two(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint("gqa", 2)
    assert run_main(monkeypatch, *arguments(folder, tmp_path / "1", *TASKS)) is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("meta_llama ({'ckpt_dir': ") and lines[0].endswith("batch_size: 4")
    expected, expected_answers = results(tmp_path / "1")
    assert len(expected) == 9 and len(expected_answers) == 20 + 3 + 6

    # Rank 0 finds some answers in its cache, the other rank none. Both must still compute the same requests.
    cache = ["--use_cache", str(tmp_path / "cache")]
    assert run_main(monkeypatch, *arguments(folder, tmp_path / "0", FACTS), *cache, "--limit", "10") is None
    args = [*arguments(folder, tmp_path / "2", *TASKS), *cache]
    done = torchrun(
        2, "tests/helpers/harness_rank.py", "lm_eval", *args, HF_HOME=str(tmp_path / "hf"), OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(lines) and done.stdout.count("Stderr") == 1
    assert done.stderr.count("2 shards -> 2 ranks") == done.stderr.count("Running loglikelihood requests") == 1
    assert "Traceback" not in done.stderr
    found, answers = results(tmp_path / "2")
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(answers) == len(expected_answers)
    for mine, reference in zip(answers, expected_answers, strict=True):
        near = pytest.approx(numbers(reference), rel=0, abs=logprob_sum(LENGTH))
        assert numbers(mine) == near and texts(mine) == texts(reference)


def numbers(response: Any) -> list[float]:
    if isinstance(response, list):
        return [number for item in response for number in numbers(item)]
    return [float(response)] if re.fullmatch(r"-?\d+\.\d+(e-?\d+)?", str(response)) else []


def texts(response: Any) -> list[str]:
    if isinstance(response, list):
        return [text for item in response for text in texts(item)]
    return [] if numbers(response) else [str(response)]


def mistaken(folder: Path) -> Any:
    """The exit status or message of a rank with a wrong command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
        return run_main(patch, *arguments(folder, folder, FACTS), "--model_args", "max_seq_len=none")


def test_a_mistake_on_two_ranks_is_one_line(checkpoint: Callable[..., Path]) -> None:
    assert run_ranks(2, mistaken, checkpoint("gqa")) == ["error: max_seq_len is 'none', expected an integer", 1]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("ckpt_dir=/nowhere/at/all", "error: /nowhere/at/all does not exist: give the folder"),
        ("max_seq_len=16", "error: meta_llama needs a checkpoint folder: --model_args ckpt_dir=..."),
        ("ckpt_dir=x,pretrained=y", "error: meta_llama has no argument pretrained; there are ckpt_dir, tokenizer_path"),
        ("ckpt_dir=x,max_seq_len=many", "error: max_seq_len is 'many', expected an integer"),
        ("ckpt_dir=x,prefill_chunk=many", "error: prefill_chunk is 'many', expected an integer"),
        ("ckpt_dir=x,max_batch_size=1.5", "error: batch_size is 1.5, expected an integer"),
    ],
)
def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch, given: str, error: str) -> None:
    code = run_main(monkeypatch, "--model_args", given, "--tasks", FACTS, "--include_path", "tests/tasks")
    assert isinstance(code, str) and code.startswith(error) and "\n" not in code


def test_help_and_other_subcommands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "--help") == 0
    assert "Language Model Evaluation Harness" in capsys.readouterr().out
    assert run_main(monkeypatch, "run", "--help") == 0
    assert "--apply_chat_template" in capsys.readouterr().out
    assert run_main(monkeypatch, "validate", "--tasks", FACTS, "--include_path", "tests/tasks") is None
    assert "valid" in capsys.readouterr().out


def test_the_harness_picks_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    code = run_main(monkeypatch, "--model", "dummy", "--tasks", COMPLETIONS, "--include_path", "tests/tasks")
    assert code is None


def test_the_harness_defaults_are_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(MetaLlama, "__init__", lambda self, **arguments: given.update(arguments))
    config = {"batch_size": "16", "max_batch_size": None, "device": "cuda:0"}
    MetaLlama.create_from_arg_obj({"ckpt_dir": "x", "batch_size": 2}, config)
    assert given == {"ckpt_dir": "x", "batch_size": 2}
    MetaLlama.create_from_arg_string("ckpt_dir=x", {"device": "cpu"})
    assert given == {"ckpt_dir": "x", "batch_size": 2, "device": "cpu"}


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        ValueError, match=r"lm_eval needs the Python package lm_eval: pip install 'llama-runner\[eval\]'"
    ):
        lm_eval_command(["--tasks", FACTS])
