// What the library says of itself, by the operator library_facts: how it was compiled, and the signatures of its
// operators. torch cannot compare these with the schemas, because it calls a function of the stable ABI by a stack of
// untyped values; so tlcr/ops/_extension.py does.
#pragma once

#include <torch/csrc/stable/library.h>

#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace tlcr {

// By the names of the operators.
std::map<std::string, std::string>& signatures();

// A type in the words of torch's schemas.
template <typename T>
struct SchemaType;
template <>
struct SchemaType<torch::stable::Tensor> {
  static std::string name() { return "Tensor"; }
};
template <>
struct SchemaType<double> {
  static std::string name() { return "float"; }
};
template <>
struct SchemaType<int64_t> {
  static std::string name() { return "int"; }
};
template <>
struct SchemaType<bool> {
  static std::string name() { return "bool"; }
};
template <typename T>
struct SchemaType<std::optional<T>> {
  static std::string name() { return "Optional[" + SchemaType<T>::name() + "]"; }
};
template <typename T>
struct SchemaType<std::vector<T>> {
  static std::string name() { return "List[" + SchemaType<T>::name() + "]"; }
};
template <typename... T>
struct SchemaType<std::tuple<T...>> {
  static std::string name() { return ((SchemaType<T>::name() + " ") + ...); }
};
template <>
struct SchemaType<void> {
  static std::string name() { return ""; }
};

template <typename Result, typename... Arguments>
std::string signature(Result (*)(Arguments...)) {
  return SchemaType<std::tuple<std::decay_t<Arguments>...>>::name() + "-> " + SchemaType<Result>::name();
}

// Registers a function as the operator's kernel, and its signature.
template <auto kFunction>
void implement(torch::stable::detail::StableLibrary& library, const char* name) {
  library.impl(name, TORCH_BOX(kFunction));
  signatures()[name] = signature(kFunction);
}

}  // namespace tlcr
