"""The version check, and what may be rebound."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from agoq_megatron import compat


@pytest.mark.parametrize("installed", ["0.19.0", "0.19.2", "0.19.0rc1"])
def test_supported_versions(monkeypatch, installed):
    monkeypatch.setattr(compat, "version", lambda _: installed)
    compat.check_megatron()


@pytest.mark.parametrize("installed", ["0.18.3", "0.20.0", "1.0"])
def test_other_versions_name_the_remedy(monkeypatch, installed):
    monkeypatch.setattr(compat, "version", lambda _: installed)
    with pytest.raises(compat.CompatibilityError, match=rf"{installed}.*pip install"):
        compat.check_megatron()


def test_no_megatron_names_the_remedy(monkeypatch):
    def missing(_):
        raise PackageNotFoundError

    monkeypatch.setattr(compat, "version", missing)
    with pytest.raises(compat.CompatibilityError, match="not installed.*pip install"):
        compat.check_megatron()
