"""One line of the doctor's report."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

from megacore.exits import raised_by_us

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """``detail`` is what was found; ``fix`` is what to do about it, a line to type where there is one."""

    name: str
    status: str
    detail: str
    fix: str = ""

    def as_json(self) -> dict[str, str]:
        """For programs."""
        return asdict(self)


Check = Callable[[], Iterable[Finding]]


def examined(name: str, check: Check) -> Iterator[Finding]:
    """What a check finds. One that breaks is itself something to be told, and no reason to leave out the others; what
    is asked for and cannot be had (a ValueError of ours, which has the fix) is a failure."""
    try:
        yield from check()
    except Exception as error:
        if isinstance(error, ValueError) and raised_by_us(error.__traceback__):
            yield Finding(name, FAIL, str(error))
        else:
            yield Finding(name, WARN, f"could not be looked at: {type(error).__name__}: {error}")


def worst(findings: Iterable[Finding]) -> str:
    """ok, warn or fail."""
    found = {each.status for each in findings}
    return next((status for status in (FAIL, WARN) if status in found), OK)
