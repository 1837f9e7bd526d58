"""Changes that programs make to a model's modules and weights take effect, compiled, uncompiled and plain.

The expected results are those of transformers' Llama with the same change of its weights.
"""

# nn.Module types attributes, which these tests use as programs do, as Tensor | Module.
# mypy: disable-error-code="union-attr,index,arg-type,operator,call-overload"

import gc
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from helpers.peers import transformers_model
from helpers.ranks import run_ranks
from llama import Llama, ModelArgs, Transformer
from llama import model as llama_model
from llama.model import Attention, FeedForward, RMSNorm, TransformerBlock

IDS = [1, 70, 400, 33, 9, 250, 8, 77]
FORMS: list[dict[str, Any]] = [{}, {"compile": False}, {"plain": True}]
Weights = dict[str, torch.Tensor]


def logprobs(llama: Llama) -> torch.Tensor:
    """Log-probabilities of IDS, computed in a prefill."""
    _, scores = llama.generate([IDS], 0, logprobs=True, echo=True)
    assert scores is not None
    return torch.tensor(scores[0][1:])


def decoded(llama: Llama) -> tuple[list[int], torch.Tensor]:
    """Six greedy ids after IDS and their log-probabilities, computed in decode steps."""
    ids, scores = llama.generate([IDS], 6, temperature=0, logprobs=True)
    assert scores is not None
    return ids[0], torch.tensor(scores[0])


def oracle(folder: Path, copy: Path, edit: Callable[[Weights], Any]) -> tuple[torch.Tensor, Any]:
    """Edit a copy of the checkpoint. Return transformers' log-probabilities of IDS on it, and its model."""
    shutil.copytree(folder, copy)
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True)
    edit(weights)
    torch.save(weights, copy / "consolidated.00.pth")
    theirs = transformers_model(copy)
    with torch.inference_mode():
        logits = theirs(torch.tensor([IDS])).logits[0].log_softmax(-1)
    return logits[:-1].gather(-1, torch.tensor(IDS[1:])[:, None])[:, 0], theirs


WQ, WO, W1 = "layers.1.attention.wq.weight", "layers.0.attention.wo.weight", "layers.1.feed_forward.w1.weight"


def zero(weights: Weights) -> None:
    weights[WO].data.zero_()


def write_rows(weights: Weights) -> None:
    weights[W1].data[:20] = 0.5


def copy_into(weights: Weights) -> None:
    with torch.no_grad():
        weights[WQ].copy_(weights[WQ].flip(0).clone())


def scale_norm(weights: Weights) -> None:
    weights["norm.weight"].data.mul_(1.5)
    weights["layers.0.ffn_norm.weight"].data.mul_(0.5)


def scale_embedding(weights: Weights) -> None:
    weights["tok_embeddings.weight"].data[70] *= 3
    weights["output.weight"].data[5] += 0.25


