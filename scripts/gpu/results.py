"""The results of measure.py's parts, kept in two files: results.json, with all that bars and questions need of each part, and
results.md, to be read."""

import argparse
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from bars import bars
from parts import Part

# Characters of a part's output and log that are kept.
KEPT = 4000
# A warning or an error of our log, or a library that could not be opened.
WARNING = re.compile(r"^.*\b(?:WARN|ERROR)\b.*$|^cuda shim: .*$", re.MULTILINE)


class Results:
    """What came of each part, in this call and in earlier ones on the same card and of the same commit."""

    def __init__(self, args: argparse.Namespace, every: list[Part]) -> None:
        self.output, self.order = args.output, [part.name for part in every]
        variables = {name: value for name, value in os.environ.items() if name.startswith("LENGTHWISE_")}
        commit_ = os.environ.get("COMMIT") or commit()
        self.about = {"commit": commit_, "gpu": args.gpu, "dry": args.dry, "slots": args.slots, "variables": variables}
        earlier = self.earlier()
        # A call that begins anew, or another card's, keeps the results that were there under another name.
        self.goes_on = bool((args.only or args.second) and earlier.get("about") == self.about)
        self.parts = earlier["parts"] if self.goes_on else {}
        if earlier and not self.goes_on:
            shutil.copy(self.output / "results.json", self.output / "results.earlier.json")

    def earlier(self) -> dict:
        try:
            found = json.loads((self.output / "results.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def has(self, part: Part) -> bool:
        """Whether what a part makes is there; of one that makes nothing, whether it went well."""
        row = self.parts.get(part.name, {"failed": "not run"})
        return all(path.exists() for path in part.makes) if part.makes else "failed" not in row and "skipped" not in row

    def is_left(self, part: Part) -> bool:
        """Whether it is for a second call: of that, or the first had no time for it."""
        row = self.parts.get(part.name)
        if row is None:
            return part.second or bool(self.parts)
        # What it was without may be there in this call.
        return bool(row.get("cut_short")) or "skipped" in row

    def add(self, part: Part, row: dict) -> None:
        self.parts[part.name] = row
        self.parts = {name: self.parts[name] for name in self.order if name in self.parts}
        self.write()

    @staticmethod
    def texts(printed: str, said: str) -> dict:
        """The ends of what a part printed and logged, and its first warning."""
        warning = WARNING.search(said)
        return {"warning": warning.group(0).strip() if warning else "", "out": printed[-KEPT:], "err": said[-KEPT:]}

    def write(self) -> None:
        """Both files, as far as the run has come; also in the folder that OUT names."""
        reached = bars(self.parts)
        results = {"about": self.about, "bars": reached, "parts": self.parts}
        for name, text in (("results.json", json.dumps(results, indent=1)), ("results.md", self.tables(reached))):
            staged = self.output / f"{name}.new"
            staged.write_text(text + "\n")
            staged.replace(self.output / name)
        folder = Path(os.environ.get("OUT") or self.output)
        if folder.is_dir() and folder.resolve() != self.output:
            for name in ("results.json", "results.md"):
                shutil.copy(self.output / name, folder / name)

    def tables(self, reached: list[dict]) -> str:
        """The bars first."""
        about = self.about
        variables = [f"{name}={value}" for name, value in about["variables"].items()]
        where = [about["gpu"] or "no GPU", *(["on the CPU (dry)"] if about["dry"] else []), *variables]
        lines = [f"# GPU run, commit {about['commit'] or 'unknown'}, {', '.join(where)}", ""]
        lines += ["| bar | asked | reached | |", "|---|---|---|---|"]
        lines += [line(bar["bar"], bar["asked"], bar["reached"], bar["verdict"]) for bar in reached]
        lines += ["", "| part | seconds | | first warning |", "|---|---|---|---|"]
        for name, row in self.parts.items():
            outcome = row.get("failed") or row.get("skipped") or ""
            lines.append(line(name, row.get("seconds", ""), outcome[:300], row.get("warning", "")[:200]))
        return "\n".join(lines)


def line(*cells: object) -> str:
    """A row of a table; a bar within a cell would end it."""
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]


def parsed(text: str) -> object:
    """One JSON value, or a list of the lines that are; none of a text."""
    rows = []
    for piece in (text, *text.splitlines()):
        try:
            value = json.loads(piece)
        except ValueError:
            continue
        if piece is text:
            return value
        rows.append(value)
    return rows or None


def commit() -> str:
    """Of the working tree; empty where it is a copy, or there is no git."""
    try:
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except OSError:
        return ""
    return asked.stdout.strip()
