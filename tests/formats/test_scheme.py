"""Number formats, granularities and schemes: what is valid, how it reads, what a mistake is answered with."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import RecipeError, SchemeError
from qcompiler.formats.scheme import (
    FORMATS,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
    UnknownGranularity,
    find_format,
    in_words,
)


def test_bits_storage_and_ranges_of_the_formats_that_are_no_integers() -> None:
    expected = {
        "fp8_e4m3": (8, "FLOAT8E4M3FN", -448, 448, 448), "fp8_e5m2": (8, "FLOAT8E5M2", -57344, 57344, 57344),
        "fp4": (4, "FLOAT4E2M1", -6, 6, 6), "nf4": (4, "UINT4", 0, 15, 1), "fp4_bnb": (4, "UINT4", 0, 15, 1),
        "binary": (1, "INT2", -1, 1, 1),
    }  # fmt: skip
    assert expected == {
        name: (found.bits, found.storage, found.qmin, found.qmax, found.symmetric_divisor)
        for name, found in FORMATS.items() if found.kind != "integer"
    }  # fmt: skip


def test_a_symmetric_scheme_has_its_zero_in_the_middle_of_the_codes() -> None:
    unsigned = {name: found.middle for name, found in FORMATS.items() if not found.signed}
    assert unsigned == {"uint2": 2, "uint3": 4, "uint4": 8, "uint8": 128, "uint16": 32768}
    assert {found.middle for found in FORMATS.values() if found.signed} == {0}


def test_ranges_and_divisors_of_the_integer_formats() -> None:
    expected = {
        "int8": (-128, 127, 127), "uint8": (0, 255, 127), "int4": (-8, 7, 7.5), "uint4": (0, 15, 7.5),
        "int3": (-4, 3, 3.5), "uint3": (0, 7, 3.5), "int2": (-2, 1, 1.5), "uint2": (0, 3, 1.5),
        "int16": (-32768, 32767, 32767), "uint16": (0, 65535, 32767), "int32": (-(2**31), 2**31 - 1, 2**31 - 1),
    }  # fmt: skip
    integers = {name: found for name, found in FORMATS.items() if found.kind == "integer"}
    assert {n: (f.qmin, f.qmax, f.symmetric_divisor) for n, f in integers.items()} == expected
    # ONNX has integers of 2, 4, 8, 16 and 32 bits.
    assert {n: f.storage for n, f in integers.items()} == {
        name: (f"U{name[1:]}" if name[0] == "u" else name).upper().replace("INT3", "INT4").replace("INT42", "INT32")
        for name in expected
    }


@pytest.mark.parametrize("name", FORMATS)
def test_codes_fit_the_numpy_dtype_and_the_onnx_storage(name: str) -> None:
    number_format = FORMATS[name]
    storage = ir.DataType[number_format.storage]
    assert storage.bitwidth >= number_format.bits
    for code in (number_format.qmin, number_format.qmax):
        assert float(np.asarray(code).astype(number_format.dtype)) == code
        assert float(np.asarray(code).astype(storage.numpy())) == code


def test_the_largest_values_of_the_float_formats_are_those_of_the_types() -> None:
    for name, dtype in (
        ("fp8_e4m3", ml_dtypes.float8_e4m3fn),
        ("fp8_e5m2", ml_dtypes.float8_e5m2),
        ("fp4", ml_dtypes.float4_e2m1fn),
    ):
        assert FORMATS[name].qmax == float(ml_dtypes.finfo(dtype).max)


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (Scheme("int8", PerChannel()), "int8 per-channel symmetric"),
        (Scheme("uint8", PerTensor(), symmetric=False), "uint8 per-tensor asymmetric"),
        (Scheme("int4", PerGroup(128)), "int4 group(128) symmetric"),
        (Scheme("fp8_e4m3", PerBlock(128, 64)), "fp8_e4m3 block(128×64) symmetric"),
        (Scheme("int8", PerToken(), dynamic=True), "int8 per-token symmetric dynamic"),
    ],
)
def test_a_scheme_reads_well(scheme: Scheme, text: str) -> None:
    assert str(scheme) == text


def test_flat_options_name_a_scheme() -> None:
    assert Scheme.from_options("int8", "channel") == Scheme("int8", PerChannel())
    assert Scheme.from_options("int4", "group", 32, False) == Scheme("int4", PerGroup(32), symmetric=False)
    assert Scheme.from_options("fp8_e4m3", "block", 128) == Scheme("fp8_e4m3", PerBlock(128, 128))
    assert Scheme.from_options("uint8", "token", dynamic=True) == Scheme("uint8", PerToken(), dynamic=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("int5", "channel"), "did you mean"),
        (("int4", "groups"), "tensor, channel, token, group, block"),
        (("int4", "group"), "group_size"),
        (("int4", "group", 0), "at least 1"),
        (("int4", "group", True), "at least 1"),
        (("int4", "group", 32.0), "a whole number"),
        (("int4", "channel", 128), "no meaning"),
        (("nf4", "group", 64, False), "no zero point"),
        (("fp8_e4m3", "tensor", None, False), "no zero point"),
        (("int32", "tensor", None, False), "no zero point"),
        (("int8", "token"), "run time"),
        (("int8", "channel", None, True, True), "dynamic"),
    ],
)
def test_a_wrong_scheme_is_answered_with_one_sentence(options: tuple[object, ...], says: str) -> None:
    with pytest.raises(SchemeError, match=says) as caught:
        Scheme.from_options(*options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith((".", "?"))


def test_a_granularity_of_another_kind_is_refused() -> None:
    with pytest.raises(SchemeError, match="PerTensor"):
        Scheme("int8", "channel")  # type: ignore[arg-type]


def test_a_misspelt_format_gets_the_closest_names_and_is_a_recipe_error() -> None:
    with pytest.raises(RecipeError, match="fp8_e4m3"):
        find_format("fp8_e4m3fn")


def test_three_names_are_offered_at_most_and_all_where_none_is_close() -> None:
    with pytest.raises(SchemeError, match=r"did you mean int8 or uint8 or int16\?"):
        find_format("int18")
    with pytest.raises(SchemeError, match=f"did you mean {' or '.join(FORMATS)}"):
        find_format("…")


# --------------------------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        # Symmetric integers go by the signed name, others by the unsigned one, however codes are stored.
        (Scheme("uint8", PerChannel()), "int8 per-channel symmetric"),
        (Scheme("int4", PerGroup(32), symmetric=False), "uint4 group(32) asymmetric"),
        (Scheme("uint4", PerGroup(32), symmetric=None), "uint4 group(32)"),
        (Scheme("int8", UnknownGranularity(), symmetric=None), "int8"),
        (Scheme("uint8", UnknownGranularity(), symmetric=False, dynamic=True), "uint8 asymmetric dynamic"),
        # Scales: floats of any width go without saying, as the model's own type does.
        (Scheme("fp4", PerGroup(32), scale_type="e8m0"), "fp4 group(32) symmetric, scales e8m0"),
        (Scheme("fp4", PerGroup(16), scale_type="e4m3"), "fp4 group(16) symmetric, scales e4m3"),
        (Scheme("int4", PerGroup(32), scale_type="float16"), "int4 group(32) symmetric"),
        (Scheme("int4", PerGroup(32), scale_type="float32"), "int4 group(32) symmetric"),
        (Scheme("nf4", PerGroup(64), scales=Scheme("int8", PerGroup(256))),
         "nf4 group(64) symmetric, scales int8 group(256)"),
        (Scheme("nf4", PerGroup(64), scales=Scheme("uint8", UnknownGranularity())),
         "nf4 group(64) symmetric, scales int8"),
        (Scheme("int8", PerToken(), dynamic=True, normalized=True),
         "int8 per-token symmetric dynamic, channels normalized"),
        (Scheme("int4", PerGroup(32), positive=True), "int4 group(32) symmetric"),
    ],
)  # fmt: skip
def test_a_scheme_says_what_the_numbers_are(scheme: Scheme, text: str) -> None:
    assert str(scheme) == text
    assert str(scheme.numbers) == text
    assert scheme.numbers.numbers == scheme.numbers


def test_schemes_of_equal_numbers_are_equal() -> None:
    assert Scheme("uint8", PerChannel(), positive=True).numbers == Scheme("int8", PerChannel()).numbers
    assert Scheme("int8", PerTensor(), scale_type="float16").numbers == Scheme("int8", PerTensor())
    assert Scheme("fp4", PerGroup(32), scale_type="e8m0").numbers != Scheme("fp4", PerGroup(32)).numbers
    assert Scheme("int8", PerTensor(), symmetric=False).numbers == Scheme("uint8", PerTensor(), symmetric=False)
    nested = Scheme("nf4", PerGroup(64), scales=Scheme("int8", PerGroup(256)))
    assert nested.numbers != Scheme("nf4", PerGroup(64)).numbers


def test_a_group_of_all_features_is_a_channel_or_a_token() -> None:
    weight, activation = Scheme("int4", PerGroup(64)), Scheme("int8", PerGroup(64), dynamic=True)
    assert weight.over(64).granularity == PerChannel()
    assert weight.over(48) == Scheme("int4", PerChannel())
    assert weight.over(65) == weight
    assert activation.over(64) == Scheme("int8", PerToken(), dynamic=True)
    assert str(activation.over(65)) == "int8 group(64) symmetric dynamic"
    # Blocks of a codebook run on over the ends of channels.
    assert Scheme("nf4", PerGroup(64)).over(64) == Scheme("nf4", PerGroup(64))
    assert Scheme("int8", PerTensor()).over(1) == Scheme("int8", PerTensor())


def test_what_a_layer_is_quantized_to_in_words() -> None:
    weight, activation = Scheme("int8", PerChannel()), Scheme("uint8", PerTensor(), symmetric=False)
    cache = Scheme("int8", PerToken(), dynamic=True)
    assert in_words(None) == ""
    assert in_words(weight) == "int8 per-channel symmetric"
    assert in_words(weight, activation) == "int8 per-channel symmetric, activations uint8 per-tensor asymmetric"
    assert in_words(None, activation) == "activations uint8 per-tensor asymmetric"
    assert in_words(None, None, cache) == "int8 per-token symmetric dynamic"


def test_scales_are_a_type_or_codes_and_have_two_levels_at_most() -> None:
    scales = Scheme("int8", PerGroup(256))
    with pytest.raises(SchemeError, match=r"scales are e8m0 or quantized to int8 group\(256\) symmetric: leave one"):
        Scheme("fp4", PerGroup(32), scale_type="e8m0", scales=scales)
    with pytest.raises(SchemeError, match="two levels at most"):
        Scheme("fp4", PerGroup(16), scales=Scheme("int8", PerGroup(256), scales=scales))
