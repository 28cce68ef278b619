// jaguar._cuda: checks torch tensors by their Python attributes and calls the C ABI of newton_schulz.h. No torch
// headers: the module is built without torch, and loads beside any version of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "newton_schulz.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

// What is read of a tensor, once.
struct View {
    std::string name, dtype, device;
    std::vector<int64_t> shape, stride;
    uint64_t address = 0;
    bool contiguous = false;
};

// How the matrices of a (batch, rows, cols) view are stored; `end` is the first address behind them.
struct Layout {
    int64_t batch = 0, row = 0;
    bool transposed = false;
    uint64_t end = 0;
};

std::string words(const std::vector<int64_t>& sizes) {
    std::string text;
    for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return "(" + text + (sizes.size() == 1 ? ",)" : ")");
}

[[noreturn]] void refuse(const View& view, const std::string& wanted) {
    throw py::value_error(view.name + " " + wanted + "; it has shape " + words(view.shape) + ", strides " +
                          words(view.stride) + " and dtype " + view.dtype + " on " + view.device);
}

// A CUDA tensor that is not empty, of one of these dtypes.
View read(py::handle tensor, std::string name, const std::vector<const char*>& dtypes) {
    View view;
    view.name = std::move(name);
    try {
        view.dtype = py::str(tensor.attr("dtype"));
        view.device = py::str(tensor.attr("device"));
        view.shape = tensor.attr("shape").cast<std::vector<int64_t>>();
        view.stride = tensor.attr("stride")().cast<std::vector<int64_t>>();
        view.contiguous = tensor.attr("is_contiguous")().cast<bool>();
        if (view.device.rfind("cuda", 0) == 0) view.address = tensor.attr("data_ptr")().cast<uint64_t>();
    } catch (py::error_already_set& error) {
        if (!error.matches(PyExc_AttributeError) && !error.matches(PyExc_TypeError)) throw;
        throw py::type_error(view.name + " must be a torch.Tensor, not " + Py_TYPE(tensor.ptr())->tp_name);
    } catch (py::cast_error&) {
        throw py::type_error(view.name + " must be a torch.Tensor, not " + Py_TYPE(tensor.ptr())->tp_name);
    }
    if (view.device.rfind("cuda", 0) != 0) refuse(view, "must be on a CUDA device");
    std::string allowed;
    for (const char* dtype : dtypes) allowed += (allowed.empty() ? "" : " or ") + std::string(dtype);
    if (std::none_of(dtypes.begin(), dtypes.end(), [&](const char* dtype) { return view.dtype == dtype; }))
        refuse(view, "must be " + allowed);
    for (int64_t size : view.shape) {
        if (size < 1) refuse(view, "must not be empty");
        if (size > INT32_MAX) refuse(view, "has a size above 2^31 - 1");
    }
    return view;
}

void need_same_device(const View& one, const View& other) {
    if (one.device != other.device) refuse(other, "must be on " + one.device + ", where " + one.name + " is");
}

void need_alignment(const View& view) {
    if (view.address % 16) refuse(view, "must begin at a multiple of 16 bytes, not at " + std::to_string(view.address));
}

void need_finite(const char* name, double value) {
    if (!std::isfinite(static_cast<float>(value)))
        throw py::value_error(std::string(name) + "=" + std::to_string(value) + " must be a finite fp32 number");
}

// Distance between rows if the elements of a row are neighbours. The stride of a size of 1 means nothing: none is read.
std::optional<int64_t> pitch(int64_t rows, int64_t cols, int64_t row, int64_t col) {
    if (cols > 1 && col != 1) return std::nullopt;
    return rows > 1 ? row : (cols + 7) / 8 * 8;
}

// Two-byte matrices whose rows, or with `turns` columns, the kernels can read in pieces of 16 bytes.
Layout layout(const View& view, bool turns) {
    if (view.shape.size() != 3) refuse(view, "must have three dimensions, (batch, rows, columns)");
    const int64_t batch = view.shape[0], rows = view.shape[1], cols = view.shape[2];
    const std::optional<int64_t> straight = pitch(rows, cols, view.stride[1], view.stride[2]);
    const std::optional<int64_t> turned =
        turns ? pitch(cols, rows, view.stride[2], view.stride[1]) : std::optional<int64_t>();
    Layout found;
    if (straight && *straight % 8 == 0) {
        found.row = *straight;
    } else if (turned && *turned % 8 == 0) {
        found.row = *turned;
        found.transposed = true;
    } else if (straight || turned) {
        refuse(view, "must have rows a multiple of 8 elements apart (pad them)");
    } else {
        refuse(view, turns ? "must have stride 1 along its last dimension, or the one before it (a transposed view)"
                           : "must have stride 1 along its last dimension");
    }
    need_alignment(view);
    if (batch > 1 && view.stride[0] % 8) refuse(view, "must have matrices a multiple of 8 elements apart");
    const int64_t long_rows = found.transposed ? cols : rows, length = found.transposed ? rows : cols;
    found.batch = batch > 1 ? view.stride[0] : long_rows * found.row;
    // Expanded and overlapping views: what is written would depend on the order, and tensor maps allow none to be read.
    std::array<std::pair<int64_t, int64_t>, 3> steps = {{{1, length}, {found.row, long_rows}, {found.batch, batch}}};
    std::sort(steps.begin(), steps.end());
    int64_t last = 0;
    for (const auto& [stride, size] : steps) {
        if (size == 1) continue;
        if (stride <= last) refuse(view, "must not have several elements at one address (an expanded view)");
        last += (size - 1) * stride;
    }
    found.end = view.address + 2 * (last + 1);
    return found;
}

