"""The error that bad input gets: it names file, line and field, and says what to do."""


class InputError(ValueError):
    """Input that breaks the contract: says in which file, line and field, and what to do."""

    def __init__(
        self,
        reason: str,
        *,
        file: object = None,
        line: int | None = None,
        field: str | None = None,
        remedy: str | None = None,
    ):
        place = ", ".join(
            part
            for part in (
                str(file) if file is not None else "",
                f"line {line}" if line is not None else "",
                f"field `{field}`" if field else "",
            )
            if part
        )
        text = f"{place}: {reason}" if place else reason
        super().__init__(f"{text}. {remedy}" if remedy else text)
        self.reason, self.file, self.line, self.field = reason, file, line, field