EDITS = [zero, write_rows, copy_into, scale_norm, scale_embedding]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("edit", EDITS)
def test_weights_are_written_in_place(
    edit: Callable[[Weights], None],
    form: dict[str, Any],
    build: Callable[..., Llama],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    llama = build("gqa", max_seq_len=32, max_batch_size=2, **form)
    before = logprobs(llama)
    edit(dict(llama.model.named_parameters()))
    expected, theirs = oracle(checkpoint("gqa"), tmp_path / "edited", edit)
    torch.testing.assert_close(logprobs(llama), expected, rtol=0, atol=1e-4)
    assert (before - expected).abs().max() > 1e-2
    ids, scores = decoded(llama)
    with torch.inference_mode():
        after = theirs(torch.tensor([IDS + ids])).logits[0, len(IDS) - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(scores, after.gather(-1, torch.tensor(ids)[:, None])[:, 0], rtol=0, atol=1e-4)
    assert after.argmax(-1).tolist() == ids


def load_part(model: Any, weights: Weights) -> None:
    missing, unexpected = model.load_state_dict({WQ: weights[WQ], W1: weights[W1]}, strict=False)
    assert unexpected == [] and WQ not in missing


def load_assigned(model: Any, weights: Weights) -> None:
    model.load_state_dict({WQ: weights[WQ], W1: weights[W1]}, strict=False, assign=True)


def load_all(model: Any, weights: Weights) -> None:
    model.load_state_dict(weights)


def set_data(model: Any, weights: Weights) -> None:
    for name in (WQ, W1):
        model.get_parameter(name).data = weights[name].clone()


def new_parameters(model: Any, weights: Weights) -> None:
    model.layers[1].attention.wq.weight = nn.Parameter(weights[WQ].clone())
    model.layers[1].feed_forward.w1.weight = nn.Parameter(weights[W1].clone())


def new_modules(model: Any, weights: Weights) -> None:
    for owner, name, weight in (
        (model.layers[1].attention, "wq", weights[WQ]),
        (model.layers[1].feed_forward, "w1", weights[W1]),
    ):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.clone())
        setattr(owner, name, linear)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("replace", [load_part, load_assigned, load_all, set_data, new_parameters, new_modules])
def test_weights_are_replaced(
    replace: Callable[[Any, Weights], None],
    form: dict[str, Any],
    dtype: str,
    build: Callable[..., Llama],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    def edit(weights: Weights) -> None:
        weights[WQ], weights[W1] = weights[WQ].flip(0).clone(), weights[W1] * 2

    llama = build("gqa", max_seq_len=32, max_batch_size=2, dtype=dtype, **form)
    before = logprobs(llama)
    expected, _ = oracle(checkpoint("gqa"), tmp_path / "edited", edit)
    weights = torch.load(tmp_path / "edited" / "consolidated.00.pth", weights_only=True)
    replace(llama.model, {name: w.to(llama.executor.device, getattr(torch, dtype)) for name, w in weights.items()})
    error = (logprobs(llama) - expected).abs().max()
    assert error < (1e-4 if dtype == "float32" else (before - expected).abs().max() / 4)


def halve(module: nn.Module, args: Any, value: torch.Tensor) -> torch.Tensor:
    return value / 2


# Modules that get the hook `halve`, and the change of weights that has the same effect.
HOOKS: list[tuple[str, Callable[[Weights], Any]]] = [
    ("layers.0.attention.wo", lambda w: w[WO].div_(2)),
    ("layers.1.feed_forward.w1", lambda w: w[W1].div_(2)),
    ("layers.1.attention.wq", lambda w: w[WQ].div_(2)),
    ("layers.0.attention", lambda w: w[WO].div_(2)),
    ("norm", lambda w: w["norm.weight"].div_(2)),
    ("output", lambda w: w["output.weight"].div_(2)),
    ("tok_embeddings", lambda w: w["tok_embeddings.weight"].div_(2)),
    ("", lambda w: w["output.weight"].div_(2)),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("name", "edit"), HOOKS)
def test_hooks_act_until_they_are_removed(
    name: str,
    edit: Callable[[Weights], Any],
    form: dict[str, Any],
    build: Callable[..., Llama],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    llama = build("gqa", max_seq_len=32, max_batch_size=2, **form)
    before = decoded(llama)
    hook = llama.model.get_submodule(name).register_forward_hook(halve)
    expected, theirs = oracle(checkpoint("gqa"), tmp_path / "edited", edit)
    torch.testing.assert_close(logprobs(llama), expected, rtol=0, atol=1e-4)
    ids, _ = decoded(llama)
    with torch.inference_mode():
        assert theirs(torch.tensor([IDS + ids])).logits[0, len(IDS) - 1 : -1].argmax(-1).tolist() == ids
    both, _ = llama.generate([IDS, IDS[:3]], 6, temperature=0)  # rows at different positions
    assert both[0] == ids and both[1] == llama.generate([IDS[:3]], 6, temperature=0)[0][0]
    hook.remove()
    after = decoded(llama)
    assert after[0] == before[0] and torch.equal(after[1], before[1])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_weights_replaced_during_a_stream_act_in_the_next_step(
    form: dict[str, Any], build: Callable[..., Llama]
) -> None:
    """The new weights of the layers are zero, so that the layers add nothing to the embedding."""
    llama = build("gqa", max_seq_len=32, max_batch_size=2, **form)
    steps = llama.stream([IDS], max_gen_len=20, temperature=0)
    (first,) = next(steps)
    model, newest = llama.model, first.id
    for layer in model.layers:
        layer.attention.wo.weight.data = torch.zeros_like(layer.attention.wo.weight)
        layer.feed_forward.w2.weight = nn.Parameter(torch.zeros_like(layer.feed_forward.w2.weight))
        layer.attention.cache.k = layer.attention.cache.k.clone()
    model.tok_embeddings.weight = nn.Parameter(model.tok_embeddings.weight.flip(0).clone())
    gc.collect()
    for (token,) in steps:
        with torch.inference_mode():
            logits = model.output(model.norm(model.tok_embeddings(torch.tensor([newest]))))
        newest = int(logits.argmax())
        assert token.id == newest


def test_another_model_takes_over_a_stream(build: Callable[..., Llama]) -> None:
    """The other model fills its own cache, even if its count of passes equals that of the first model."""
    llama, other = (build("gqa", max_seq_len=32, max_batch_size=2) for _ in "ab")
    expected = [token.id for (token,) in llama.stream([IDS], max_gen_len=12, temperature=0)]
    steps = llama.stream([IDS], max_gen_len=12, temperature=0)
    found = [next(steps)[0].id for _ in range(3)]
    other.model.passes = llama.model.passes
    llama.model = other.model
    assert found + [token.id for (token,) in steps] == expected


def grow_positions(model: Any) -> None:
    model.params.max_seq_len = 64


def widen_embedding(model: Any) -> None:
    model.tok_embeddings.weight = nn.Parameter(torch.ones(512, model.params.dim + 8))


def narrow_embedding(model: Any) -> None:
    model.tok_embeddings.weight = nn.Parameter(torch.ones(512, model.params.dim - 8))


def shorten_angles(model: Any) -> None:
    model.freqs_cis = model.freqs_cis[:4]


def narrow_angles(model: Any) -> None:
    model.freqs_cis = model.freqs_cis[:, ::2].contiguous()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("change", [grow_positions, widen_embedding, narrow_embedding, shorten_angles, narrow_angles])
def test_inconsistent_sizes_raise(
    change: Callable[[Any], None], form: dict[str, Any], build: Callable[..., Llama]
) -> None:
    """Checked for a decode step, too, in which native.c would otherwise read out of bounds."""
    llama = build("gqa", max_seq_len=32, max_batch_size=2, **form)
    change(llama.model)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        llama.generate([[5]], 40, temperature=0)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_angles_in_float64_act(form: dict[str, Any], build: Callable[..., Llama]) -> None:
    llama = build("gqa", max_seq_len=32, max_batch_size=2, **form)
    before = decoded(llama)
    llama.model.freqs_cis = llama.model.freqs_cis.to(torch.complex128)
    after = decoded(llama)
    assert after[0] == before[0]
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-4)


def test_a_bias_must_be_a_parameter(build: Callable[..., Llama]) -> None:
    layer: Any = build("gqa", max_seq_len=32).model.layers[0]
    with pytest.raises(TypeError, match="cannot assign"):
        layer.attention.wq.bias = torch.ones(128)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_weights_refuse_foreach_and_numpy_writes(scheme: str, build: Callable[..., Llama]) -> None:
    layer: Any = build("gqa", max_seq_len=32, quantize=scheme).model.layers[0]
    weight = layer.attention.wq.weight
    with pytest.raises(RuntimeError, match="cannot be written"):
        torch._foreach_zero_([weight])
    with pytest.raises(ValueError, match="read-only"):
        weight.detach().numpy()[0] = 0


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_layers_are_deleted(
    form: dict[str, Any], build: Callable[..., Llama], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    llama = build("gqa", max_seq_len=32, max_batch_size=2, **form)
    decoded(llama)
    del llama.model.layers[0]
    shutil.copytree(checkpoint("gqa"), tmp_path / "fewer")
    weights = torch.load(tmp_path / "fewer" / "consolidated.00.pth", weights_only=True)
    kept = {}
    for name, weight in weights.items():
        if not name.startswith("layers."):
            kept[name] = weight
        elif (at := int(name.split(".")[1])) > 0:
            kept[name.replace(f"layers.{at}", f"layers.{at - 1}")] = weight
    params = json.loads((tmp_path / "fewer" / "params.json").read_text())
    (tmp_path / "fewer" / "params.json").write_text(json.dumps(params | {"n_layers": params["n_layers"] - 1}))
    torch.save(kept, tmp_path / "fewer" / "consolidated.00.pth")
    with torch.inference_mode():
        logits = transformers_model(tmp_path / "fewer")(torch.tensor([IDS])).logits[0].log_softmax(-1)
    expected = logits[:-1].gather(-1, torch.tensor(IDS[1:])[:, None])[:, 0]
    torch.testing.assert_close(logprobs(llama), expected, rtol=0, atol=1e-4)


class UsersBlock(nn.Module):
    """A block as users write it. It gets the arguments of Meta's code: start_pos is one int, the mask is additive."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, start_pos: int, freqs_cis: torch.Tensor, mask: Any) -> torch.Tensor:
        assert isinstance(start_pos, int) and freqs_cis.is_complex()
        assert x.shape[1] == 1 or (mask.shape == (x.shape[1], start_pos + x.shape[1]) and mask.is_floating_point())
        y: torch.Tensor = self.block(x, start_pos, freqs_cis, mask)
        return y


class UsersModel(nn.Module):
    """A model as users write it, which negates the logits of another one."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model, self.params = model, model.params

    def forward(self, tokens: torch.Tensor, start_pos: int) -> torch.Tensor:
        return -self.model(tokens, start_pos)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_modules_that_the_user_wrote(form: dict[str, Any], build: Callable[..., Llama]) -> None:
    llama = build("gqa", max_seq_len=32, max_batch_size=3, **form)
    prompts = [IDS, IDS[:3], IDS[:3]]
    expected = llama.generate(prompts, 5, temperature=0)
    llama.model.layers[1] = UsersBlock(llama.model.layers[1])
    assert llama.generate(prompts, 5, temperature=0) == expected
    negative = build("gqa", max_seq_len=32, max_batch_size=3, plain=True)
    negative.model.output.weight.data.neg_()
    llama.model = UsersModel(llama.model)  # type: ignore[assignment]
    assert llama.generate(prompts, 5, temperature=0) == negative.generate(prompts, 5, temperature=0)
    with pytest.raises(TypeError, match="expected a Transformer"):
        llama.model = 5  # type: ignore[assignment]


def test_a_model_that_cannot_run_is_usable_after_the_change_is_undone(build: Callable[..., Llama]) -> None:
    llama = build("gqa", max_seq_len=32, max_batch_size=2)
    before = decoded(llama)
    layer = llama.model.layers[0].feed_forward
    kept = layer.w2
    layer.w2 = nn.Linear(3, 5, device=llama.executor.device)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        decoded(llama)
    layer.w2 = kept
    after = decoded(llama)
    assert after[0] == before[0] and torch.equal(after[1], before[1])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", ["n_local_heads", "n_local_kv_heads", "head_dim"])
def test_head_counts_that_do_not_match_the_weights_are_refused(
    name: str, form: dict[str, Any], build: Callable[..., Llama]
) -> None:
    """The error is that of `view`, as in Meta's code."""
    llama = build("gqa", max_seq_len=32, max_batch_size=2, **form)
    before, attention = decoded(llama), llama.model.layers[1].attention
    setattr(attention, name, getattr(attention, name) // 2)
    with pytest.raises(RuntimeError, match=r"shape .* is invalid for input of size"):
        decoded(llama)
    setattr(attention, name, getattr(attention, name) * 2)
    after = decoded(llama)
    assert after[0] == before[0] and torch.equal(after[1], before[1])


@pytest.mark.parametrize("form", [{}, {"compile": False}], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_weights_are_read_and_refuse_to_be_written(
    scheme: str, form: dict[str, Any], build: Callable[..., Llama]
) -> None:
    llama = build("gqa", max_seq_len=32, max_batch_size=2, quantize=scheme, **form)
    full = build("gqa", max_seq_len=32, max_batch_size=2)
    assert llama.model.state_dict().keys() == full.model.state_dict().keys()
    weight = llama.model.layers[1].attention.wk.weight
    original = full.model.layers[1].attention.wk.weight
    step = original.abs().max() / (127 if scheme == "int8" else 7)
    assert weight.shape == original.shape and (weight - original).abs().max() < step
    writes: list[Callable[[], Any]] = [
        lambda: weight.data.zero_(),
        lambda: weight.data[0].zero_(),
        lambda: weight.data.__setitem__(slice(0, 3), 0),
        lambda: weight.copy_(original),
        lambda: setattr(weight, "data", original),
        lambda: weight.requires_grad_(True),
        lambda: llama.model.load_state_dict(full.model.state_dict()),
    ]
    for write in writes:
        with pytest.raises(RuntimeError, match="its original is gone and it cannot be written: build without quantize"):
            write()
    with pytest.raises(TypeError, match=r"quantized weights stay torch\.float32"):
        llama.model.half()
    before = decoded(llama)
    llama.model.layers[1].attention.wk.weight = nn.Parameter(weight.clone(), requires_grad=False)
    ids, scores = decoded(llama)
    assert ids == before[0]
    torch.testing.assert_close(scores, before[1], rtol=0, atol=1e-2 if scheme == "int4" else 1e-3)
    hook = llama.model.layers[0].feed_forward.register_forward_hook(lambda m, a, y: torch.zeros_like(y))
    assert not torch.equal(decoded(llama)[1], scores)
    hook.remove()


def changed_on_a_rank(folder: Path, form: dict[str, Any]) -> list[tuple[list[float], list[list[int]]]]:
    """Results of one model, first unchanged, then after each of several changes that every rank makes to its slices."""
    llama = Llama.build(folder, max_seq_len=32, max_batch_size=2, **form)
    model: Any = llama.model
    found = []

    def note() -> None:
        found.append((logprobs(llama).tolist(), llama.generate([IDS, IDS[:3]], 5, temperature=0)[0]))

    note()
    model.layers[0].attention.wo.weight.data.zero_()
    note()
    model.layers[1].feed_forward.w1.weight.data.mul_(2)
    note()
    model.load_state_dict({name: w * 1.25 for name, w in model.state_dict().items() if "wv" in name}, strict=False)
    note()
    model.layers[0].feed_forward.w3.weight = nn.Parameter(model.layers[0].feed_forward.w3.weight * 0.5)
    note()
    hook = model.layers[1].attention.wq.register_forward_hook(halve)
    note()
    model.layers[0] = UsersBlock(model.layers[0])
    note()
    hook.remove()
    del model.layers[0]
    note()
    llama.close()
    return found


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_changes_on_two_ranks_are_those_on_one(form: dict[str, Any], checkpoint: Callable[..., Path]) -> None:
    """The expected results are those of one rank with plain layers, which other tests compare with transformers."""
    expected = changed_on_a_rank(checkpoint("gqa"), {"plain": True})
    for before, after in pairwise(
        expected[:-2]
    ):  # the last two wrap a layer, which changes nothing, and delete a layer
        assert max(abs(a - b) for a, b in zip(before[0], after[0], strict=True)) > 1e-3
    for found in run_ranks(2, changed_on_a_rank, checkpoint("gqa"), form):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), rtol=0, atol=1e-4)
            assert ours[1] == theirs[1]


# A model that the user builds -----------------------------------------------------------------------

SMALL: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512, "multiple_of": 32}


def losses() -> list[float]:
    """The losses of ten steps of SGD on one batch."""
    torch.manual_seed(1)
    model = Transformer(ModelArgs(**SMALL, max_seq_len=16, max_batch_size=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    tokens = torch.tensor([IDS, IDS[::-1]])
    found = []
    for _ in range(10):
        logits = model(tokens, 0)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def losses_of_a_rank() -> list[float]:
    from llama.parallel.groups import connect_ranks, current_world, init_process_groups, shutdown

    connect_ranks(current_world())
    init_process_groups(current_world(), torch.device("cpu"))
    found = losses()
    shutdown()
    return found


def test_a_model_trains_alike_on_one_rank_and_on_two() -> None:
    alone = losses()
    assert alone == sorted(alone, reverse=True) and alone[-1] < alone[0] - 0.5
    for found in run_ranks(2, losses_of_a_rank):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(alone), rtol=0, atol=1e-4)


def test_gradients_are_those_of_transformers(build: Callable[..., Llama], checkpoint: Callable[..., Path]) -> None:
    llama, theirs = build("gqa", max_seq_len=32, max_batch_size=1), transformers_model(checkpoint("gqa"))
    assert not any(weight.requires_grad for weight in llama.model.parameters())
    llama.model.requires_grad_(True)
    tokens = torch.tensor([IDS])
    for logits in (llama.model(tokens.to(llama.executor.device), 0), theirs(tokens).logits):
        nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:].to(logits.device)).backward()
    pairs = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "norm.weight": "model.norm.weight",
        "layers.0.attention.wv.weight": "model.layers.0.self_attn.v_proj.weight",
        WO: "model.layers.0.self_attn.o_proj.weight",
        W1: "model.layers.1.mlp.gate_proj.weight",
        "layers.1.feed_forward.w2.weight": "model.layers.1.mlp.down_proj.weight",
        "layers.0.attention_norm.weight": "model.layers.0.input_layernorm.weight",
    }
    for ours, other in pairs.items():
        found, expected = llama.model.get_parameter(ours).grad, theirs.get_parameter(other).grad
        assert found is not None and expected is not None and expected.abs().max() > 1e-4
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-4)


