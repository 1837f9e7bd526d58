"""Log-probabilities of given ids: of each id, of continuations, and of texts of any length.

All functions accept ids. Log-probabilities are natural logarithms, of the raw logits (temperature 1), computed in
float32 and summed in float64. Under torchrun every rank makes the same calls and gets the same numbers. The KV cache is
overwritten.

The functions raise FloatingPointError if logits are not finite. If memory runs out in a model of `Llama.build`, they
raise InsufficientMemoryError.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch.nn.utils.rnn import pad_sequence

from llama.accelerate.executor import Executor, Measure
from llama.console import progress
from llama.engine.engine import Engine
from llama.engine.logprobs import log_norm, score
from llama.engine.requests import Alternatives, alternatives, check_alternatives, check_list, read_ids
from llama.engine.worker import not_finite, read_back
from llama.errors import explain_oom
from llama.options import check_int
from llama.params import ModelArgs
from llama.tokenizer import Tokenizer

# Positions per forward pass, including padding. A text with more gets a pass of its own. A higher limit is not faster.
BATCH_TOKENS = 4096


def token_logprobs(
    llama: Engine, token_lists: Sequence[Sequence[int]], *, bos: bool | None = None
) -> list[list[float]]:
    """The log-probability of each id given the ids before it: for each list of n ids, a list of n numbers.

        ids      t0       t1          t2             t3
        with BOS t0|BOS   t1|BOS t0   t2|BOS t0 t1   t3|BOS t0 t1 t2
        without  0.0      t1|t0       t2|t0 t1       t3|t0 t1 t2

    bos: whether to add BOS before each list that does not begin with it. None adds it if the tokenizer does. The first
        id of a list without added BOS has no context, so its number is 0.0.

    `generate(..., max_gen_len=0, logprobs=True, echo=True)` returns the same for ids that begin with BOS.

    Raises ValueError or TypeError for ids outside the vocabulary, and for lists that are empty or longer than
    max_seq_len (use `rolling_loglikelihood`).
    """
    texts, prefixes = [], []
    check_list("token_lists", "lists of ids", token_lists)
    for i, token_list in enumerate(token_lists):
        ids = read_ids(f"list {i}", token_list, llama.model.params)
        full = with_bos(llama.tokenizer, ids, bos)
        texts.append(Text(tuple(full), 1))
        prefixes.append([0.0] if len(full) == len(ids) else [])  # for a first id without context
    return [
        prefix + [logprob for (logprob,) in values]
        for prefix, values in zip(prefixes, measure_texts(llama, texts, _logprob), strict=True)
    ]


def loglikelihood(
    llama: Engine, requests: Sequence[tuple[Sequence[int], Sequence[int]]], *, bos: bool | None = None
) -> list[tuple[float, bool]]:
    """(log-likelihood, is_greedy) of each request. A request is a pair (context ids, continuation ids).

        context       c0  c1  c2
        continuation              a0  a1          -> log p(a0|c0 c1 c2) + log p(a1|c0 c1 c2 a0)

    is_greedy: whether greedy decoding after the context would generate exactly the continuation. An empty continuation
    has (0.0, True).

    The rules are those of EleutherAI's lm-evaluation-harness:
    - An empty context is replaced with BOS, or with EOS if there is no BOS. If the continuation begins with that id,
      this id becomes the context and is not scored.
    - The input is the context and the continuation without its last id. If that is longer than max_seq_len, the
      beginning of the context is dropped.

    bos: as in `token_logprobs`, for contexts that are not empty.

    Equal contexts are computed once. Raises ValueError or TypeError for ids outside the vocabulary, and for
    continuations longer than max_seq_len.
    """
    check_bos(bos)
    check_list("requests", "pairs of lists of ids", requests)
    limit = llama.model.params.max_seq_len
    texts = []
    for i, request in enumerate(requests):
        if len(request) != 2:
            raise ValueError(f"request {i} has {len(request)} parts, expected (context ids, continuation ids)")
        context, continuation = (
            read_ids(f"{part} {i}", ids, llama.model.params, any_length=True)
            for part, ids in zip(("context", "continuation"), request, strict=True)
        )
        if context:
            context = with_bos(llama.tokenizer, context, bos)
        elif continuation and continuation[0] == prefix_id(llama.tokenizer):
            context, continuation = continuation[:1], continuation[1:]
        else:
            context = [prefix_id(llama.tokenizer)]
        if len(continuation) > limit:
            raise ValueError(
                f"continuation {i} has {len(continuation)} ids, but max_seq_len is {limit}: build with a larger one, "
                "or use rolling_loglikelihood"
            )
        ids = (context + continuation)[-(limit + 1) :]
        texts.append(Text(tuple(ids), len(ids) - len(continuation)))
    return [
        (math.fsum(logprob for logprob, _ in values), all(is_best for _, is_best in values))
        for values in measure_texts(llama, texts, _logprob_and_best)
    ]


def rolling_loglikelihood(
    llama: Engine, token_lists: Sequence[Sequence[int]], stride: int | None = None, *, bos: bool | None = None
) -> list[float]:
    """The log-likelihood of each list of ids, of any length: the sum of the log-probabilities of its ids.

    Perplexity is exp(-sum / number of ids scored).

    The ids are computed in windows of max_seq_len. Each id is scored once, in the first window that can score it, given
    the ids before it in that window. The first window scores up to max_seq_len ids, each later one up to `stride`.
    An example with max_seq_len 4. t0, which may be BOS, is not scored:

        ids           t0  t1  t2  t3  t4  t5  t6  t7
        stride 4      [-----input-----]                scores t1 to t4
                                  [-----input-----]    scores t5 to t7: the last window is filled up with context
        stride 2      [-----input-----]                scores t1 to t4
                              [-----input-----]        scores t5 and t6
                                  [-----input-----]    scores t7

    stride: 1 to max_seq_len. None means max_seq_len, which makes the fewest windows. EleutherAI's
        lm-evaluation-harness does the same. With a smaller stride every id has at least max_seq_len - stride ids of
        context, if the text has that many before it, and the computation takes max_seq_len / stride times as long.
    bos: as in `token_logprobs`. Without BOS the first id is not scored. The result for an empty list is 0.0.

    Raises ValueError or TypeError for a stride out of range and for ids outside the vocabulary.
    """
    limit = llama.model.params.max_seq_len
    check_stride(stride, limit)
    texts: list[Text] = []
    list_indices = []
    check_list("token_lists", "lists of ids", token_lists)
    for i, ids in enumerate(token_lists):
        full = with_bos(llama.tokenizer, read_ids(f"list {i}", ids, llama.model.params, any_length=True), bos)
        for window in windows(full, limit, stride or limit):
            texts.append(window)
            list_indices.append(i)
    logprobs: list[list[float]] = [[] for _ in token_lists]
    for i, values in zip(list_indices, measure_texts(llama, texts, _logprob), strict=True):
        logprobs[i] += [logprob for (logprob,) in values]
    return [math.fsum(each) for each in logprobs]


def top_logprobs(llama: Engine, ids: Sequence[int], k: int) -> list[Alternatives]:
    """The k most probable next ids after each prefix: for each of n ids, k pairs (id, log-probability), best first.

        ids      t0        t1           t2
        returns  ?|t0      ?|t0 t1      ?|t0 t1 t2

    BOS is not added. k: 1 to the size of the vocabulary. Raises ValueError or TypeError for ids that are empty, longer
    than max_seq_len or outside the vocabulary, and for a k out of range.
    """
    check_alternatives("k", k, 1, llama.model.params)
    text = read_ids("the text", ids, llama.model.params)
    # Append a placeholder id, so that the prediction after the last id is returned too.
    (values,) = measure_texts(llama, [Text((*text, 0), 1)], partial(score, k=k))
    return [alternatives(row, k)[1] for row in values]


@explain_oom
@torch.inference_mode()
def hidden_states(llama: Engine, ids: Sequence[int]) -> torch.Tensor:
    """The hidden states after the final norm, which are the input of the output layer.

    Returns [1, n, dim] in the model's dtype, on its device. BOS is not added. The logits are
    `llama.executor.logits(hidden_states(llama, ids))`. Raises as `top_logprobs` does.
    """
    text = read_ids("the text", ids, llama.model.params)
    with llama.scheduler.one_call(), llama.scheduler.exclusive(text):
        return llama.executor.hidden(torch.tensor([text], device=llama.executor.device), 0, len(text))


def check_bos(bos: bool | None) -> None:
    if bos not in (True, False, None):
        raise TypeError(f"bos is {bos!r}, expected True or False")


def check_stride(stride: int | None, max_seq_len: int) -> None:
    if stride is not None:
        check_int("stride", stride, 1)
        if stride > max_seq_len:
            raise ValueError(
                f"stride is {stride}, but a window has only max_seq_len {max_seq_len} ids, so some would not be scored"
            )


def prefix_id(tokenizer: Tokenizer) -> int:
    """The id that replaces an empty context: BOS, or EOS in vocabularies without BOS."""
    return tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id


def with_bos(tokenizer: Tokenizer, ids: list[int], bos: bool | None = None) -> list[int]:
    """Add BOS before `ids`, unless they begin with it.

    bos: None adds BOS if the tokenizer does. Raises ValueError for True if the vocabulary has no BOS.
    """
    check_bos(bos)
    if not (tokenizer.adds_bos if bos is None else bos) or ids[:1] == [tokenizer.bos_id]:
        return ids
    if tokenizer.bos_id < 0:
        raise ValueError("this tokenizer has no BOS: leave bos unset")
    return [tokenizer.bos_id, *ids]


# Computation ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Ids. Those from index `start` on are measured, each given the ids before it."""

    ids: tuple[int, ...]
    start: int


