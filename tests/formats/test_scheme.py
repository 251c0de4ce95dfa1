"""Number formats, granularities and schemes: what is valid, how it reads, what a mistake is answered with."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import RecipeError, SchemeError
from qcompiler.formats.scheme import FORMATS, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, Scheme, find_format


def test_ranges_and_divisors_of_the_integer_formats() -> None:
    expected = {
        "int8": (-128, 127, 127), "uint8": (0, 255, 127), "int4": (-8, 7, 7.5), "uint4": (0, 15, 7.5),
        "int3": (-4, 3, 3.5), "uint3": (0, 7, 3.5), "int2": (-2, 1, 1.5), "uint2": (0, 3, 1.5),
        "int16": (-32768, 32767, 32767), "uint16": (0, 65535, 32767), "int32": (-(2**31), 2**31 - 1, 2**31 - 1),
    }  # fmt: skip
    assert {n: (f.qmin, f.qmax, f.symmetric_divisor) for n, f in FORMATS.items() if f.kind == "integer"} == expected


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
