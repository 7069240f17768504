// Choice of the instruction set at run time.

#include <cstdlib>
#include <stdexcept>

#include "conv2d.h"

namespace disco {
namespace {

#if defined(DISCO_HAVE_AVX512VNNI)
// An instruction set together with AVX-512-VNNI.
IsaKernels with_quads(const IsaKernels& isa, const char* name) {
  IsaKernels both = isa;
  both.name = name;
  both.quads = &avx512vnni_kernels();
  return both;
}
#endif

std::vector<const IsaKernels*> usable_isas() {
  std::vector<const IsaKernels*> usable = {&scalar_kernels()};
#if defined(DISCO_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    usable.push_back(&avx2_kernels());
  }
#endif
#if defined(DISCO_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    usable.push_back(&avx512_kernels());
#if defined(DISCO_HAVE_AVX512VNNI) && defined(DISCO_HAVE_AVX512BF16)
    // Both CPUs and virtual machines may have either without the other.
    const bool vnni = __builtin_cpu_supports("avx512vnni");
    static const IsaKernels with_vnni = with_quads(avx512_kernels(), "avx512_vnni");
    if (vnni) usable.push_back(&with_vnni);
    if (__builtin_cpu_supports("avx512bf16")) {
      static const IsaKernels with_both = with_quads(avx512bf16_kernels(), "avx512_bf16");
      usable.push_back(vnni ? &with_both : &avx512bf16_kernels());
    }
#endif
  }
#endif
#if defined(DISCO_HAVE_NEON)
  usable.push_back(&neon_kernels());  // AArch64 is not to be had without
#endif
  return usable;
}

const IsaKernels& choose_isa() {
  const std::vector<const IsaKernels*> usable = usable_isas();
  const char* wanted = std::getenv("DISCO_KERNELS_ISA");
  if (wanted == nullptr || *wanted == '\0') return *usable.back();
  std::string names;
  for (const IsaKernels* isa : usable) {
    if (std::string(wanted) == isa->name) return *isa;
    names += names.empty() ? isa->name : std::string(", ") + isa->name;
  }
  throw std::invalid_argument("DISCO_KERNELS_ISA=" + std::string(wanted) +
                              " is not to be had on this machine; allowed here: " + names);
}

}  // namespace

const IsaKernels& active_isa() {
  static const IsaKernels& isa = choose_isa();
  return isa;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const IsaKernels* isa : usable_isas()) names.push_back(isa->name);
  return names;
}

}  // namespace disco
