#include "bind/arguments.h"

#include <cstring>

#include "bind/ops.h"

namespace tokenstep::bind {
namespace {

constexpr Int128 kTooLarge = Int128{1} << 100;

Int128 from_python_int(PyObject* number) {
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(number, &overflow);
  if (overflow == 0) return value;
  if (overflow < 0) return -kTooLarge;
  const unsigned long long large = PyLong_AsUnsignedLongLong(number);
  if (!PyErr_Occurred()) return large;
  PyErr_Clear();
  return kTooLarge;
}

}  // namespace

void translate_errors() {
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const TypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    }
  });
}

std::string text_of(double value) { return nb::repr(nb::float_(value)).c_str(); }
std::string text_of(Int128 value) {
  if (value >= kTooLarge) return "an integer above 2^64";
  if (value <= -kTooLarge) return "an integer below -2^63";
  return value < 0 ? std::to_string(static_cast<int64_t>(value))
                   : std::to_string(static_cast<uint64_t>(value));
}

std::string Label::text() const {
  std::string out = name;
  if (row >= 0 && !entry_only) out += format("[%lld]", static_cast<long long>(row));
  if (entry >= 0) out += format("[%lld]", static_cast<long long>(entry));
  return out;
}

void Label::reject_type(nb::handle got, const char* expected) const {
  raise<TypeError>(op, "%s is %s, expected %s", text().c_str(), kind_of(got).c_str(), expected);
}

bool is_array(nb::handle source) {
  if (PyFloat_Check(source.ptr()) || PyLong_Check(source.ptr())) return false;
  static PyObject* const kDlpack = PyUnicode_InternFromString("__dlpack__");
  return PyObject_HasAttr(source.ptr(), kDlpack) != 0;
}

void read_number(const Label& label, nb::handle source, double& out) {
  if (!PyFloat_Check(source.ptr()) && !PyLong_Check(source.ptr()) &&
      (!PyNumber_Check(source.ptr()) || PyComplex_Check(source.ptr())))
    label.reject_type(source, "a number");
  out = PyFloat_AsDouble(source.ptr());
  if (out == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();  // an int beyond the doubles, or an array of several elements
    label.reject_type(source, "a number that fits a float");
  }
}

void read_number(const Label& label, nb::handle source, Int128& out) {
  if (PyLong_Check(source.ptr())) {
    out = from_python_int(source.ptr());
    return;
  }
  const nb::object index =
      PyFloat_Check(source.ptr()) ? nb::object() : nb::steal(PyNumber_Index(source.ptr()));
  if (!index.is_valid()) {
    PyErr_Clear();
    label.reject_type(source, "an integer");
  }
  out = from_python_int(index.ptr());
}

void expect_length(const Label& label, int64_t length, int64_t expected) {
  if (length != expected)
    raise<ValueError>(label.op, "%s has length %lld, expected %lld (one per row)", label.name,
                      static_cast<long long>(length), static_cast<long long>(expected));
}

void expect_host(const Label& label, const Tensor& array) {
  if (!array.on_cpu())
    raise<ValueError>(label.op, "%s is on %s, expected cpu: its values are read there", label.text().c_str(),
                      device_name(array.device_type, array.device_id).c_str());
}

}  // namespace tokenstep::bind
