"""The page on the benchmarks: result files as `rows`, what follows from them as `tables` and `figures`, the `page`."""
