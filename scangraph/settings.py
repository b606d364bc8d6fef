"""Every setting, read once.

`load_settings()` is called by the command line (or by Serve, through `graph.build`), and the one frozen object it returns is
handed down: each deployment gets its own section and nothing reads the environment after that.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from scangraph.contracts.errors import InvalidSetting

#: The checkout that holds `graph.py`, `deployments/` and the environments.
HOME = Path(__file__).resolve().parents[1]


class Section(BaseModel):
    """A part of the settings that one deployment gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StageSettings(Section):
    """What every stage has."""

    num_cpus: float = Field(1, ge=0, description="CPUs a replica reserves")
    min_replicas: int = Field(1, ge=0, description="replicas kept; with 0 the first who wants the stage waits for its start")
    max_replicas: int = Field(1, ge=1, description="replicas at most")
    work_seconds: float = Field(60, gt=0, description="work that a replica may have before it; more gets another replica")
    upscale_seconds: float = Field(5, ge=0, description="time that more replicas must be wanted before they are started")
    downscale_seconds: float = Field(300, ge=0, description="time that fewer replicas must be wanted before some are stopped")
    surge_percent: int = Field(
        100, ge=0, le=100, description="more replicas while a new version is rolled out; with 0 old ones stop first"
    )
    shutdown_seconds: float = Field(600, gt=0, description="time a replica gets to finish its work before it is stopped")


class ImageioSettings(StageSettings):
    """Limits of the gate, and the stage's share."""

    min_replicas: int = Field(1, ge=1, description="replicas kept; uploads are looked into, so there is always one")
    num_cpus: float = Field(0, ge=0, description="CPUs a replica reserves; it waits for the disk more than it computes")
    max_voxels: int = Field(1024**3, gt=0, description="voxels an image may have")
    max_inflated_bytes: int = Field(8 * 1024**3, gt=0, description="bytes a file may inflate to")
    max_pixels: int = Field(200_000_000, gt=0, description="pixels a 2-D image may have, all pages together")
    max_pages: int = Field(1000, gt=0, description="pages a 2-D image may have")
    concurrent: int = Field(4, gt=0, description="files read or written at once")


class NnunetSettings(StageSettings):
    """The segmentation stage."""

    num_gpus: float | None = Field(
        None, ge=0, le=1, description="fraction of a GPU a replica reserves; unset: 0.5 where the cluster has a GPU, else 0"
    )
    models_held: int = Field(8, gt=0, description="models kept in memory, the least recently used leaves first")
    threads: int = Field(0, ge=0, description="CPU threads of one prediction, 0 for every core of the node")


class SmoothingSettings(StageSettings):
    """The surface stage."""

    threads: int = Field(0, ge=0, description="structures that one scene works on at once, 0 for one on every core of the node")
    open3d: bool = Field(False, description="run from the environment smoothing-open3d, and measure distances by open3d")


class PostprocessSettings(StageSettings):
    """The mask stage."""

    num_cpus: float = Field(0, ge=0, description="CPUs a replica reserves")
    cugraph: bool = Field(False, description="run from the environment postprocess-cugraph; large graphs then go to the GPU")
    num_gpus: float | None = Field(
        None,
        ge=0,
        le=1,
        description="fraction of a GPU a replica reserves; unset: 0.25 with cugraph on a GPU, else 0",
    )


class ImagingSettings(StageSettings):
    """The stage of 2-D images."""

    num_cpus: float = Field(0, ge=0, description="CPUs a replica reserves")
    num_gpus: float = Field(0, ge=0, le=1, description="fraction of a GPU a replica reserves; needs onnxruntime-gpu")
    threads: int = Field(0, ge=0, description="CPU threads of one detection, 0 for every core of the node")
    max_pixels: int = Field(200_000_000, gt=0, description="pixels that an image may be enlarged to, all pages together")
    models_held: int = Field(4, gt=0, description="models kept in memory, the least recently used leaves first")


