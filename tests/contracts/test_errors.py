"""Every error: crosses processes whole, says what was wrong, and has its place in the table of statuses."""

from __future__ import annotations

import inspect
import pickle
import re
import string

import cloudpickle
import pytest

from scangraph.contracts import errors
from scangraph.contracts.errors import (
    STATUS_NAMES,
    FatalError,
    InvalidVolume,
    PathRefused,
    ScanGraphError,
    TransientError,
    UsageError,
    WrongGrid,
)


def subclasses(cls: type[ScanGraphError]) -> list[type[ScanGraphError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in subclasses(child))]


EVERY = [cls for cls in dict.fromkeys(subclasses(ScanGraphError)) if cls.__module__ == errors.__name__]
CONCRETE = [cls for cls in EVERY if not cls.__subclasses__()]
every_error = pytest.mark.parametrize("cls", EVERY)


def example(cls: type[ScanGraphError]) -> ScanGraphError:
    """An error with every field that its sentence names: numbers where it formats numbers, quotes and braces elsewhere."""
    fields = {name: 12.5 if spec else "a {b} 'c' ü" for _, name, spec, _ in string.Formatter().parse(cls.template) if name}
    return cls(**fields, more={"list": [1, 2.5, None, True]})


def test_every_class_is_found() -> None:
    defined = {cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, ScanGraphError)}
    assert set(EVERY) == defined
    assert len(CONCRETE) > 20


# --- across processes -------------------------------------------------------------------------------------------------


def assert_same(again: BaseException, error: ScanGraphError) -> None:
    assert type(again) is type(error)
    assert isinstance(again, ScanGraphError)
    assert again.fields == error.fields
    assert str(again) == str(error)
    assert again.detail == error.detail
    assert again.args == error.args


@every_error
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_survives_pickle(cls: type[ScanGraphError], protocol: int) -> None:
    for error in (example(cls), cls()):
        assert_same(pickle.loads(pickle.dumps(error, protocol)), error)


@every_error
def test_survives_cloudpickle(cls: type[ScanGraphError]) -> None:
    assert_same(pickle.loads(cloudpickle.dumps(example(cls))), example(cls))


def test_survives_pickle_as_the_cause_of_another() -> None:
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("outer") from PathRefused(path="../x", reason="it leads outside")
    kept = pickle.loads(pickle.dumps(caught.value.__cause__))
    assert str(kept).startswith("'../x' is refused: it leads outside.")


# --- what it says -----------------------------------------------------------------------------------------------------


@every_error
def test_says_its_fields(cls: type[ScanGraphError]) -> None:
    text = str(example(cls))
    assert "a {b}" in text or "{" not in cls.template
    assert text == example(cls).detail


@every_error
def test_missing_fields_show_as_their_names(cls: type[ScanGraphError]) -> None:
    names = {name for _, name, _, _ in string.Formatter().parse(cls.template) if name}
    text = str(cls())
    assert all("{" + name + "}" in text for name in names)
    assert text == re.sub(r"\{(\w+)[^}]*\}", r"{\1}", cls.template)


def test_sentences_known_answers() -> None:
    assert str(InvalidVolume(detail="no voxels")) == "no voxels"
    grid = WrongGrid(first="image_A", second="image_P", overlap_percent=12.4, first_extent="a", second_extent="b")
    assert str(grid).startswith(
        "image_P must overlap image_A, but only 12 % of it does: image_A spans a, image_P spans b (LPS mm)."
    )


# --- the table of statuses --------------------------------------------------------------------------------------------


@every_error
def test_status_is_in_the_table(cls: type[ScanGraphError]) -> None:
    assert cls.status in STATUS_NAMES
    assert cls.title
    assert not cls.title.endswith(".")


@every_error
def test_kind_and_status_fit(cls: type[ScanGraphError]) -> None:
    kinds = [kind for kind in (UsageError, TransientError, FatalError) if issubclass(cls, kind)]
    allowed = {UsageError: range(400, 500), TransientError: (429, 503, 507), FatalError: (500, 504)}
    assert len(kinds) == (0 if cls is ScanGraphError else 1)
    assert all(cls.status in allowed[kind] for kind in kinds)


def test_codes_are_unique_and_plain() -> None:
    codes = [cls.code for cls in CONCRETE]
    assert len(set(codes)) == len(codes)
    general = {cls.code for cls in EVERY} - set(codes)
    assert general == {"internal-error", "bad-request", "unavailable"}, "a concrete error without a code of its own"
    assert all(set(code) <= {*string.ascii_lowercase, "-"} for code in codes)


def test_wire_names() -> None:
    grpc = "INVALID_ARGUMENT NOT_FOUND ABORTED PERMISSION_DENIED RESOURCE_EXHAUSTED UNIMPLEMENTED INTERNAL UNAVAILABLE "
    grpc += "UNAUTHENTICATED DEADLINE_EXCEEDED FAILED_PRECONDITION OUT_OF_RANGE DATA_LOSS"
    assert {wire.grpc for wire in STATUS_NAMES.values()} <= set(grpc.split())
    closes = [wire.websocket for wire in STATUS_NAMES.values()]
    assert closes == [4000 + status for status in STATUS_NAMES]  # 4000-4999 is for applications (RFC 6455)