def windows(ids: list[int], max_seq_len: int, stride: int) -> Iterator[Text]:
    """Yield the windows of `rolling_loglikelihood`: up to max_seq_len ids of input, and the id that follows them."""
    scored = 1
    while scored < len(ids):
        end = min(len(ids), scored + (max_seq_len if scored == 1 else stride))
        begin = max(0, end - 1 - max_seq_len)
        yield Text(tuple(ids[begin:end]), scored - begin)
        scored = end


@dataclass(frozen=True)
class Group:
    """Texts that begin with the same `prefix`, which is computed once for all of them.

    The input of a text is all its ids but the last, which is only predicted. A text without shared prefix is a group of
    its own: its prefix is its whole input. In other groups each text has a suffix: its input after the prefix. It may
    be empty.
    """

    prefix: tuple[int, ...]
    texts: list[Text]

    def suffix(self, text: Text) -> tuple[int, ...]:
        return text.ids[len(self.prefix) : -1]

    @property
    def suffix_lengths(self) -> list[int]:
        """The lengths of the suffixes that are not empty."""
        return [n for n in map(len, map(self.suffix, self.texts)) if n]


def measure_texts(llama: Engine, texts: Sequence[Text], measure: Measure) -> list[list[list[float]]]:
    """Measure ids. Returns for each text, in the given order, len(ids) - start rows of m numbers.

    measure: (logits [n, vocab], the ids that follow them [n]) -> [n, m], all fp32.

    Equal texts are computed once. Raises FloatingPointError if a number is not finite.
    """
    results: dict[Text, list[list[float]]] = {text: [] for text in texts}
    measured = [text for text in results if text.start < len(text.ids)]
    llama.executor.refresh()
    groups = [Group(text.ids[:-1], [text]) for text in measured] if llama.executor.is_aligned else _groups(measured)
    with llama.scheduler.one_call():
        for batch in progress(list(_batches(groups, llama.model.params)), "scoring"):
            with llama.scheduler.exclusive(batch):  # also waits for late ranks
                batch_results = _measure_batch(llama, batch, measure)
            for text, values in batch_results:
                results[text] = values
                if not all(math.isfinite(number) for row in values for number in row):
                    begin = ", ".join(map(str, text.ids[:8]))
                    for cache in llama.executor.caches:
                        cache.clear()
                    raise not_finite(f"in a text that begins with ids {begin}")
    return [results[text] for text in texts]