class ExecutorSettings(Section):
    """The control plane."""

    attempts: int = Field(3, ge=1, description="times a step is tried when its process dies or the storage does not answer")
    step_timeout_seconds: float = Field(
        3600, gt=0, description="longest time one step may take, where its pipeline says nothing"
    )
    max_running: int = Field(4, gt=0, description="executions at work at once in one executor; the others wait in the queue")
    max_running_bytes: int | None = Field(
        None, gt=0, description="decoded inputs of what is at work at once; unset: half of the cluster's object store"
    )
    lease_seconds: float = Field(
        15, ge=1, description="silence after which an executor counts as dead and its work is taken over"
    )
    ageing_seconds: float = Field(900, ge=0, description="waiting time that is worth one step of priority")
    max_pending: int = Field(10_000, gt=0, description="executions that may wait; more are answered 429")
    max_pending_per_account: int = Field(5_000, gt=0, description="executions of one account that may wait")
    keep_from_seconds: float = Field(0.1, ge=0, description="results of steps that took less are made again, not kept")
    kept_results_bytes: int = Field(
        10 * 1024**3, ge=0, description="size of the kept step results; the least recently used leave"
    )
    held_inputs_bytes: int = Field(1024**3, ge=0, description="decoded inputs held in the object store for the next execution")
    retention_days: float | None = Field(None, gt=0, description="age at which ended executions are forgotten; unset: never")
    storage_patience_seconds: float = Field(
        900, ge=0, description="time that an execution waits for a storage that does not answer before it fails"
    )


class FilesSettings(Section):
    """Uploads and downloads."""

    max_upload_bytes: int = Field(8 * 1024**3, gt=0, description="bytes a file may have")
    retention_days: float | None = Field(None, gt=0, description="age at which uploads and results are deleted; unset: never")
    resumable_hours: float = Field(24, gt=0, description="time to finish a resumable upload")
    max_open_uploads: int = Field(64, gt=0, description="uploads that one account may have begun and not finished")
    link_seconds: int | None = Field(
        None, gt=0, le=7 * 86400, description="downloads are sent on to S3, by a link good for so long; unset: sent from here"
    )
    link_endpoint: str = Field("", description="address of S3 in those links, as clients reach it; unset: the service's own")


class AuthSettings(Section):
    """Accounts and tokens."""

    issuer: str = Field("scangraph", description="`iss` of the tokens")
    audience: str = Field("scangraph", description="`aud` of the tokens")
    access_seconds: int = Field(900, gt=0, description="life of an access token")
    refresh_seconds: int = Field(7 * 86400, gt=0, description="life of a refresh token")
    logins_per_minute: int = Field(10, gt=0, description="logins that one account name, or one address, may try in a minute")
    signing_key: Path | None = Field(None, description="private key (PEM, Ed25519); unset: made in <data>/keys")


class GatewaySettings(Section):
    """The HTTP door."""

    min_replicas: int = Field(1, ge=1, description="replicas kept")
    max_replicas: int = Field(1, ge=1, description="replicas at most")
    target_requests: float = Field(
        32, gt=0, description="requests, open WebSockets too, that a replica should have; more get another"
    )
    max_requests: int = Field(256, gt=0, description="requests, open WebSockets too, that one replica works on at once")
    max_queued: int = Field(64, gt=0, description="requests that wait at a proxy for a replica; more are answered 503 at once")
    max_body_bytes: int = Field(1024 * 1024, gt=0, description="bytes a JSON body may have")
    stall_seconds: float = Field(20, gt=0, description="silence in the middle of a request after which it is cut off")
    poll_seconds: float = Field(0.2, gt=0, description="how often the records are looked at for news while somebody waits")
    origins: tuple[str, ...] = Field((), description="other origins whose pages may open a WebSocket")
    page_dir: Path | None = Field(None, description="folder of the built web page; unset: where `make setup` puts it")


class LogSettings(Section):
    """What the service's processes write down."""

    format: Literal["json", "text"] = Field("json", description="one JSON object a line, or a line to be read")
    folder: Path | None = Field(None, description="where; unset: <data>/logs of a local service, Ray's own folder in a cluster")


class MetricsSettings(Section):
    """`GET /metrics`, for Prometheus."""

    access: Literal["token", "open", "off"] = Field(
        "token", description="token: for an admin's bearer and the one in token_file; open: for everybody; off: for nobody"
    )
    token_file: Path | None = Field(None, description="the bearer of whoever scrapes; unset: made in <data>/metrics-token")
    interval_seconds: float = Field(
        10,
        ge=1,
        le=10,  # whatever is said here, Ray's agent forgets a gauge after 20 s
        description="how often processes of a local service report; in a cluster RAY_metrics_report_interval_ms says it",
    )


class TracingSettings(Section):
    """Where spans are sent (OTLP over gRPC)."""

    endpoint: str = Field(
        "", pattern=r"^(https?://[^\s/]+/?)?$", description="collector, e.g. http://127.0.0.1:4317; unset: no spans are made"
    )
    ratio: float = Field(1.0, ge=0, le=1, description="part of the traces that is sent, where the client does not decide")
    headers: dict[str, SecretStr] = Field({}, description="what the collector wants to know, as JSON: authorization, …")


