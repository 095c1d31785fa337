"""Prints all cases as the table in README.md, from the folder tests: python -m faults.table > faults/README.md"""

from faults import cases_files, cases_flags, cases_runs

HEAD = """# Faults

What is wrong, the exit code, and what the line on standard error must match (a regular expression). Those of the first
two tables end before anything is loaded, and write nothing; they run in one process (`test_cases.py`). Those of the
last one happen while the model runs, in processes of their own (`test_runs.py`); what else has to be there or not
afterwards, such as the other videos or the pixels of one that could not be saved, is in `cases_runs.py`. Several
processes at once, a full disk, a reader that leaves, 200 videos in a row: `test_several.py`."""
KINDS = {"Files and values": cases_files, "Flags and prompts": cases_flags, "While it runs": cases_runs}


def table() -> str:
    parts = [HEAD]
    for kind, cases in KINDS.items():
        rows = "\n".join(f"| {case.name} | {case.code} | {escaped(case.line)} |" for case in cases.CASES)
        parts.append(f"## {kind}: {len(cases.CASES)}\n\n| fault | exit code | line |\n|---|---|---|\n{rows}")
    return "\n\n".join(parts)


def escaped(line: str) -> str:
    return "``" + line.replace("|", "\\|") + "``" if line else ""


if __name__ == "__main__":
    print(table())
