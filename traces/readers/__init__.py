"""Readers of trace files, one module per format, called like the format; `traces.formats` finds them by file name."""
