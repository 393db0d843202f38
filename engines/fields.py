"""Fields of params: stricter than marshmallow's, and those for files and texts."""

from collections.abc import Callable, Mapping
from typing import Any

from marshmallow import ValidationError, fields

from engines import media


class Text(fields.String):
    """A string that UTF-8 can carry: lone surrogates, legal in JSON, break every tokenizer and database."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> str:
        text: str = super()._deserialize(value, attr, data, **kwargs)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValidationError("Not valid Unicode: a surrogate stands alone.") from error
        return text


class Int(fields.Integer):
    """A JSON integer; "5", 5.5 and true are refused."""

    def _validated(self, value: Any) -> int:
        if isinstance(value, (bool, str)):
            raise self.make_error("invalid", input=value)
        return super()._validated(value)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(strict=True, **kwargs)


class Number(fields.Float):
    """A finite JSON number; "0.7" and true are refused."""

    def _validated(self, value: Any) -> float:
        if isinstance(value, (bool, str)):
            raise self.make_error("invalid", input=value)
        return super()._validated(value)


class Truth(fields.Boolean):
    """true or false; 1 and "yes" are refused."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class StringOrList(fields.Field[list[str]]):
    """One string or a list of them; loads as a list."""

    def __init__(self, *, most: int, longest: int, least: int = 0, most_together: int | None = None, **kwargs: Any):
        """most, least: strings. longest: characters of each; most_together: of all."""
        items = {"type": "string", "minLength": 1, "maxLength": longest}
        shape = [items, {"type": "array", "items": items, "minItems": least, "maxItems": most}]
        super().__init__(metadata={"oneOf": shape, **kwargs.pop("metadata", {})}, **kwargs)
        self.most = most
        self.least = least
        self.longest = longest
        self.most_together = most_together

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> list[str]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ValidationError("Must be a string or a list of strings.")
        if not self.least <= len(items) <= self.most:
            raise ValidationError(f"At least {self.least} strings." if items == [] else f"At most {self.most} strings.")
        if any(not 1 <= len(item) <= self.longest for item in items):
            raise ValidationError(f"Each string must have 1 to {self.longest} characters.")
        if self.most_together is not None and sum(map(len, items)) > self.most_together:
            raise ValidationError(f"At most {self.most_together} characters in all.")
        return [str(Text().deserialize(item)) for item in items]


class File(fields.String):
    """A file as Base64, with or without a data URL's head; loads as the bare Base64."""

    def __init__(self, check: Callable[[bytes], object], most_bytes: int, **kwargs: Any) -> None:
        """check: raises BadMedia for what is no such file."""
        super().__init__(**kwargs)
        self.check = check
        self.most_bytes = most_bytes

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> str:
        text: str = super()._deserialize(value, attr, data, **kwargs)
        try:
            self.check(media.decode(text, self.most_bytes))
        except media.BadMedia as error:
            raise ValidationError(str(error)) from error
        return text.partition(",")[2] if text.startswith("data:") else text
