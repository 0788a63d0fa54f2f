"""Every barrier and every wait of the kernels, found in their sources, and the kernels without one of them."""

import re
from pathlib import Path
from typing import NamedTuple

from emulator.build import OUT, ROOT

CALL = re.compile(r"\b(block_barrier|warp_barrier|wait_copies<[^<>]*>)\(\);")
HEADERS = "csrc/cuda/*.cuh"


class Site(NamedTuple):
    header: str  # below csrc
    line: int  # from 1
    call: str

    def __str__(self):
        return f"{Path(self.header).stem}-{self.line}-{self.call.split('<')[0]}"


def code_of(line: str) -> str:
    return line.split("//")[0]


def find_sites() -> list[Site]:
    sites = []
    for file in sorted(ROOT.glob(HEADERS)):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            calls = CALL.findall(code_of(line))
            assert len(calls) <= 1, f"{file}:{number}: one barrier or wait to a line, so that each can be left out"
            sites += [Site(str(file.relative_to(ROOT / "csrc")), number, call) for call in calls]
    return sites


def unparsed_calls() -> list[str]:
    """Return the lines that name a barrier or a wait in a way that find_sites does not see."""
    found = {(site.header, site.line) for site in find_sites()}
    names = re.compile(r"\b(block_barrier|warp_barrier|wait_copies)\b")
    lines = []
    for file in sorted(ROOT.glob(HEADERS)):
        header = str(file.relative_to(ROOT / "csrc"))
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if names.search(code_of(line)) and (header, number) not in found:
                lines.append(f"{header}:{number}: {line.strip()}")
    return lines


def without(site: Site) -> tuple[Path, str]:
    """Write a copy of the header without the call and return (include directory, header)."""
    folder = OUT / "mutants" / str(site)
    target = folder / site.header
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = (ROOT / "csrc" / site.header).read_text().splitlines(keepends=True)
    lines[site.line - 1] = CALL.sub(";", lines[site.line - 1], count=1)
    target.write_text("".join(lines))
    return folder, site.header


def one_instance(source: Path, arguments: str) -> Path:
    """Write a copy of an instance file with those instances alone whose template arguments are these."""
    kept = []
    for line in source.read_text().splitlines():
        if not line.startswith("template ") or f"<{arguments}>" in line:
            kept.append(line)
    assert any(line.startswith("template ") for line in kept), f"{source} has no instance <{arguments}>"
    target = OUT / "mutants" / "instances" / f"{source.stem}-{re.sub(r'[^A-Za-z0-9]+', '-', arguments)}.cu"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(kept) + "\n"
    if not target.exists() or target.read_text() != text:  # keeps its date otherwise
        target.write_text(text)
    return target
