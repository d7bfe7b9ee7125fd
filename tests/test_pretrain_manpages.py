"""What the third model of the comparison reads: pages of unpacked Debian packages."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import pretrain_manpages
from pretrain_manpages import olmoe_config, pages


def write_page(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


BODY = '.TH CP 1\n.\\" -*- coding: UTF-8 -*-\n\'\\" t\n.SH BEZEICHNUNG\ncp \\- Dateien kopieren\n.PP\nfür alle\n.PP\n'
CLEAN = ".TH CP 1\n.SH BEZEICHNUNG\ncp \\- Dateien kopieren\n.PP\nfür alle\n.PP\n"


def test_pages_without_comments_links_and_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    man = tmp_path / "manpages-de/usr/share/man/de"
    cp = write_page(man, "man1/cp.1.gz", BODY)
    write_page(man, "man1/copy.1.gz", ".so man1/cp.1\n")
    write_page(man, "man8/b.8.gz", BODY)
    write_page(tmp_path, "manpages-de/usr/share/man/fr/man1/cp.1.gz", BODY)
    (man / "man1/link.1.gz").symlink_to(cp)
    found = pages(tmp_path, ("manpages-de", "absent"), "de")
    assert list(found.items()) == [("manpages-de/man1/cp.1", CLEAN), ("manpages-de/man8/b.8", CLEAN)]
    monkeypatch.setattr(pretrain_manpages, "LONGEST", 20)
    assert pages(tmp_path, ("manpages-de",), "de")["manpages-de/man1/cp.1"] == CLEAN[:20]


def test_the_third_model_is_unlike_the_demo() -> None:
    config = olmoe_config(0)
    assert (config.model_type, config.norm_topk_prob, config.tie_word_embeddings) == ("olmoe", False, False)
