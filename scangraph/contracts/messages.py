"""What Kafka carries: requests in, and what is said of those that could not be accepted."""

from __future__ import annotations

import base64
import binascii
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from scangraph.contracts.api import Priority
from scangraph.contracts.errors import InvalidMessage

#: Header of a progress message whose execution came by Kafka, and the place of the id in a request without one in its body.
CORRELATION = "correlation-id"
#: The idempotency keys of requests by Kafka begin so: what came by HTTP with the same key is another request.
KEY_PREFIX = "kafka:"
#: Headers of a dead letter begin so; those of the original stay beside them.
DEAD = "scangraph-"
_MOST_FAULTS = 10


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MessageInput(_Wire):
    """What goes into an input: a file of the service, a file in its storage, or the bytes; exactly one of them."""

    file_id: str | None = Field(None, description="id of a file (POST /v1/files)")
    uri: str | None = Field(None, description="in the service's storage: s3://…, file://…, or a path in it; wants `sha256`")
    data: str | None = Field(None, description="the file itself, base64")
    filename: str = Field("image", max_length=255, description="name of `data`")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="of the file; another one is refused")
    label_scheme: Literal["kits"] | None = Field(None, description="numbering of a mask, if not the label table's")

    @model_validator(mode="after")
    def _one(self) -> MessageInput:
        if sum(value is not None for value in (self.file_id, self.uri, self.data)) != 1:
            raise ValueError("give exactly one of `file_id`, `uri` and `data`")
        if self.uri is not None and self.sha256 is None:
            raise ValueError("a `uri` wants a `sha256`: the service did not write that file")
        return self

    def content(self) -> bytes:
        """Return the bytes of `data`; raises `InvalidMessage`."""
        try:
            return base64.b64decode(self.data or "", validate=True)
        except (binascii.Error, ValueError):
            raise InvalidMessage(detail="`data` is not base64") from None


class ProcessingRequest(_Wire):
    """Value of a message on the requests' topic, as JSON."""

    correlation_id: str = Field(
        min_length=1, max_length=200, description="the client's name of this request: sent again, it makes nothing new"
    )
    pipeline_id: str = Field(min_length=1, max_length=64, description="UUID or name of a pipeline; `name@3` for a revision")
    inputs: dict[str, MessageInput | list[MessageInput]] = Field(description="by the pipeline's input names")
    parameters: dict[str, Any] = Field(default_factory=dict, description="as in `POST /v1/executions`")
    priority: Priority = "normal"


def read_request(value: bytes | None, correlation_id: str | None = None) -> ProcessingRequest:
    """Read a message.

    Parameters
    ----------
    value : bytes or None
        Its JSON.
    correlation_id : str, optional
        From its header, where the value has none.

    Raises
    ------
    InvalidMessage
        With a JSON pointer at each fault, and none of the message's values: it may be anything.
    """
    try:
        plain = _Envelope.model_validate_json(value or b"").model_dump()
        if correlation_id is not None:
            plain.setdefault("correlation_id", correlation_id)
        return ProcessingRequest.model_validate(plain)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)[:_MOST_FAULTS]
        faults = [{"pointer": "".join(f"/{part}" for part in fault["loc"]), "detail": fault["msg"]} for fault in found]
        detail = "; ".join(f"{fault['pointer'] or 'the value'}: {fault['detail']}" for fault in faults)
        raise InvalidMessage(detail=detail, errors=faults) from None
    except RecursionError:
        raise InvalidMessage(detail="the value is nested too deeply") from None


class _Envelope(BaseModel):
    """Any JSON object."""

    model_config = ConfigDict(extra="allow")
