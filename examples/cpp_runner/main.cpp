// Runs a package made by inductor_x86q.package on one raw tensor, without Python.
//
//   runner model.pt2 input.bin 1,3,224,224 [output.bin]
//
// input.bin holds float32 values in row-major order; the result is written to output.bin in the same form. Prints the
// five largest values of the first row, and the median time of a call. A package holds machine code: run only what you trust.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <ATen/ATen.h>
#include <ATen/cpu/Utils.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::vector<int64_t> parse_shape(const std::string& text) {
  std::vector<int64_t> shape;
  std::stringstream stream(text);
  for (std::string size; std::getline(stream, size, ',');) {
    shape.push_back(std::stoll(size));
  }
  return shape;
}

at::Tensor read_tensor(const std::string& path, const std::vector<int64_t>& shape) {
  at::Tensor tensor = at::empty(shape, at::kFloat);
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) {
    throw std::runtime_error("cannot open " + path);
  }
  if (static_cast<size_t>(file.tellg()) != tensor.nbytes()) {
    throw std::runtime_error(
        path + " has " + std::to_string(file.tellg()) + " bytes, the shape needs " + std::to_string(tensor.nbytes()));
  }
  file.seekg(0);
  file.read(static_cast<char*>(tensor.data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
  return tensor;
}

// A package names the instruction sets that its code may use. Where one is missing, a call would end in SIGILL.
void require_cpu(const std::string& path) {
  const auto metadata = torch::inductor::AOTIModelPackageLoader::load_metadata_from_package(path, "model");
  const auto needed = metadata.find("inductor_x86q_instruction_sets");
  if (needed == metadata.end()) {
    throw std::runtime_error(path + " does not say which CPU it was built for: make it with inductor_x86q.package");
  }
  const auto present = at::cpu::get_cpu_capabilities();
  std::string missing;
  std::stringstream names(needed->second);
  for (std::string name; std::getline(names, name, ',');) {
    const auto found = present.find(name);
    if (found == present.end() || !found->second.toBool()) {
      missing += (missing.empty() ? "" : ", ") + name;
    }
  }
  if (!missing.empty()) {
    throw std::runtime_error(
        path + " was built for a CPU with " + missing + ", which this one does not have: package it for this one with cpu=");
  }
}

void write_tensor(const std::string& path, const at::Tensor& tensor) {
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(tensor.const_data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
  if (!file) {
    throw std::runtime_error("cannot write " + path);
  }
}

void print_top(const at::Tensor& row, int64_t count) {
  auto [values, indices] = row.topk(std::min(count, row.numel()));
  for (int64_t rank = 0; rank < values.numel(); ++rank) {
    std::cout << indices[rank].item<int64_t>() << " " << values[rank].item<float>() << "\n";
  }
}

double median_milliseconds(torch::inductor::AOTIModelPackageLoader& loader, const std::vector<at::Tensor>& inputs) {
  std::vector<double> times;
  for (int repeat = 0; repeat < 20; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    loader.run(inputs);
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

int run(int argc, char** argv) {
  if (argc != 4 && argc != 5) {
    std::cerr << "usage: " << argv[0] << " model.pt2 input.bin 1,3,224,224 [output.bin]\n";
    return 2;
  }
  // Without it a package reads past the end of an input that is smaller than what it was compiled for.
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", /*overwrite=*/0);
  const c10::InferenceMode guard;
  require_cpu(argv[1]);
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  const std::vector<at::Tensor> inputs = {read_tensor(argv[2], parse_shape(argv[3]))};
  const at::Tensor output = loader.run(inputs).at(0).contiguous();
  if (argc == 5) {
    write_tensor(argv[4], output);
  }
  print_top(output[0].flatten().to(at::kFloat), 5);
  std::cout << "median " << median_milliseconds(loader, inputs) << " ms\n";
  return 0;
}

} // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
