"""The front door: `sora-lite VERB`. One thin module per verb, imported only when it is called."""

import difflib
import importlib
import os
import sys
from collections.abc import Callable

from sora_lite import __version__
from sora_lite.errors import Interrupted, UserError

VERBS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "the whole way on moving handwritten digits: data, VAE, DiT, clips, figures"),
    "train-vae": ("train", "train the causal spatiotemporal VAE on shards"),
    "train": ("train", "train the video DiT on shards"),
    "data-preview": ("data_preview", "what training would see: contact sheets and a page, or lines of JSON"),
    "export": ("export", "write a run's newest checkpoint as safetensors for inference"),
    "import": ("import_weights", "weights that others published (DiT, Latte, Wan) as an export of this project"),
    "generate": ("generate", "make clips from an exported model"),
    "evaluate": ("evaluate", "measure a model of a labelled data set with classifiers trained on real clips"),
    "inspect": ("inspect", "parameters and FLOPs of a model, without building it"),
    "checkpoint": ("checkpoint", "list or verify the checkpoints of a run"),
    "scaling": ("scaling", "the power law of a sweep's validation loss, and what it predicts"),
    "submit": ("submit", "submit a training job to Slurm"),
}
"""Verb: (module of `sora_lite.cli`, one line of help). A module has `main(config)`, or `main(verb, argv)` for a verb
of WITH_WORDS."""

WITH_WORDS = ("checkpoint", "submit")
"""Verbs whose arguments are not settings alone."""


def run_verb(action: Callable[[], object]) -> int:
    """Call `action`; a `UserError` becomes one line on stderr and exit status 2, Ctrl-C becomes 130.

    A stop that was asked for by a signal, after which the same command goes on, becomes 75.
    """
    try:
        action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        print(f"error: {error.filename}: {error.strerror}; name another path, or clear this one", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"{stop}; the same command goes on from there", file=sys.stderr)
        return os.EX_TEMPFAIL
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is done", file=sys.stderr)
        return 130
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of `sora-lite`. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(f"sora_lite {__version__}: train video Diffusion Transformers\n\nusage: sora-lite VERB [--help] ...\n")
        for verb, (_, line) in VERBS.items():
            print(f"  {verb:<11}{line}")
        print("\nData sets are made by `sora-data`. `sora-lite VERB --help` shows every setting of a verb.")
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0

    def call() -> None:
        verb = argv[0]
        if verb not in VERBS:
            near = difflib.get_close_matches(verb, VERBS, n=1)
            cure = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
            raise UserError(f"{verb}: no such verb; {cure}")
        from sora_lite.cli.compose import configure

        # Before the verb's module, whose torch takes seconds to import: help and typing errors need none of it.
        arguments = [verb, argv[1:]] if verb in WITH_WORDS else [configure(verb, argv[1:])]
        importlib.import_module(f"sora_lite.cli.{VERBS[verb][0]}").main(*arguments)

    return run_verb(call)