def _groups(texts: list[Text]) -> list[Group]:
    """Group texts with equal ids before `start`, if that saves at least an eighth of their positions."""
    by_context: dict[tuple[int, ...], list[Text]] = {}
    for text in texts:
        by_context.setdefault(text.ids[: text.start], []).append(text)
    groups = []
    for context, members in by_context.items():
        n_positions = sum(len(text.ids) - 1 for text in members)
        if (len(members) - 1) * len(context) * 8 >= n_positions:
            # Start with a new group. Divide large groups, to limit the memory of hidden states.
            n_measured = BATCH_TOKENS
            for text in members:
                if n_measured >= BATCH_TOKENS:
                    groups.append(Group(context, []))
                    n_measured = 0
                groups[-1].texts.append(text)
                n_measured += len(text.ids) - text.start
        else:
            groups += [Group(text.ids[:-1], [text]) for text in members]
    return groups


def _batches(groups: list[Group], args: ModelArgs) -> Iterator[list[Group]]:
    """Yield batches of groups, longest prefixes first.

    They are as large as the cache and BATCH_TOKENS allow in both passes of `_measure_batch`. If a batch has several
    groups, all suffixes must fit one pass, because that pass overwrites the prefixes.
    """
    batch: list[Group] = []
    suffixes: list[int] = []  # lengths
    for group in sorted(groups, key=lambda group: -len(group.prefix)):
        extended = suffixes + group.suffix_lengths
        longest_suffix, longest_prefix = max(extended, default=0), len((batch or [group])[0].prefix)
        if batch and (
            max(len(batch) + 1, len(extended)) > args.max_batch_size
            or longest_prefix * (len(batch) + 1) > BATCH_TOKENS
            or longest_suffix * len(extended) > BATCH_TOKENS
            or longest_prefix + longest_suffix > args.max_seq_len
        ):
            yield batch
            batch, extended = [], group.suffix_lengths
        batch.append(group)
        suffixes = extended
    if batch:
        yield batch


