"""Arrays at the door (csrc/bind/tensor.h): what is read, and what is refused with which words."""

import array
import re

import numpy as np
import pytest

from tokenstep import _native

testing = _native.cpu.testing


def describe(x):
    return testing.describe(x)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


# ---- read -------------------------------------------------------------------------------------------------
def test_torch_tensors_are_read_in_place(torch):
    x = torch.empty(3, 5)
    assert describe(x) == ("float32", "cpu", (3, 5), (5, 1), x.data_ptr())


def test_numpy_arrays_are_read_in_place():
    x = np.empty((3, 5), np.float32)
    assert describe(x) == ("float32", "cpu", (3, 5), (5, 1), x.ctypes.data)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64"])
def test_torch_dtypes_are_named_as_torch_names_them(torch, name):
    assert describe(torch.zeros(2, dtype=getattr(torch, name)))[0] == name


@pytest.mark.parametrize("name", ["float32", "float16", "int8", "uint8", "int32", "int64"])
def test_numpy_dtypes_are_named_as_numpy_names_them(name):
    assert describe(np.zeros(2, name))[0] == name


def test_strided_torch_views_keep_their_strides_and_offset(torch):
    x = torch.zeros(6, 10)
    view = x[1::2, 3:7]
    assert describe(view) == ("float32", "cpu", (3, 4), (20, 1), x.data_ptr() + 13 * 4)
    assert describe(x.T)[3] == (1, 10)
    assert describe(x[:1].expand(4, 10))[3] == (0, 1)


def test_strided_numpy_views_keep_their_strides_and_offset():
    x = np.zeros((6, 10), np.float32)
    assert describe(x[1::2, 3:7]) == ("float32", "cpu", (3, 4), (20, 1), x.ctypes.data + 13 * 4)
    assert describe(x[::-1])[3] == (-10, 1)


def test_arrays_without_dimensions_or_elements_are_read(torch):
    assert describe(torch.tensor(1.0))[2] == ()
    assert describe(np.empty((0, 7), np.int32))[2] == (0, 7)


def test_read_only_numpy_arrays_are_read():
    x = np.arange(4, dtype=np.int64)
    x.flags.writeable = False
    assert describe(x)[2] == (4,)


def test_detached_parameters_and_resolved_views_are_read(torch):
    parameter = torch.nn.Parameter(torch.zeros(4))
    assert describe(parameter.detach())[2] == (4,)
    assert describe(torch.nn.Parameter(torch.zeros(4), requires_grad=False))[2] == (4,)
    negative = torch.zeros(2, dtype=torch.complex64).conj().imag
    assert describe(negative.resolve_neg())[2] == (2,)


def test_inference_mode_tensors_are_read(torch):
    with torch.inference_mode():
        assert describe(torch.zeros(4))[2] == (4,)


def test_reading_keeps_no_reference():
    import sys

    x = np.zeros(4, np.float32)
    before = sys.getrefcount(x)
    for _ in range(10):
        describe(x)
    assert sys.getrefcount(x) == before


# ---- refused ----------------------------------------------------------------------------------------------
def refused(error, words, x):
    with pytest.raises(error, match=re.escape(words)) as info:
        describe(x)
    assert str(info.value).startswith("tokenstep.testing.describe: array")


@pytest.mark.parametrize(
    "x",
    [b"1234", bytearray(8), memoryview(b"1234"), array.array("f", [1]), [1.0], (1,), 3.0, "text", {}],
)
def test_what_is_no_array_is_refused_by_its_type(x):
    refused(
        TypeError, f"array is a {type(x).__module__ + '.' if type(x).__module__ != 'builtins' else ''}", x
    )


def test_tensors_that_require_grad_are_refused(torch):
    refused(TypeError, "requires grad", torch.zeros(3, requires_grad=True))
    refused(TypeError, "pass array.detach()", torch.nn.Parameter(torch.zeros(3)))


def test_negative_views_are_refused(torch):
    refused(TypeError, "is a negative view", torch.zeros(2, dtype=torch.complex64).conj().imag)


