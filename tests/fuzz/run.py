"""make fuzz: every target for its share of the time; the first that fails ends it all, and its input is kept.

    python tests/fuzz/run.py [--minutes 10] [--jobs 2] [--seed N] [TARGET...]

New inputs that reach new code stay in build/fuzz/corpus, where the next run goes on; failures in build/fuzz/failures.
"""

import argparse
import os
import random
import re
import subprocess
import sys
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz import programs  # noqa: E402

INPUTS_PER_MINUTE = 100_000  # all targets together
MAX_LENGTH = {"encoder": 512, "vocabulary": 256}
FAILURES = programs.OUT / "failures"


class Campaign:
    def __init__(self, commands: dict[str, list[str]], seconds: float, seed: int):
        self.commands, self.seconds, self.seed = commands, seconds, seed
        self.processes, self.is_over = [], False

    def run(self, target: str) -> int:
        """Fuzz one target and return how many inputs it got; RuntimeError with its last words if it failed."""
        if self.is_over:
            return 0
        found = programs.OUT / "corpus" / target
        found.mkdir(parents=True, exist_ok=True)
        FAILURES.mkdir(exist_ok=True)
        options = [f"-max_total_time={self.seconds:.0f}", f"-max_len={MAX_LENGTH.get(target, 1024)}"]
        options += [f"-seed={self.seed}", f"-artifact_prefix={FAILURES / target}-"]
        process = subprocess.Popen(
            [*self.commands[target], *options, str(found), str(programs.FOLDER / "corpus" / target)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        self.processes.append(process)
        log = process.communicate()[0]
        if self.is_over:
            return 0
        done = re.search(r"Done (\d+) runs in (\d+) second", log)
        if process.returncode or not done:
            raise RuntimeError(f"{target} failed:\n{log[-6000:]}")
        print(f"{target:16}{int(done[1]):>12,} inputs in {done[2]} s", flush=True)
        return int(done[1])

    def stop(self) -> None:
        self.is_over = True
        for process in self.processes:
            process.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time")
    parser.add_argument("--seed", type=int, default=random.randrange(1, 2**31))
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all, unless named")
    options = parser.parse_args()
    known = [*programs.TARGETS, *programs.PYTHON_TARGETS]
    if unknown := set(options.targets) - set(known):
        parser.error(f"TARGET must be one of {' '.join(known)}, got {' '.join(sorted(unknown))}")
    targets = options.targets or known

    if "CXX" not in os.environ and programs.makes_libfuzzer("clang++"):
        os.environ["CXX"] = "clang++"
    compiled = [x for x in targets if x in programs.TARGETS]
    commands = programs.build(compiled, options.jobs) if compiled else {}
    commands |= {x: programs.python_command(x) for x in targets if x in programs.PYTHON_TARGETS}
    seconds = options.minutes * 60 * options.jobs / len(targets)
    print(f"{programs.compiler()}, {len(targets)} targets, {seconds:.0f} s each, seed {options.seed}", flush=True)
    campaign = Campaign(commands, seconds, options.seed)
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [pool.submit(campaign.run, target) for target in targets]
        wait(runs, return_when=FIRST_EXCEPTION)
        campaign.stop()
    failures = [run.exception() for run in runs if run.exception()]
    if failures:
        print(failures[0], file=sys.stderr)
        print(f"run it again with the input, which is in {FAILURES}; keep it in tests/fuzz/corpus", file=sys.stderr)
        return 1
    total = sum(run.result() for run in runs)
    least = int(INPUTS_PER_MINUTE * options.minutes) if not options.targets else 0
    print(f"{total:,} inputs, none failed" + (f"; fewer than {least:,}: too few" if total < least else ""))
    return int(total < least)


if __name__ == "__main__":
    sys.exit(main())