def test_a_model_is_built_loaded_and_run_without_build(
    build: Callable[..., Llama], checkpoint: Callable[..., Path]
) -> None:
    """As Meta's own `build` and conversion scripts do."""
    expected = build("gqa", max_seq_len=32, max_batch_size=2)
    params = json.loads((checkpoint("gqa") / "params.json").read_text())
    args = ModelArgs(max_seq_len=32, max_batch_size=2, **params)
    args.vocab_size = expected.tokenizer.n_words
    model = Transformer(args)
    model.load_state_dict(torch.load(checkpoint("gqa") / "consolidated.00.pth", weights_only=True), strict=False)
    llama = Llama(model, expected.tokenizer)
    assert llama.generate([IDS, IDS[:2]], 6, temperature=0) == expected.generate([IDS, IDS[:2]], 6, temperature=0)
    llama.close()
    assert torch.distributed.is_initialized()  # the other model is still open
    expected.generate([IDS], 2)


def test_modules_are_built_with_metas_arguments() -> None:
    args = ModelArgs(**SMALL, max_seq_len=16, max_batch_size=2)
    assert TransformerBlock(1, args).layer_id == 1 and Attention(args).n_rep == 2
    feed_forward = FeedForward(dim=64, hidden_dim=256, multiple_of=32, ffn_dim_multiplier=None)
    assert feed_forward.w1.weight.shape == (192, 64) and feed_forward(torch.ones(1, 64)).shape == (1, 64)
    x = torch.randn(3, 8)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(RMSNorm(8, eps=1e-5)(x), expected)
    assert RMSNorm(8).eps == 1e-6


