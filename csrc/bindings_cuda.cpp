// The CUDA extension module: a table of contents.
#include "bindings_cuda.h"

PYBIND11_MODULE(_cuda, module) {
    using namespace bindings;
    using Unlocked = py::call_guard<py::gil_scoped_release>;
    py::register_exception<lors::CudaError>(module, "CudaError", PyExc_RuntimeError);
    module.attr("arches") = LORS_CUDA_ARCHS;
    module.attr("runtime") = CUDART_VERSION;
    module.def("device_count", device_count);
    module.def("shared_memory", lors::shared_memory);
    module.def("plan_gram", plan_gram);
    module.def("tie_chunks", lors::tie_chunks);
    module.def("merge_tiles", lors::merge_tiles);
    module.def("gram_apply", gram_apply, Unlocked());
    module.def("residual_threshold", residual_threshold, Unlocked());
    module.def("threshold_sample", lors::threshold_sample);
    module.def("merge_update", merge_update, Unlocked());
    module.def("ties_update", ties_update, Unlocked());
    module.def("ties_tiles", lors::ties_tiles);
    module.def("measure", measure, Unlocked());
    module.def("measure_tiles", lors::measure_tiles);
    module.def("eigh", eigh, Unlocked());
    module.def("eigh_max_size", lors::eigh_max_size);
    module.def("orthonormalise", orthonormalise, Unlocked());
    module.def("expand", expand, Unlocked());
    module.def("orthonormalise_max_rows", lors::orthonormalise_max_rows);
}
