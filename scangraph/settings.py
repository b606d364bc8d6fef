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


class PostprocessSettings(StageSettings):
    """The mask stage."""

    num_cpus: float = Field(0, ge=0, description="CPUs a replica reserves")


class ExecutorSettings(Section):
    """The control plane."""

    attempts: int = Field(3, ge=1, description="times a step is tried when its process dies")
    step_timeout_seconds: float = Field(3600, gt=0, description="longest time one step may take")


class GatewaySettings(Section):
    """The HTTP door."""

    min_replicas: int = Field(1, ge=1, description="replicas kept")
    max_replicas: int = Field(1, ge=1, description="replicas at most")
    max_requests: int = Field(100, gt=0, description="requests one replica works on at once")
    max_body_bytes: int = Field(1024 * 1024, gt=0, description="bytes a JSON body may have")


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
    host: str = Field("127.0.0.1", description="address the gateway listens on; there are no accounts yet: keep it local")
    port: int = Field(8000, ge=0, le=65535, description="port the gateway listens on; 0 takes a free one")
    environments: Literal["prebuilt", "ray-built"] = Field(
        "prebuilt", description="prebuilt: .envs/<stage> made by `make setup`; ray-built: Ray makes them from the locks"
    )
    environments_dir: Path = Field(HOME / ".envs", description="where the prebuilt environments are")
    models_dir: Path = Field(HOME / "models", description="shipped models; those installed in <data>/models go before them")
    cpus: int | None = Field(None, gt=0, description="CPUs a local Ray may use; unset: all")
    object_store_mb: int | None = Field(None, gt=75, description="size of the local object store; unset: Ray's choice")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="level of the service's log")

    imageio: ImageioSettings = ImageioSettings()
    nnunet: NnunetSettings = NnunetSettings()
    smoothing: SmoothingSettings = SmoothingSettings()
    postprocess: PostprocessSettings = PostprocessSettings()
    executor: ExecutorSettings = ExecutorSettings()
    gateway: GatewaySettings = GatewaySettings()

    @property
    def storage_root(self) -> Path:
        """What the paths in requests and answers are relative to."""
        return self.data / "storage"

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