def test_attributes_that_programs_read(build: Callable[..., Llama]) -> None:
    llama = build("gqa", max_seq_len=32, max_batch_size=2)
    model, tokens = llama.model, torch.tensor([IDS], device=llama.executor.device)
    block = model.layers[1]
    assert (model.vocab_size, model.n_layers, model.freqs_cis.shape) == (512, 2, (64, 8))
    assert (block.layer_id, block.n_heads, block.dim, block.head_dim) == (1, 8, 128, 16)
    attention = block.attention
    assert attention.cache_k.shape == attention.cache_v.shape == (2, 32, attention.n_local_kv_heads, 16)
    model(tokens, 0)
    assert attention.cache_k[0, : len(IDS)].abs().sum() > 0 and attention.cache_k[0, len(IDS) :].abs().sum() == 0
    attention.cache_k = torch.zeros_like(attention.cache_k)
    assert attention.cache_k.abs().sum() == 0
    with pytest.raises(ValueError, match="cache_v of shape"):
        attention.cache_v = torch.zeros(2, 3)
    h = model.tok_embeddings(tokens)
    mask = torch.full((len(IDS), len(IDS)), -torch.inf, device=h.device).triu(1)
    assert block(h, 0, model.freqs_cis[: len(IDS)], mask).shape == h.shape
    assert sum(p.numel() for p in model.parameters()) == sum(w.numel() for w in model.state_dict().values())
    assert len([name for name in model.state_dict() if name.startswith("layers.0.")]) == 9


