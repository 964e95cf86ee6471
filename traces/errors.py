"""What goes wrong with workloads: a file that cannot be used, an argument that makes no sense."""


class TraceError(ValueError):
    """A trace cannot be used. The message says where (`FILE:LINE`), what is there, what is allowed, what to do."""


def require(ok: bool, name: str, value: object, allowed: str, remedy: str) -> None:
    """ValueError about the argument `name` unless `ok`."""
    if not ok:
        raise ValueError(f"{name} is {value!r}: allowed is {allowed}; {remedy}")
