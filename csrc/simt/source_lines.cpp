#include "simt/source_lines.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <regex>

namespace tokenstep::simt {
namespace {

// The line of the call before a return address. Of functions inlined into one another, the innermost one
// outside of the emulator: in the kernel, not in the software of an intrinsic.
std::string source_line(uint32_t offset) {
  char text[64];
  snprintf(text, sizeof text, "0x%x", offset - 1);
  Dl_info module;
  if (!dladdr(__ehdr_start, &module)) return text;
  const std::string command =
      std::string("addr2line -i -e '") + module.dli_fname + "' " + text + " 2>/dev/null";
  FILE* pipe = popen(command.c_str(), "r");
  if (!pipe) return text;
  std::string found;
  for (char line[1024]; fgets(line, sizeof line, pipe);)
    if (found.empty() && !strstr(line, "/csrc/simt/") && line[0] != '?') found = line;
  pclose(pipe);
  found = found.substr(0, found.find_first_of(" \n"));  // without "(discriminator 2)"
  return found.empty() ? std::string("code ") + text : found.substr(found.rfind('/') + 1);
}

}  // namespace

std::string with_source_lines(const std::string& message) {
  static const std::regex tag("<code ([0-9]+)>");
  static std::map<uint32_t, std::string> known;
  std::string text;
  auto rest = message.cbegin();
  for (std::sregex_iterator it(message.begin(), message.end(), tag), end; it != end; ++it) {
    text.append(rest, (*it)[0].first);
    const auto offset = static_cast<uint32_t>(std::stoul((*it)[1]));
    if (!known.contains(offset)) known[offset] = source_line(offset);
    text += known[offset];
    rest = (*it)[0].second;
  }
  return text.append(rest, message.cend());
}

}  // namespace tokenstep::simt
