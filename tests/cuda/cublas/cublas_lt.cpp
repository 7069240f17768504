// cuBLASLt as far as disco_kernels uses it, on the CPU: the same functions, which check what they
// are given and compute in double. Sizes, numbers of attributes and the order of arguments are
// those of cublasLt.h; where that is found, the compiler compares them.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <set>

#if __has_include(<cublasLt.h>)
#include <cublasLt.h>
static_assert(CUBLASLT_MATMUL_DESC_EPILOGUE == 7 && CUBLASLT_MATMUL_DESC_BIAS_POINTER == 8);
static_assert(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES == 1);
static_assert(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES == 5 &&
              CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES == 8);
static_assert(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK == 3 &&
              CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE == 2);
static_assert(CUBLAS_STATUS_NOT_SUPPORTED == 15 && CUBLAS_STATUS_INTERNAL_ERROR == 14);
static_assert(CUBLASLT_EPILOGUE_DEFAULT == 1 && CUBLASLT_EPILOGUE_RELU == 2);
static_assert(CUBLASLT_EPILOGUE_BIAS == 4 && CUBLASLT_EPILOGUE_RELU_BIAS == 6);
static_assert(CUBLAS_COMPUTE_32F == 68 && CUDA_R_32F == 0 && CUDA_R_16F == 2 && CUDA_R_16BF == 14);
static_assert(sizeof(cublasLtMatmulHeuristicResult_t) == 96 && sizeof(cublasLtEpilogue_t) == 4);
#else
using cublasStatus_t = int;
constexpr int CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7;
using cublasLtHandle_t = void*;
using cublasLtMatmulDesc_t = void*;
using cublasLtMatrixLayout_t = void*;
using cublasLtMatmulPreference_t = void*;
using cublasComputeType_t = int;
using cudaDataType_t = int;
using cudaDataType = int;
using cublasLtMatmulDescAttributes_t = int;
using cublasLtMatmulPreferenceAttributes_t = int;
using cudaStream_t = void*;
struct cublasLtMatmulAlgo_t {
  uint64_t data[8];
};
struct cublasLtMatmulHeuristicResult_t {
  cublasLtMatmulAlgo_t algo;
  size_t workspaceSize;
  cublasStatus_t state;
  float wavesCount;
  int reserved[4];
};
#endif

namespace {

constexpr uint64_t kAlgorithm = 0x6469736363ull;
constexpr size_t kWorkspace = 1 << 20;

struct Handle {};
struct Desc {
  int epilogue = 1;
  const void* bias = nullptr;
};
struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t stride;
};
struct Preference {
  size_t workspace = 0;
  uint32_t alignments[4] = {256, 256, 256, 256};
  uint32_t reductions = 7;
};

std::set<const void*> live;

template <typename T>
T* object(const void* pointer) {
  return live.count(pointer) ? static_cast<T*>(const_cast<void*>(pointer)) : nullptr;
}

template <typename T, typename Pointer>
cublasStatus_t make(Pointer* target, T* made) {
  live.insert(made);
  *target = reinterpret_cast<Pointer>(made);
  return CUBLAS_STATUS_SUCCESS;
}

template <typename T>
cublasStatus_t destroy(const void* pointer) {
  if (!live.erase(pointer)) return CUBLAS_STATUS_INVALID_VALUE;
  delete static_cast<T*>(const_cast<void*>(pointer));
  return CUBLAS_STATUS_SUCCESS;
}

double read(const void* values, int type, int64_t place) {
  uint16_t bits;
  std::memcpy(&bits, static_cast<const uint16_t*>(values) + place, 2);
  if (type == 2) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return static_cast<double>(half);
  }
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

void write(void* values, int type, int64_t place, float value) {
  uint16_t bits;
  if (type == 2) {
    const _Float16 half = static_cast<_Float16>(value);
    std::memcpy(&bits, &half, 2);
  } else {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
  }
  std::memcpy(static_cast<uint16_t*>(values) + place, &bits, 2);
}

// Whether these make a product: no transposition, every column within its distance.
bool fit(const Layout* a, const Layout* b, const Layout* c, const Layout* d) {
  for (const Layout* each : {a, b, c, d}) {
    if (!each || (each->type != 2 && each->type != 14) || each->type != a->type) return false;
    if (each->stride < static_cast<int64_t>(each->rows)) return false;
  }
  return a->rows == d->rows && a->columns == b->rows && b->columns == d->columns &&
         c->rows == d->rows && c->columns == d->columns;
}

}  // namespace

