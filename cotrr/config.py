"""Settings as frozen dataclasses, and their absl flags: one flag per field."""

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeVar

from absl import app, flags, logging

from cotrr.compilation import keep_compiled
from cotrr.errors import InputError

T = TypeVar("T")
_DEFINE: dict[type, Any] = {int: flags.DEFINE_integer, float: flags.DEFINE_float,
           str: flags.DEFINE_string, bool: flags.DEFINE_bool}  # fmt: skip


def setting(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field with its default, the help of its flag, and its bounds (both inclusive)."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high})


def check_settings(settings: Any) -> None:
    """Raises InputError for a number of a settings dataclass that is out of bounds or not finite."""
    for field in dataclasses.fields(settings):
        value, low, high = getattr(settings, field.name), field.metadata["low"], field.metadata["high"]
        if isinstance(value, str):
            continue
        inside = (low is None or value >= low) and (high is None or value <= high)
        if not (math.isfinite(value) and inside):
            ends = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
            raise InputError(f"--{field.name}={value}: expected {' and '.join(ends) or 'a finite number'}")


def flags_from_dataclass(cls: type, skip: Collection[str] = ()) -> None:
    """Defines one absl flag per field of `cls`: its name, default and help."""
    for field in dataclasses.fields(cls):
        if field.name not in skip:
            _DEFINE[type(field.default)](field.name, field.default, field.metadata["help"])
            # Else absl lists the flag with this module, and a launcher's --help does not show it.
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[field.name])


def dataclass_from_flags(cls: type[T], **given: Any) -> T:
    """An instance of `cls` from the parsed flags; `given` fields do not come from flags."""
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return cls(**{n: getattr(flags.FLAGS, n) for n in names if n not in given}, **given)


def launch(
    main: Callable[..., None], define_flags: Callable[[], None], commands: Collection[str] = ()
) -> None:
    """Runs a launcher: defines and parses its flags; bad flags or input end it with status 2.

    Where it has `commands`, the first argument is one of them, and `main` gets it.
    """

    def stop(reason: object) -> NoReturn:
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)

    def parse(argv: list[str]) -> list[str]:
        try:
            "".join(argv).encode()
            return flags.FLAGS(argv)
        except flags.Error as error:
            required = re.match(r"flag --(\w+)=None:", str(error))
            stop(f"--{required[1]} is required. See --help" if required else f"{error}. See --help")
        except UnicodeEncodeError:
            stop("an argument is not UTF-8")

    def guarded(argv: list[str]) -> None:
        command, rest = (argv[1:2], argv[2:]) if commands else ([], argv[1:])
        if rest:
            stop(f"unexpected argument {rest[0]!r}; flags look like --name=value")
        if commands and not set(command) & set(commands):
            stop(f"expected one of {', '.join(commands)} first. See --help")
        try:
            main(*command)
        except InputError as error:
            stop(error)
        except OSError as error:
            stop(f"{error.filename or 'output'}: {(error.strerror or str(error)).lower()}")

    keep_compiled()
    define_flags()
    flags.FLAGS.verbosity = logging.WARNING  # libraries tell a lot at INFO; --verbosity=0 shows it
    app.run(guarded, flags_parser=parse)
