import os
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zonebundle.errors import UsageError
from zonebundle.model.ids import (
    check_bundle_id,
    check_zone_name,
    decode_zone_name,
    encode_zone_name,
    new_bundle_id,
    new_installation_id,
    parse_snapshot_name,
    snapshot_name,
)


@given(st.from_regex(r"[A-Za-z0-9._@:-]{1,200}", fullmatch=True))
def test_a_zone_is_one_directory_and_comes_back(name: str) -> None:
    directory = encode_zone_name(name)
    assert decode_zone_name(directory) == name
    assert os.path.basename(directory) == directory
    assert directory.isascii()
    assert not directory.startswith(".")
    # What a file system takes as a name.
    assert len(directory) <= 255


@given(st.text(min_size=1))
def test_any_other_name_is_one_directory_too(name: str) -> None:
    try:
        directory = encode_zone_name(name)
    except UnicodeEncodeError:
        return
    assert decode_zone_name(directory) == name
    assert "/" not in directory
    assert "\0" not in directory
    assert directory not in ("", ".", "..")


@pytest.mark.parametrize("name", ["web", "a" * 200, "oxz_propolis-server_1", "runc:web", "web@1.2", "-web", "..."])
def test_zone_names(name: str) -> None:
    assert check_zone_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "a" * 201, ".", "..", "bundles", "bundle-cleanup", "a/b", "a\n", "\n", "a b", "é", "a\0", "%2e"]
)
def test_what_cannot_be_a_zones_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="use 1 to 200"):
        check_zone_name(name)


def test_bundle_ids_are_canonical() -> None:
    bundle_id = new_bundle_id()
    assert check_bundle_id(bundle_id) == bundle_id
    assert check_bundle_id(bundle_id.upper()) == bundle_id
    assert uuid.UUID(bundle_id).version == 4


@pytest.mark.parametrize("text", ["", "x", "..", "../../etc", "0" * 31, "0" * 33, "g" * 32])
def test_what_is_no_bundle_id_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="UUID"):
        check_bundle_id(text)


def test_a_snapshots_name_says_whose_it_is() -> None:
    installation, bundle_id = new_installation_id(), new_bundle_id()
    assert parse_snapshot_name(snapshot_name(installation, bundle_id)) == (installation, bundle_id)


@given(st.text())
def test_names_of_others_are_not_ours(name: str) -> None:
    assert parse_snapshot_name(name) is None


@pytest.mark.parametrize("change", ["{}x", "x{}", "{}\n", " {}", "{}/x"])
def test_names_that_only_look_like_ours_are_not(change: str) -> None:
    name = snapshot_name(new_installation_id(), new_bundle_id())
    assert parse_snapshot_name(change.format(name)) is None
