#include "bind/sample_args.h"

#include <unistd.h>

#include <algorithm>
#include <string>
#include <type_traits>

#include "common/check.h"
#include "common/sampling_rules.h"

namespace tokenstep::bind {
namespace {

using Int128 = __int128;  // holds every int64 and uint64
constexpr Int128 kTooLarge = Int128{1} << 100;

std::string text_of(double value) { return nb::repr(nb::float_(value)).c_str(); }
std::string text_of(Int128 value) {
  if (value >= kTooLarge) return "an integer above 2^64";
  if (value <= -kTooLarge) return "an integer below -2^63";
  return value < 0 ? std::to_string(static_cast<int64_t>(value))
                   : std::to_string(static_cast<uint64_t>(value));
}

// An argument, or an entry of it: `top_p`, `top_p[3]`, `prompt_tokens[3][17]`.
struct Label {
  const char* op;
  const char* name;
  int64_t row = -1, entry = -1;
  bool entry_only = false;  // the argument is one row's: `prompt_tokens[17]`

  std::string text() const {
    std::string out = name;
    if (row >= 0 && !entry_only) out += format("[%lld]", static_cast<long long>(row));
    if (entry >= 0) out += format("[%lld]", static_cast<long long>(entry));
    return out;
  }
  Label at(int64_t i) const { return {op, name, row, i, entry_only}; }
  template <class Value>
  [[noreturn]] void reject(Value value, const char* expected) const {
    raise<ValueError>(op, "%s = %s, expected %s", text().c_str(), text_of(value).c_str(), expected);
  }
  [[noreturn]] void reject_type(nb::handle got, const char* expected) const {
    raise<TypeError>(op, "%s is %s, expected %s", text().c_str(), kind_of(got).c_str(), expected);
  }
};

// ---- one number ------------------------------------------------------------------------------------------
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

// ---- one number per row ----------------------------------------------------------------------------------
template <class Value>
Value element(const Tensor& array, int64_t i) {
  const int64_t at = i * array.stride[0];
  switch (array.dtype) {
    case DType::kFloat32:
      return static_cast<Value>(array.as<const float>()[at]);
    case DType::kFloat64:
      return static_cast<Value>(array.as<const double>()[at]);
    case DType::kInt32:
      return static_cast<Value>(array.as<const int32_t>()[at]);
    case DType::kUInt32:
      return static_cast<Value>(array.as<const uint32_t>()[at]);
    case DType::kUInt64:
      return static_cast<Value>(array.as<const uint64_t>()[at]);
    default:
      return static_cast<Value>(array.as<const int64_t>()[at]);
  }
}

template <class Value>
Tensor read_array(const Label& label, nb::handle source) {
  Tensor array = tensor_from(label.op, label.name, source);
  if (!array.on_cpu())
    raise<ValueError>(label.op, "%s is on %s, expected cpu like logits", label.text().c_str(),
                      device_name(array.device_type, array.device_id).c_str());
  if constexpr (std::is_same_v<Value, double>)
    array.expect_dtype({DType::kFloat32, DType::kFloat64, DType::kInt32, DType::kInt64});
  else
    array.expect_dtype({DType::kInt32, DType::kInt64, DType::kUInt32, DType::kUInt64});
  return array;
}

void expect_length(const Label& label, int64_t length, int64_t expected) {
  if (length != expected)
    raise<ValueError>(label.op, "%s has length %lld, expected %lld (one per row)", label.name,
                      static_cast<long long>(length), static_cast<long long>(expected));
}

// Calls set(row, value, label) for each row of the batch.
template <class Value, class Set>
void read_values(const Label& argument, nb::handle source, int num_rows, Set set) {
  const auto set_all = [&](nb::handle number) {
    Value value;
    read_number(argument, number, value);
    if (num_rows == 0) set(-1, value, argument);  // checks the value
    for (int row = 0; row < num_rows; ++row) set(row, value, argument);
  };
  if (PyFloat_Check(source.ptr()) || PyLong_Check(source.ptr())) return set_all(source);
  if (const bool is_list = PyList_Check(source.ptr()); is_list || PyTuple_Check(source.ptr())) {
    expect_length(argument, PySequence_Size(source.ptr()), num_rows);
    for (int row = 0; row < num_rows; ++row) {
      const Label label{argument.op, argument.name, row};
      // Converting an element runs Python code, which may shorten the list.
      PyObject* item = is_list ? PyList_GetItem(source.ptr(), row) : PyTuple_GetItem(source.ptr(), row);
      if (!item) throw nb::python_error();
      const nb::object number = nb::borrow(item);
      Value value;
      read_number(label, number, value);
      set(row, value, label);
    }
    return;
  }
  if (!is_array(source)) {
    if (!PyNumber_Check(source.ptr()))
      argument.reject_type(source, "a number, or a list or array of one per row");
    return set_all(source);
  }
  const Tensor array = read_array<Value>(argument, source);
  if (array.ndim == 0) return set_all(source);
  array.expect_ndim(1);
  expect_length(argument, array.shape[0], num_rows);
  for (int row = 0; row < num_rows; ++row)
    set(row, element<Value>(array, row), Label{argument.op, argument.name, row});
}

struct FloatField {
  const char* name;
  nb::handle RowArguments::* argument;
  float RowParams::* field;
  bool (*in_range)(float);
  const char* expected;
};

constexpr FloatField kFloatFields[] = {
    {"temperature", &RowArguments::temperature, &RowParams::temperature,
     [](float x) { return x >= 0.0f && is_finite(x); }, "a finite temperature \u2265 0"},
    {"top_p", &RowArguments::top_p, &RowParams::top_p, [](float x) { return x >= 0.0f && x <= 1.0f; },
     "0 \u2264 top_p \u2264 1"},
    {"min_p", &RowArguments::min_p, &RowParams::min_p, [](float x) { return x >= 0.0f && x <= 1.0f; },
     "0 \u2264 min_p \u2264 1"},
    {"repetition_penalty", &RowArguments::repetition_penalty, &RowParams::repetition_penalty,
     [](float x) { return x > 0.0f && is_finite(x); }, "a finite repetition_penalty > 0"},
    {"presence_penalty", &RowArguments::presence_penalty, &RowParams::presence_penalty,
     [](float x) { return is_finite(x); }, "a finite number"},
    {"frequency_penalty", &RowArguments::frequency_penalty, &RowParams::frequency_penalty,
     [](float x) { return is_finite(x); }, "a finite number"},
};

// ---- seeds -----------------------------------------------------------------------------------------------
void fill_with_entropy(std::vector<uint64_t>& seeds) {
  constexpr size_t kAtOnce = 32;  // getentropy gives at most 256 bytes
  for (size_t i = 0; i < seeds.size(); i += kAtOnce)
    if (getentropy(&seeds[i], std::min(kAtOnce, seeds.size() - i) * sizeof(uint64_t)) != 0)
      throw std::runtime_error("tokenstep: the operating system gave no entropy for a seed");
}

uint64_t check_seed(Int128 value, const Label& label) {
  if (value < -(Int128{1} << 63) || value >= Int128{1} << 64)
    label.reject(value, "-2^63 \u2264 seed < 2^64, or None");
  return static_cast<uint64_t>(value);
}

void read_seeds(const char* op, nb::handle source, std::vector<RowParams>& rows) {
  const Label argument{op, "seed"};
  const int num_rows = static_cast<int>(rows.size());
  const bool is_sequence = PyList_Check(source.ptr()) || PyTuple_Check(source.ptr());
  bool any_none = source.is_none();
  if (is_sequence) {
    const Py_ssize_t size = PySequence_Size(source.ptr());
    for (Py_ssize_t i = 0; i < size && !any_none; ++i) any_none = nb::object(source[i]).is_none();
  }
  if (!any_none)
    return read_values<Int128>(argument, source, num_rows, [&](int row, Int128 value, const Label& label) {
      const uint64_t seed = check_seed(value, label);
      if (row >= 0) rows[static_cast<size_t>(row)].seed = seed;
    });
  std::vector<uint64_t> fresh(rows.size());
  fill_with_entropy(fresh);
  if (is_sequence) expect_length(argument, PySequence_Size(source.ptr()), num_rows);
  for (int row = 0; row < num_rows; ++row) {
    const nb::object item = is_sequence ? nb::object(source[row]) : nb::none();
    rows[static_cast<size_t>(row)].seed = fresh[static_cast<size_t>(row)];
    if (item.is_none()) continue;
    const Label label{op, "seed", row};
    Int128 value;
    read_number(label, item, value);
    rows[static_cast<size_t>(row)].seed = check_seed(value, label);
  }
}

// ---- token histories
// ----------------------------------------------------------------------------------------------

// Where a token stands in the list of the row being read. Rows are told apart by number, so that nothing is
// cleared.
class UniqueIds {
 public:
  void start_row() {
    places_.resize(kMaxVocabSize);
    if (++row_ == 0) {
      std::fill(places_.begin(), places_.end(), Place{});
      row_ = 1;
    }
  }
  uint32_t& count_of(int32_t id, RowInputs& inputs) {
    Place& place = places_[static_cast<size_t>(id)];
    if (place.row != row_) {
      place = {row_, static_cast<uint32_t>(inputs.history_ids.size())};
      inputs.history_ids.push_back(id);
      inputs.history_counts.push_back(0);
    }
    return inputs.history_counts[place.index];
  }

