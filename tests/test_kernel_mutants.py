"""Every barrier and every wait of the kernels is needed, and the tests would notice if one were missing.

Each is left out, one at a time, and small cases run under ThreadSanitizer. Noticed is: a race, a broken rule of the
emulator (deadlock, copies that nobody waits for), or results with other bits (poison that was read is NaN).
"""

import re

import pytest
import torch
from emulator.build import TSAN, build, depends_on
from emulator.mutants import find_sites, unparsed_calls, without
from emulator.ops import EmulatorError
from emulator.stages import RUNS, STAGES

pytestmark = pytest.mark.cpu
SITES = find_sites()


@pytest.fixture(scope="module")
def baseline():
    """Return f(stage, run): the results of the kernels as they are, which nothing may complain about."""
    known = {}

    def results(stage, run):
        if (stage, run) not in known:
            known[stage, run] = run(stage, TSAN, build(TSAN, sources=stage.sources()))
        return known[stage, run]

    return results


def complaint(stage, site, baseline):
    """Return what a run says about the kernels without the call at the site, or None."""
    sources = stage.sources()
    build(TSAN, sources=sources)
    changed = [x.stem for x in sources if depends_on(TSAN, x, site.header)]
    runs = [run for pattern, run in RUNS.items() if any(re.match(pattern, x) for x in changed)]
    assert runs, f"no run covers {site.header}"
    program = build(TSAN, sources=sources, instead=without(site))
    for run in runs:
        expected = baseline(stage, run)
        try:
            actual = run(stage, TSAN, program)
        except EmulatorError as error:
            return str(error)
        for x, y in zip(actual, expected):
            if not torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)):
                return "other bits"
    return None


def test_no_call_escapes_the_parser():
    assert len(SITES) > 20
    assert not (lines := unparsed_calls()), "write one call and its semicolon to a line:\n" + "\n".join(lines)


@pytest.mark.kernels
@pytest.mark.parametrize("site", SITES, ids=str)
def test_a_missing_barrier_or_wait_is_noticed(site, baseline):
    assert any(complaint(stage, site, baseline) for stage in STAGES), (
        f"csrc/{site.header}:{site.line}: nothing notices when {site.call}() is missing: "
        "is it needed? If so, add a case that shows it."
    )
