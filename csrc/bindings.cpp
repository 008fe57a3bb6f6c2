// The CPU extension module: a table of contents.
#include "bindings.h"

PYBIND11_MODULE(LORS_MODULE, module) {
    using namespace bindings;
    module.attr("isa") = lors::kIsa;
    module.def("address", [](const py::array& x) { return reinterpret_cast<uintptr_t>(x.data()); });
    module.def("gram_apply", gram_apply);
    module.def("residual_threshold", residual_threshold);
    module.def("merge_update", merge_update);
    module.def("apply_update", apply_update);
    module.def("ties_update", ties_update);
    module.def("sparse_part", sparse_part);
    module.def("sparse_update", sparse_update);
    module.def("truncated_svd", truncated_svd);
    module.def("eigh_single", eigh_single);
    module.def("multiply_rate", lors::multiply_rate, py::call_guard<py::gil_scoped_release>());
    module.def("bfloat16_rate", lors::bfloat16_rate, py::call_guard<py::gil_scoped_release>());
    module.def("read_rate", lors::read_rate, py::call_guard<py::gil_scoped_release>());
}
