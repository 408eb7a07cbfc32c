"""What is said to a user whose run cannot be read or cannot work."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class ConfigError(ValueError):
    """Everything that is wrong with the user's input, at once: one line per problem in ``problems``."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        lines = self.problems if count == 1 else (f"{count} problems:", *(f"  {line}" for line in self.problems))
        super().__init__("\n".join(lines))


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """``did you mean NAME?``, or the list of names where none is near."""
    known = list(names)
    near = get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
