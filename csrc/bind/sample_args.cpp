#include "bind/sample_args.h"

#include <unistd.h>

#include <algorithm>
#include <string>
#include <utility>

#include "bind/arguments.h"
#include "bind/backend.h"
#include "bind/sample_lists.h"
#include "common/sampling_rules.h"

namespace tokenstep::bind {
namespace {

// Reads the parameters of all rows; an array on the device of `logits` is noted for the device.
struct Reader {
  const char* op;
  RowInputs& inputs;
  const Tensor* logits;  // null: every array is read here

  std::vector<RowParams>& rows() const { return inputs.rows; }

  // check(value, label) gives what goes into each row's `field`, or raises.
  template <class Value, class Check, class Field>
  void read(const char* name, RowField id, nb::handle source, Check check, Field RowParams::* field) const {
    const auto leave_to_device = [&](const Tensor& array) {
      if (backend::kOnHost || !logits || array.device_type != backend::kDeviceType) return false;
      array.expect_same_device(*logits);
      inputs.device_fields.fields[static_cast<int>(id)] = {array.data, array.ndim ? array.stride[0] : 0,
                                                           array.dtype};
      return true;
    };
    read_values<Value>({op, name}, source, static_cast<int>(rows().size()), leave_to_device,
                       [&](int row, Value value, const Label& label) {
                         const Field checked = check(value, label);
                         if (row >= 0) rows()[static_cast<size_t>(row)].*field = checked;
                       });
  }
};

struct FloatField {
  const char* name;
  RowField id;
  nb::handle RowArguments::* argument;
  float RowParams::* field;
  bool (*in_range)(float);
  const char* expected;
};

constexpr FloatField kFloatFields[] = {
    {"temperature", RowField::kTemperature, &RowArguments::temperature, &RowParams::temperature,
     [](float x) { return x >= 0.0f && is_finite(x); }, "a finite temperature \u2265 0"},
    {"top_p", RowField::kTopP, &RowArguments::top_p, &RowParams::top_p,
     [](float x) { return x >= 0.0f && x <= 1.0f; }, "0 \u2264 top_p \u2264 1"},
    {"min_p", RowField::kMinP, &RowArguments::min_p, &RowParams::min_p,
     [](float x) { return x >= 0.0f && x <= 1.0f; }, "0 \u2264 min_p \u2264 1"},
    {"repetition_penalty", RowField::kRepetitionPenalty, &RowArguments::repetition_penalty,
     &RowParams::repetition_penalty, [](float x) { return x > 0.0f && is_finite(x); },
     "a finite repetition_penalty > 0"},
    {"presence_penalty", RowField::kPresencePenalty, &RowArguments::presence_penalty,
     &RowParams::presence_penalty, [](float x) { return is_finite(x); }, "a finite number"},
    {"frequency_penalty", RowField::kFrequencyPenalty, &RowArguments::frequency_penalty,
     &RowParams::frequency_penalty, [](float x) { return is_finite(x); }, "a finite number"},
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

void read_seeds(const Reader& reader, nb::handle source) {
  std::vector<RowParams>& rows = reader.rows();
  const Label argument{reader.op, "seed"};
  const int num_rows = static_cast<int>(rows.size());
  const bool is_sequence = PyList_Check(source.ptr()) || PyTuple_Check(source.ptr());
  bool any_none = source.is_none();
  if (is_sequence) {
    const Py_ssize_t size = PySequence_Size(source.ptr());
    for (Py_ssize_t i = 0; i < size && !any_none; ++i) any_none = nb::object(source[i]).is_none();
  }
  if (!any_none)
    return reader.read<Int128>(
        "seed", RowField::kSeed, source,
        [](Int128 value, const Label& label) { return check_seed(value, label); }, &RowParams::seed);
  std::vector<uint64_t> fresh(rows.size());
  fill_with_entropy(fresh);
  if (is_sequence) expect_length(argument, PySequence_Size(source.ptr()), num_rows);
  for (int row = 0; row < num_rows; ++row) {
    const nb::object item = is_sequence ? nb::object(source[row]) : nb::none();
    rows[static_cast<size_t>(row)].seed = fresh[static_cast<size_t>(row)];
    if (item.is_none()) continue;
    const Label label{reader.op, "seed", row};
    Int128 value;
    read_number(label, item, value);
    rows[static_cast<size_t>(row)].seed = check_seed(value, label);
  }
}

// ---- all that is a number --------------------------------------------------------------------------------
void read_numbers(const Reader& reader, const RowArguments& arguments) {
  for (const FloatField& field : kFloatFields)
    reader.read<double>(
        field.name, field.id, arguments.*field.argument,
        [&](double value, const Label& label) {
          const float rounded = static_cast<float>(value);
          if (!field.in_range(rounded)) label.reject(value, field.expected);
          return rounded;
        },
        field.field);
  reader.read<Int128>(
      "top_k", RowField::kTopK, arguments.top_k,
      [](Int128 value, const Label&) {
        return static_cast<int32_t>(std::clamp<Int128>(value, -1, INT32_MAX));
      },
      &RowParams::top_k);
  if (arguments.position.is_valid())
    reader.read<Int128>(
        "position", RowField::kPosition, arguments.position,
        [](Int128 value, const Label& label) {
          if (value < 0 || value >= Int128{1} << 64) label.reject(value, "0 \u2264 position < 2^64");
          return static_cast<uint64_t>(value);
        },
        &RowParams::position);
  reader.read<Int128>(
      "substream", RowField::kSubstream, arguments.substream,
      [](Int128 value, const Label& label) {
        if (value < 0 || value >= Int128{1} << 32) label.reject(value, "0 \u2264 substream < 2^32");
        return static_cast<uint32_t>(value);
      },
      &RowParams::substream);
  read_seeds(reader, arguments.seed);
}

// How many of the last tokens penalties count: an argument of llama.cpp's rules alone.
void read_penalty_last_n(const Reader& reader, const RowArguments& arguments) {
  constexpr int kDefault = 64;
  const Label argument{reader.op, "penalty_last_n"};
  const bool counts_last = arguments.semantics == Semantics::kLlamaCpp;
  if (arguments.penalty_last_n.is_none()) {
    for (RowParams& row : reader.rows()) row.penalty_last_n = counts_last ? kDefault : 0;
    return;
  }
  if (!counts_last)
    raise<ValueError>(reader.op, "penalty_last_n = %s, expected None unless semantics = 'llama.cpp'",
                      nb::repr(arguments.penalty_last_n).c_str());
  read_values<Int128>(
      argument, arguments.penalty_last_n, static_cast<int>(reader.rows().size()),
      [](const Tensor&) { return false; },
      [&](int row, Int128 value, const Label& label) {
        if (value < -1 || value > kMaxPenaltyLastN)
          label.reject(value, "-1 \u2264 penalty_last_n \u2264 2^20");
        if (row >= 0) reader.rows()[static_cast<size_t>(row)].penalty_last_n = static_cast<int32_t>(value);
      });
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
      {"penalty_last_n", a.penalty_last_n},
  };
  for (const auto& [name, value] : values)
    if (PyList_Check(value.ptr()) || PyTuple_Check(value.ptr()))
      Label{op, name}.reject_type(value, "a number: a row has one value");
}

// Moves `at` on by count elements; returns where they begin.
template <class T>
T* take(char*& at, size_t count) {
  T* begin = reinterpret_cast<T*>(at);
  at += count * sizeof(T);
  return begin;
}

}  // namespace

void RowInputs::drop_history() {
  for (RowParams& row : rows) row.history_size = 0;
  history_ids.clear();
  history_counts.clear();
  window_tokens.clear();
}

void RowInputs::sort_histories() {
  std::vector<std::pair<int32_t, uint32_t>> entries;
  for (size_t row = 0; row < rows.size(); ++row) {
    const size_t begin = begins[row].history, size = static_cast<size_t>(rows[row].history_size);
    entries.resize(size);
    for (size_t i = 0; i < size; ++i) entries[i] = {history_ids[begin + i], history_counts[begin + i]};
    std::sort(entries.begin(), entries.end());
    for (size_t i = 0; i < size; ++i) {
      history_ids[begin + i] = entries[i].first;
      history_counts[begin + i] = entries[i].second;
    }
  }
}

void RowInputs::point_rows(int32_t* to_history_ids, uint32_t* to_history_counts, int32_t* to_bias_ids,
                           float* to_bias_values) {
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i].history_ids = to_history_ids + begins[i].history;
    rows[i].history_counts = to_history_counts + begins[i].history;
    rows[i].bias_ids = to_bias_ids + begins[i].bias;
    rows[i].bias_values = to_bias_values + begins[i].bias;
  }
}

