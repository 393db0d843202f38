"""Fields of OpenAI's requests that the platform takes otherwise than its own."""

from collections.abc import Mapping
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, pre_load

from engines.fields import Text


class Unsupported(fields.Field[Any]):
    """What would change the answer if it were left out in silence: only values that ask for nothing are taken."""

    def __init__(self, *neutral: Any, why: str = "It is not supported.") -> None:
        """neutral: values that mean the same as leaving it out."""
        taken = f"Only {', '.join(map(repr, neutral))}." if neutral else "Leave it out."
        super().__init__(metadata={"description": f"{why} {taken}"})
        self._neutral = neutral
        self._refusal = f"{why} {taken}"

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> None:
        # By type too: 0 is no False.
        if not any(value == known and type(value) is type(known) for known in self._neutral):
            raise ValidationError(self._refusal)


class Ignored(fields.Raw):
    """What is no business of an answer."""

    def __init__(self) -> None:
        super().__init__(metadata={"description": "Taken, and ignored."})


class Asked(Schema):
    """A request of OpenAI's; null means the same as leaving a field out."""

    class Meta:
        unknown = RAISE

    model = Text(
        required=True,
        metadata={
            "description": "An id or alias (GET /v1/models), or the job type, such as llm, for any model of it.",
            "example": "llm",
        },
    )
    user = Ignored()
    safety_identifier = Ignored()

    @pre_load
    def _without_nulls(self, data: Any, **_: Any) -> Any:
        # A form's values are no JSON object, and it knows no null.
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data