def test_conjugate_views_are_refused_by_their_dtype(torch):
    with pytest.raises(TypeError, match=r"x has dtype torch.complex64, expected float32"):
        testing.weight(torch.zeros(2, dtype=torch.complex64).conj(), np.zeros(2, np.int64))


def test_meta_tensors_are_refused(torch):
    refused(TypeError, "array", torch.zeros(3, device="meta"))


def test_sparse_tensors_are_refused(torch):
    refused(TypeError, "array", torch.eye(3).to_sparse())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused(torch):
    refused(TypeError, "array", torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]))


def test_fake_tensors_are_refused(torch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(3)
    refused(TypeError, "FakeTensor, expected a plain torch.Tensor", fake)


def test_tensor_subclasses_are_refused(torch):
    class Mine(torch.Tensor):
        pass

    refused(TypeError, "Mine, expected a plain torch.Tensor", torch.zeros(3).as_subclass(Mine))


def test_functional_tensors_inside_vmap_are_refused(torch):
    def inside(x):
        describe(x)
        return x

    with pytest.raises(TypeError, match="array"):
        torch.func.vmap(inside)(torch.zeros(2, 3))


def test_more_than_five_dimensions_are_refused(torch):
    refused(ValueError, "6 dimensions, expected at most 5", torch.zeros(1, 1, 1, 1, 1, 1))
    refused(ValueError, "6 dimensions, expected at most 5", np.zeros((1,) * 6, np.float32))


def test_numpy_arrays_of_objects_and_text_are_refused():
    refused(TypeError, "array", np.array([None, 1]))
    refused(TypeError, "array", np.array(["a"]))


def test_numpy_arrays_of_foreign_byte_order_are_refused():
    refused(TypeError, "array", np.zeros(3, ">f4"))


# ---- checks of an op's arguments, seen through one that has two --------------------------------------------
def weight(x, out):
    testing.weight(x, out)


@pytest.mark.parametrize(
    ("x", "out", "error", "words"),
    [
        (np.zeros(3), np.zeros(3, np.int64), TypeError, "x has dtype float64, expected float32"),
        (np.zeros(3, bool), np.zeros(3, np.int64), TypeError, "x has dtype bool, expected float32"),
        (np.zeros(3, np.float32), np.zeros(3, np.int32), TypeError, "out has dtype int32, expected int64"),
        (
            np.zeros((3, 1), np.float32),
            np.zeros(3, np.int64),
            ValueError,
            "x has shape [3, 1], expected 1 dimension",
        ),
        (np.zeros(3, np.float32), np.zeros(4, np.int64), ValueError, "out has shape [4], expected [3] = [n]"),
        (
            np.zeros(6, np.float32)[::2],
            np.zeros(3, np.int64),
            ValueError,
            "x has stride 2 along axis 0, expected 1",
        ),
        (np.zeros(3, np.float32), np.zeros(3, np.int64)[::-1], ValueError, "out has stride -1 along axis 0"),
        (np.zeros(3, np.float32), np.broadcast_to(np.int64(0), 3), ValueError, "out is read-only"),
        (np.zeros(3, np.float32), [0, 0, 0], TypeError, "out is a list, expected an array"),
        ([0.0], np.zeros(1, np.int64), TypeError, "x is a list, expected an array"),
    ],
)
def test_errors_name_op_argument_expected_and_got(x, out, error, words):
    with pytest.raises(error, match=re.escape(f"tokenstep.testing.weight: {words}")):
        weight(x, out)


def test_torch_and_numpy_arguments_may_be_mixed(torch):
    out = torch.zeros(2, dtype=torch.int64)
    weight(np.zeros(2, np.float32), out)
    assert out.tolist() == [1 << 40] * 2


def test_an_array_whose_dlpack_raises_is_refused_with_its_reason():
    class Broken:
        def __dlpack__(self, **kwargs):
            raise BufferError("no memory today")

        def __dlpack_device__(self):
            return (1, 0)

    refused(TypeError, "no memory today", Broken())