size_t RowInputs::packed_bytes() const {
  return rows.size() * sizeof(RowParams) + history_ids.size() * (sizeof(int32_t) + sizeof(uint32_t)) +
         bias_ids.size() * (sizeof(int32_t) + sizeof(float)) + window_tokens.size() * sizeof(int32_t);
}

void RowInputs::pack(void* memory, void* address) {
  char* at = static_cast<char*>(address) + rows.size() * sizeof(RowParams);
  int32_t* const to_history_ids = take<int32_t>(at, history_ids.size());
  uint32_t* const to_history_counts = take<uint32_t>(at, history_counts.size());
  int32_t* const to_bias_ids = take<int32_t>(at, bias_ids.size());
  point_rows(to_history_ids, to_history_counts, to_bias_ids, take<float>(at, bias_values.size()));
  if (!window_tokens.empty()) rows[0].window = take<int32_t>(at, window_tokens.size());

  char* to = static_cast<char*>(memory);
  const auto copy = [&](const auto& values) {
    const size_t bytes = values.size() * sizeof(values[0]);
    if (bytes > 0) memcpy(to, values.data(), bytes);
    to += bytes;
  };
  copy(rows);
  copy(history_ids);
  copy(history_counts);
  copy(bias_ids);
  copy(bias_values);
  copy(window_tokens);
}

