"""The files of results: what runs left in their folders, as results/<name>.json keeps it."""

import json
import shutil
from pathlib import Path

from common import written_whole

HERE = Path(__file__).resolve().parent


def collect(folders):
    """The results of all victim folders and of the defences inside them, audits left out.

    A folder can also be that of one defence inside a victim's folder.
    """
    for folder in sorted(map(Path, folders)):
        if (folder / "audit.json").exists():
            continue
        for path in sorted([*folder.glob("result.json"), *folder.glob("*/result.json")]):
            result = json.loads(path.read_text())
            inside = path.parent == folder and (folder.parent / "result.json").exists()
            victim = folder.resolve().parent.name if inside else folder.name
            yield {"folder": path.parent.as_posix(), "victim": victim, **result}


def store(path, found):
    """Put results into a file of results; those of the same victims and folders are replaced."""
    stored = json.loads(path.read_text()) if path.exists() else []
    runs = {(run["victim"], Path(run["folder"]).name): run for run in [*stored, *found]}.values()
    order = sorted(runs, key=lambda run: (run["victim"], Path(run["folder"]) / "result.json"))
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(order, indent=0) + "\n")


def keep_pictures(pictures):
    """Copy the pictures that runs have drawn, where papers.toml names the run."""
    for picture in pictures:
        if "run" in picture and Path(picture["run"]).exists():
            with written_whole(HERE / picture["file"]) as temporary:
                shutil.copy(picture["run"], temporary)


def pictures_at(place, pictures):
    """The Markdown of the pictures of papers.toml that stand below one table and exist."""
    found = [p for p in pictures if p["at"] == place and (HERE / p["file"]).exists()]
    return [f"![{p['alt']}]({p['file']})\n\n{p['text']}" for p in found]
