// CuPy has no exchange table of DLPack: what such a table gives is asked of its Python functions.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <initializer_list>

namespace tokenstep::bind::cupy {

namespace nb = nanobind;

// The stream on which CuPy is working on a device; null is the default one.
void* current_stream(int device_id);

// The DLPack capsule of an array that will be used on CuPy's current stream.
nb::object dlpack_of(nb::handle array);

// A new uninitialised array on a device.
nb::object empty(std::initializer_list<int64_t> shape, const char* dtype, int device_id);

}  // namespace tokenstep::bind::cupy
