// The activation between gate_up and down.
#pragma once

#include <sgl_kernel/utils.cuh>

namespace er_sglang {

// silu(gate) * up, computed in float32.
template <typename T>
SGL_DEVICE T silu_and_mul(T gate, T up) {
  const float g = static_cast<float>(gate);
  return static_cast<T>(__fdividef(g, 1.f + __expf(-g)) * static_cast<float>(up));
}

}  // namespace er_sglang
