"""What numba compiles: the loops of the kernels on CPU. Imported only to compile them (see `workers`).

Each module has functions that make a worker, as plain Python: a C function `worker(job)` once it is compiled. They hold
plain values only, may raise nothing, and take no memory but the `stack`: so the code can be used without numba later.
"""
