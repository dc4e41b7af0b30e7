// Places in the program, for messages: kept as 32-bit offsets into this module, and turned into file:line (by
// the debugger's addr2line, where there is one) only when a message is read.
#pragma once
#include <cstdint>
#include <cstdio>
#include <string>

namespace tokenstep::simt {

extern "C" const char __ehdr_start[]
    __attribute__((visibility("hidden")));  // by the linker: where the module is loaded
extern "C" const char _end[] __attribute__((visibility("hidden")));

inline uint32_t code_offset(const void* return_address) {
  return static_cast<uint32_t>(static_cast<const char*>(return_address) - __ehdr_start);
}
inline bool in_module(uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(__ehdr_start) < static_cast<size_t>(_end - __ehdr_start);
}

// Part of a message. Without memory of its own: whoever reports an error never returns to release it.
struct Text {
  template <class... Args>
  Text(const char* format, Args... args) {
    snprintf(chars, sizeof chars, format, args...);
  }
  char chars[64];
};

inline Text code_tag(uint32_t offset) {
  return {"<code %u>", offset};
}  // stands for the place until the message is read
std::string with_source_lines(const std::string& message);  // the message with its tags replaced by file:line

}  // namespace tokenstep::simt
