"""What the model thinks of given ids: log-probabilities, ranks of continuations, perplexity of long texts.

Everything here takes ids and reads the raw logits: natural logarithms of a softmax in float32, summed in float64. Under
torchrun every rank makes the same calls and gets the same numbers. The KV cache is overwritten.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch.nn.utils.rnn import pad_sequence

from llama.accelerate.executor import Executor, Measure, log_norm, score
from llama.console import progress
from llama.engine.engine import Engine, read_back
from llama.engine.requests import Alternatives, alternatives, check_alternatives, check_int, check_list, read_ids
from llama.errors import explain_oom
from llama.params import ModelArgs
from llama.tokenizer import Tokenizer

# One pass computes at most so many positions, padding included, or one text: enough to keep arithmetic busy.
BATCH_TOKENS = 4096


def token_logprobs(
    llama: Engine, token_lists: Sequence[Sequence[int]], *, bos: bool | None = None
) -> list[list[float]]:
    """The log-probability of each id given the ids before it, a list as long as each of `token_lists`.

        ids      t0   t1       t2          t3
        returns  0.0  t1|t0    t2|t0 t1    t3|t0 t1 t2

    With BOS in front the first id has a predecessor, and a log-probability: t0|BOS. bos: None puts BOS in front where
    the tokenizer does, True and False decide; it is never doubled. `generate(..., max_gen_len=0, logprobs=True,
    echo=True)` returns the same for ids with their BOS.

    Raises ValueError or TypeError for ids outside the vocabulary and for lists that are longer than max_seq_len
    (`rolling_loglikelihood` takes those) or empty.
    """
    texts, answers = [], []
    check_list("token_lists", "lists of ids", token_lists)
    for i, ids in enumerate(token_lists):
        text = read_ids(f"list {i}", ids, llama.model.params)
        full = with_bos(llama.tokenizer, text, bos)
        texts.append(Text(tuple(full), 1))
        answers.append([0.0] * (len(full) == len(text)))  # nothing predicts the first id
    return [
        answer + [logprob for (logprob,) in values]
        for answer, values in zip(answers, measure_texts(llama, texts, _logprob), strict=True)
    ]


def loglikelihood(
    llama: Engine, requests: Sequence[tuple[Sequence[int], Sequence[int]]], *, bos: bool | None = None
) -> list[tuple[float, bool]]:
    """(log-likelihood, is_greedy) of each continuation given its context; a request is (context ids, continuation ids).

        context       c0  c1  c2
        continuation              a0  a1          -> log p(a0|c0 c1 c2) + log p(a1|c0 c1 c2 a0)

    is_greedy: whether greedy decoding would give exactly the continuation. An empty one has (0.0, True).
    An empty context becomes BOS, or EOS where there is no BOS; a continuation that begins with that id keeps it as its
    context instead. Of a context that does not fit max_seq_len beside its continuation, the end counts: input are the
    last max_seq_len ids before the continuation's last. All this as in EleutherAI's lm-evaluation-harness.
    bos: as in `token_logprobs`, for contexts that are not empty.

    Continuations of one context share its computation. Raises ValueError or TypeError for ids outside the vocabulary,
    and for continuations that are longer than max_seq_len.
    """
    check_bos(bos)
    check_list("requests", "pairs of lists of ids", requests)
    limit = llama.model.params.max_seq_len
    texts = []
    for i, request in enumerate(requests):
        if len(request) != 2:
            raise ValueError(f"request {i} has {len(request)} parts, expected (context ids, continuation ids)")
        before, after = (
            read_ids(f"{part} {i}", ids, llama.model.params, any_length=True)
            for part, ids in zip(("context", "continuation"), request, strict=True)
        )
        if before:
            before = with_bos(llama.tokenizer, before, bos)
        elif after and after[0] == prefix_id(llama.tokenizer):
            before, after = after[:1], after[1:]
        else:
            before = [prefix_id(llama.tokenizer)]
        if len(after) > limit:
            raise ValueError(
                f"continuation {i} has {len(after)} ids, but max_seq_len is {limit}: build with a larger one, "
                "or use rolling_loglikelihood"
            )
        ids = (before + after)[-(limit + 1) :]
        texts.append(Text(tuple(ids), len(ids) - len(after)))
    return [
        (math.fsum(logprob for logprob, _ in values), all(is_best for _, is_best in values))
        for values in measure_texts(llama, texts, _logprob_and_best)
    ]


def rolling_loglikelihood(
    llama: Engine, token_lists: Sequence[Sequence[int]], stride: int | None = None, *, bos: bool | None = None
) -> list[float]:
    """The log-likelihood of texts of any length, the sum over their ids; perplexity is exp(-sum / number of ids).

    A window is max_seq_len ids of input. The first scores all that it can, each of the others up to `stride` new ids:
    every id is scored once, with as many ids before it as its window has. With max_seq_len 4, and t0 BOS or the first:

        ids           t0  t1  t2  t3  t4  t5  t6  t7
        stride 4      [-----input-----]                scores t1 to t4
                                  [-----input-----]    scores t5 to t7; the last window is filled from the left
        stride 2      [-----input-----]                scores t1 to t4
                              [-----input-----]        scores t5 and t6
                                  [-----input-----]    scores t7

    stride: 1 to max_seq_len; None is max_seq_len, the fewest windows (the rule of EleutherAI's lm-evaluation-harness).
    A smaller one gives more context, max_seq_len - stride ids at least, and takes max_seq_len / stride times as long.
    bos: as in `token_logprobs`; without BOS the first id is not scored. An empty text has 0.0.

    Raises ValueError or TypeError for a stride out of range and for ids outside the vocabulary.
    """
    limit = llama.model.params.max_seq_len
    check_stride(stride, limit)
    texts: list[Text] = []
    owners = []
    check_list("token_lists", "lists of ids", token_lists)
    for i, ids in enumerate(token_lists):
        full = with_bos(llama.tokenizer, read_ids(f"list {i}", ids, llama.model.params, any_length=True), bos)
        for text in windows(full, limit, stride or limit):
            texts.append(text)
            owners.append(i)
    parts: list[list[float]] = [[] for _ in token_lists]
    for i, values in zip(owners, measure_texts(llama, texts, _logprob), strict=True):
        parts[i] += [logprob for (logprob,) in values]
    return [math.fsum(part) for part in parts]


def top_logprobs(llama: Engine, ids: Sequence[int], k: int) -> list[Alternatives]:
    """What the model would say after each prefix: for every id the k best next ids, (id, log-probability), best first.

        ids      t0        t1           t2
        returns  ?|t0      ?|t0 t1      ?|t0 t1 t2

    The ids count as they are, without BOS unless they have it. Raises ValueError or TypeError for ids that are none,
    too many or outside the vocabulary, and for a k that is not 1 to the size of the vocabulary.
    """
    check_alternatives("k", k, 1, llama.model.params)
    text = read_ids("the text", ids, llama.model.params)
    # What follows the last id is asked for too: any id can stand for it, as only the alternatives are read.
    (values,) = measure_texts(llama, [Text((*text, 0), 1)], partial(score, k=k))
    return [alternatives(row, k)[1] for row in values]


@explain_oom
@torch.inference_mode()
def hidden_states(llama: Engine, ids: Sequence[int]) -> torch.Tensor:
    """The states before the output layer, after the last norm: [1, n, dim] in the model's dtype, on its device.

    `llama.accelerate.executor.logits(hidden_states(llama, ids))` are the logits. Errors as in `top_logprobs`.
    """
    text = read_ids("the text", ids, llama.model.params)
    with llama.call(), llama.lock:
        llama.take_turn(text, text)
        return llama.executor.hidden(torch.tensor([text], device=llama.executor.device), 0, len(text))


def check_bos(bos: bool | None) -> None:
    if bos not in (True, False, None):
        raise TypeError(f"bos is {bos!r}, expected True or False")


def check_stride(stride: int | None, max_seq_len: int) -> None:
    if stride is not None:
        check_int("stride", stride, 1)
        if stride > max_seq_len:
            raise ValueError(
                f"stride is {stride}, but a window has only max_seq_len {max_seq_len} ids: some would be left out"
            )


def prefix_id(tokenizer: Tokenizer) -> int:
    """What stands before a text that nothing else precedes: BOS, or EOS in vocabularies that have no BOS."""
    return tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id


def with_bos(tokenizer: Tokenizer, ids: list[int], bos: bool | None = None) -> list[int]:
    """`ids` with BOS in front, at most once. bos: None puts it there where the tokenizer does. Raises ValueError where
    True asks for a BOS that the vocabulary lacks."""
    check_bos(bos)
    if not (tokenizer.adds_bos if bos is None else bos) or ids[:1] == [tokenizer.bos_id]:
        return ids
    if tokenizer.bos_id < 0:
        raise ValueError("this tokenizer has no BOS: leave bos out")
    return [tokenizer.bos_id, *ids]


# How it is computed -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Ids, of which those from `start` on are measured, each by what the ids before it let the model expect."""

    ids: tuple[int, ...]
    start: int


def windows(ids: list[int], max_seq_len: int, stride: int) -> Iterator[Text]:
    """The windows of `rolling_loglikelihood`, each with the id that its last input predicts."""
    done = 1
    while done < len(ids):
        end = min(len(ids), done + (max_seq_len if done == 1 else stride))
        begin = max(0, end - 1 - max_seq_len)
        yield Text(tuple(ids[begin:end]), done - begin)
        done = end


@dataclass(frozen=True)
class Group:
    """Texts that begin with `prefix`, which is computed once for all of them.

    A text alone has all its input there. Of several, each has a rest of its own: what follows the prefix, without the
    last id, which is predicted only.
    """

    prefix: tuple[int, ...]
    texts: list[Text]

    def rest(self, text: Text) -> tuple[int, ...]:
        return text.ids[len(self.prefix) : -1]

    @property
    def rests(self) -> list[int]:
        """The lengths of those that there are."""
        return [n for n in map(len, map(self.rest, self.texts)) if n]


def measure_texts(llama: Engine, texts: Sequence[Text], measure: Measure) -> list[list[list[float]]]:
    """measure's numbers for each measured id of each text, in the order of the texts: [len(ids) - start][m].

    Equal texts are computed once. Raises FloatingPointError where a number is not finite.
    """
    found: dict[Text, list[list[float]]] = {text: [] for text in texts}
    measured = [text for text in found if text.start < len(text.ids)]
    llama.executor.follow()
    groups = [Group(text.ids[:-1], [text]) for text in measured] if llama.executor.is_aligned else _groups(measured)
    with llama.call():
        for batch in progress(list(_batches(groups, llama.model.params)), "scoring"):
            with llama.lock:
                llama.take_turn(batch, batch)  # also waits: between two calls a rank may take its time
                measured_batch = _measure_batch(llama, batch, measure)
            for text, values in measured_batch:
                found[text] = values
                if not all(math.isfinite(number) for row in values for number in row):
                    begin = ", ".join(map(str, text.ids[:8]))
                    raise llama.damaged(f"in a text that begins with ids {begin}")
    return [found[text] for text in texts]


def _groups(texts: list[Text]) -> list[Group]:
    """Texts that are alike up to where they are measured share that part, if it saves an eighth of their work."""
    alike: dict[tuple[int, ...], list[Text]] = {}
    for text in texts:
        alike.setdefault(text.ids[: text.start], []).append(text)
    groups = []
    for common, members in alike.items():
        work = sum(len(text.ids) - 1 for text in members)
        if (len(members) - 1) * len(common) * 8 >= work:
            measured = BATCH_TOKENS  # a bound on the states that are kept, so that thousands of short texts are cut up
            for text in members:
                if measured >= BATCH_TOKENS:
                    groups.append(Group(common, []))
                    measured = 0
                groups[-1].texts.append(text)
                measured += len(text.ids) - text.start
        else:
            groups += [Group(text.ids[:-1], [text]) for text in members]
    return groups


def _batches(groups: list[Group], args: ModelArgs) -> Iterator[list[Group]]:
    """The longest prefixes first, as many as the cache and BATCH_TOKENS allow in both passes of `_measure_batch`. The
    second one computes the rests of several groups at once, as it overwrites their prefixes."""
    batch: list[Group] = []
    rests: list[int] = []
    for group in sorted(groups, key=lambda group: -len(group.prefix)):
        more = rests + group.rests
        longest, prefix = max(more, default=0), len((batch or [group])[0].prefix)
        if batch and (
            max(len(batch) + 1, len(more)) > args.max_batch_size
            or prefix * (len(batch) + 1) > BATCH_TOKENS
            or longest * len(more) > BATCH_TOKENS
            or prefix + longest > args.max_seq_len
        ):
            yield batch
            batch, more = [], group.rests
        batch.append(group)
        rests = more
    if batch:
        yield batch


@explain_oom
@torch.inference_mode()
def _measure_batch(llama: Engine, batch: list[Group], measure: Measure) -> list[tuple[Text, list[list[float]]]]:
    """Two passes: the prefixes, then what the texts have beside them, each row behind a copy of its prefix's cache.

        prefix  t0 t1 t2        rest  t3 t4        not an input  t5
        start 3: the state of t2 predicts t3, those of t3 and t4 predict t4 and t5

    Rows are padded on the right: causality hides the padding in the first pass, the mask in the second, and no state of
    it is looked at.
    """
    executor = llama.executor
    lengths = [len(group.prefix) for group in batch]
    h = executor.hidden(_padded([group.prefix for group in batch], executor), 0, max(lengths))  # [groups, seqlen, dim]
    rows = [(slot, group, text) for slot, group in enumerate(batch) for text in group.texts]
    states = {text: [h[slot, text.start - 1 : lengths[slot]]] for slot, _, text in rows}
    later = [(slot, group.rest(text), text) for slot, group, text in rows if group.rest(text)]
    # More rows than fit are texts of one group: what the first row holds of their prefix is not overwritten.
    size = min(
        executor.model.params.max_batch_size,
        max(1, BATCH_TOKENS // max((len(rest) for _, rest, _ in later), default=1)),
    )
    for at in range(0, len(later), size):
        slots, rests, owners = zip(*later[at : at + size], strict=True)
        starts = [lengths[slot] for slot in slots]
        tokens = _padded(rests, executor)  # [rows, rest]
        for cache in executor.caches if at == 0 else ():  # later rows find the prefix where it is
            cache.expand(list(slots), max(starts))
        same = len(set(starts)) == 1
        start_pos = starts[0] if same else torch.tensor(starts, device=tokens.device)
        h = executor.hidden(tokens, start_pos, max(starts) + tokens.shape[1])
        for row, (rest, text) in enumerate(zip(rests, owners, strict=True)):
            states[text].append(h[row, : len(rest)])
    flat = torch.cat([part for parts in states.values() for part in parts])  # [measured ids, dim]
    targets = torch.tensor([token for text in states for token in text.ids[text.start :]], device=flat.device)
    values = iter(read_back(executor.measured(flat, targets, measure)))
    return [(text, list(islice(values, len(text.ids) - text.start))) for text in states]


def _padded(rows: Sequence[Sequence[int]], executor: Executor) -> torch.Tensor:
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True).to(executor.device)


def _logprob(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.gather(-1, targets[:, None]) - log_norm(logits)


def _logprob_and_best(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Also 1 where the id is the first of the most probable ones, which is what greedy decoding takes."""
    return torch.cat((_logprob(logits, targets), (logits.argmax(dim=-1) == targets)[:, None].float()), dim=-1)
