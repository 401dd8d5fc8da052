"""Runs `vlmcap train` and `vlmcap evaluate`: fast help, errors in one sentence, and no empty run folders."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmcap.compose import register_schemas
from vlmcap.config.kinds import SCHEMAS
from vlmcap.config_errors import explain, innermost
from vlmcap.config_files import config_file, use_config_dir
from vlmcap.config_saved import loosened
from vlmcap.errors import StoppedBySignal, TrialPruned, UserError, first_line, storage_problem
from vlmcap.libraries import set_cuda_variables
from vlmcap.locks import living_owner
from vlmcap.overrides import foreign_key, read_overrides
from vlmcap.plugins import load_plugins, plugin_kinds, take_plugins
from vlmcap.terminal import leave_closed_pipe

HYDRA_FOLDER = ".hydra"  # Hydra's subfolder of the run folder, as conf/train.yaml sets it

_made: list[Path] = []  # folders that `UniqueRunFolder` created, innermost first


class UniqueRunFolder(Callback):
    """Gives each run and each sweep its own folder before Hydra writes to it; `hydra.callbacks` names this class.

    A folder that is named by the time gets a number if another run has created it in the same second. A folder that the
    user named is refused if a running process writes to it.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Claims the folder of a run."""
        if _is_named_by_clock(config, "run"):
            config.hydra.run.dir = str(_new_folder(Path(config.hydra.run.dir)))
        elif not _is_first_process(config):  # only the first process writes Hydra's files
            config.hydra.output_subdir = None
        elif config.hydra.output_subdir is not None and (owner := living_owner(Path(config.hydra.run.dir))):
            # Hydra turns exceptions of its callbacks into warnings.
            hint = "wait until it ends, stop it, or choose another folder"
            print(f"Error: hydra.run.dir={config.hydra.run.dir} is in use by {owner}; {hint}", file=sys.stderr)
            raise SystemExit(2)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Claims the folder of a sweep, and passes it to the jobs by an override."""
        if _is_named_by_clock(config, "sweep") and not config.sweep.folder:
            folder = str(_new_folder(Path(config.hydra.sweep.dir)))
            config.hydra.sweep.dir = folder
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{folder}'")


def _is_named_by_clock(config: DictConfig, kind: str) -> bool:
    settings = OmegaConf.to_container(config.hydra[kind], resolve=False)
    return isinstance(settings, dict) and "${now:" in str(settings["dir"])


def _is_first_process(config: DictConfig) -> bool:
    """Returns whether this process is the first or only one of its run."""
    # Ranks as torchrun, Slurm and Lightning set them; the first process may have none.
    names = ("LOCAL_RANK", "RANK", "SLURM_PROCID")
    is_alone = config.hardware.devices * config.trainer.num_nodes == 1
    return is_alone or all(os.environ.get(name, "0") in ("", "0") for name in names)


def _new_folder(wanted: Path) -> Path:
    """Creates and returns a new folder: `wanted`, or the first free name with -2, -3 and so on appended."""
    folder, number = wanted, 1
    while True:
        # What this call creates, innermost first, to be removed if the run leaves it empty.
        missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        except FileNotFoundError:  # another process removed an empty parent
            continue
        else:
            _made.extend(missing)
            return folder


def run_program(
    main: Callable[[], object], name: str, arguments: Sequence[str] | None = None, command: str = ""
) -> None:
    """Runs a Hydra program, and reports errors of Hydra like those of this package.

    Args:
        main: Function that is decorated by Hydra.
        name: Name of its YAML file under `conf/`.
        arguments: Arguments as typed; None takes those of this process.
        command: Command before the arguments; empty takes the script of this process.
    """
    # 1. Variables that libraries read when they are imported.
    set_cuda_variables()
    given = [*sys.argv[1:]] if arguments is None else [*arguments]
    command = command or f"python {shlex.quote(sys.argv[0])}"
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises errors instead of printing them and exiting with 1
    try:
        with report_user_errors():
            given = take_plugins(given)
            if {"-h", "--help"} & set(given):
                text = help_text(name)
                print(text.replace(f"python {name}.py", command) if command.startswith("vlmcap") else text)
                return
            register_schemas()
            sys.argv[1:] = hydra_arguments(given, command, of_checkpoint=name == "evaluate")
            main()
    finally:
        for folder in _made:  # removes the empty ones
            with suppress(OSError):
                folder.rmdir()
        _made.clear()


