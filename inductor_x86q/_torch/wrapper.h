// What the generated function includes, precompiled once: Inductor's own header, and those of operators that it calls
// through the dispatcher (the library's int8 max pool), which would otherwise be read anew, for seconds, at each compile.
#pragma once
#include <torch/csrc/inductor/cpp_wrapper/cpu.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/jit_type.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