RowInputs read_rows(const char* op, const RowArguments& arguments, const Tensor& logits) {
  RowInputs inputs;
  inputs.resize(static_cast<size_t>(logits.shape[0]));
  const int vocab_size = static_cast<int>(logits.shape[1]);
  const Reader reader{op, inputs, &logits};
  read_numbers(reader, arguments);
  read_penalty_last_n(reader, arguments);
  read_biases(op, arguments.logit_bias, vocab_size, inputs);
  read_histories(op, arguments, vocab_size, inputs);
  inputs.window_tokens.clear();
  return inputs;
}

RowInputs read_one_row(const char* op, const RowArguments& arguments, int vocab_size) {
  RowInputs inputs;
  inputs.resize(1);
  expect_plain_values(op, arguments);
  const Reader reader{op, inputs, nullptr};
  read_numbers(reader, arguments);
  read_penalty_last_n(reader, arguments);
  read_bias({op, "logit_bias"}, arguments.logit_bias, vocab_size, inputs, 0);
  const auto label = [&](const char* name) { return Label{op, name, 0, -1, true}; };
  inputs.rows[0].position = static_cast<uint64_t>(
      read_history(label("prompt_tokens"), arguments.prompt_tokens, label("output_tokens"),
                   arguments.output_tokens, arguments.semantics, vocab_size, inputs, 0));
  return inputs;
}

Tensor read_logits(const char* op, nb::handle logits) {
  Tensor tensor = tensor_from(op, "logits", logits);
  tensor.expect_ndim(2)
      .expect_dtype({DType::kFloat32, DType::kFloat16, DType::kBFloat16})
      .expect_contiguous_last_axis();
  if (tensor.device_type != backend::kDeviceType)
    raise<ValueError>(op, "logits is on %s, expected %s",
                      device_name(tensor.device_type, tensor.device_id).c_str(), backend::kDeviceName);
  if (tensor.shape[1] < 1 || tensor.shape[1] > kMaxVocabSize || tensor.shape[0] > INT32_MAX)
    raise<ValueError>(op, "logits has shape %s, expected [B, V] with 1 \u2264 V \u2264 %d",
                      shape_text(tensor).c_str(), kMaxVocabSize);
  return tensor;
}

SampleParams params_of(const char* op, const Tensor& logits, nb::handle bitmask, Semantics semantics) {
  SampleParams params{};
  params.logits = logits.data;
  params.logits_stride = logits.stride[0];
  params.logits_dtype = logits.dtype;
  params.num_rows = static_cast<int32_t>(logits.shape[0]);
  params.vocab_size = static_cast<int32_t>(logits.shape[1]);
  params.semantics = semantics;
  if (bitmask.is_none()) return params;
  const Tensor mask = tensor_from(op, "token_bitmask", bitmask);
  const int64_t words = (params.vocab_size + 31) / 32;
  mask.expect_dtype({DType::kInt32, DType::kUInt32})
      .expect_shape({params.num_rows, words}, "[B, ceil(V / 32)]")
      .expect_contiguous_last_axis()
      .expect_same_device(logits);
  params.token_bitmask = mask.as<const uint32_t>();
  params.token_bitmask_stride = mask.stride[0];
  return params;
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

Semantics read_semantics(const char* op, nb::handle semantics) {
  static constexpr std::pair<const char*, Semantics> kNames[] = {{"tokenstep", Semantics::kTokenstep},
                                                                 {"vllm", Semantics::kVllm},
                                                                 {"transformers", Semantics::kTransformers},
                                                                 {"llama.cpp", Semantics::kLlamaCpp}};
  static PyObject* const kDefault = PyUnicode_InternFromString(kNames[0].first);
  if (semantics.ptr() == kDefault) return Semantics::kTokenstep;
  if (PyUnicode_Check(semantics.ptr()))
    for (const auto& [name, value] : kNames)
      if (PyUnicode_CompareWithASCIIString(semantics.ptr(), name) == 0) return value;
  raise<ValueError>(op, "semantics = %s, expected 'tokenstep', 'vllm', 'transformers' or 'llama.cpp'",
                    nb::repr(semantics).c_str());
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
