"""Commands of the command line, one module each: a dataclass of its options with `run(command) -> exit status`.

`command` is the command line as it was typed, for the results that name it.
"""