# Threads ------------------------------------------------------------------------------------------


def test_threads_get_their_own_answers(build: Callable[..., Llama]) -> None:
    llama = build("gqa", max_seq_len=64, max_batch_size=2)
    prompts = [[1, *range(10 * i, 10 * i + 3 + i)] for i in range(1, 9)]
    expected = [llama.generate([prompt], 12, temperature=0)[0] for prompt in prompts]

    def streamed(prompt: list[int]) -> list[list[int]]:
        steps = llama.stream([prompt], max_gen_len=12, temperature=0)
        return [[token.id for step in steps for token in step if token.id is not None]]

    def broken(prompt: list[int]) -> None:
        for _ in llama.stream([prompt], max_gen_len=12, temperature=0):
            raise KeyError(prompt[0])

    with ThreadPoolExecutor(6) as pool:
        whole = [pool.submit(llama.generate, [prompt], 12, temperature=0) for prompt in prompts]
        streams = [pool.submit(streamed, prompt) for prompt in prompts]
        leaving = [pool.submit(broken, prompt) for prompt in prompts[:3]]
    assert [future.result()[0] for future in whole] == expected
    assert [future.result() for future in streams] == expected
    assert all(isinstance(future.exception(), KeyError) for future in leaving)


def call_in_orders(folder: Path) -> tuple[str, str, bool]:
    """Ranks 0 and 1 make two calls in different orders. Returns both errors, and whether the model is usable."""
    llama = Llama.build(folder, max_seq_len=32, max_batch_size=2)
    rank = torch.distributed.get_rank()
    calls = [[IDS], [IDS[:3]]]
    errors = []
    for prompts in calls if rank == 0 else calls[::-1]:
        try:
            llama.generate(prompts, 3, temperature=0)
            errors.append("")
        except RuntimeError as error:
            errors.append(str(error))
    usable = llama.generate([IDS], 3, temperature=0)[0] == llama.generate([IDS], 3, temperature=0)[0]
    llama.close()
    return errors[0], errors[1], usable


