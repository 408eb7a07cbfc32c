"""What is said to a user whose run cannot be read or cannot work."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class ConfigError(ValueError):
    """Everything that is wrong with a run, at once: one line per problem in ``problems``."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        title = "the run cannot be used:" if count == 1 else f"the run cannot be used, {count} problems:"
        super().__init__("\n".join([title, *(f"  {problem}" for problem in self.problems)]))


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """``did you mean NAME?``, or the list of names where none is near."""
    known = list(names)
    near = get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
