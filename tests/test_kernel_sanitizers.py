"""The kernels under ThreadSanitizer (no race) and AddressSanitizer with UBSan (no overrun, nothing undefined).

Every array of a problem and every buffer in shared memory is an allocation of its own, exactly as large as it must be.
`make test` runs the main instances; the others have the marker kernels.
"""

import pytest
from emulator.build import ASAN, TSAN, build
from emulator.stages import RUNS, STAGES

pytestmark = pytest.mark.cpu


def check(stage, variant, run):
    run(stage, variant, build(variant, sources=stage.sources()))  # raises what a sanitizer or the emulator says


@pytest.mark.parametrize("variant", (TSAN, ASAN), ids=lambda x: x.name)
@pytest.mark.parametrize("run", RUNS.values(), ids=lambda x: x.__name__)
def test_main_instances_are_clean(run, variant):
    check(STAGES[0], variant, run)


@pytest.mark.kernels
@pytest.mark.parametrize("variant", (TSAN, ASAN), ids=lambda x: x.name)
@pytest.mark.parametrize("stage", STAGES[1:], ids=str)
@pytest.mark.parametrize("run", RUNS.values(), ids=lambda x: x.__name__)
def test_every_instance_is_clean(run, stage, variant):
    check(stage, variant, run)
