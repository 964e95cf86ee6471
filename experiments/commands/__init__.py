"""The subcommands of `deepflow`, one module each, with `main(arguments) -> int`."""
