"""Hugging Face folders: read, written, and back, against transformers itself."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, Phi3Config

from golden.make_checkpoint import MODELS as SEEDED
from golden.make_checkpoint import TOKENIZER
from helpers.paths import LLAMA3
from llama import Llama, ModelArgs, Tokenizer
from llama.chat.formats import ChatFormat, base_model_note
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.layout import tensor_shapes
from llama.convert import ConvertError, convert
from llama.tokenizer import find_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# What each model is like: open_llama_3b has heads of 100, TinyLlama one KV head for 8, Llama 3.2 tied embeddings.
MODELS: dict[str, Any] = {
    "llama-2": LlamaConfig(**SIZES | {"num_key_value_heads": 8}),
    "llama-3.2": LlamaConfig(**SIZES | {"tie_word_embeddings": True, "rope_parameters": LLAMA3_SCALING}),
    "open-llama-3b": LlamaConfig(
        **SIZES | {"hidden_size": 200, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 540}
    ),
    "linear": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    "nemo": MistralConfig(**SIZES, head_dim=12, sliding_window=None),
    "mistral-0.1": MistralConfig(**SIZES, sliding_window=64),
    "phi-3": Phi3Config(**SIZES, sliding_window=64),
    "narrow": LlamaConfig(**SIZES | {"intermediate_size": 38, "rms_norm_eps": 1e-6}),
}
IDS = torch.randint(512, (2, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """hugging_face(name): the folder that transformers wrote of a random model, in float32, with tok512's tokenizer."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "hf"
            torch.manual_seed(len(name))
            model = AutoModelForCausalLM.from_config(MODELS[name]).float()
            for key, weight in model.named_parameters():  # transformers starts norms at one and biases at nothing
                torch.nn.init.normal_(weight, 1.0 if "norm" in key else 0.0, 0.1 if "norm" in key else 0.05)
            model.save_pretrained(made[name])
            shutil.copy(TOKENIZER, made[name] / "tokenizer.model")
        return made[name]

    return make


def their_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(IDS).logits


