"""What benchmarks share: results, the machine they ran on, tables, workloads, and the engines under test."""
