// Entry point through torch's dispatcher: its stable ABI, torch >= 2.10.
#include "core/check.h"
#include "core/door.h"
#include "core/stable.h"

// Defined in libtorch_cuda.so. Weak, so that the same library also loads with a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace tokenmill {
namespace {

#if defined(TOKENMILL_EMULATED)
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

using torch::stable::Tensor;
using torch::stable::detail::StableLibrary;

class Torch : public Framework {
 public:
  Array empty(Sizes sizes, ScalarType dtype, bool on_gpu, int32_t device) const override;
  void* stream(int32_t device) const override {
    void* stream = nullptr;
    if (!aoti_torch_get_current_cuda_stream)
      throw std::runtime_error("tokenmill: this torch has no CUDA support");
    if (aoti_torch_get_current_cuda_stream(device, &stream) != 0)
      throw std::runtime_error("tokenmill: no current CUDA stream");
    return stream;
  }
};

const Torch kTorch;

View view_of(const Tensor& t, bool written) {
  View v;
  v.sizes = {t.sizes().data(), t.sizes().size()};
  v.strides = {t.strides().data(), t.strides().size()};
  v.dtype = t.scalar_type();
  v.element_bytes = static_cast<int32_t>(t.element_size());
  v.on_gpu = t.is_cuda();
  v.is_cuda = kEmulated || v.on_gpu;
  v.device = t.get_device_index();
  v.pointer = written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
  v.framework = &kTorch;
  return v;
}

Array Torch::empty(Sizes sizes, ScalarType dtype, bool on_gpu, int32_t device) const {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= std::max<int64_t>(sizes[i], 1);
  }
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  const auto device_type = on_gpu ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               code, device_type, on_gpu ? device : 0, &handle) != 0)
    throw std::runtime_error("tokenmill: out of memory: no result of shape " + show(sizes));
  const auto tensor = std::make_shared<Tensor>(handle);
  Array made;
  static_cast<View&>(made) = view_of(*tensor, true);
  made.owner = tensor;
  return made;
}

// Owned values from the stack of a call: they must be released, also when the call fails.
struct Taken {
  explicit Taken(const Schema& schema) {
    tensors.reserve(schema.arguments.size());
    texts.reserve(schema.arguments.size());
  }
  ~Taken() {
    for (StringHandle text : texts) torch_delete_string(text);
  }
  Taken(const Taken&) = delete;
  Taken& operator=(const Taken&) = delete;

  template <typename T>
  std::optional<T> value(StableIValue slot, bool optional) {
    if (optional) return torch::stable::detail::to<std::optional<T>>(slot);
    return torch::stable::detail::to<T>(slot);
  }

  Argument argument(StableIValue slot, const SchemaArgument& schema) {
    Argument a;
    if (schema.kind == Kind::array) {
      auto tensor = value<Tensor>(slot, schema.optional);
      // For a required tensor torch passes None as an undefined tensor.
      a.given = tensor && tensor->defined();
      if (a.given) tensors.emplace_back(std::move(*tensor), schema.written);
    } else if (schema.kind == Kind::text) {
      texts.push_back(torch::stable::detail::to<StringHandle>(slot));
      const char* data = nullptr;
      size_t length = 0;
      TORCH_ERROR_CODE_CHECK(torch_string_length(texts.back(), &length));
      TORCH_ERROR_CODE_CHECK(torch_string_c_str(texts.back(), &data));
      a.text = {data, length};
    } else if (schema.kind == Kind::integer) {
      const auto given = value<int64_t>(slot, schema.optional);
      a.given = given.has_value();
      a.integer = given.value_or(0);
    } else if (schema.kind == Kind::number) {
      const auto given = value<double>(slot, schema.optional);
      a.given = given.has_value();
      a.number = given.value_or(0);
    } else {
      a.boolean = torch::stable::detail::to<bool>(slot);
    }
    return a;
  }

  std::vector<std::pair<Tensor, bool>> tensors;  // with true if the call writes into it
  std::vector<StringHandle> texts;
};

#if defined(TOKENMILL_WITH_CUDA) && !defined(TOKENMILL_EMULATED)
constexpr const char* kKeys[] = {"CPU", "CUDA"};
#else
constexpr const char* kKeys[] = {"CPU"};
#endif

}  // namespace

void torch_call(Operator& op, uint64_t* stack, uint64_t inputs, uint64_t outputs) {
  const Schema& schema = op.schema();
  Taken taken(schema);
  Argument arguments[kMaxArguments];
  for (size_t i = 0; i < inputs; ++i) arguments[i] = taken.argument(stack[i], schema.arguments[i]);
  size_t tensor = 0;
  for (size_t i = 0; i < inputs; ++i) {
    const SchemaArgument& a = schema.arguments[i];
    if (a.kind != Kind::array) continue;
    if (arguments[i].given) {
      const auto& [t, written] = taken.tensors[tensor++];
      arguments[i].view = view_of(t, written);
    } else if (!a.optional) {
      fail(op.name, a.name, "must be a tensor", "None");
    }
  }
  Array results[kMaxResults];
  op.call(schema, arguments, results, outputs);
  for (size_t i = 0; i < outputs; ++i)
    stack[i] = torch::stable::detail::from(*static_cast<const Tensor*>(results[i].owner.get()));
}

Registration::Registration(std::initializer_list<Operator*> added, bool has_kernels) {
  for (Operator* op : added) all_operators().emplace(op->name, op);
  if (!has_kernels) return;
  for (const char* key : kKeys) {
    // Never freed: registrations live as long as the library.
    auto* const library = new StableLibrary(StableLibrary::Kind::IMPL,
                                            C10_STRINGIZE(TOKENMILL_NAMESPACE), key, "", 0);
    for (Operator* op : added) library->impl(op->name, op->boxed);
  }
  auto& all = this_library().operators;
  all.insert(all.end(), added);
}

}  // namespace tokenmill