class KafkaSettings(Section):
    """The Kafka door; without `bootstrap_servers` there is none."""

    bootstrap_servers: str = Field("", description="brokers, host:port with commas; unset: no Kafka")
    requests_topic: str = Field("image-processing-requests", min_length=1, description="where requests are read")
    progress_topic: str = Field("processing-progress", min_length=1, description="where every execution's events are told")
    dead_letter_topic: str = Field(
        "image-processing-requests.dead-letter", min_length=1, description="where requests go that cannot be accepted"
    )
    group: str = Field("scangraph", min_length=1, description="consumer group of the replicas")
    account: str = Field("kafka", min_length=1, description="account that the executions belong to; an operator at least")
    replicas: int = Field(1, ge=1, description="replicas kept; more than there are partitions have nothing to read")
    concurrent: int = Field(16, gt=0, description="messages one replica works on at once")
    max_inline_bytes: int = Field(8 * 1024**2, gt=0, description="bytes a file inside a message may have")
    longest_pause_seconds: float = Field(10, gt=0, description="longest time between two tries where something is away")
    session_seconds: float = Field(15, ge=6, description="silence after which the broker gives a replica's partitions away")
    lease_seconds: float = Field(15, ge=1, description="silence after which another replica tells the events")
    poll_seconds: float = Field(0.2, gt=0, description="how often the records are looked at for news")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how the brokers are spoken to"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "SCRAM-SHA-512", description="how a name and password are shown"
    )
    sasl_username: str = Field("", description="the name; wants a SASL_… protocol")
    sasl_password: SecretStr = Field(SecretStr(""), description="its password")
    ca_file: Path | None = Field(None, description="PEM of the authorities that brokers are believed by; unset: the system's")
    certificate_file: Path | None = Field(None, description="PEM of our certificate, where brokers want one")
    key_file: Path | None = Field(None, description="PEM of its key")
    key_password: SecretStr = Field(SecretStr(""), description="password of the key")
    options: dict[str, str] = Field({}, description="more of librdkafka's settings, as JSON; those that a promise needs stay")

    @property
    def on(self) -> bool:
        """Whether there is a Kafka door."""
        return bool(self.bootstrap_servers)

    @model_validator(mode="after")
    def _fits(self) -> KafkaSettings:
        if self.security_protocol.startswith("SASL") and not (self.sasl_username and self.sasl_password.get_secret_value()):
            raise ValueError(f"{self.security_protocol} wants sasl_username and sasl_password")
        if self.sasl_username and not self.security_protocol.startswith("SASL"):
            raise ValueError(f"sasl_username wants a SASL_… protocol, not {self.security_protocol}: it would not be used")
        if (self.ca_file or self.certificate_file) and "SSL" not in self.security_protocol:
            raise ValueError(f"certificates want SSL or SASL_SSL, not {self.security_protocol}: they would not be used")
        if self.certificate_file is not None and self.key_file is None:
            raise ValueError("certificate_file wants key_file")
        if len({self.requests_topic, self.progress_topic, self.dead_letter_topic}) < 3:
            raise ValueError("the three topics must differ")
        return self


class GrpcSettings(Section):
    """The gRPC door."""

    enabled: bool = Field(True, description="listen for gRPC")
    port: int | None = Field(
        None, ge=0, le=65535, description="its port, 0 takes a free one; unset: 1000 above the other one, if that is free"
    )
    reflection: bool = Field(True, description="tell clients that ask which methods there are")
    max_message_bytes: int = Field(4 * 1024**2, ge=2**16, description="bytes a message may have; larger images come in chunks")
    max_streams: int = Field(100, gt=0, description="calls that one connection may have open")
    max_images: int = Field(16, gt=0, description="images of one stream that may arrive at once, and as many at work")
    idle_seconds: float = Field(300, gt=0, description="time in which a stream of images with nothing at work must go on")