def hydra_arguments(given: Sequence[str], command: str, *, of_checkpoint: bool = False) -> list[str]:
    """Returns the arguments with overrides in Hydra's grammar, and applies `--config-dir`.

    Args:
        given: Arguments as typed.
        command: Command before the arguments.
        of_checkpoint: Whether a checkpoint brings the configuration, and with it the keys of its own kinds.

    Raises:
        UserError: A flag is unknown, an override is wrong, or the folder of `--config-dir` does not exist.
    """
    from hydra._internal.utils import get_args_parser

    known, unknown = get_args_parser().parse_known_intermixed_args(given)
    if unknown:
        flag, _, value = unknown[0].partition("=")
        # A flag's value may be the next argument: `--batch_size 4`.
        following = given[given.index(unknown[0]) + 1 :][:1]
        value = value or next((word for word in following if "=" not in word and not word.startswith("-")), "…")
        override = f"{flag.lstrip('-').replace('-', '_')}={value}"
        instead = foreign_key(override) or f"overrides have no dashes, as in {shlex.quote(override)}"
        raise UserError(f"{flag} is not a flag of {command}; {instead}")
    use_config_dir(known.config_dir)
    flags = [*given]
    # The flags that Hydra reads itself.
    for override in known.overrides:
        flags.remove(override)
    is_sweep = known.multirun and known.cfg is None
    again = "" if known.cfg else shlex.join([*shlex.split(command), "-m", *given])
    overrides = read_overrides(known.overrides, is_sweep=is_sweep, command=again)
    return [*flags, *(loosened(overrides) if of_checkpoint else overrides)]


def help_text(name: str) -> str:
    """Returns the help text of `conf/<name>.yaml`.

    Hydra would print the same text, but collects all choices of all groups first and copies its configuration for each,
    which takes four times as long.
    """
    text = str(OmegaConf.load(config_file(name)).hydra.help.template)
    load_plugins()
    choices = [f"{group}={kind}" for group in SCHEMAS for kind in plugin_kinds(group)]
    return f"{text}\nFrom plugins: {', '.join(choices)}" if choices else text


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Turns a `UserError` into one line on stderr and exit code 2, and Ctrl-C into one line and exit code 130.

    It is also used inside functions that Hydra calls, because Hydra would print all overrides before an exception.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException

    try:
        yield
        # A closed pipe is noticed here, where it is handled, and not at the exit of the interpreter.
        sys.stdout.flush()
        _remove_unused_folder()  # the run may have used another paths.output_dir
    except (UserError, HydraException, OmegaConfBaseException) as error:
        cause = error if isinstance(error, UserError) else innermost(error)
        # Hydra wraps errors of OmegaConf, and a `UserError` may be the cause.
        sentence = str(cause) if isinstance(cause, UserError) else explain(cause)
        if is_sweep():
            _fail_job(error, sentence)
        _remove_unused_folder()
        print(f"Error: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None
    except StoppedBySignal as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(stop.exit_code) from None
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        leave_closed_pipe()
    except Exception as error:
        if problem := storage_problem(error, output_folder() if HydraConfig.initialized() else None):
            if is_sweep():
                _fail_job(error, problem)
            print(f"Error: {problem}", file=sys.stderr)
            raise SystemExit(2) from None
        if not is_sweep():
            raise
        if not isinstance(error, TrialPruned):
            traceback.print_exc()
        _fail_job(error, first_line(error))


def _fail_job(error: Exception, sentence: str) -> NoReturn:
    """Fails a job of a sweep by an exception, because an exit would also end the following jobs.

    Hydra stores the exception, so the frames of its traceback are cleared to free the model.
    """
    print(
        f"Error in job {output_folder().name}: {sentence}" if not isinstance(error, TrialPruned) else sentence,
        file=sys.stderr,
    )
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    _remove_unused_folder()  # a folder with a status.json is kept
    raise UserError(f"a job of the sweep failed, and the others ran: {sentence}") from None


def is_sweep() -> bool:
    """Returns whether this is a job of a sweep, not the program that starts the jobs."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def output_folder() -> Path:
    """Returns the folder that Hydra created for the run."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


def _remove_unused_folder() -> None:
    """Removes the run folder if it holds only files of Hydra, because the run failed or used another folder."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized() or OmegaConf.is_missing(HydraConfig.get().runtime, "output_dir"):
        return
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    written_by_hydra = {str(hydra_config.output_subdir), f"{hydra_config.job.name}.log"}
    if folder.is_dir() and {child.name for child in folder.iterdir()} <= written_by_hydra:
        shutil.rmtree(folder)
