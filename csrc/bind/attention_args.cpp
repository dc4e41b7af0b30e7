#include "bind/attention_args.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <string>

#include "bind/backend.h"
#include "common/check.h"

namespace tokenstep::bind {
namespace {

long long ll(int64_t x) { return static_cast<long long>(x); }

RowsView rows_view(const Tensor& t) { return {t.data, t.stride[0], t.stride[1]}; }
CacheView cache_view(const Tensor& t) { return {t.data, t.stride[0], t.stride[1], t.stride[2]}; }

// The kernels of a GPU copy rows of a cache in pieces of eight elements, or of 16 bytes.
void expect_aligned_rows(const Tensor& cache) {
  const int64_t piece = std::min<int64_t>(8 * bytes_of(cache.dtype), 16);
  const auto is_aligned = [&](int64_t bytes) { return bytes % piece == 0; };
  bool aligned = is_aligned(static_cast<int64_t>(reinterpret_cast<uintptr_t>(cache.data)));
  for (int axis = 0; axis < 3; ++axis)
    aligned &= cache.shape[axis] < 2 || is_aligned(cache.stride[axis] * bytes_of(cache.dtype));
  if (!aligned && !cache.empty())
    raise<ValueError>(cache.op,
                      "%s has rows at strides of %lld, %lld and %lld elements, expected rows that begin at "
                      "multiples of %lld bytes",
                      cache.argument, ll(cache.stride[0]), ll(cache.stride[1]), ll(cache.stride[2]),
                      ll(piece));
}

void read_caches(TensorReader& reader, const BatchArguments& arguments, bool appends, const Tensor& first,
                 PagedBatch& batch) {
  const auto read = [&](const char* name, nb::handle source) {
    return appends ? reader.read_to_write(name, source) : reader.read(name, source);
  };
  const Tensor k_cache = read("k_cache", arguments.k_cache);
  k_cache.expect_dtype({first.dtype, DType::kFloat8E4M3, DType::kInt8})
      .expect_same_device(first)
      .expect_contiguous_last_axis()
      .expect_shape({-1, -1, -1, batch.head_dim}, "[num_blocks, block_size, num_kv_heads, head_dim]");
  const Tensor v_cache = read("v_cache", arguments.v_cache);
  v_cache.expect_dtype({k_cache.dtype})
      .expect_same_device(first)
      .expect_contiguous_last_axis()
      .expect_shape({k_cache.shape[0], k_cache.shape[1], k_cache.shape[2], batch.head_dim},
                    "the shape of k_cache");
  batch.cache_dtype = k_cache.dtype;
  batch.num_blocks = size32(k_cache, 0);
  batch.block_size = size32(k_cache, 1);
  batch.num_kv_heads = size32(k_cache, 2);
  if (batch.block_size < 1 || batch.num_kv_heads < 1)
    raise<ValueError>(reader.op(), "k_cache has shape %s, expected block_size and num_kv_heads of at least 1",
                      shape_text(k_cache).c_str());
  batch.k_cache = cache_view(k_cache);
  batch.v_cache = cache_view(v_cache);
  if (backend::kOnHost) return;
  expect_aligned_rows(k_cache);
  expect_aligned_rows(v_cache);
}

// One scale per KV head of a quantised cache; none of any other. Where the host can read them, they are
// judged.
const float* read_scales(TensorReader& reader, const char* name, nb::handle source, const Tensor& first,
                         const PagedBatch& batch) {
  if (!is_quantised(batch.cache_dtype)) {
    if (source.is_none()) return nullptr;
    raise<ValueError>(reader.op(), "%s is given, expected None: only quantised caches have scales, not %s",
                      name, name_of(batch.cache_dtype));
  }
  if (source.is_none())
    raise<ValueError>(reader.op(), "%s is None, expected float32 [num_kv_heads] for a cache of %s", name,
                      name_of(batch.cache_dtype));
  const Tensor scales = reader.read(name, source);
  scales.expect_dtype({DType::kFloat32})
      .expect_shape({batch.num_kv_heads}, "[num_kv_heads]")
      .expect_contiguous()
      .expect_same_device(first);
  const float* values = scales.as<float>();
  for (int head = 0; backend::kOnHost && head < batch.num_kv_heads; ++head)
    if (!(values[head] > 0.0f && std::isfinite(values[head])))
      raise<ValueError>(reader.op(), "%s[%d] = %g, expected a finite number above 0", name, head,
                        static_cast<double>(values[head]));
  return values;
}

void read_sequences(TensorReader& reader, const BatchArguments& arguments, const Tensor& first,
                    PagedBatch& batch) {
  const Tensor seq_lens = reader.read("seq_lens", arguments.seq_lens);
  seq_lens.expect_dtype({DType::kInt32}).expect_ndim(1).expect_contiguous().expect_same_device(first);
  const Tensor table = reader.read("block_table", arguments.block_table);
  table.expect_dtype({DType::kInt32})
      .expect_shape({seq_lens.shape[0], -1}, "[len(seq_lens), max_blocks]")
      .expect_contiguous_last_axis()
      .expect_same_device(first);
  batch.num_sequences = size32(seq_lens, 0);
  batch.seq_lens = seq_lens.as<int32_t>();
  batch.max_blocks = size32(table, 1);
  batch.block_table = table.as<int32_t>();
  batch.block_table_stride = table.stride[0];

  if (!arguments.query_start.is_none()) {
    const Tensor start = reader.read("query_start", arguments.query_start);
    start.expect_dtype({DType::kInt32})
        .expect_shape({seq_lens.shape[0] + 1}, "[len(seq_lens) + 1]")
        .expect_contiguous()
        .expect_same_device(first);
    batch.query_start = start.as<int32_t>();
  } else if (batch.num_queries != batch.num_sequences) {
    raise<ValueError>(reader.op(), "%s has %d rows for %d sequences, expected one each, or query_start",
                      first.argument, batch.num_queries, batch.num_sequences);
  }
}

void read_new_rows(TensorReader& reader, const BatchArguments& arguments, const Tensor& first,
                   PagedBatch& batch) {
  const auto read = [&](const char* name, nb::handle source, const char* other) {
    if (source.is_none()) raise<TypeError>(reader.op(), "%s is None, expected an array like %s", name, other);
    const Tensor rows = reader.read(name, source);
    rows.expect_dtype({first.dtype})
        .expect_shape({batch.num_queries, batch.num_kv_heads, batch.head_dim}, "[T, num_kv_heads, head_dim]")
        .expect_contiguous_last_axis()
        .expect_same_device(first);
    return rows_view(rows);
  };
  batch.new_k = read("k", arguments.k, "v");
  batch.new_v = read("v", arguments.v, "k");
}

void read_rope(TensorReader& reader, nb::handle rope, const Tensor& first, PagedBatch& batch) {
  static PyObject* const kNames[] = {PyUnicode_InternFromString("cos"), PyUnicode_InternFromString("sin"),
                                     PyUnicode_InternFromString("interleaved")};
  nb::object parts[3];
  for (int i = 0; i < 3; ++i) {
    parts[i] = nb::steal(PyObject_GetAttr(rope.ptr(), kNames[i]));
    if (parts[i].is_valid()) continue;
    PyErr_Clear();
    raise<TypeError>(reader.op(), "rope is %s, expected a tokenstep.Rope or None", kind_of(rope).c_str());
  }
  const Tensor cos = reader.read("rope.cos", parts[0]), sin = reader.read("rope.sin", parts[1]);
  cos.expect_dtype({DType::kFloat32}).expect_ndim(2).expect_contiguous().expect_same_device(first);
  sin.expect_dtype({DType::kFloat32})
      .expect_shape({cos.shape[0], cos.shape[1]}, "the shape of rope.cos")
      .expect_contiguous()
      .expect_same_device(first);
  if (cos.shape[1] < 1 || cos.shape[1] > batch.head_dim / 2)
    raise<ValueError>(reader.op(),
                      "rope.cos has shape %s, expected [max_position, rotary_dim / 2] with 2 ≤ rotary_dim ≤ "
                      "%d (head_dim)",
                      shape_text(cos).c_str(), batch.head_dim);
  batch.rope = {cos.as<float>(), sin.as<float>(), size32(cos, 0), static_cast<int32_t>(2 * cos.shape[1]),
                read_bool(reader.op(), "rope.interleaved", parts[2])};
}

}  // namespace

// ---- arrays -----------------------------------------------------------------------------------------------
Tensor TensorReader::keep(Tensor tensor) {
  if (!tensor.exchange) kept_.push_back(tensor.keep_alive);
  return tensor;
}

Tensor TensorReader::read(const char* argument, nb::handle source) {
  return keep(tensor_from(op_, argument, source));
}

Tensor TensorReader::read_to_write(const char* argument, nb::handle source) {
  Tensor tensor = keep(tensor_from(op_, argument, source, Access::kWrite));
  for (int i = 0; i < tensor.ndim && !tensor.empty(); ++i)
    if (tensor.shape[i] > 1 && tensor.stride[i] == 0)
      raise<ValueError>(op_,
                        "%s has stride 0 along axis %d, expected an array of distinct elements to write to",
                        argument, i);
  return tensor;
}

void refuse_other_devices(const Tensor& tensor) {
  if (tensor.device_type == backend::kDeviceType) return;
  const nb::object reason = nb::module_::import_("tokenstep._native").attr("cuda_absent_because");
  raise<ValueError>(
      tensor.op, "%s is on %s, expected %s: %s", tensor.argument,
      device_name(tensor.device_type, tensor.device_id).c_str(), backend::kDeviceName,
      reason.is_none() ? "there are no kernels for that device" : nb::cast<std::string>(reason).c_str());
}

void check_head_dim(const Tensor& tensor) {
  const int64_t head_dim = tensor.shape[tensor.ndim - 1];
  if (head_dim < 8 || head_dim > kMaxHeadDim || head_dim % 8)
    raise<ValueError>(tensor.op, "%s has head_dim %lld, expected a multiple of 8 from 8 to %d",
                      tensor.argument, ll(head_dim), kMaxHeadDim);
}

int32_t size32(const Tensor& tensor, int axis) {
  if (tensor.shape[axis] > INT32_MAX)
    raise<ValueError>(tensor.op, "%s has shape %s, expected sizes below 2^31", tensor.argument,
                      shape_text(tensor).c_str());
  return static_cast<int32_t>(tensor.shape[axis]);
}

const float* read_per_head(TensorReader& reader, const char* argument, nb::handle source, const Tensor& q) {
  if (source.is_none()) return nullptr;
  const Tensor values = reader.read(argument, source);
  values.expect_dtype({DType::kFloat32})
      .expect_shape({q.shape[1]}, "[num_heads]")
      .expect_contiguous()
      .expect_same_device(q);
  return values.as<float>();
}

// ---- the batch --------------------------------------------------------------------------------------------
PagedBatch read_batch(TensorReader& reader, const BatchArguments& arguments, const Tensor& first) {
  refuse_other_devices(first);
  first.expect_dtype({DType::kFloat32, DType::kFloat16, DType::kBFloat16})
      .expect_ndim(3)
      .expect_contiguous_last_axis();
  check_head_dim(first);
  const bool appends = !arguments.k.is_none() || !arguments.v.is_none();
  PagedBatch batch{};
  batch.dtype = first.dtype;
  batch.num_queries = size32(first, 0);
  batch.head_dim = size32(first, 2);
  read_caches(reader, arguments, appends, first, batch);
  batch.k_scale = read_scales(reader, "k_scale", arguments.k_scale, first, batch);
  batch.v_scale = read_scales(reader, "v_scale", arguments.v_scale, first, batch);
  read_sequences(reader, arguments, first, batch);
  if (appends) read_new_rows(reader, arguments, first, batch);
  if (!arguments.rope.is_none()) read_rope(reader, arguments.rope, first, batch);
  return batch;
}

void read_queries(const Tensor& q, PagedBatch& batch) {
  batch.q = rows_view(q);
  batch.num_heads = size32(q, 1);
  if (batch.num_heads < 1 || batch.num_heads % batch.num_kv_heads)
    raise<ValueError>(q.op, "q has %d heads, expected a multiple of the cache's %d", batch.num_heads,
                      batch.num_kv_heads);
}

void check_query_start(const char* op, const PagedBatch& batch) {
  const int32_t* start = batch.query_start;
  if (!start || !backend::kOnHost) return;
  if (start[0] < 0) raise<ValueError>(op, "query_start[0] = %d, expected at least 0", start[0]);
  for (int r = 0; r < batch.num_sequences; ++r) {
    const int64_t count = int64_t{start[r + 1]} - start[r];
    if (count < 0)
      raise<ValueError>(op, "query_start[%d] = %d, expected at least query_start[%d] = %d", r + 1,
                        start[r + 1], r, start[r]);
    if (count > batch.max_query_len)
      raise<ValueError>(op, "query_start gives sequence %d %lld queries, expected at most max_query_len = %d",
                        r, ll(count), batch.max_query_len);
  }
  if (start[batch.num_sequences] > batch.num_queries)
    raise<ValueError>(op, "query_start[%d] = %d, expected at most %d (the rows given)", batch.num_sequences,
                      start[batch.num_sequences], batch.num_queries);
}

// ---- numbers ----------------------------------------------------------------------------------------------
float read_float(const char* op, const char* argument, nb::handle source, float fallback) {
  if (source.is_none()) return fallback;
  const double value = PyFloat_AsDouble(source.ptr());
  if (value == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    raise<TypeError>(op, "%s is %s, expected a number or None", argument, kind_of(source).c_str());
  }
  const float rounded = static_cast<float>(value);
  if (!std::isfinite(rounded))
    raise<ValueError>(op, "%s = %g, expected a number that is finite in float32, or None", argument, value);
  return rounded;
}

int32_t read_positive_int(const char* op, const char* argument, nb::handle source) {
  const nb::object index = nb::steal(PyNumber_Index(source.ptr()));
  if (!index.is_valid()) {
    PyErr_Clear();
    raise<TypeError>(op, "%s is %s, expected an int", argument, kind_of(source).c_str());
  }
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow || value < 1 || value > INT32_MAX)
    raise<ValueError>(op, "%s = %s, expected 1 ≤ %s < 2^31", argument, nb::str(index).c_str(), argument);
  return static_cast<int32_t>(value);
}

bool read_bool(const char* op, const char* argument, nb::handle source) {
  if (!PyBool_Check(source.ptr()))
    raise<TypeError>(op, "%s is %s, expected a bool", argument, kind_of(source).c_str());
  return source.ptr() == Py_True;
}

}  // namespace tokenstep::bind
