"""Options are declared once: signatures, checks and messages follow from `llama.options`."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from llama import Llama
from llama.options import DTYPES, BuildOptions, ModelOptions, SamplingOptions, Settings, declared
from llama.parallel import device


def test_metas_signature_has_the_declared_defaults() -> None:
    parameters = list(inspect.signature(Llama.build).parameters.values())
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == list(declared(ModelOptions))
    for parameter in positional[1:]:
        assert parameter.default == declared(ModelOptions)[parameter.name].default
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords == {name: option.default for name, option in declared(BuildOptions).items()}


def test_dtypes_are_those_of_torch() -> None:
    assert tuple(device.DTYPES) == DTYPES


@pytest.mark.parametrize("method", [Llama.text_completion, Llama.chat_completion, Llama.generate])
def test_methods_show_the_options_of_sampling(method: Callable[..., Any]) -> None:
    parameters = inspect.signature(method).parameters
    for name, option in declared(Settings).items():
        if name in parameters and not (method is Llama.generate and name == "max_gen_len"):
            assert parameters[name].default == option.default, name
    assert set(declared(SamplingOptions)) <= set(parameters)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"divice": "cpu"}, TypeError, "build has no option divice: did you mean device?"),
        (
            {"zzz": 1},
            TypeError,
            "build has no option zzz; there are device, dtype, quantize, compile, plain, prefill_chunk, chat_format",
        ),
        ({"quantize": "int3"}, ValueError, "quantize 'int3': expected int8, int4 or fp8"),
        ({"compile": "yes"}, ValueError, "compile is 'yes', expected True, False or 'auto'"),
        ({"plain": "False"}, TypeError, "plain is 'False', expected True or False"),
        ({"prefill_chunk": 0}, ValueError, "prefill_chunk is 0, expected an integer from 1"),
        ({"prefill_chunk": -1024}, ValueError, "prefill_chunk is -1024, expected an integer from 1"),
        ({"prefill_chunk": 64.0}, TypeError, "prefill_chunk is 64.0, expected an integer"),
        ({"tokenizer_path": 7}, TypeError, "tokenizer_path is 7, expected a path"),
        ({"max_seq_len": 0}, ValueError, "max_seq_len is 0, expected an integer from 1"),
        ({"max_batch_size": 2.0}, TypeError, "max_batch_size is 2.0, expected an integer"),
        ({"seed": 2**64}, ValueError, f"seed is {2**64}, expected an integer from 0, below {2**64}"),
    ],
)
def test_build_checks_its_options(
    options: dict[str, Any], error: type[Exception], message: str, checkpoint: Callable[..., Any]
) -> None:
    with pytest.raises(error) as raised:
        Llama.build(checkpoint("mha"), **options)
    assert str(raised.value) == message


def test_an_unknown_setting_is_named(build: Callable[..., Llama]) -> None:
    llama = build("mha")
    with pytest.raises(TypeError, match="there is no setting top_q: did you mean top_p"):
        llama.text_completion(["x"], top_q=1)  # type: ignore[call-arg]  # the mistake under test