@explain_oom
@torch.inference_mode()
def _measure_batch(llama: Engine, batch: list[Group], measure: Measure) -> list[tuple[Text, list[list[float]]]]:
    """Compute the prefixes, one row each, then the suffixes, each after a copy of its prefix in the cache.

        prefix  t0 t1 t2        suffix  t3 t4        not an input  t5
        start 3: the hidden state of t2 predicts t3, those of t3 and t4 predict t4 and t5

    Rows are padded on the right. The causal mask hides the padding, and its hidden states are not used.
    """
    executor = llama.executor
    lengths = [len(group.prefix) for group in batch]
    h = executor.hidden(_padded([group.prefix for group in batch], executor), 0, max(lengths))  # [groups, seqlen, dim]
    rows = [(slot, group, text) for slot, group in enumerate(batch) for text in group.texts]
    states = {text: [h[slot, text.start - 1 : lengths[slot]]] for slot, _, text in rows}
    suffixes = [(slot, group.suffix(text), text) for slot, group, text in rows if group.suffix(text)]
    # Only the suffixes of a single group may need several passes (see `_batches`).
    size = min(
        executor.model.params.max_batch_size,
        max(1, BATCH_TOKENS // max((len(suffix) for _, suffix, _ in suffixes), default=1)),
    )
    for start in range(0, len(suffixes), size):
        slots, inputs, owners = zip(*suffixes[start : start + size], strict=True)
        prefix_lengths = [lengths[slot] for slot in slots]
        tokens = _padded(inputs, executor)  # [rows, suffix]
        # A suffix is written after its prefix, so later passes of a single group find the prefix in the cache.
        for cache in executor.caches if start == 0 else ():
            cache.expand(list(slots), max(prefix_lengths))
        is_uniform = len(set(prefix_lengths)) == 1
        start_pos = prefix_lengths[0] if is_uniform else torch.tensor(prefix_lengths, device=tokens.device)
        h = executor.hidden(tokens, start_pos, max(prefix_lengths) + tokens.shape[1])
        for row, (suffix, text) in enumerate(zip(inputs, owners, strict=True)):
            states[text].append(h[row, : len(suffix)])
    flat = torch.cat([part for parts in states.values() for part in parts])  # [measured ids, dim]
    targets = torch.tensor([token for text in states for token in text.ids[text.start :]], device=flat.device)
    values = iter(read_back(executor.measured(flat, targets, measure)))
    return [(text, list(islice(values, len(text.ids) - text.start))) for text in states]


def _padded(rows: Sequence[Sequence[int]], executor: Executor) -> torch.Tensor:
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True).to(executor.device)


def _logprob(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """logits [n, vocab], targets [n] -> [n, 1]."""
    return logits.gather(-1, targets[:, None]) - log_norm(logits)


def _logprob_and_best(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """logits [n, vocab], targets [n] -> [n, 2]: the log-probability, and 1 if greedy decoding chooses the target."""
    return torch.cat((_logprob(logits, targets), (logits.argmax(dim=-1) == targets)[:, None].float()), dim=-1)
