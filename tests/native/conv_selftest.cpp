// Runs the kernels of every instruction set that this machine has against a plain loop.
//
//   conv_selftest           everything
//   conv_selftest "layer 7" one case, under the name that a failure gave
//
// DISCO_KERNELS_ISA restricts it to some instruction sets, with commas between. Prints what was
// covered; ends with 1 and the case if anything was wrong.

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "guarded.h"
#include "oracle.h"

namespace selftest {
namespace {

// A child's words to the process that waits for it: they outlive a fatal access.
struct Report {
  char current[2000];
  char summary[2000];
};

void say(char (&to)[2000], const std::string& text) {
  std::snprintf(to, sizeof(to), "%s", text.c_str());
}

// Whether the comparison notices a mistake of a ten thousandth, and a value that is no number.
void check_the_comparison() {
  const CaseList list = tile_cases();
  int64_t noticed = 0;
  for (size_t i = 0; i < 30; ++i) {
    // Bfloat16 has no ten thousandths.
    if (list.cases[i].geometry.dtype != disco::kFloat32) continue;
    const ConvData data(list.cases[i]);
    const Expected expected = expected_of(list.cases[i], data, 0);
    for (size_t o = 0; o < expected.value.size(); ++o) {
      const double value = expected.value[o], bound = expected.bound[o];
      const float right = static_cast<float>(value);
      const float nudged = right + 1e-4f;
      double fraction = 0;
      if (!compare(right, value, bound, fraction).empty()) {
        throw CheckFailed("the comparison refuses the right value");
      }
      for (const float wrong : {nudged, std::nanf("")}) {
        if (compare(wrong, value, bound, fraction).empty()) {
          throw CheckFailed("the comparison accepts a wrong value");
        }
        ++noticed;
      }
    }
  }
  if (noticed == 0) throw CheckFailed("the comparison was not tried");
}

std::string run_all(const std::string& only, Report& report) {
  say(report.current, "the choice of the instruction set");
  const disco::IsaKernels& isa = disco::active_isa();
  if (isa.max_pixels > kMostTilePixels || isa.max_vectors * isa.vector_length > kMostTileChannels ||
      isa.lane_kernels().max_pixels > kMostTilePixels || isa.vector_length > kMostLanes) {
    throw CheckFailed("its tiles are larger than tile_cases() goes: extend them");
  }
  say(report.current, "the comparison itself");
  check_the_comparison();
  Tally tally;
  std::string covered;
  int64_t found = 0;
  const std::pair<const char*, CaseList (*)()> lists[] = {{"tiles", tile_cases},
                                                          {"layers", layer_cases},
                                                          {"large layers", large_cases},
                                                          {"grouped layers", grouped_cases}};
  for (const auto& [title, cases_of] : lists) {
    const CaseList list = cases_of();
    for (const ConvCase& conv : list.cases) {
      if (!only.empty() && conv.name != only) continue;
      say(report.current, describe(conv));
      check_conv(conv, tally);
      ++found;
    }
    if (list.cases.empty() || list.pairs_covered != list.pairs_possible) {
      throw CheckFailed(std::string("the list of ") + title + " is not complete");
    }
    covered += std::to_string(list.cases.size()) + " " + title;
    if (list.pairs_possible > 0) {
      covered += " (" + std::to_string(list.pairs_covered) + " pairs of " +
                 std::to_string(list.pairs_possible) + ")";
    }
    covered += ", ";
  }
  if (only.empty()) {
    say(report.current, "gather_pack");
    covered += std::to_string(check_pack(tally)) + " packings";
  } else {
    say(report.current, "the search for " + only);
    if (found == 0) throw CheckFailed("there is no case of this name");
    covered = "only " + only;
  }
  char worst[32];
  std::snprintf(worst, sizeof(worst), "%.2f", tally.worst);
  if (only.empty() && tally.in_parts == 0) throw CheckFailed("no sum was made in parts");
  return covered + "; " + std::to_string(tally.calls) + " guarded calls, " +
         std::to_string(tally.in_parts) + " cases in parts, " + std::to_string(tally.outputs) +
         " outputs, the worst at " + worst + " of its bound";
}

// One instruction set in a process of its own: it is chosen once a process, and a fatal access is
// then reported by this one.
struct IsaRun {
  std::string isa;
  Report* report;
  pid_t child;
};

IsaRun start_isa(const std::string& isa, const std::string& only) {
  void* shared =
      mmap(nullptr, sizeof(Report), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) throw std::runtime_error("mmap failed");
  Report& report = *static_cast<Report*>(shared);
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("fork failed");
  if (child == 0) {
    setenv("DISCO_KERNELS_ISA", isa.c_str(), 1);
    int status = 0;
    try {
      say(report.summary, run_all(only, report));
    } catch (const std::exception& error) {
      say(report.summary, error.what());
      status = 1;
    }
    std::exit(status);
  }
  return {isa, &report, child};
}

bool finish_isa(const IsaRun& run) {
  const Report& report = *run.report;
  int status = 0;
  if (waitpid(run.child, &status, 0) != run.child) throw std::runtime_error("waitpid failed");
  const bool good = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  if (good) {
    std::printf("%s: %s\n", run.isa.c_str(), report.summary);
  } else {
    std::printf("%s: FAILED in %s\n", run.isa.c_str(), report.current);
    if (WIFSIGNALED(status)) {
      std::printf("  ended by signal %d%s\n", WTERMSIG(status),
                  WTERMSIG(status) == SIGSEGV ? ", as a touched guard page ends it" : "");
    } else {
      std::printf("  %s\n", report.summary[0] != '\0' ? report.summary : "see what it printed");
    }
  }
  std::fflush(stdout);
  munmap(run.report, sizeof(Report));
  return good;
}

// As many at a time as there are cores, since most of a run is one thread's work.
bool run_isas(const std::vector<std::string>& isas, const std::string& only) {
  const size_t at_once = std::max(1u, std::thread::hardware_concurrency());
  std::deque<IsaRun> running;
  bool good = true;
  for (const std::string& isa : isas) {
    if (running.size() == at_once) {
      good &= finish_isa(running.front());
      running.pop_front();
    }
    running.push_back(start_isa(isa, only));
  }
  for (const IsaRun& run : running) good &= finish_isa(run);
  return good;
}

}  // namespace
}  // namespace selftest

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // children must not inherit what is not yet written
  const std::string only = argc > 1 ? argv[1] : "";
  try {
    const std::string mistake = selftest::unguarded();
    if (!mistake.empty()) throw selftest::CheckFailed(mistake);
    std::vector<std::string> isas = disco::available_isas();
    const char* wanted = std::getenv("DISCO_KERNELS_ISA");
    if (wanted != nullptr && *wanted != '\0') {  // one, or several with commas between
      isas.clear();
      std::stringstream names(wanted);
      for (std::string isa; std::getline(names, isa, ',');) isas.push_back(isa);
    }
    const bool good = selftest::run_isas(isas, only);
    std::printf("conv_selftest: %s\n", good ? "all passed" : "FAILED");
    return good ? 0 : 1;
  } catch (const std::exception& error) {
    std::printf("conv_selftest: FAILED: %s\n", error.what());
    return 1;
  }
}