def test_calls_in_different_orders_are_refused_on_every_rank(checkpoint: Callable[..., Path]) -> None:
    for first, second, usable in run_ranks(2, call_in_orders, checkpoint("gqa")):
        for error in (first, second):
            assert error.startswith(
                "calls of several threads reached the ranks in different orders: make all calls from"
            )
            assert "\n" not in error
        assert usable


def call_during_a_stream(folder: Path) -> tuple[bool, bool, bool]:
    """Another thread calls while a stream is read. Returns whether it waits, and whether both are correct."""
    llama = Llama.build(folder, max_seq_len=32, max_batch_size=2)
    alone = [llama.generate([ids], 6, temperature=0)[0] for ids in (IDS, IDS[:3])]
    steps = llama.stream([IDS], max_gen_len=6, temperature=0)
    ids = [next(steps)[0].id]
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(llama.generate, [IDS[:3]], 6, temperature=0)
        time.sleep(0.3)
        waits = not other.done()
        ids += [token.id for step in steps for token in step]
        found = other.result()[0]
    llama.close()
    return waits, [ids] == alone[0], found == alone[1]


def test_on_two_ranks_a_call_waits_for_other_threads_streams(checkpoint: Callable[..., Path]) -> None:
    assert run_ranks(2, call_during_a_stream, checkpoint("gqa")) == [(True, True, True)] * 2


@pytest.mark.parametrize("name", ["repeat_kv", "apply_rotary_emb"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_functions_of_the_module_may_be_replaced(
    name: str, form: dict[str, Any], build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = build("gqa", max_seq_len=32, max_batch_size=2, **form)
    before, original, calls = decoded(llama), getattr(llama_model, name), 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args)

    monkeypatch.setattr(llama_model, name, counted)
    ids, scores = decoded(llama)
    assert ids == before[0] and calls
    torch.testing.assert_close(scores, before[1], rtol=0, atol=1e-4)


def test_pruning_acts(build: Callable[..., Llama]) -> None:
    """torch's pruning replaces the parameter and computes the weight in a pre-hook."""
    llama = build("gqa", max_seq_len=32, max_batch_size=2)
    before = logprobs(llama)
    llama.model.requires_grad_(False)
    prune.ln_structured(llama.model.layers[0].feed_forward.w2, "weight", amount=0.5, n=2, dim=0)
    pruned = logprobs(llama)
    assert (pruned - before).abs().max() > 1e-3
    prune.remove(llama.model.layers[0].feed_forward.w2, "weight")
    torch.testing.assert_close(logprobs(llama), pruned, rtol=0, atol=1e-4)
