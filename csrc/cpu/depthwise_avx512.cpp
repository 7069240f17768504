// AVX-512 micro-kernels of grouped convolutions: 14 pixels x 16 channels. 14 of 32 registers
// accumulate and up to 7 hold weights; maps of 14, 28, 56 and 112 columns have no ragged tile.

#include "narrow_avx512.h"

namespace disco {
namespace {

constexpr int kLanePixels = 14;
constexpr int kLaneWindows = 6;
constexpr bool kFreeMasks = true;

using Lanes = __m512i;

inline Lanes load_lanes(const int32_t* lanes) { return _mm512_loadu_si512(lanes); }
inline Vector permute(Vector v, Lanes lanes) { return _mm512_permutexvar_ps(lanes, v); }

}  // namespace
}  // namespace disco

#include "depthwise_body.h"

namespace disco {

const LaneKernels& avx512_lane_kernels() { return lane_kernels(); }

}  // namespace disco
