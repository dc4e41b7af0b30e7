// Errors of the public entry points: `tokenstep.<op>: <argument> = <got>, expected <what>`.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace tokenstep {

struct ValueError : std::invalid_argument {  // a value out of range: ValueError in Python
  using std::invalid_argument::invalid_argument;
};
struct TypeError : std::invalid_argument {  // a wrong kind of object: TypeError in Python
  using std::invalid_argument::invalid_argument;
};

__attribute__((format(printf, 1, 2))) inline std::string format(const char* pattern, ...) {
  va_list args, again;
  va_start(args, pattern);
  va_copy(again, args);
  std::string text(static_cast<size_t>(vsnprintf(nullptr, 0, pattern, args)), '\0');
  vsnprintf(text.data(), text.size() + 1, pattern, again);
  va_end(args);
  va_end(again);
  return text;
}

template <class Error, class... Args>
[[noreturn]] void raise(const char* op, const char* pattern, Args... args) {
  throw Error(std::string("tokenstep.") + op + ": " + format(pattern, args...));
}

}  // namespace tokenstep
