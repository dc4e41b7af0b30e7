#include "bind/sample_lists.h"

#include <algorithm>
#include <utility>

#include "common/sampling_rules.h"

namespace tokenstep::bind {
namespace {

// ---- token histories --------------------------------------------------------------------------------------
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
    const Tensor array = tensor_from(label.op, label.name, source);
    expect_dtype_of<Int128>(array);
    expect_host(label, array);
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

}  // namespace

int64_t read_history(const Label& prompt, nb::handle prompt_tokens, const Label& output,
                     nb::handle output_tokens, Semantics semantics, int vocab_size, RowInputs& inputs,
                     size_t row) {
  static thread_local UniqueIds unique;
  unique.start_row();
  const size_t begin = inputs.begins[row].history = inputs.history_ids.size();
  int64_t num_outputs;
  if (semantics == Semantics::kLlamaCpp) {
    std::vector<int32_t>& window = inputs.window_tokens;
    window.clear();
    const auto append = [&](int32_t id) { window.push_back(id); };
    read_ids(prompt, prompt_tokens, vocab_size, append);
    num_outputs = read_ids(output, output_tokens, vocab_size, append);
    if (const int32_t last_n = inputs.rows[row].penalty_last_n; last_n >= 0)
      window.erase(window.begin(), window.end() - std::min<ptrdiff_t>(last_n, std::ssize(window)));
    for (const int32_t id : window) ++unique.count_of(id, inputs);
    if (inputs.rows[row].penalty_last_n < 0) window.clear();  // nothing is ever too old
  } else {
    read_ids(prompt, prompt_tokens, vocab_size,
             [&](int32_t id) { unique.count_of(id, inputs) |= kInPrompt; });
    num_outputs =
        read_ids(output, output_tokens, vocab_size, [&](int32_t id) { ++unique.count_of(id, inputs); });
  }
  inputs.rows[row].history_size = static_cast<int32_t>(inputs.history_ids.size() - begin);
  return num_outputs;
}

void read_histories(const char* op, const RowArguments& arguments, int vocab_size, RowInputs& inputs) {
  if (arguments.prompt_tokens.is_none() && arguments.output_tokens.is_none()) return;
  const int num_rows = static_cast<int>(inputs.rows.size());
  const auto prompts = sequences_of_rows({op, "prompt_tokens"}, arguments.prompt_tokens, num_rows);
  const auto outputs = sequences_of_rows({op, "output_tokens"}, arguments.output_tokens, num_rows);
  for (size_t row = 0; row < inputs.rows.size(); ++row) {
    const auto label = [&](const char* name) { return Label{op, name, static_cast<int64_t>(row)}; };
    read_history(label("prompt_tokens"), prompts[row], label("output_tokens"), outputs[row],
                 arguments.semantics, vocab_size, inputs, row);
  }
}

// ---- logit bias -----------------------------------------------------------------------------------------
void read_bias(const Label& label, nb::handle source, int vocab_size, RowInputs& inputs, size_t row) {
  inputs.begins[row].bias = inputs.bias_ids.size();
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
  inputs.rows[row].bias_size = static_cast<int32_t>(entries.size());
}

void read_biases(const char* op, nb::handle source, int vocab_size, RowInputs& inputs) {
  const Label argument{op, "logit_bias"};
  if (source.is_none()) return;
  if (PyDict_Check(source.ptr())) {  // one for all rows
    RowInputs shared;
    shared.resize(1);
    read_bias(argument, source, vocab_size, shared, 0);
    for (RowParams& row : inputs.rows) row.bias_size = shared.rows[0].bias_size;
    inputs.bias_ids = std::move(shared.bias_ids);
    inputs.bias_values = std::move(shared.bias_values);
    return;
  }
  if (!PyList_Check(source.ptr()) && !PyTuple_Check(source.ptr()))
    argument.reject_type(source, "a dict {token id: bias}, or a list of one dict or None per row");
  expect_length(argument, PySequence_Size(source.ptr()), static_cast<int64_t>(inputs.rows.size()));
  for (size_t row = 0; row < inputs.rows.size(); ++row)
    read_bias(Label{op, "logit_bias", static_cast<int64_t>(row)}, nb::object(source[row]), vocab_size, inputs,
              row);
}

}  // namespace tokenstep::bind