 private:
  struct Place {
    uint32_t row = 0, index = 0;
  };
  std::vector<Place> places_;
  uint32_t row_ = 0;
};

constexpr const char* kIdsExpected = "a sequence of token ids (a list, or a 1-D array of integers)";

// Calls add(id) for each id of one row's sequence; returns how many there are.
template <class Add>
int64_t read_ids(const Label& label, nb::handle source, int vocab_size, Add add) {
  const auto add_checked = [&](int64_t i, Int128 id) {
    if (id < 0 || id >= vocab_size) {
      const std::string expected = "0 \u2264 id < " + std::to_string(vocab_size);
      label.at(i).reject(id, expected.c_str());
    }
    add(static_cast<int32_t>(id));
  };
  if (source.is_none()) return 0;
  if (is_array(source)) {
    const Tensor array = read_array<Int128>(label, source);
    if (array.ndim != 1)
      raise<ValueError>(label.op, "%s has shape %s, expected one dimension: the token ids of one row",
                        label.text().c_str(), shape_text(array).c_str());
    for (int64_t i = 0; i < array.shape[0]; ++i) add_checked(i, element<Int128>(array, i));
    return array.shape[0];
  }
  if (PyUnicode_Check(source.ptr()) || PyBytes_Check(source.ptr()) || PyDict_Check(source.ptr()) ||
      !PySequence_Check(source.ptr()))
    label.reject_type(source, kIdsExpected);
  const nb::object list =
      PyList_Check(source.ptr()) ? nb::borrow(source) : nb::steal(PySequence_List(source.ptr()));
  if (!list.is_valid()) throw nb::python_error();
  int64_t i = 0;
  for (; i < PyList_Size(list.ptr()); ++i) {
    const nb::object item = nb::borrow(PyList_GetItem(list.ptr(), i));
    Int128 id;
    read_number(label.at(i), item, id);
    add_checked(i, id);
  }
  return i;
}

// The token sequences of all rows: an iterable of num_rows sequences, as objects.
std::vector<nb::object> sequences_of_rows(const Label& argument, nb::handle source, int num_rows) {
  constexpr const char* kExpected = "one id sequence per row (a list of lists or of 1-D arrays)";
  std::vector<nb::object> rows(static_cast<size_t>(num_rows), nb::none());
  if (source.is_none()) return rows;
  if (PyUnicode_Check(source.ptr()) || PyDict_Check(source.ptr()) || !PySequence_Check(source.ptr()))
    argument.reject_type(source, kExpected);
  const nb::object list =
      PyList_Check(source.ptr()) ? nb::borrow(source) : nb::steal(PySequence_List(source.ptr()));
  if (!list.is_valid()) throw nb::python_error();
  if (PyList_Size(list.ptr()) > 0)
    if (const nb::object first = nb::borrow(PyList_GetItem(list.ptr(), 0));
        PyIndex_Check(first.ptr()) && !is_array(first))
      Label{argument.op, argument.name, 0}.reject_type(first, kExpected);
  expect_length(argument, PyList_Size(list.ptr()), num_rows);
  for (int row = 0; row < num_rows; ++row)
    rows[static_cast<size_t>(row)] = nb::borrow(PyList_GetItem(list.ptr(), row));
  return rows;
}

// Prompt and output of one row, as a range of unique ids with counts. Returns the number of output tokens.
int64_t read_history(const Label& prompt, nb::handle prompt_tokens, const Label& output,
                     nb::handle output_tokens, int vocab_size, RowInputs& inputs, RowParams& row) {
  static thread_local UniqueIds unique;
  unique.start_row();
  row.history_begin = static_cast<int64_t>(inputs.history_ids.size());
  read_ids(prompt, prompt_tokens, vocab_size, [&](int32_t id) { unique.count_of(id, inputs) |= kInPrompt; });
  const int64_t num_outputs =
      read_ids(output, output_tokens, vocab_size, [&](int32_t id) { ++unique.count_of(id, inputs); });
  row.history_size =
      static_cast<int32_t>(static_cast<int64_t>(inputs.history_ids.size()) - row.history_begin);
  return num_outputs;
}

// ---- logit bias ------------------------------------------------------------------------------------------
void read_bias(const Label& label, nb::handle source, int vocab_size, RowInputs& inputs, RowParams& row) {
  row.bias_begin = static_cast<int64_t>(inputs.bias_ids.size());
  if (source.is_none()) return;
  if (!PyDict_Check(source.ptr())) label.reject_type(source, "a dict {token id: bias}");
  std::vector<std::pair<int32_t, float>> entries;
  entries.reserve(static_cast<size_t>(PyDict_Size(source.ptr())));
  const nb::object items =
      nb::steal(PyDict_Items(source.ptr()));  // a copy: reading a value may run Python code
  for (Py_ssize_t i = 0; i < PyList_Size(items.ptr()); ++i) {
    PyObject* item = PyList_GetItem(items.ptr(), i);
    const nb::handle key = PyTuple_GetItem(item, 0), value = PyTuple_GetItem(item, 1);
    Int128 id;
    if (!PyIndex_Check(key.ptr()))
      raise<TypeError>(label.op, "%s has the key %s, expected token ids (int)", label.text().c_str(),
                       nb::repr(key).c_str());
    read_number(label, key, id);
    if (id < 0 || id >= vocab_size)
      raise<ValueError>(label.op, "%s has the key %s, expected 0 \u2264 id < %d", label.text().c_str(),
                        text_of(id).c_str(), vocab_size);
    double bias;
    read_number(label.at(static_cast<int64_t>(id)), value, bias);
    const float rounded = static_cast<float>(bias);
    if (!(rounded < kInfinity))
      label.at(static_cast<int64_t>(id)).reject(bias, "a finite bias, or -inf to ban the token");
    entries.emplace_back(static_cast<int32_t>(id), rounded);
  }
  std::sort(entries.begin(), entries.end());
  for (size_t i = 1; i < entries.size(); ++i)
    if (entries[i].first == entries[i - 1].first)
      raise<ValueError>(label.op, "%s has two keys for token %d", label.text().c_str(), entries[i].first);
  for (const auto& [id, bias] : entries) {
    inputs.bias_ids.push_back(id);
    inputs.bias_values.push_back(bias);
  }
  row.bias_size = static_cast<int32_t>(entries.size());
}

void read_biases(const char* op, nb::handle source, int vocab_size, RowInputs& inputs) {
  const Label argument{op, "logit_bias"};
  if (source.is_none()) return;
  if (PyDict_Check(source.ptr())) {  // one for all rows
    RowParams shared;
    read_bias(argument, source, vocab_size, inputs, shared);
    for (RowParams& row : inputs.rows) {
      row.bias_begin = shared.bias_begin;
      row.bias_size = shared.bias_size;
    }
    return;
  }
  if (!PyList_Check(source.ptr()) && !PyTuple_Check(source.ptr()))
    argument.reject_type(source, "a dict {token id: bias}, or a list of one dict or None per row");
  expect_length(argument, PySequence_Size(source.ptr()), static_cast<int64_t>(inputs.rows.size()));
  for (size_t row = 0; row < inputs.rows.size(); ++row)
    read_bias(Label{op, "logit_bias", static_cast<int64_t>(row)}, nb::object(source[row]), vocab_size, inputs,
              inputs.rows[row]);
}

// ---- all that is a number --------------------------------------------------------------------------------
void read_numbers(const char* op, const RowArguments& arguments, std::vector<RowParams>& rows) {
  const int num_rows = static_cast<int>(rows.size());
  for (const FloatField& field : kFloatFields)
    read_values<double>({op, field.name}, arguments.*field.argument, num_rows,
                        [&](int row, double value, const Label& label) {
                          const float rounded = static_cast<float>(value);
                          if (!field.in_range(rounded)) label.reject(value, field.expected);
                          if (row >= 0) rows[static_cast<size_t>(row)].*field.field = rounded;
                        });
  read_values<Int128>({op, "top_k"}, arguments.top_k, num_rows, [&](int row, Int128 value, const Label&) {
    if (row >= 0)
      rows[static_cast<size_t>(row)].top_k = static_cast<int32_t>(std::clamp<Int128>(value, -1, INT32_MAX));
  });
  if (arguments.position.is_valid())
    read_values<Int128>({op, "position"}, arguments.position, num_rows,
                        [&](int row, Int128 value, const Label& label) {
                          if (value < 0 || value >= Int128{1} << 64)
                            label.reject(value, "0 \u2264 position < 2^64");
                          if (row >= 0)
                            rows[static_cast<size_t>(row)].position = static_cast<uint64_t>(value);
                        });
  read_values<Int128>({op, "substream"}, arguments.substream, num_rows,
                      [&](int row, Int128 value, const Label& label) {
                        if (value < 0 || value >= Int128{1} << 32)
                          label.reject(value, "0 \u2264 substream < 2^32");
                        if (row >= 0) rows[static_cast<size_t>(row)].substream = static_cast<uint32_t>(value);
                      });
  read_seeds(op, arguments.seed, rows);
}

void expect_plain_values(const char* op, const RowArguments& a) {
  const std::pair<const char*, nb::handle> values[] = {
      {"temperature", a.temperature},
      {"top_k", a.top_k},
      {"top_p", a.top_p},
      {"min_p", a.min_p},
      {"repetition_penalty", a.repetition_penalty},
      {"presence_penalty", a.presence_penalty},
      {"frequency_penalty", a.frequency_penalty},
      {"seed", a.seed},
      {"substream", a.substream},
  };
  for (const auto& [name, value] : values)
    if (PyList_Check(value.ptr()) || PyTuple_Check(value.ptr()))
      Label{op, name}.reject_type(value, "a number: a row has one value");
}

}  // namespace

RowInputs read_rows(const char* op, const RowArguments& arguments, int num_rows, int vocab_size) {
  RowInputs inputs;
  inputs.rows.resize(static_cast<size_t>(num_rows));
  read_numbers(op, arguments, inputs.rows);
  read_biases(op, arguments.logit_bias, vocab_size, inputs);
  if (arguments.prompt_tokens.is_none() && arguments.output_tokens.is_none()) return inputs;
  const auto prompts = sequences_of_rows({op, "prompt_tokens"}, arguments.prompt_tokens, num_rows);
  const auto outputs = sequences_of_rows({op, "output_tokens"}, arguments.output_tokens, num_rows);
  for (int row = 0; row < num_rows; ++row)
    read_history({op, "prompt_tokens", row}, prompts[static_cast<size_t>(row)], {op, "output_tokens", row},
                 outputs[static_cast<size_t>(row)], vocab_size, inputs,
                 inputs.rows[static_cast<size_t>(row)]);
  return inputs;
}

RowInputs read_one_row(const char* op, const RowArguments& arguments, int vocab_size) {
  RowInputs inputs;
  inputs.rows.resize(1);
  expect_plain_values(op, arguments);
  read_numbers(op, arguments, inputs.rows);
  RowParams& row = inputs.rows[0];
  read_bias({op, "logit_bias"}, arguments.logit_bias, vocab_size, inputs, row);
  const auto label = [&](const char* name) { return Label{op, name, 0, -1, true}; };
  row.position = static_cast<uint64_t>(read_history(label("prompt_tokens"), arguments.prompt_tokens,
                                                    label("output_tokens"), arguments.output_tokens,
                                                    vocab_size, inputs, row));
  return inputs;
}

Tensor read_logits(const char* op, nb::handle logits) {
  Tensor tensor = tensor_from(op, "logits", logits);
  tensor.expect_ndim(2)
      .expect_dtype({DType::kFloat32, DType::kFloat16, DType::kBFloat16})
      .expect_contiguous_last_axis();
  if (!tensor.on_cpu())
    raise<ValueError>(op, "logits is on %s, expected cpu",
                      device_name(tensor.device_type, tensor.device_id).c_str());
  if (tensor.shape[1] < 1 || tensor.shape[1] > kMaxVocabSize || tensor.shape[0] > INT32_MAX)
    raise<ValueError>(op, "logits has shape %s, expected [B, V] with 1 \u2264 V \u2264 %d",
                      shape_text(tensor).c_str(), kMaxVocabSize);
  return tensor;
}

void read_bitmask(const char* op, nb::handle bitmask, SampleParams& params) {
  params.token_bitmask = nullptr;
  if (bitmask.is_none()) return;
  const Tensor mask = tensor_from(op, "token_bitmask", bitmask);
  const int64_t words = (params.vocab_size + 31) / 32;
  mask.expect_dtype({DType::kInt32, DType::kUInt32})
      .expect_shape({params.num_rows, words}, "[B, ceil(V / 32)]")
      .expect_contiguous_last_axis();
  if (!mask.on_cpu())
    raise<ValueError>(op, "token_bitmask is on %s, expected cpu like logits",
                      device_name(mask.device_type, mask.device_id).c_str());
  params.token_bitmask = mask.as<const uint32_t>();
  params.token_bitmask_stride = mask.stride[0];
}

int read_num_logprobs(const char* op, nb::handle logprobs) {
  if (logprobs.is_none()) return -1;
  const Label label{op, "logprobs"};
  Int128 value;
  read_number(label, logprobs, value);
  if (value < 0 || value > kMaxTopLogprobs) label.reject(value, "0 \u2264 logprobs \u2264 20, or None");
  return static_cast<int>(value);
}

LogprobsMode read_logprobs_mode(const char* op, nb::handle mode) {
  static PyObject* const kRaw = PyUnicode_InternFromString("raw");
  if (mode.ptr() == kRaw) return LogprobsMode::kRaw;
  if (PyUnicode_Check(mode.ptr())) {
    if (PyUnicode_CompareWithASCIIString(mode.ptr(), "raw") == 0) return LogprobsMode::kRaw;
    if (PyUnicode_CompareWithASCIIString(mode.ptr(), "processed") == 0) return LogprobsMode::kProcessed;
  }
  raise<ValueError>(op, "logprobs_mode = %s, expected 'raw' or 'processed'", nb::repr(mode).c_str());
}

void raise_for_status(const char* op, const int32_t* status, int num_rows) {
  int first = -1, failures = 0;
  for (int row = num_rows - 1; row >= 0; --row)
    if (status[row] != 0) {
      first = row;
      ++failures;
    }
  if (first < 0) return;
  std::string others;
  if (failures > 1)
    others = "; " + std::to_string(failures - 1) + (failures == 2 ? " more row fails" : " more rows fail");
  switch (static_cast<SampleStatus>(status[first])) {
    case SampleStatus::kBadLogit:
      raise<ValueError>(op, "logits[%d] holds NaN or +inf (status 1)%s", first, others.c_str());
    case SampleStatus::kNoToken:
      raise<ValueError>(op, "logits[%d] has no token left with a finite value (status 2)%s", first,
                        others.c_str());
    default:
      raise<ValueError>(op, "a parameter of row %d is out of range (status 3)%s", first, others.c_str());
  }
}

}  // namespace tokenstep::bind