def our_logits(folder: Path) -> torch.Tensor:
    llama = Llama.build(folder, max_seq_len=64, max_batch_size=2, dtype="float32", device="cpu")
    try:
        return llama.model.forward(IDS, 0)
    finally:
        llama.close()


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.abs().max() > 0.3  # a model that answers zeros agrees with everything
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def meta_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "consolidated.00.pth", weights_only=True)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_the_way_back(hugging_face: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """Hugging Face -> Meta -> Hugging Face -> Meta: the same logits in every folder, and the same bits."""
    folder = hugging_face(name)
    expected = their_logits(folder)
    convert(folder, tmp_path / "meta")
    same(our_logits(tmp_path / "meta"), expected)
    convert(tmp_path / "meta", tmp_path / "hf", to="hf", shards=3)
    same(their_logits(tmp_path / "hf"), expected)
    convert(tmp_path / "hf", tmp_path / "again", shards=2)
    same(our_logits(tmp_path / "again"), expected)

    back = weights(tmp_path / "hf")
    if name != "phi-3":  # which is written as a Mistral, unfused
        theirs = weights(folder)
        assert back.keys() == theirs.keys()
        assert all(torch.equal(back[key], theirs[key]) for key in theirs)
    convert(tmp_path / "again", tmp_path / "whole", shards=1)
    first, last = meta_weights(tmp_path / "meta"), meta_weights(tmp_path / "whole")
    assert first.keys() == last.keys() and all(torch.equal(first[key], last[key]) for key in first)
    assert ("output.weight" in first) == (name != "llama-3.2")


@pytest.mark.parametrize("name", SEEDED)
@pytest.mark.parametrize("shards", [1, 2])
def test_seeded_checkpoints_there_and_back(
    checkpoint: Callable[..., Path], golden: dict, tmp_path: Path, name: str, shards: int
) -> None:
    """Meta -> Hugging Face: transformers answers the logits that Meta's code answered. And back: bit for bit."""
    convert(checkpoint(name, shards), tmp_path / "hf", to="hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    for asked in golden[name]["logits"]:
        with torch.inference_mode():
            last = model(torch.tensor([asked["prompt_tokens"]])).logits[0, -1]
        best = last.topk(8)
        assert best.indices.tolist() == asked["last_top8_ids"]
        torch.testing.assert_close(best.values, torch.tensor(asked["last_top8_logits"]), rtol=0, atol=1e-4)
    convert(tmp_path / "hf", tmp_path / "meta")
    original = Checkpoint(checkpoint(name, 1))
    back = meta_weights(tmp_path / "meta")
    assert back.keys() == original.shapes.keys()
    assert all(torch.equal(back[key], original[0][key]) for key in back)


# Tokenizers ---------------------------------------------------------------------------------------

DIALOGS: list[Any] = [
    [{"role": "user", "content": " Hi there\n"}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Hello. "},
        {"role": "user", "content": "Bye"},
    ],
]
TEXTS = ["Permission is  hereby granted\n\n", "é\u2603\U0001f600 1234567", "def f(x):\n\treturn x", " a", ""]


def tiny(folder: Path, rows: int, tokenizer: Path) -> Path:
    """A Meta folder of the smallest model there can be, with a tokenizer."""
    folder.mkdir()
    params: dict[str, Any] = {
        "dim": 8,
        "n_layers": 1,
        "n_heads": 2,
        "vocab_size": rows,
        "hidden_dim": 8,
        "rope_theta": 500000.0,
    }
    params |= {"use_scaled_rope": rows > 128000}
    shapes = tensor_shapes(ModelArgs(**params))
    torch.save({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(params))
    shutil.copy(tokenizer, folder / tokenizer.name)
    return folder


@pytest.mark.parametrize(("rows", "tokenizer", "dialect"), [(512, TOKENIZER, "llama2"), (128256, LLAMA3, "llama3")])
def test_transformers_reads_the_same_ids(tmp_path: Path, rows: int, tokenizer: Path, dialect: str) -> None:
    shutil.copy(tokenizer, tmp_path / "tokenizer.model")
    folder = tiny(tmp_path / "meta", rows, tmp_path / "tokenizer.model")
    convert(folder, tmp_path / "hf", to="hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = Tokenizer(folder / "tokenizer.model", use_scaled_rope=rows > 512)
    for text in TEXTS:
        ids = ours.encode(text, bos=True, eos=False)
        assert theirs(text).input_ids == ids
        specials = ours.kind != "tiktoken"  # which decodes them to their names, as Meta's does
        assert theirs.decode(ids, skip_special_tokens=specials) == ours.decode(ids)
    # The dialect of Meta's chat models comes along as a template.
    for dialog in DIALOGS:
        encoded = theirs.apply_chat_template(dialog, add_generation_prompt=True)
        assert list(getattr(encoded, "input_ids", encoded)) == ChatFormat(ours, dialect).encode(dialog)
    # And back: from tokenizer.model where it is there, else from tokenizer.json.
    (tmp_path / "without").mkdir()
    for path in (tmp_path / "hf").iterdir():
        if path.name != "tokenizer.model":
            shutil.copy(path, tmp_path / "without")
    for source, name in (("hf", "tokenizer.model"), ("without", "tokenizer.json")):
        convert(tmp_path / source, tmp_path / f"meta-{source}")
        found = Tokenizer(find_tokenizer(tmp_path / f"meta-{source}"), use_scaled_rope=rows > 512)
        assert (tmp_path / f"meta-{source}" / name).exists()
        assert (found.n_words, found.bos_id, found.eos_id) == (ours.n_words, ours.bos_id, ours.eos_id)
        assert found.stop_tokens == ours.stop_tokens and found.adds_bos and found.chat_format == dialect
        assert all(found.encode(text, bos=True, eos=False) == ours.encode(text, bos=True, eos=False) for text in TEXTS)


PHI3_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_added_tokens_and_spare_rows(tmp_path: Path) -> None:
    """Phi-3's way: tokens added to a SentencePiece vocabulary, white space dropped after them, rows left over."""
    shutil.copy(TOKENIZER, tmp_path / "tokenizer.model")
    folder = tiny(tmp_path / "meta", 512, tmp_path / "tokenizer.model")
    convert(folder, tmp_path / "plain", to="hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    names = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(name, rstrip=True) for name in names]})
    tokenizer.chat_template = PHI3_TEMPLATE
    model = AutoModelForCausalLM.from_config(Phi3Config(**SIZES | {"vocab_size": 528}, sliding_window=None))
    model.save_pretrained(tmp_path / "phi")
    tokenizer.save_pretrained(tmp_path / "phi")
    shutil.copy(TOKENIZER, tmp_path / "phi" / "tokenizer.model")

    convert(tmp_path / "phi", tmp_path / "out")
    llama = Llama.build(tmp_path / "out", max_seq_len=64, max_batch_size=1, device="cpu")
    assert llama.tokenizer.n_words == 528 and llama.tokenizer.decode([600 % 528, 527]) is not None
    assert llama.dialogs.name == "phi3"
    dialog: list[Any] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "  Hi there  "},
        {"role": "assistant", "content": "Hello <|end|> x"},
        {"role": "user", "content": "Bye"},
    ]
    plain: list[Any] = [dict(m, content=m["content"].replace("<|end|>", "|end|")) for m in dialog]
    theirs = tokenizer.apply_chat_template(plain, add_generation_prompt=True)
    assert llama.dialogs.encode(plain) == list(getattr(theirs, "input_ids", theirs))
    assert llama.dialogs.encode(dialog).count(llama.tokenizer.special_ids["<|end|>"]) == 4
    llama.close()
    # Meta -> Hugging Face keeps the added tokens and the template.
    convert(tmp_path / "out", tmp_path / "back", to="hf")
    end = llama.tokenizer.special_ids["<|end|>"]
    assert end in json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"]
    back = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert list(getattr(back.apply_chat_template(plain, add_generation_prompt=True), "input_ids", theirs)) == list(
        getattr(theirs, "input_ids", theirs)
    )


def test_another_order_or_another_eos_than_tokenizer_model(tmp_path: Path) -> None:
    """tokenizer.json counts where the two disagree."""
    shutil.copy(TOKENIZER, tmp_path / "tokenizer.model")
    convert(tiny(tmp_path / "meta", 512, tmp_path / "tokenizer.model"), tmp_path / "hf", to="hf")
    path, config = tmp_path / "hf" / "tokenizer.json", tmp_path / "hf" / "tokenizer_config.json"
    convert(tmp_path / "hf", tmp_path / "same")
    assert (tmp_path / "same" / "tokenizer.model").exists()
    whole, keys = path.read_text(), json.loads(config.read_text())
    found = json.loads(whole)
    vocab = found["model"]["vocab"]
    names = {i: name for name, i in vocab.items()}
    vocab[names[400]], vocab[names[401]] = 401, 400
    path.write_text(json.dumps(found))
    convert(tmp_path / "hf", tmp_path / "swapped")
    path.write_text(whole)
    config.write_text(json.dumps(keys | {"eos_token": "<s>"}))
    convert(tmp_path / "hf", tmp_path / "eos")
    for name, eos in (("swapped", 2), ("eos", 1)):
        assert Tokenizer(find_tokenizer(tmp_path / name)).kind == "tokenizer.json"
        assert Tokenizer(find_tokenizer(tmp_path / name)).eos_id == eos


@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json", "config.json"])
def test_bos_and_eos_wherever_they_are_named(tmp_path: Path, where: str) -> None:
    shutil.copy(TOKENIZER, tmp_path / "tokenizer.model")
    convert(tiny(tmp_path / "meta", 512, tmp_path / "tokenizer.model"), tmp_path / "hf", to="hf")
    (tmp_path / "hf" / "tokenizer.model").unlink()
    if where != "tokenizer_config.json":
        (tmp_path / "hf" / "tokenizer_config.json").unlink()
    if where == "config.json":
        config = json.loads((tmp_path / "hf" / where).read_text())
        (tmp_path / "hf" / where).write_text(json.dumps(config | {"eos_token_id": [10**20, 2]}))  # no id at all, EOS
    if where == "special_tokens_map.json":
        names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
        (tmp_path / "hf" / where).write_text(json.dumps(names))
    convert(tmp_path / "hf", tmp_path / "out")
    found = Tokenizer(tmp_path / "out" / "tokenizer.json")
    assert (found.bos_id, found.eos_id, found.adds_bos, found.stop_tokens) == (1, 2, True, {2})


def test_tokens_that_only_a_tokenizer_json_has(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(hugging_face("llama-2"), tmp_path / "in")
    added = tmp_path / "in" / "added_tokens.json"
    added.write_text('{"<s>": 1, "</s>": 2}')  # older folders list what the vocabulary has anyway
    convert(tmp_path / "in", tmp_path / "plain")
    added.write_text('{"<pad>": 512}')
    with pytest.raises(ConvertError, match=r"tokenizer.model lacks the tokens of added_tokens.json"):
        convert(tmp_path / "in", tmp_path / "out")


def test_a_tokenizer_larger_than_the_embedding(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(hugging_face("llama-2"), tmp_path / "in")
    shutil.copy(LLAMA3, tmp_path / "in" / "tokenizer.model")
    with pytest.raises(ConvertError, match=r"the tokenizer has 128256 ids, the embedding 512 rows"):
        convert(tmp_path / "in", tmp_path / "out")


def test_a_base_model_stays_one(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Only the folder's name tells that Meta's base models were not taught to chat; the new one's is another."""
    shutil.copytree(checkpoint("mha"), tmp_path / "llama-2-7b")
    convert(tmp_path / "llama-2-7b", tmp_path / "mine", to="hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "mine").chat_template is None
    for source in ("llama-2-7b", "mine"):
        convert(tmp_path / source, tmp_path / f"from-{source}")
        assert Tokenizer(tmp_path / f"from-{source}" / "tokenizer.model").chat_format is None
        assert "looks like a base model" in str(base_model_note(tmp_path / f"from-{source}"))
    shutil.copytree(checkpoint("mha"), tmp_path / "llama-2-7b-chat")
    convert(tmp_path / "llama-2-7b-chat", tmp_path / "chat")
    assert Tokenizer(tmp_path / "chat" / "tokenizer.model").chat_format == "llama2"


@pytest.mark.parametrize("fault", ["named in no file", "in two files"])
def test_an_index_that_its_files_contradict(hugging_face: Callable[..., Path], tmp_path: Path, fault: str) -> None:
    convert(hugging_face("llama-2"), tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "in", to="hf", shards=2)
    path = tmp_path / "in" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    second = max(index["weight_map"].values())
    if fault == "named in no file":
        index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = second
        path.write_text(json.dumps(index))
        part = f"{second} lacks model.layers.9.mlp.up_proj.weight, which model.safetensors.index.json names"
    else:
        extra = {"model.embed_tokens.weight": torch.zeros(512, 64)}
        save_file(load_file(tmp_path / "in" / second) | extra, tmp_path / "in" / second, {"format": "pt"})
        part = f"{second} holds model.embed_tokens.weight, which another file holds too"
    with pytest.raises(ConvertError, match=part):
        convert(tmp_path / "in", tmp_path / "out")


def test_without_a_tokenizer(
    hugging_face: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(hugging_face("llama-2"), tmp_path / "in")
    (tmp_path / "in" / "tokenizer.model").unlink()
    convert(tmp_path / "in", tmp_path / "out")
    assert "has neither tokenizer.model nor tokenizer.json: put one beside the new files" in capsys.readouterr().err


def test_a_window_survives_the_way_there_and_back(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    convert(hugging_face("mistral-0.1"), tmp_path / "meta")
    for i in range(2):
        convert(tmp_path / "meta", tmp_path / f"hf{i}", to="hf")
        convert(tmp_path / f"hf{i}", tmp_path / "meta", force=True)
    assert Checkpoint(tmp_path / "meta").params.sliding_window == 64


def test_stored_types_are_kept_one_by_one(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    """bfloat16 matrices beside float32 norms, there and back: bit for bit."""
    shutil.copytree(hugging_face("llama-2"), tmp_path / "in")
    tensors = {k: t.bfloat16() if t.dim() == 2 else t for k, t in weights(tmp_path / "in").items()}
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "in", tmp_path / "meta", shards=2)
    convert(tmp_path / "meta", tmp_path / "hf", to="hf")
    back = weights(tmp_path / "hf")
    assert back.keys() == tensors.keys()
    assert all(back[key].dtype == tensors[key].dtype and torch.equal(back[key], tensors[key]) for key in tensors)


def test_files_are_never_empty(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    convert(hugging_face("llama-2"), tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "hf", to="hf", shards=4)
    assert all(load_file(path) for path in (tmp_path / "hf").glob("*.safetensors"))
    with pytest.raises(ConvertError, match="--shards 19 would leave a file empty"):
        convert(tmp_path / "meta", tmp_path / "more", to="hf", shards=19)


@pytest.mark.parametrize(("name", "eps"), [("mistral-0.1", 1e-6), ("phi-3", 1e-5), ("llama-2", 1e-6)])
def test_what_a_configuration_leaves_out(
    hugging_face: Callable[..., Path], tmp_path: Path, name: str, eps: float
) -> None:
    """As transformers fills it in."""
    shutil.copytree(hugging_face(name), tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    config = json.loads(path.read_text())
    del config["rms_norm_eps"]
    path.write_text(json.dumps(config))
    convert(tmp_path / "in", tmp_path / "out")
    assert Checkpoint(tmp_path / "out").params.norm_eps == eps
    same(our_logits(tmp_path / "out"), their_logits(tmp_path / "in"))


# Configurations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-3.2", {"use_scaled_rope": True, "rope_scaling_factor": 32.0, "rope_theta": 500000.0}),
        ("linear", {"rope_linear_factor": 4.0, "rope_theta": 10000.0}),
        ("mistral-0.1", {"sliding_window": 64}),
        ("nemo", {"head_dim": 12}),
        ("open-llama-3b", {"hidden_dim": 540, "n_kv_heads": 2}),
        ("narrow", {"hidden_dim": 38, "norm_eps": 1e-6}),
    ],
)
def test_params(hugging_face: Callable[..., Path], tmp_path: Path, name: str, expected: dict[str, Any]) -> None:
    convert(hugging_face(name), tmp_path / "out")
    params = json.loads((tmp_path / "out" / "params.json").read_text())
    assert expected.items() <= params.items()
    optional = {
        "use_scaled_rope",
        "rope_scaling_factor",
        "rope_linear_factor",
        "sliding_window",
        "head_dim",
        "hidden_dim",
    }
    assert not (params.keys() & optional) - expected.keys()


@pytest.mark.parametrize("keys", ["transformers 4", "transformers 5"])
def test_configurations_of_both_kinds(hugging_face: Callable[..., Path], tmp_path: Path, keys: str) -> None:
    """rope_theta and rope_scaling at the top, as before transformers 5, or rope_parameters."""
    shutil.copytree(hugging_face("llama-3.2"), tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    if keys == "transformers 4":
        config |= {"rope_theta": theta, "rope_scaling": rope}
    else:
        config |= {"rope_parameters": rope | {"rope_theta": theta}}
    path.write_text(json.dumps(config))
    convert(tmp_path / "in", tmp_path / "out")
    same(our_logits(tmp_path / "out"), their_logits(hugging_face("llama-3.2")))


def test_an_output_matrix_beside_tied_embeddings_is_used(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    """transformers ties the two only where the file does not hold both."""
    shutil.copytree(hugging_face("llama-3.2"), tmp_path / "in")
    tensors = weights(tmp_path / "in")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "in", tmp_path / "out")
    assert "output.weight" in meta_weights(tmp_path / "out")
    same(our_logits(tmp_path / "out"), their_logits(tmp_path / "in"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": [1]}, "rope_theta is [1], expected a positive number"),
        ({"rope_theta": 10**400}, "rope_theta is 1000000"),
        ({"rope_parameters": {"rope_theta": {}}}, "the rotary settings {'rope_theta': {}} are not supported"),
        ({"rope_parameters": {"rope_theta": "1"}}, "rope_theta is '1', expected a positive number"),
        ({"rope_parameters": {"rope_type": ["x"]}}, "rope scaling ['x'] is not supported: rope_type default, linear"),
        ({"rope_scaling": {"type": ["x"]}}, "rope scaling ['x'] is not supported: rope_type default, linear"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings is 'many', expected a whole number from 1 to"),
        ({"max_position_embeddings": [1]}, "max_position_embeddings is [1], expected a whole number from 1 to"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0, expected a whole number from 1 to"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected a whole number"),
    ],
)
def test_a_key_of_another_type_is_named(
    hugging_face: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    shutil.copytree(hugging_face("llama-2"), tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_parameters": None} | changes))
    with pytest.raises(ConvertError, match=re.escape(f"{tmp_path / 'in'}: config.json: {message}")):
        convert(tmp_path / "in", tmp_path / "out")


def test_keys_that_are_null_or_missing(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(hugging_face("llama-2"), tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    config = json.loads(path.read_text())
    keys = ("rope_parameters", "rope_theta", "rope_scaling", "max_position_embeddings", "tie_word_embeddings")
    path.write_text(json.dumps(config | dict.fromkeys(keys)))
    convert(tmp_path / "in", tmp_path / "null")
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in keys}))
    convert(tmp_path / "in", tmp_path / "missing")
    for name in ("null", "missing"):
        convert(tmp_path / name, tmp_path / f"{name}-hf", to="hf")
        written = json.loads((tmp_path / f"{name}-hf" / "config.json").read_text())
        assert [written[key] for key in keys[1:]] == [10000.0, None, 4096, False]
