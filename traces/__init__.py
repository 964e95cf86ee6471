"""Workloads as streams of `cluster.request.Arrival`: readers of public formats, a generator, transforms, statistics.

A workload is any iterable of arrivals in order; readers and transforms are iterables that start afresh at each
`iter()` and hold a constant amount of memory, so they compose by nesting:
`RateScale(TimeWindow(AzureTrace("azure2023_conv", model="m"), duration_s=600), factor=2)`.
"""
