// Error messages of one form: "op: argument: expected X, got Y". Thrown as std::invalid_argument
// (ValueError in Python).
#pragma once
#include <stdexcept>
#include <string>

namespace miue {

// What the machine cannot do (no driver, a failed launch); becomes BackendError in Python.
struct BackendFailure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void require(bool ok, const char* op, const char* argument, const std::string& expected,
                    const std::string& got) {
    if (!ok)
        throw std::invalid_argument(std::string(op) + ": " + argument + ": expected " + expected +
                                    ", got " + got);
}

}  // namespace miue
