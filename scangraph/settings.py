"""Every setting, read once.

`load_settings()` is called by the command line (or by Serve, through `graph.build`), and the one frozen object it returns is
handed down: each deployment gets its own section and nothing reads the environment after that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

#: The checkout that holds `graph.py`, `deployments/` and the environments.
HOME = Path(__file__).resolve().parents[1]


class Section(BaseModel):
    """A part of the settings that one deployment gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StageSettings(Section):
    """What every stage has."""

    num_cpus: float = Field(1, ge=0, description="CPUs a replica reserves")
    min_replicas: int = Field(1, ge=1, description="replicas kept")
    max_replicas: int = Field(1, ge=1, description="replicas at most")
    shutdown_seconds: float = Field(600, gt=0, description="time a replica gets to finish its work before it is stopped")


class ImageioSettings(StageSettings):
    """Limits of the gate, and the stage's share."""

    num_cpus: float = Field(0, ge=0, description="CPUs a replica reserves; it waits for the disk more than it computes")
    max_voxels: int = Field(1024**3, gt=0, description="voxels an image may have")
    max_inflated_bytes: int = Field(8 * 1024**3, gt=0, description="bytes a file may inflate to")
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
    kept_results_bytes: int = Field(
        10 * 1024**3, ge=0, description="size of the kept step results; the least recently used leave"
    )
    held_inputs_bytes: int = Field(1024**3, ge=0, description="decoded inputs held in the object store for the next execution")
    retention_days: float | None = Field(None, gt=0, description="age at which ended executions are forgotten; unset: never")


class FilesSettings(Section):
    """Uploads and downloads."""

    max_upload_bytes: int = Field(8 * 1024**3, gt=0, description="bytes a file may have")
    retention_days: float | None = Field(None, gt=0, description="age at which uploads and results are deleted; unset: never")
    resumable_hours: float = Field(24, gt=0, description="time to finish a resumable upload")
    max_open_uploads: int = Field(64, gt=0, description="uploads that one account may have begun and not finished")


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
    max_requests: int = Field(256, gt=0, description="requests one replica works on at once; more are answered 503")
    max_body_bytes: int = Field(1024 * 1024, gt=0, description="bytes a JSON body may have")
    stall_seconds: float = Field(20, gt=0, description="silence in the middle of a request after which it is cut off")
    poll_seconds: float = Field(0.2, gt=0, description="how often the records are looked at for news while somebody waits")
    origins: tuple[str, ...] = Field((), description="other origins whose pages may open a WebSocket")


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
    environments: Literal["prebuilt", "ray-built"] = Field(
        "prebuilt", description="prebuilt: .envs/<stage> made by `make setup`; ray-built: Ray makes them from the locks"
    )
    environments_dir: Path = Field(HOME / ".envs", description="where the prebuilt environments are")
    models_dir: Path = Field(HOME / "models", description="shipped models; those installed in <data>/models go before them")
    cpus: int | None = Field(None, gt=0, description="CPUs a local Ray may use; unset: all")
    object_store_mb: int | None = Field(None, gt=75, description="size of the local object store; unset: Ray's choice")
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
    executor: ExecutorSettings = ExecutorSettings()
    gateway: GatewaySettings = GatewaySettings()
    files: FilesSettings = FilesSettings()
    auth: AuthSettings = AuthSettings()

    @property
    def database(self) -> str:
        """URL of the records."""
        return self.database_url or f"sqlite+aiosqlite:///{self.data}/scangraph.db"

    @property
    def storage(self) -> str:
        """URL of the files."""
        return self.storage_url or self.storage_root.as_uri()

    @property
    def storage_root(self) -> Path:
        """What the paths in requests and answers are relative to."""
        return self.data / "storage"

    @property
    def cache(self) -> Path:
        """What can be made again, and takes long to make."""
        return self.data / "cache"

    @property
    def model_folders(self) -> tuple[Path, ...]:
        """Where models are looked for, the first find wins."""
        return (self.data / "models", self.models_dir)


def load_settings(**changes: Any) -> Settings:
    """Read the settings from the environment, with paths made absolute.

    Parameters
    ----------
    **changes
        Fields that go before the environment.
    """
    settings = Settings(**changes)
    paths = {name: getattr(settings, name).expanduser().resolve() for name in ("data", "environments_dir", "models_dir")}
    return settings.model_copy(update=paths)


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
