"""One line of the doctor's report."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

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
    """What a check finds. One that breaks is itself something to be told, and no reason to leave out the others."""
    try:
        yield from check()
    except Exception as error:
        yield Finding(name, WARN, f"could not be looked at: {type(error).__name__}: {error}")


def worst(findings: Iterable[Finding]) -> str:
    """ok, warn or fail."""
    found = {each.status for each in findings}
    return next((status for status in (FAIL, WARN) if status in found), OK)
