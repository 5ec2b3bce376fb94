"""C++ loops for what lies between the matrix products of a forward on a CPU."""
