"""What is legal on both sides of a value that is not: the fix that a refusal names."""


def multiples(unit: int, near: int) -> str:
    """The multiples of ``unit`` on both sides of ``near``."""
    below = near // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def divisors(number: int, near: int) -> str:
    """The divisors of ``number`` on both sides of ``near``."""
    return nearest([n for n in range(1, number + 1) if number % n == 0], near)


def nearest(legal: list[int], near: int) -> str:
    """The legal values on both sides of ``near``."""
    below = [n for n in legal if n < near][-1:]
    above = [n for n in legal if n > near][:1]
    return " or ".join(map(str, below + above))
