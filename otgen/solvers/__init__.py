"""Solvers: what an optimal transport user calls. They see the kernels only through `otgen.ops`."""
