// A device "cuda" for a torch that was built without CUDA: its memory is the CPU's, and the CPU's kernels run on it.
// To torch its tensors are on another device: it refuses an operator that mixes them with the CPU's, and numpy, as it
// would on a GPU. It is loaded before torch, because torch asks once whether there is CUDA.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(kDevice); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
};

void release(void* memory) { c10::free_cpu(memory); }

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {memory, memory, &release, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
};
Allocator allocator;

void release_owner(void* owner) { c10::raw::intrusive_ptr::decref(static_cast<c10::StorageImpl*>(owner)); }

// The same memory on another device. It keeps the storage that owns the memory.
c10::Storage same_memory(const c10::Storage& storage, c10::Device device) {
  c10::StorageImpl* owner = storage.unsafeGetStorageImpl();
  c10::raw::intrusive_ptr::incref(owner);
  c10::Allocator* own = device.is_cuda() ? static_cast<c10::Allocator*>(&allocator) : c10::GetCPUAllocator();
  c10::DataPtr memory(owner->mutable_data(), owner, &release_owner, device);
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(memory), own, true);
}

at::Tensor tensor_of(c10::Storage storage, const at::Tensor& like, c10::DispatchKey key) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  tensor._set_conj(like.is_conj());
  tensor._set_neg(like.is_neg());
  return tensor;
}

// The tensors of one call: on the CPU, and back.
class Call {
 public:
  c10::Storage on_cpu(const c10::Storage& storage) {
    if (!storage.device().is_cuda()) return storage;
    auto found = cpu_.find(storage.unsafeGetStorageImpl());
    if (found == cpu_.end()) {
      found = cpu_.emplace(storage.unsafeGetStorageImpl(), same_memory(storage, c10::Device(c10::kCPU))).first;
      own_.emplace(found->second.unsafeGetStorageImpl(), storage);
    }
    return found->second;
  }

  at::Tensor on_cpu(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cuda()) return tensor;
    at::Tensor alias = tensor_of(on_cpu(tensor.storage()), tensor, c10::DispatchKey::CPU);
    given_.emplace(alias.unsafeGetTensorImpl(), std::make_pair(alias, tensor));
    return alias;
  }

  // A result: an argument itself, a view of one, or new.
  at::Tensor back(const at::Tensor& tensor) const {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    auto argument = given_.find(tensor.unsafeGetTensorImpl());
    if (argument != given_.end()) return argument->second.second;
    auto own = own_.find(tensor.storage().unsafeGetStorageImpl());
    auto storage = own == own_.end() ? same_memory(tensor.storage(), kDevice) : own->second;
    return tensor_of(std::move(storage), tensor, c10::DispatchKey::CUDA);
  }

  // Arguments that were given another shape or other memory: resize_, set_, out=.
  void keep_shapes() const {
    for (const auto& [impl, tensors] : given_) {
      auto* to = tensors.second.unsafeGetTensorImpl();
      const c10::Storage& storage = impl->unsafe_storage();
      auto own = own_.find(storage.unsafeGetStorageImpl());
      bool same = own != own_.end() && storage.data() == own->second.data() && storage.nbytes() == own->second.nbytes();
      if (!same || to->unsafe_storage().unsafeGetStorageImpl() != own->second.unsafeGetStorageImpl()) {
        to->set_storage_keep_dtype(same ? own->second : same_memory(storage, kDevice));
      }
      if (impl->sizes() != to->sizes() || impl->strides() != to->strides() ||
          impl->storage_offset() != to->storage_offset()) {
        to->set_storage_offset(impl->storage_offset());
        to->set_sizes_and_strides(impl->sizes(), impl->strides());
      }
    }
  }

 private:
  std::unordered_map<c10::StorageImpl*, c10::Storage> cpu_, own_;
  std::unordered_map<c10::TensorImpl*, std::pair<at::Tensor, at::Tensor>> given_;  // the CPU's tensor, the argument
};

template <typename F>
c10::IValue with_tensors(const c10::IValue& value, const F& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> changed;
    for (const at::Tensor& tensor : value.toTensorVector()) changed.push_back(change(tensor));
    return changed;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> changed;
    for (const auto& tensor : value.toOptionalTensorVector())
      changed.push_back(tensor ? std::optional<at::Tensor>(change(*tensor)) : std::nullopt);
    return changed;
  }
  return value;
}

// GPUs take indices from the CPU.
const std::unordered_set<std::string> kMixing = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};

void require_one_device(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const auto& arguments = op.schema().arguments();
  if (kMixing.count(op.schema().name())) return;
  for (size_t i = 0; i < arguments.size(); ++i) {
    with_tensors(stack[stack.size() - arguments.size() + i], [&](const at::Tensor& tensor) {
      TORCH_CHECK(
          !tensor.defined() || !tensor.device().is_cpu() || tensor.dim() == 0,
          "Expected all tensors to be on the same device: ", arguments[i].name(), " of ", op.schema().operator_name(),
          " is on cpu, others on ", kDevice);
      return tensor;
    });
  }
}

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  require_one_device(op, *stack);
  Call call;
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    } else if (value.isStorage()) {
      value = call.on_cpu(value.toStorage());
    } else {
      value = with_tensors(value, [&](const at::Tensor& tensor) { return call.on_cpu(tensor); });
    }
  }
  c10::Dispatcher::singleton().redispatchBoxed(op, c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
    (*stack)[i] = with_tensors((*stack)[i], [&](const at::Tensor& tensor) { return call.back(tensor); });
  }
  call.keep_shapes();
}

at::Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_generic_symint(size, &allocator, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  const c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_strided_symint_generic(size, stride, &allocator, keys, c10::dtype_or_default(dtype));
}

at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool) {
  Call call;
  call.on_cpu(to).copy_(call.on_cpu(from));
  return to;
}

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, CUDAHooks);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy);
}
