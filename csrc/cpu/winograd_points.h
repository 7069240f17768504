// The finite points of F(4x4, 3x3) other than 0: plus and minus these. See winograd_body.h.
#pragma once

namespace disco {

constexpr float kWinogradA = 0.625f;
constexpr float kWinogradB = 1.5f;

}  // namespace disco
