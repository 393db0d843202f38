"""The blueprint of /v1, with OpenAI's errors in the document, and the headers that every answer carries."""

from types import SimpleNamespace
from typing import Any, TypeVar

from flask import Request, Response
from marshmallow import Schema
from webargs.multidictproxy import MultiDictProxy
from werkzeug.datastructures import CombinedMultiDict

from app import parsing
from app.examples import EVENT
from app.limits import room_here
from app.openai.errors import OpenAiError

PREFIX = "/v1"

View = TypeVar("View")


#: Answers that are no JSON object, as the document has them.
STREAM = {**EVENT, "description": "With stream: true. Chunks as server-sent events; the last one says [DONE]."}
TEXT = {"type": "string", "description": "With a response_format that is no JSON."}


class FormParser(parsing.Parser):
    """Also reads forms that have files in them."""

    __location_map__ = {**parsing.Parser.__location_map__, "multipart": "load_multipart"}

    def load_multipart(self, req: Request, schema: Schema) -> MultiDictProxy:
        """The form's fields and files."""
        parts: list[Any] = [req.form, req.files]
        return MultiDictProxy(CombinedMultiDict(parts), schema)


class Blueprint(parsing.Blueprint):
    """A blueprint that takes forms, and whose errors are documented in OpenAI's shape."""

    ARGUMENTS_PARSER = FormParser()
    DEFAULT_LOCATION_CONTENT_TYPE_MAPPING = {
        **parsing.Blueprint.DEFAULT_LOCATION_CONTENT_TYPE_MAPPING,
        "multipart": "multipart/form-data",
    }

    def register_views_in_doc(self, api: Any, app: Any, spec: Any, **kwargs: Any) -> None:
        """Also write the shape of errors into the document."""
        content = {"application/json": {"schema": OpenAiError}}
        spec.components.response("OPENAI_ERROR", {"description": "An error", "content": content})
        super().register_views_in_doc(api, app, spec, **kwargs)

    def _prepare_arguments_doc(self, doc: Any, doc_info: Any, **kwargs: Any) -> Any:
        # flask-smorest would state the refusals of its parser, which are 422 and of another shape.
        doc_info.get("arguments", {}).pop("responses", None)
        return super()._prepare_arguments_doc(doc, doc_info, **kwargs)

    @staticmethod
    def _prepare_response_doc(doc: Any, doc_info: Any, *, api: Any, **kwargs: Any) -> Any:
        ours = SimpleNamespace(
            DEFAULT_ERROR_RESPONSE_NAME="OPENAI_ERROR", DEFAULT_RESPONSE_CONTENT_TYPE="application/json"
        )
        return parsing.Blueprint._prepare_response_doc(doc, doc_info, api=ours, **kwargs)


blueprint = Blueprint("openai", __name__, url_prefix=PREFIX, description="OpenAI's API: docs/openai.md.")


def states_server_errors(view: View) -> View:
    """Write into the document with what statuses a job that was waited for may end."""
    for status, description in (
        (504, "It timed out, or goes on; the message says which."),
        (503, "Nobody can take it now."),
        (500, "It failed; the message says why."),
    ):
        view = blueprint.alt_response(status, schema=OpenAiError, description=description)(view)
    return view


@blueprint.after_request
def tell_room(response: Response) -> Response:
    """How many more requests the caller may send, as OpenAI's clients read it."""
    room = room_here()
    if room is not None:
        response.headers["x-ratelimit-limit-requests"] = str(room.limit)
        response.headers["x-ratelimit-remaining-requests"] = str(room.remaining)
        response.headers["x-ratelimit-reset-requests"] = f"{room.reset_s}s"
    return response
