"""Benchmarks, one file each, named by their file: `deepflow bench NAME`. `harness` holds what they share.

A benchmark has a docstring whose first line says what it measures, `Options` (a `harness.result.Options`),
`run(options) -> list[Row]`, and where it cannot run everywhere `missing(options) -> str | None`: why not
here.
"""
