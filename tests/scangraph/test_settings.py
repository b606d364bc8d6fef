from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from scangraph.contracts.errors import InvalidSetting
from scangraph.settings import describe_settings, load_settings


def test_environment_and_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCANGRAPH_DATA", str(tmp_path))
    monkeypatch.setenv("SCANGRAPH_PORT", "8123")
    monkeypatch.setenv("SCANGRAPH_NNUNET__NUM_GPUS", "0.25")
    settings = load_settings()
    assert (settings.data, settings.port, settings.nnunet.num_gpus) == (tmp_path, 8123, 0.25)
    assert settings.storage_root == tmp_path / "storage"
    assert settings.nnunet.models_held == 8  # the section's other defaults stay
    assert load_settings(port=9000).port == 9000


def test_paths_are_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCANGRAPH_DATA", raising=False)
    assert load_settings().data == tmp_path / ".scangraph"


def test_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCANGRAPH_NNUNET__NUM_GPUS", "three")
    with pytest.raises(ValidationError):
        load_settings()


def test_settings_are_frozen_and_all_described() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]
    rows = describe_settings(settings)
    assert all(meaning for _, _, meaning in rows)
    assert "SCANGRAPH_SMOOTHING__MAX_REPLICAS" in {name for name, _, _ in rows}


def test_secrets_may_be_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scangraph_database_url").write_text("postgresql+asyncpg://u:secret@h/n\n")
    (tmp_path / "scangraph_storage_options").write_text('{"access_key_id": "a", "secret_access_key": "b"}')
    monkeypatch.setenv("SCANGRAPH_SECRETS", str(tmp_path))
    settings = load_settings()
    assert settings.database == "postgresql+asyncpg://u:secret@h/n"
    assert settings.storage_options == {"access_key_id": "a", "secret_access_key": "b"}
    monkeypatch.setenv("SCANGRAPH_DATABASE_URL", "sqlite:///x")
    assert load_settings().database == "sqlite:///x"
    monkeypatch.setenv("SCANGRAPH_SECRETS", str(tmp_path / "none"))
    with pytest.raises(InvalidSetting, match="is no folder"):
        load_settings()
