#include "simt/source_lines.h"

#include <dlfcn.h>

#include <cstdio>
#include <regex>

namespace tokenstep::simt {
namespace {

// The line of the call before a return address; inlined functions at their innermost place.
std::string source_line(uint32_t offset) {
  char text[64];
  snprintf(text, sizeof text, "0x%x", offset - 1);
  Dl_info module;
  if (!dladdr(__ehdr_start, &module)) return text;
  const std::string command = std::string("addr2line -e '") + module.dli_fname + "' " + text + " 2>/dev/null";
  std::string line;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    for (int c; (c = fgetc(pipe)) != EOF && c != '\n';) line += static_cast<char>(c);
    pclose(pipe);
  }
  if (line.empty() || line[0] == '?') return std::string("code ") + text;
  line = line.substr(0, line.find(' '));  // without "(discriminator 2)"
  return line.substr(line.rfind('/') + 1);
}

}  // namespace

std::string with_source_lines(const std::string& message) {
  static const std::regex tag("<code ([0-9]+)>");
  std::string text;
  auto rest = message.cbegin();
  for (std::sregex_iterator it(message.begin(), message.end(), tag), end; it != end; ++it) {
    text.append(rest, (*it)[0].first);
    text += source_line(static_cast<uint32_t>(std::stoul((*it)[1])));
    rest = (*it)[0].second;
  }
  return text.append(rest, message.cend());
}

}  // namespace tokenstep::simt
