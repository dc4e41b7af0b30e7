// Element types of tensors, and the widening to float32 that host and device share.
#pragma once
#include <cstdint>

namespace tokenstep {

enum class DType : int32_t {
  kFloat32,
  kFloat16,
  kBFloat16,
  kFloat8E4M3,
  kInt8,
  kUInt8,
  kInt32,
  kInt64,
  kUInt32,
  kUInt64,
  kFloat64,
  kOther
};

constexpr int bytes_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat32:
    case DType::kInt32:
    case DType::kUInt32:
      return 4;
    case DType::kInt64:
    case DType::kUInt64:
    case DType::kFloat64:
      return 8;
    default:
      return 1;
  }
}

// Elements of a cache that has scales.
constexpr bool is_quantised(DType dtype) { return dtype == DType::kFloat8E4M3 || dtype == DType::kInt8; }

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat8E4M3:
      return "float8_e4m3";
    case DType::kInt8:
      return "int8";
    case DType::kUInt8:
      return "uint8";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kUInt32:
      return "uint32";
    case DType::kUInt64:
      return "uint64";
    case DType::kFloat64:
      return "float64";
    case DType::kOther:
      break;
  }
  return "unsupported dtype";
}

}  // namespace tokenstep
