// The convolution as a plain loop in double precision, and how far float32 may be from it.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "conv_cases.h"
#include "tensor.h"

namespace selftest {

// The values of a case.
struct ConvData {
  explicit ConvData(const ConvCase& conv);

  std::vector<Tensor> sources;              // NaN in every channel that no node selects
  std::vector<std::vector<float>> weights;  // per node [outputs][inputs][taps]
  std::vector<float> bias;                  // [out_channels], or empty
  std::vector<Tensor> residual;             // one, or none
  Tensor out;  // NaN where nothing may be read, and where nothing may be written
};

struct Expected {
  std::vector<double> value, bound;  // [batch][out_h][out_w][outputs of the node]
};

Expected expected_of(const ConvCase& conv, const ConvData& data, size_t node);

// What is wrong with `actual`, or nothing; `fraction` becomes the error over the bound.
std::string compare(float actual, double value, double bound, double& fraction);

}  // namespace selftest
