// A device guard for "cuda" that does nothing. A torch without a GPU has none, and under FakeTensorMode an operator
// that switches to its tensors' device would end there. tests/test_cuda_walk.py builds and loads this.
#include <c10/core/impl/DeviceGuardImplInterface.h>

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
