// What the checks report.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "conv_cases.h"

namespace selftest {

struct CheckFailed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Tally {
  int64_t calls = 0;     // of a kernel, every buffer at a guarded edge
  int64_t outputs = 0;   // compared
  int64_t in_parts = 0;  // cases whose sums were broken off and continued, too
  double worst = 0;      // error over the bound
};

// Runs a case on one thread and on two, with every buffer's end and then with its begin at a
// forbidden page, and direct float32 sums of several segments in two parts. Throws CheckFailed if
// these differ in a bit, if an output is further from the oracle than it may be, or if anything
// else was written.
void check_conv(const ConvCase& conv, Tally& tally);

// Messages of gather_pack, bit by bit. Returns the number of cases.
int64_t check_pack(Tally& tally);

}  // namespace selftest
