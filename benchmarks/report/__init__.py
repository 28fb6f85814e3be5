"""Writes the page on the benchmarks: `rows` reads result files, `tables` and `figures` show them, `page` joins all."""
