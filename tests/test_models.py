"""The demo model as each exporter writes it computes what the torch model does; planted outliers change no output."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from models.export import (
    CHECKPOINT,
    NAMES,
    OUTLIER_CHANNELS,
    OUTLIER_FACTOR,
    MissingEnvironmentError,
    model_path,
    plant_outliers,
)

ort = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HIDDEN, VOCABULARY, LAYERS, PAST = 256, 3072, 4, 5
WITH_CACHE = [name for name in NAMES if name.startswith(("dynamo-past", "optimum", "genai"))]
SHAPES = [(1, 17), (3, 9)]  # (batch, sequence)


def each(names: list[str]) -> list[Any]:
    """As test parameters; the variants whose exporter has an environment of its own are marked."""
    return [pytest.param(name, marks=[pytest.mark.exporters] if "genai" in name else []) for name in names]


def tolerance(variant: str) -> float:
    """Of the largest magnitude. Half precision: 11 bits through four layers."""
    return 5e-3 if "fp16" in variant else 1e-4


@cache
def torch_model(outliers: bool = False) -> Any:
    model = transformers.LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    if outliers:
        plant_outliers(model.state_dict(), LAYERS)
    return model


@cache
def text_ids() -> np.ndarray:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    return np.array(tokenizer.encode((CHECKPOINT / "heldout.txt").read_text(encoding="utf-8")[:4000]).ids)


def batch(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and their mask; the last two positions of the last row are padding where there are several rows."""
    ids = text_ids()[: shape[0] * shape[1]].reshape(shape)
    mask = np.ones_like(ids)
    mask[1:][-1:, -2:] = 0
    return ids, mask


@torch.no_grad()  # type: ignore[untyped-decorator]
def expected(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The torch model's logits [batch, sequence, vocabulary], and key, value, key … of the layers."""
    output = torch_model()(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), use_cache=True)
    layers = output.past_key_values.layers
    return output.logits.numpy(), [part.numpy() for layer in layers for part in (layer.keys, layer.values)]


@cache
def session(variant: str) -> Any:
    try:
        path = model_path(variant)
    except MissingEnvironmentError as error:
        pytest.skip(str(error))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(variant: str, ids: np.ndarray, mask: np.ndarray, past: list[np.ndarray]) -> dict[str, np.ndarray]:
    """`past` is key, value, key …, each [batch, kv heads, past, head size]; the ids are those after it."""
    inputs = {entry.name for entry in session(variant).get_inputs()}
    known = {"input_ids": ids, "attention_mask": mask}
    start = past[0].shape[2] if past else 0
    known["position_ids"] = np.broadcast_to(np.arange(start, start + ids.shape[1]), ids.shape)
    for index, part in enumerate(past):
        known[f"past_key_values.{index // 2}.{'value' if index % 2 else 'key'}"] = part
    assert inputs <= set(known)
    outputs = [entry.name for entry in session(variant).get_outputs()]
    values = session(variant).run(outputs, {name: known[name] for name in inputs})
    return dict(zip(outputs, values, strict=True))


def relative(actual: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(actual.astype(np.float64) - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", each(NAMES))
def test_logits_are_those_of_the_torch_model(variant: str, shape: tuple[int, int]) -> None:
    ids, mask = batch(shape)
    logits, keys_and_values = expected(ids, mask)
    past = [part[:, :, :0] for part in keys_and_values] if variant in WITH_CACHE else []
    actual = run(variant, ids, mask, past)["logits"]
    assert actual.shape == (*shape, VOCABULARY)
    assert relative(actual[mask == 1], logits[mask == 1]) < tolerance(variant)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", each(WITH_CACHE))
def test_it_goes_on_from_a_past(variant: str, shape: tuple[int, int]) -> None:
    if "genai" in variant and shape[0] > 1:
        shape = (shape[0], PAST + 1)  # GroupQueryAttention takes one token at a time then
    ids, _ = batch(shape)
    mask = np.ones_like(ids)
    logits, keys_and_values = expected(ids, mask)
    outputs = run(variant, ids[:, PAST:], mask, [part[:, :, :PAST] for part in keys_and_values])
    assert relative(outputs["logits"], logits[:, PAST:]) < tolerance(variant)
    for index, part in enumerate(keys_and_values):
        present = outputs[f"present.{index // 2}.{'value' if index % 2 else 'key'}"]
        assert relative(present, part) < tolerance(variant)


@pytest.mark.parametrize("variant", each([name for name in NAMES if name.endswith("outliers")]))
def test_planted_gains_are_in_the_graph(variant: str) -> None:
    """For each layer norm's gain of the checkpoint, the graph has one that is 50 times that in exactly 4 channels."""
    session(variant)
    graph = onnx.load(model_path(variant)).graph
    arrays = [onnx.numpy_helper.to_array(tensor).astype(np.float64) for tensor in graph.initializer]
    gains = [array for array in arrays if array.shape == (HIDDEN,)]
    for name, parameter in torch_model().named_parameters():
        if not name.endswith("layernorm.weight"):
            continue
        ratios = [gain / parameter.detach().double().numpy() for gain in gains]
        planted = [np.isclose(ratio, OUTLIER_FACTOR, rtol=2e-3) for ratio in ratios]
        kept = [np.isclose(ratio, 1, rtol=2e-3) for ratio in ratios]
        found = [p.sum() == OUTLIER_CHANNELS and (p | k).all() for p, k in zip(planted, kept, strict=True)]
        assert any(found), name


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_planted_outliers_change_the_activations_and_not_the_function() -> None:
    ids = torch.from_numpy(text_ids()[None, :128])
    loudness: dict[tuple[bool, str], Any] = {}
    logits = []
    for outliers in (False, True):
        model = torch_model(outliers)
        norms = [(n, m) for n, m in model.named_modules() if n.endswith("layernorm")]
        hooks = [
            norm.register_forward_hook(
                lambda _m, _i, output, key=(outliers, name): loudness.__setitem__(key, output.abs().amax(dim=(0, 1)))
            )
            for name, norm in norms
        ]
        logits.append(model(ids).logits.numpy())
        for hook in hooks:
            hook.remove()
        assert len(norms) == 2 * LAYERS
    assert relative(logits[1], logits[0]) < 1e-5
    peaks = {key: float(channels.max() / channels.median()) for key, channels in loudness.items()}
    for name in {name for _, name in loudness}:
        louder = np.sort((loudness[True, name] / loudness[False, name]).numpy())
        np.testing.assert_allclose(louder[-4:], 50, rtol=1e-2, err_msg=name)
        np.testing.assert_allclose(louder[:-4], 1, rtol=1e-2, err_msg=name)
        assert peaks[True, name] > 10, name
    # A trained norm can be that uneven by itself; most are not.
    assert np.median([peaks[True, name] / peaks[False, name] for _, name in peaks]) > 4


def test_an_unknown_variant_is_named() -> None:
    with pytest.raises(ValueError, match=r"no variant 'nosuch'.*dynamo"):
        model_path("nosuch")
