"""What S3 can do and obstore has no call for: links for clients, and deleting what unfinished uploads left. By botocore."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any
from urllib.parse import quote, urlsplit

#: obstore's names of the options that botocore needs, in lower case and without "aws_".
_ACCESS, _SECRET, _TOKEN = "access_key_id", "secret_access_key", ("session_token", "token")
_REGION, _ENDPOINT = ("region", "default_region"), ("endpoint", "endpoint_url")
#: After this a link's URL is refused by S3 itself.
LONGEST_LINK_SECONDS = 7 * 86400


class Bucket:
    """A prefix of a bucket. Its calls block; nothing is loaded or connected before the first.

    Parameters
    ----------
    url : str
        `s3://bucket/prefix`.
    options : mapping
        As `open_storage` takes them. What is not there comes from the environment's `AWS_…`, as for obstore.
    link_endpoint : str
        Address of the server that links name.
    """

    def __init__(self, url: str, options: Mapping[str, str], link_endpoint: str = "") -> None:
        parts = urlsplit(url)
        self.name, self._prefix = parts.netloc, parts.path.strip("/")
        self._options = {name.lower().removeprefix("aws_"): value for name, value in options.items()}
        self._link_endpoint = link_endpoint

    def link(self, name: str, seconds: int, filename: str, media_type: str) -> str:
        """Return a URL by which anybody can GET an object until so many seconds from now. Made here, without a request."""
        wanted = {
            "Bucket": self.name,
            "Key": self._key(name),
            "ResponseContentDisposition": f"attachment; filename*=UTF-8''{quote(filename, safe='')}",
            "ResponseContentType": media_type,
            "ResponseCacheControl": "private, no-store",
        }
        return str(self._linking.generate_presigned_url("get_object", Params=wanted, ExpiresIn=seconds))

    def prepare(self, rule: dict[str, Any]) -> list[str]:
        """Make the bucket where there is none, give it a lifecycle rule, and return what was done or could not be."""
        from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

        told = []
        try:
            try:
                self._client.head_bucket(Bucket=self.name)
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                    raise
                self._client.create_bucket(Bucket=self.name, **self._where())
                told.append("made the bucket")
            try:
                kept = self._client.get_bucket_lifecycle_configuration(Bucket=self.name)["Rules"]
            except ClientError:
                kept = []  # there is none yet
            ours = {one["ID"] for one in rule["Rules"]}
            rules = [*(one for one in kept if one.get("ID") not in ours), *rule["Rules"]]
            try:
                self._client.put_bucket_lifecycle_configuration(Bucket=self.name, LifecycleConfiguration={"Rules": rules})
                told.append("set the lifecycle rule for uploads that never ended")
            except ClientError as error:
                told.append(f"this server takes no such lifecycle rule ({error.response['Error']['Code']}): the service sweeps")
        except (BotoCoreError, ClientError) as error:
            raise OSError(_told(error)) from error
        return told

    def _where(self) -> dict[str, Any]:
        region = self._client.meta.region_name
        return {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}

    def sweep(self, prefix: str, older_than: timedelta) -> list[str]:
        """Abort uploads in parts that began longer ago, below a prefix, and return their names."""
        from botocore.exceptions import BotoCoreError, ClientError

        before, swept = datetime.now(UTC) - older_than, []
        try:
            pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.name, Prefix=self._key(prefix))
            found = [upload for page in pages for upload in page.get("Uploads", []) if upload["Initiated"] < before]
            for upload in found:
                try:
                    self._client.abort_multipart_upload(Bucket=self.name, Key=upload["Key"], UploadId=upload["UploadId"])
                except ClientError as error:  # ended meanwhile, one way or the other
                    if error.response["Error"]["Code"] != "NoSuchUpload":
                        raise
                swept.append(upload["Key"].removeprefix(self._key("")))
        except (BotoCoreError, ClientError) as error:
            raise OSError(_told(error)) from error  # what the storage's translation knows
        return swept

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    @cached_property
    def _client(self) -> Any:
        return self._connect(self._option(*_ENDPOINT))

    @cached_property
    def _linking(self) -> Any:
        return self._connect(self._link_endpoint) if self._link_endpoint else self._client

    def _connect(self, endpoint: str | None) -> Any:
        from botocore.config import Config  # type: ignore[import-untyped]
        from botocore.session import Session  # type: ignore[import-untyped]

        hosted = (self._option("virtual_hosted_style_request") or "").lower() in {"1", "true", "yes"}
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": "virtual" if hosted else "path"},
            connect_timeout=3,
            read_timeout=30,
            retries={"total_max_attempts": 3},
            # Servers that are not Amazon's need not know its newer checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        return Session().create_client(
            "s3",
            region_name=self._option(*_REGION) or "us-east-1",
            endpoint_url=endpoint or None,
            aws_access_key_id=self._options.get(_ACCESS),
            aws_secret_access_key=self._options.get(_SECRET),
            aws_session_token=next((self._options[name] for name in _TOKEN if name in self._options), None),
            config=config,
        )

    def _option(self, *names: str) -> str | None:
        given = [self._options.get(name) for name in names]
        return next(filter(None, [*given, *(os.environ.get(f"AWS_{name}".upper()) for name in names)]), None)


def _told(error: Any) -> str:
    """Write botocore's error as S3's own answer is written."""
    answer = getattr(error, "response", None)
    if answer is None:
        return f"error sending request: {type(error).__name__}"
    code, status = answer["Error"]["Code"], answer["ResponseMetadata"]["HTTPStatusCode"]
    return f"status code: {status} <Code>{code}</Code>"


def lifecycle(url: str, days: int = 2) -> dict[str, Any]:
    """Return the bucket's rule, as `put-bucket-lifecycle-configuration` takes it, that deletes what broken uploads left.

    Only that: how long files are kept is the service's own business, for it knows who still reads them.
    """
    prefix = urlsplit(url).path.strip("/")
    rule = {
        "ID": "scangraph-unfinished-uploads",
        "Status": "Enabled",
        "Filter": {"Prefix": f"{prefix}/" if prefix else ""},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": days},
    }
    return {"Rules": [rule]}
