#include <charconv>
#include <locale>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/door.h"

namespace tokenmill {
namespace {

// Parts of a list, none of which contains ", " itself.
std::vector<std::string_view> split(std::string_view list) {
  std::vector<std::string_view> parts;
  while (!list.empty()) {
    const size_t end = std::min(list.find(", "), list.size());
    parts.push_back(list.substr(0, end));
    list.remove_prefix(std::min(end + 2, list.size()));
  }
  return parts;
}

Kind kind_of_type(std::string_view type) {
  if (type.starts_with("Tensor")) return Kind::array;
  if (type == "SymInt" || type == "int") return Kind::integer;
  if (type == "float") return Kind::number;
  if (type == "bool") return Kind::boolean;
  if (type == "str") return Kind::text;
  throw std::logic_error("tokenmill: no argument of an operator is of type " + std::string(type));
}

// std::from_chars takes floating-point numbers only since GLIBCXX_3.4.29.
double number_of(std::string_view text) {
  std::istringstream stream{std::string(text)};
  stream.imbue(std::locale::classic());
  double number = 0;
  stream >> number;
  return number;
}

// "SymInt? max_total=None"
SchemaArgument argument_of(std::string_view text) {
  SchemaArgument a{};
  const size_t equals = std::min(text.find('='), text.size());
  const std::string_view value = text.substr(std::min(equals + 1, text.size()));
  const size_t space = text.rfind(' ', equals);
  std::string_view type = text.substr(0, space);
  a.name = text.substr(space + 1, equals - space - 1);
  a.written = type.find('!') != std::string_view::npos;
  a.optional = type.ends_with('?');
  if (a.optional) type.remove_suffix(1);
  a.kind = kind_of_type(type);
  a.has_default = equals < text.size();
  a.value.given = a.has_default && value != "None";
  if (!a.value.given) return a;
  if (a.kind == Kind::text)
    a.text = value.substr(1, value.size() - 2);
  else if (a.kind == Kind::boolean)
    a.value.boolean = value == "True";
  else if (a.kind == Kind::integer)
    std::from_chars(value.data(), value.data() + value.size(), a.value.integer);
  else
    a.value.number = number_of(value);
  return a;
}

std::map<std::string, Schema, std::less<>>& schemas() {
  static std::map<std::string, Schema, std::less<>> all;
  return all;
}

}  // namespace

Schema::Schema(std::string_view text) : name(text.substr(0, text.find('('))) {
  const size_t arrow = text.find(") -> ");
  std::string_view outputs = text.substr(arrow + 5);
  for (std::string_view part : split(text.substr(name.size() + 1, arrow - name.size() - 1)))
    if (part != "*") arguments.push_back(argument_of(part));
  for (SchemaArgument& a : arguments) a.value.text = a.text;
  if (outputs.starts_with('(')) outputs = outputs.substr(1, outputs.size() - 2);
  for (std::string_view part : split(outputs))
    results.emplace_back(part.substr(std::min(part.rfind(' ') + 1, part.size())));
}

void define_schema(std::string_view text) {
  Schema schema(text);
  schemas().emplace(schema.name, std::move(schema));
}

const Schema& schema_of(std::string_view name) {
  const auto found = schemas().find(name);
  if (found == schemas().end())
    throw std::logic_error("tokenmill: no schema of " + std::string(name));
  return found->second;
}

const Schema& Operator::checked_schema() const {
  const Schema& schema = schema_of(name);
  std::string wanted;
  for (const SchemaArgument& a : schema.arguments) wanted += static_cast<char>(a.kind);
  if (kinds.size() > kMaxArguments)
    throw std::logic_error("tokenmill." + std::string(name) + ": a schema has at most " +
                           std::to_string(kMaxArguments) + " arguments");
  if (wanted != kinds)
    throw std::logic_error("tokenmill." + std::string(name) + ": the schema has arguments " +
                           wanted + ", the record of C++ " + kinds);
  return schema;
}

std::map<std::string, Operator*, std::less<>>& all_operators() {
  static std::map<std::string, Operator*, std::less<>> all;
  return all;
}

Library& this_library() {
#if defined(TOKENMILL_EMULATED)
  static Library library{{}, true, true};
#elif defined(TOKENMILL_WITH_CUDA)
  static Library library{{}, true, false};
#else
  static Library library{{}, false, false};
#endif
  return library;
}

}  // namespace tokenmill

extern "C" __attribute__((visibility("default"))) const tokenmill::Library* tokenmill_library() {
  tokenmill::Library& library = tokenmill::this_library();
  for (tokenmill::Operator* op : library.operators) op->schema();
  return &library;
}