void need_apart(const View& out, uint64_t out_end, const View& other, uint64_t other_end) {
    if (out.address < other_end && other.address < out_end)
        refuse(other, "lies in the memory of " + out.name + ", which is written while " + other.name + " is read");
}

void need_shape(const View& view, const std::vector<int64_t>& shape, const std::string& why) {
    if (view.shape != shape) refuse(view, "must have shape " + words(shape) + " (" + why + ")");
}

int32_t format_of(const std::string& name) {
    if (name == "torch.float16" || name == "fp16") return JAGUAR_FP16;
    return name == "torch.bfloat16" || name == "bf16" ? JAGUAR_BF16 : JAGUAR_FP32;
}

// The GIL is released: a launch may wait for a place in the queue of the device.
template <typename Args>
void launch(const char* name, int (*function)(const Args*, uint64_t), const Args& args, uint64_t stream) {
    int code;
    {
        py::gil_scoped_release release;
        code = function(&args, stream);
    }
    if (code)
        throw std::runtime_error(std::string(name) + ": " + jaguar_error(code) + " (" + std::to_string(code) + ")");
}

const std::vector<const char*> HALF = {"torch.float16"};
const std::vector<const char*> HALVES = {"torch.float16", "torch.bfloat16"};
const std::vector<const char*> FLOATS = {"torch.float16", "torch.bfloat16", "torch.float32"};

void prepare(const py::list& matrices, py::handle out, py::handle statistics, double scale, uint64_t stream) {
    const size_t count = matrices.size();
    if (count < 1 || count > JAGUAR_MAX_BATCH)
        throw py::value_error("matrices: 1 to " + std::to_string(JAGUAR_MAX_BATCH) + " go into one call, not " +
                              std::to_string(count));
    const View x = read(out, "out", HALF);
    const Layout to = layout(x, false);
    const int64_t batch = static_cast<int64_t>(count), rows = x.shape[1], cols = x.shape[2];
    need_shape(x, {batch, rows, cols}, "one matrix for each of `matrices`");
    const View sums = read(statistics, "statistics", {"torch.float32"});
    need_same_device(x, sums);
    need_alignment(sums);
    int64_t room = 1;
    for (int64_t size : sums.shape) room *= size;
    if (!sums.contiguous || room < batch * 2 * JAGUAR_PARTS)
        refuse(sums, "must be contiguous, with at least " + words({batch, 2, JAGUAR_PARTS}) + " elements");
    const uint64_t sums_end = sums.address + 4 * room;
    need_apart(x, to.end, sums, sums_end);
    need_finite("scale", scale);

    jaguar_prepare_args args{};
    View first;
    for (size_t k = 0; k < count; ++k) {
        const View g = read(matrices[k], "matrices[" + std::to_string(k) + "]", FLOATS);
        if (k == 0) {
            first = g;
            if (g.shape != std::vector<int64_t>{rows, cols} && g.shape != std::vector<int64_t>{cols, rows})
                refuse(g, "must have shape " + words({rows, cols}) + " or " + words({cols, rows}) +
                              ", as the matrices of out or transposed");
        }
        need_shape(g, first.shape, "as matrices[0]");
        if (g.dtype != first.dtype) refuse(g, "must be " + first.dtype + ", as matrices[0]");
        need_same_device(x, g);
        if (!g.contiguous) refuse(g, "must be contiguous");
        need_alignment(g);
        const uint64_t end = g.address + rows * cols * (g.dtype == "torch.float32" ? 4 : 2);
        need_apart(x, to.end, g, end);
        need_apart(sums, sums_end, g, end);
        args.g[k] = g.address;
    }
    args.batch = static_cast<int32_t>(batch);
    args.rows = static_cast<int32_t>(rows);
    args.cols = static_cast<int32_t>(cols);
    args.transposed = first.shape[0] != rows;
    args.g_format = format_of(first.dtype);
    args.x = x.address;
    args.x_batch = to.batch;
    args.x_row = to.row;
    args.statistics = sums.address;
    args.scale = static_cast<float>(scale);
    launch("prepare", jaguar_prepare, args, stream);
}

