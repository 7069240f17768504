// Which loops serve the instruction set in use.

#include "message_kernels.h"

#include <cstring>

#include "conv2d.h"

namespace disco {

const MessageKernels& active_message_kernels() {
#if defined(DISCO_HAVE_AVX512)
  // A prefix: what is built on AVX-512 for the convolutions has these loops, too.
  if (std::strncmp(active_isa().name, "avx512", 6) == 0) return avx512_message_kernels();
#endif
#if defined(DISCO_HAVE_AVX2)
  if (std::strcmp(active_isa().name, "avx2") == 0) return avx2_message_kernels();
#endif
  return scalar_message_kernels();
}

}  // namespace disco