class Settings(BaseSettings):
    """Settings of the whole service, from `SCANGRAPH_…` variables; a section's field is `SCANGRAPH_<SECTION>__<FIELD>`."""

    model_config = SettingsConfigDict(
        env_prefix="SCANGRAPH_",
        env_nested_delimiter="__",
        frozen=True,
        extra="ignore",
        nested_model_default_partial_update=True,
    )

    data: Path = Field(Path(".scangraph"), description="folder of everything a server keeps: storage/, models/, caches")
    host: str = Field("127.0.0.1", description="address the gateway listens on; TLS ends in front of it")
    port: int = Field(8000, ge=0, le=65535, description="port the gateway listens on; 0 takes a free one")
    environments: Literal["prebuilt", "ray-built", "images"] = Field(
        "prebuilt",
        description="prebuilt: .envs/<stage> made by `make setup`; ray-built: Ray makes them from the locks; images: in the "
        "image of those nodes that have Ray's resource scangraph-<stage>",
    )
    environments_dir: Path = Field(HOME / ".envs", description="where the prebuilt environments are")
    models_dir: Path = Field(HOME / "models", description="shipped models; those installed in <data>/models go before them")
    cache_dir: Path | None = Field(None, description="compiled loops and traced networks; unset: <data>/cache")
    cpus: int | None = Field(None, gt=0, description="CPUs a local Ray may use; unset: all")
    object_store_mb: int | None = Field(None, gt=75, description="size of the local object store; unset: Ray's choice")
    stop_seconds: float = Field(
        60, gt=0, description="time that a local service has to stop; what is at work then goes on at the next start"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="level of the service's log")

    database_url: str = Field(
        "", description="records: postgresql+asyncpg://user:password@host/name; unset: SQLite, <data>/scangraph.db"
    )
    storage_url: str = Field("", description="files: s3://bucket/prefix; unset: the folder <data>/storage")
    storage_options: dict[str, str] = Field({}, description="obstore's options for storage_url, as JSON: endpoint, region, …")

    imageio: ImageioSettings = ImageioSettings()
    nnunet: NnunetSettings = NnunetSettings()
    smoothing: SmoothingSettings = SmoothingSettings()
    postprocess: PostprocessSettings = PostprocessSettings()
    imaging: ImagingSettings = ImagingSettings()
    executor: ExecutorSettings = ExecutorSettings()
    gateway: GatewaySettings = GatewaySettings()
    grpc: GrpcSettings = GrpcSettings()
    files: FilesSettings = FilesSettings()
    auth: AuthSettings = AuthSettings()
    log: LogSettings = LogSettings()
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()
    kafka: KafkaSettings = KafkaSettings()

    @property
    def database(self) -> str:
        """URL of the records."""
        return self.database_url or f"sqlite:///{self.data}/scangraph.db"

    @property
    def storage(self) -> str:
        """URL of the files."""
        return self.storage_url or self.storage_root.as_uri()

    @property
    def storage_root(self) -> Path:
        """What the paths in requests and answers are relative to."""
        return self.data / "storage"

    @property
    def metrics_token_file(self) -> Path:
        """Where the bearer of whoever scrapes stands."""
        return self.metrics.token_file or self.data / "metrics-token"

    @property
    def cache(self) -> Path:
        """What can be made again, and takes long to make."""
        return self.cache_dir or self.data / "cache"

    @property
    def model_folders(self) -> tuple[Path, ...]:
        """Where models are looked for, the first find wins."""
        return (self.data / "models", self.models_dir)


def load_settings(**changes: Any) -> Settings:
    """Read the settings from the environment, with paths made absolute.

    What is secret may be in files instead, as container engines give it: in the folder `SCANGRAPH_SECRETS`, called as the
    variable is, in lower case. Variables go before files.

    Parameters
    ----------
    **changes
        Fields that go before the environment.
    """
    secrets = os.environ.get("SCANGRAPH_SECRETS")
    if secrets and not Path(secrets).is_dir():
        raise InvalidSetting(section="secrets", reason=f"SCANGRAPH_SECRETS names {secrets}, which is no folder")
    settings = Settings(_secrets_dir=secrets or None, **changes)
    paths = {name: getattr(settings, name).expanduser().resolve() for name in ("data", "environments_dir", "models_dir")}
    sections = {
        name: section.model_copy(update={field: getattr(section, field).expanduser().resolve()})
        for name, section, field in (("log", settings.log, "folder"), ("metrics", settings.metrics, "token_file"))
        if getattr(section, field) is not None
    }
    return settings.model_copy(update={**paths, **sections})


def describe_settings(settings: Settings) -> list[tuple[str, str, str]]:
    """List (variable, value, meaning) of every setting."""
    rows = []
    for name, info in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Section):
            for inner, inner_info in type(value).model_fields.items():
                rows.append((f"SCANGRAPH_{name}__{inner}".upper(), str(getattr(value, inner)), inner_info.description or ""))
        else:
            rows.append((f"SCANGRAPH_{name}".upper(), str(value), info.description or ""))
    return rows
