#!/usr/bin/env python
"""Generates videos with Wan2.1 or Wan2.2; with --use_magcache only a part of the transformer calls is computed.

Accepts every flag of Wan2.1's generate.py. Runs with the `wan` package beside it: of this repository, Wan2.1 or Wan2.2.
"""

import os
import sys
from argparse import Namespace

try:
    from magcache.app.backend import check_before_import, check_wan, start_processes
    from magcache.app.checks import make_job  # nothing here imports torch until something runs
    from magcache.app.console import Stopped, speak_safely, stop_cleanly
    from magcache.app.errors import Failed, Refused
    from magcache.app.flags import is_first, make_parser
    from magcache.app.inputs import make_expander, read_inputs, video_shape
    from magcache.app.processes import gathered, leaving_at_once
    from magcache.app.requests import check_targets, choose_requests, make_requests
    from magcache.app.show_plan import show_plan
    from magcache.app.tell import announce, tell_failures
except ImportError as fault:
    remedies = "activate its environment, or install its requirements.txt"
    if (fault.name or "").startswith("magcache"):
        remedies = "`pip install .` in its repository, or copy its folder magcache/ beside magcache_generate.py"
    print(f"magcache_generate.py: error: package magcache cannot be imported ({fault}): {remedies}", file=sys.stderr)
    sys.exit(2)


def run(args: Namespace) -> bool:
    """Does what the flags ask for. Returns whether all of it worked."""
    job = make_job(args)
    check_before_import(job.sampling, job.machine)
    inputs = read_inputs(job)
    config = check_wan(job.sampling, job.inputs, job.machine)
    group = start_processes(job)
    requests, *_ = gathered(make_requests(job), group.everyone)
    requests, *_ = gathered(choose_requests(job, requests), group.everyone)
    if not requests:
        print("all of them are finished; --overwrite makes them again")
        return True
    expander = make_expander(job, inputs) if args.use_prompt_extend and group.speaks else None
    check_targets(job, requests)
    announce(job, video_shape(job.sampling, inputs), requests, group.count)

    from magcache.app.generate import make_all

    failures = make_all(job, config, group, inputs, expander, requests)
    if group.speaks:
        tell_failures(failures, len(requests))
    return not failures


def main() -> None:
    parser = make_parser(__file__, __doc__)
    args = parser.parse_args()
    if not is_first("RANK"):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the first process speaks for all)
    try:
        if args.magcache_plan:
            show_plan(args)
        elif not run(args):
            sys.exit(1)
    except Refused as refusal:
        parser.error(str(refusal))
    except Failed as failure:
        sys.exit(f"{parser.prog}: error: {failure}")


if __name__ == "__main__":
    stop_cleanly()
    speak_safely()
    with leaving_at_once():
        try:
            main()
        except Stopped as stop:
            if is_first("RANK"):
                print(f"{os.path.basename(__file__)}: {stop}", file=sys.stderr)
            sys.exit(128 + stop.number)
