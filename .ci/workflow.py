"""Run the workflow, or resume one that was interrupted.

A run that was killed leaves its lock behind and perhaps notebooks that still compute. Those are waited for and the
lock is removed; the lock of a run that is alive is respected.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil


def working_here(program: str) -> list[int]:
    "Ids of the other processes in this folder whose command line starts `program` (directly or through Python)."
    here, found = os.getcwd(), []
    for process in psutil.process_iter(["pid", "cmdline", "cwd"]):
        words = [Path(word).name for word in (process.info["cmdline"] or [])[:3]]
        if program in words and process.info["cwd"] == here and process.info["pid"] != os.getpid():
            found.append(process.info["pid"])
    return found


def release_stale_lock(snakemake: list[str]) -> None:
    "Remove the lock of a run that was killed, once the notebooks it left behind have ended."
    if working_here("snakemake") or not any(Path(".snakemake/locks").glob("*")):
        return
    told = False
    while left := working_here("papermill"):
        if not told:
            print(f"waiting for notebooks of an interrupted run to end (processes {left})", flush=True)
        told = True
        time.sleep(1)
    print("removing the lock of an interrupted run", flush=True)
    subprocess.run([*snakemake, "--unlock", "--quiet"], check=True)


def main() -> None:
    "Hand over to snakemake; arguments that are not known here are passed on to it."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick", help="quick, full, paper or smoke")
    parser.add_argument("--cores", default="2", help="notebooks that run side by side")
    parser.add_argument("--target", nargs="*", default=[], help="rules or files; default: everything")
    known, rest = parser.parse_known_args()
    snakemake = [sys.executable, "-m", "snakemake", *known.target, "--snakefile", "Snakefile", "--cores", known.cores]
    snakemake += ["--config", f"profile={known.profile}"]
    release_stale_lock(snakemake)
    os.execv(sys.executable, [*snakemake, "--rerun-incomplete", *rest])


if __name__ == "__main__":
    main()
