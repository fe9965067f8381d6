"""Settings as frozen dataclasses, and their absl flags: one flag per field."""

import dataclasses
import sys
from collections.abc import Collection
from typing import Any, TypeVar

from absl import app, flags, logging

from cotrr.errors import InputError

T = TypeVar("T")
_DEFINE: dict[type, Any] = {int: flags.DEFINE_integer, float: flags.DEFINE_float,
           str: flags.DEFINE_string, bool: flags.DEFINE_bool}  # fmt: skip


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its default and the help of its flag."""
    return dataclasses.field(default=default, metadata={"help": help})


def flags_from_dataclass(cls: type, skip: Collection[str] = ()) -> None:
    """Defines one absl flag per field of `cls`: its name, default and help."""
    for field in dataclasses.fields(cls):
        if field.name not in skip:
            kind = type(field.default)
            _DEFINE[kind](field.name, field.default, field.metadata["help"])


def dataclass_from_flags(cls: type[T], **given: Any) -> T:
    """An instance of `cls` from the parsed flags; `given` fields do not come from flags."""
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return cls(**{n: getattr(flags.FLAGS, n) for n in names if n not in given}, **given)


def launch(main: Any, define_flags: Any) -> None:
    """Runs a launcher: defines its flags, parses them, and turns bad input into exit status 2."""

    def guarded(argv: list[str]) -> None:
        if argv[1:]:
            print(f"error: unexpected argument {argv[1]!r}; flags look like --name=value", file=sys.stderr)
            sys.exit(2)
        try:
            main()
        except (InputError, ValueError) as error:
            if not isinstance(error, InputError) and not str(error).startswith("--"):
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    define_flags()
    flags.FLAGS.verbosity = logging.WARNING  # libraries tell a lot at INFO; --verbosity=0 shows it
    app.run(guarded)
