"""How long the simulated model takes to answer."""

from dataclasses import dataclass

from leasehold.core import errors


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceTime:
    """Time of an answer, by its tokens. Raises `InvalidArgument` if one is negative or above an hour."""

    #: Before the first token.
    first_token_seconds: float = 0.2
    #: For each token that is generated.
    seconds_per_token: float = 0.014
    #: No answer takes longer, however long it is.
    answer_seconds_max: float = 60.0

    def __post_init__(self) -> None:
        for name in ("first_token_seconds", "seconds_per_token", "answer_seconds_max"):
            if not 0 <= getattr(self, name) <= 3600:
                raise errors.InvalidArgument(f"{name}: {getattr(self, name)} is not in 0 to 3600", field=name)

    def seconds(self, completion_tokens: int) -> float:
        """From arrival to the last of `completion_tokens` tokens."""
        seconds = self.first_token_seconds + completion_tokens * self.seconds_per_token
        return min(seconds, self.answer_seconds_max)
