// The parts of the ABI that launch nothing.
#include "launch.h"

JAGUAR_EXPORT const char* jaguar_error(int code) {
    switch (code) {
        case JAGUAR_OK:
            return "no error";
        case JAGUAR_BAD_SHAPE:
            return "sizes must be positive and at most 2^30, addresses given, formats known; a triangle must be square "
                   "and not transposed, a transposed D must not be C, at most 64 matrices can be prepared and at most "
                   "32 steps taken at once, and the tiles must fit the grid";
        case JAGUAR_BAD_ALIGNMENT:
            return "every address must be a multiple of 16 bytes and every row and batch stride of 8 elements";
        case JAGUAR_NO_KERNEL:
            return "the device must have compute capability 8.0 or newer, and a matrix of jaguar_small a short side of "
                   "at most 64";
        default:
            return cudaGetErrorString(static_cast<cudaError_t>(code));
    }
}

JAGUAR_EXPORT int jaguar_abi_version() { return JAGUAR_ABI_VERSION; }

JAGUAR_EXPORT int jaguar_driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