extern "C" {

int disco_live_objects() { return static_cast<int>(live.size()); }
int disco_refuses = 0;
int disco_products = 0;

const char* cublasLtGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_SUCCESS ? "success" : "refused by the library";
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) { return make(handle, new Handle); }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return destroy<Handle>(handle); }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
  if (compute != 68 || scale != 0) return CUBLAS_STATUS_INVALID_VALUE;
  return make(desc, new Desc);
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) { return destroy<Desc>(desc); }

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t size) {
  Desc* found = object<Desc>(desc);
  if (found && attribute == 7 && size == sizeof(int)) {
    std::memcpy(&found->epilogue, value, size);
  } else if (found && attribute == 8 && size == sizeof(void*)) {
    std::memcpy(&found->bias, value, size);
  } else {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type,
                                          uint64_t rows, uint64_t columns, int64_t stride) {
  return make(layout, new Layout{static_cast<int>(type), rows, columns, stride});
}
cublasStatus_t cublasLtMatrixLayoutDestroy(const cublasLtMatrixLayout_t layout) {
  return destroy<Layout>(layout);
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  return make(preference, new Preference);
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  return destroy<Preference>(preference);
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, size_t size) {
  Preference* found = object<Preference>(preference);
  if (found && attribute == 1 && size == sizeof(size_t)) {
    std::memcpy(&found->workspace, value, size);
  } else if (found && attribute == 3 && size == sizeof(uint32_t)) {
    std::memcpy(&found->reductions, value, size);
  } else if (found && attribute >= 5 && attribute <= 8 && size == sizeof(uint32_t)) {
    std::memcpy(&found->alignments[attribute - 5], value, size);
  } else {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t* results,
                                              int* count) {
  const Preference* limits = object<Preference>(preference);
  *count = 0;
  if (!object<Handle>(handle) || !object<Desc>(desc) || !limits || wanted != 1 ||
      limits->workspace < kWorkspace || limits->reductions != 2 ||
      !fit(object<Layout>(a), object<Layout>(b), object<Layout>(c), object<Layout>(d))) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (disco_refuses) return static_cast<cublasStatus_t>(disco_refuses);
  *results = {};
  results->algo.data[7] = kAlgorithm;
  for (int i = 0; i < 4; ++i) results->algo.data[i] = limits->alignments[i];
  results->workspaceSize = kWorkspace;
  *count = 1;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                              cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                              cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algo,
                              void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  const Layout *al = object<Layout>(a_layout), *bl = object<Layout>(b_layout);
  const Layout *cl = object<Layout>(c_layout), *dl = object<Layout>(d_layout);
  const Desc* given = object<Desc>(desc);
  if (disco_refuses) return static_cast<cublasStatus_t>(disco_refuses);
  if (!object<Handle>(handle) || !given || !fit(al, bl, cl, dl) || stream ||
      algo->data[7] != kAlgorithm || !workspace || workspace_bytes < kWorkspace) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  // An algorithm is for addresses as they were promised.
  const void* const addresses[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    if (reinterpret_cast<uintptr_t>(addresses[i]) % algo->data[i])
      return CUBLAS_STATUS_INVALID_VALUE;
  }
  // In place only with one description of both.
  if (c == d && c_layout != d_layout) return CUBLAS_STATUS_INVALID_VALUE;
  const bool with_bias = given->epilogue & 4, relu = given->epilogue & 2;
  if ((given->epilogue & ~7) || given->epilogue == 0 || with_bias != (given->bias != nullptr)) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  float scale, add;
  std::memcpy(&scale, alpha, 4);
  std::memcpy(&add, beta, 4);
  std::memset(workspace, 0xff, workspace_bytes);
  for (uint64_t column = 0; column < dl->columns; ++column) {
    for (uint64_t row = 0; row < dl->rows; ++row) {
      double sum = 0;
      for (uint64_t k = 0; k < al->columns; ++k) {
        sum += read(a, al->type, static_cast<int64_t>(k) * al->stride + row) *
               read(b, bl->type, static_cast<int64_t>(column) * bl->stride + k);
      }
      sum *= scale;
      // What is multiplied by zero is not read.
      if (add != 0) sum += add * read(c, cl->type, static_cast<int64_t>(column) * cl->stride + row);
      if (with_bias) sum += read(given->bias, dl->type, static_cast<int64_t>(row));
      if (relu && sum < 0) sum = 0;
      write(d, dl->type, static_cast<int64_t>(column) * dl->stride + row, static_cast<float>(sum));
    }
  }
  ++disco_products;
  return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"