void product(py::handle out, py::handle a, py::handle b, double alpha, double beta, py::handle c, bool triangle,
             uint64_t stream) {
    const View d = read(out, "out", HALVES), left = read(a, "a", HALF), right = read(b, "b", HALF);
    const Layout to = layout(d, true), from_a = layout(left, false), from_b = layout(right, true);
    const int64_t batch = left.shape[0], m = left.shape[1], k = left.shape[2], n = right.shape[2];
    need_shape(right, {batch, k, n}, "a has shape " + words(left.shape));
    need_shape(d, {batch, m, n}, "that of a @ b");
    need_same_device(d, left);
    need_same_device(d, right);
    need_apart(d, to.end, left, from_a.end);
    need_apart(d, to.end, right, from_b.end);
    if (triangle && m != n) refuse(d, "must be square where triangle=True");
    if (triangle && to.transposed) refuse(d, "must have stride 1 along its last dimension where triangle=True");
    need_finite("alpha", alpha);
    need_finite("beta", beta);

    jaguar_product_args args{};
    if (!c.is_none()) {
        const View plus = read(c, "c", HALF);
        const Layout from_c = layout(plus, false);
        need_shape(plus, d.shape, "that of out");
        need_same_device(d, plus);
        // In place is well defined only where each element is read at the very place that it is written to.
        const bool same = plus.address == d.address && from_c.row == to.row && from_c.batch == to.batch &&
                          !to.transposed;
        if (!same) need_apart(d, to.end, plus, from_c.end);
        if (beta != 0) {  // as in torch, nothing of c is read with beta = 0, and no NaN
            args.c = plus.address;
            args.c_batch = from_c.batch;
            args.c_row = from_c.row;
        }
    } else if (beta != 0) {
        throw py::value_error("beta=" + std::to_string(beta) + " needs c, and c is None");
    }
    args.batch = static_cast<int32_t>(batch);
    args.m = static_cast<int32_t>(m);
    args.n = static_cast<int32_t>(n);
    args.k = static_cast<int32_t>(k);
    args.a = left.address;
    args.a_batch = from_a.batch;
    args.a_row = from_a.row;
    args.b = right.address;
    args.b_batch = from_b.batch;
    args.b_row = from_b.row;
    args.b_transposed = from_b.transposed;
    args.d = d.address;
    args.d_batch = to.batch;
    args.d_row = to.row;
    args.d_transposed = to.transposed;
    args.d_format = format_of(d.dtype);
    args.alpha = static_cast<float>(alpha);
    args.beta = static_cast<float>(beta);
    args.triangle = triangle;
    launch("product", jaguar_product, args, stream);
}

void small(py::handle items, int64_t largest, const std::string& g_format, const std::string& o_format,
           const std::vector<std::array<double, 3>>& coefficients, double scale, double ridge,
           uint64_t stream) {
    const View table = read(items, "items", {"torch.int64"});
    if (table.shape.size() != 2 || table.shape[1] != 6 || !table.contiguous)
        refuse(table, "must be contiguous with shape (count, 6)");
    need_alignment(table);
    if (largest < 1 || largest > JAGUAR_SMALL)
        throw py::value_error("largest=" + std::to_string(largest) + " must be 1 to " + std::to_string(JAGUAR_SMALL));
    for (const auto& [name, format] : {std::pair("g_format", &g_format), std::pair("o_format", &o_format)})
        if (*format != "fp16" && *format != "bf16" && *format != "fp32")
            throw py::value_error(std::string(name) + "='" + *format + "' must be 'fp16', 'bf16' or 'fp32'");
    if (coefficients.empty() || coefficients.size() > JAGUAR_MAX_STEPS)
        throw py::value_error("coefficients: 1 to " + std::to_string(JAGUAR_MAX_STEPS) + " steps are possible, not " +
                              std::to_string(coefficients.size()));
    need_finite("scale", scale);
    need_finite("ridge", ridge);

    jaguar_small_args args{};
    args.items = table.address;
    args.count = static_cast<int32_t>(table.shape[0]);
    args.largest = static_cast<int32_t>(largest);
    args.g_format = format_of(g_format);
    args.o_format = format_of(o_format);
    args.steps = static_cast<int32_t>(coefficients.size());
    args.scale = static_cast<float>(scale);
    args.ridge = static_cast<float>(ridge);
    for (size_t step = 0; step < coefficients.size(); ++step) {
        for (double value : coefficients[step]) need_finite("coefficients", value);
        args.a[step] = static_cast<float>(coefficients[step][0]);
        args.b[step] = static_cast<float>(coefficients[step][1]);
        args.c[step] = static_cast<float>(coefficients[step][2]);
    }
    launch("small", jaguar_small, args, stream);
}

}  // namespace

#ifndef JAGUAR_CUDA_VERSION
#define JAGUAR_CUDA_VERSION "unknown"
#endif

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "Launches of the CUDA kernels; jaguar.backends.polar.cuda is what calls them.";
    module.def("prepare", &prepare, "matrices"_a, "out"_a, "statistics"_a, "scale"_a, "stream"_a);
    module.def("product", &product, "out"_a, "a"_a, "b"_a, "alpha"_a, "beta"_a, "c"_a, "triangle"_a, "stream"_a);
    module.def("small", &small, "items"_a, "largest"_a, "g_format"_a, "o_format"_a, "coefficients"_a, "scale"_a,
               "ridge"_a, "stream"_a);
    module.def("abi_version", &jaguar_abi_version);
    module.def("driver_version", &jaguar_driver_version);
    module.def("cuda_version", [] { return JAGUAR_CUDA_VERSION; });
}
