"""How `vlmcap train` and `vlmcap evaluate` run.

Help at once, a mistake as one sentence, and no folder left by a run of nothing.
"""

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

HYDRA_FOLDER = ".hydra"  # of the run, as conf/train.yaml sets it

_made: list[Path] = []  # folders that `UniqueRunFolder` made, the innermost first


class UniqueRunFolder(Callback):
    """Gives each run and each sweep a folder of its own before Hydra writes to it, as `hydra.callbacks` in conf/train.yaml names it.

    A folder that is named by the time of day gets a number where another run has made it in the same second. A folder
    that the user named and a living run writes to is refused.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Claims the folder of a run."""
        if _is_named_by_clock(config, "run"):
            config.hydra.run.dir = str(_new_folder(Path(config.hydra.run.dir)))
        elif not _is_first_process(config):  # the first one keeps Hydra's files for all
            config.hydra.output_subdir = None
        elif config.hydra.output_subdir is not None and (owner := living_owner(Path(config.hydra.run.dir))):
            # Hydra turns exceptions of its callbacks into warnings.
            sentence = f"hydra.run.dir={config.hydra.run.dir} is in use by {owner}: wait for it to end, stop it, or choose another folder"
            print(f"Error: {sentence}", file=sys.stderr)
            raise SystemExit(2)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Claims the folder of a sweep, which jobs learn of by an override."""
        if _is_named_by_clock(config, "sweep") and not config.sweep.folder:
            folder = str(_new_folder(Path(config.hydra.sweep.dir)))
            config.hydra.sweep.dir = folder
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{folder}'")


def _is_named_by_clock(config: DictConfig, kind: str) -> bool:
    found = OmegaConf.to_container(config.hydra[kind], resolve=False)
    return isinstance(found, dict) and "${now:" in str(found["dir"])


def _is_first_process(config: DictConfig) -> bool:
    """Whether this process is the first one of its run, or the only one."""
    names = ("LOCAL_RANK", "RANK", "SLURM_PROCID")
    is_alone = config.hardware.devices * config.trainer.num_nodes == 1
    return is_alone or all(os.environ.get(name, "0") in ("", "0") for name in names)


def _new_folder(wanted: Path) -> Path:
    """A folder that this call has made: `wanted`, or with -2, -3 and so on behind its name."""
    folder, number = wanted, 1
    while True:
        missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        except FileNotFoundError:  # another process removed a parent, which was empty
            continue
        else:
            _made.extend(missing)
            return folder


def run_program(
    main: Callable[[], object], name: str, arguments: Sequence[str] | None = None, command: str = ""
) -> None:
    """Runs a program of Hydra's; mistakes that Hydra itself finds are told like ours.

    Args:
        main: Decorated by Hydra.
        name: Of its file under `conf/`.
        arguments: As typed; None takes those of this process.
        command: What was typed in front of them; empty is the script of this process.
    """
    set_cuda_variables()
    given = [*sys.argv[1:]] if arguments is None else [*arguments]
    command = command or f"python {shlex.quote(sys.argv[0])}"
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us whole, not as Hydra's text and exit code 1
    try:
        with report_user_errors():
            given = take_plugins(given)
            if {"-h", "--help"} & set(given):
                print(
                    help_text(name).replace(
                        f"python {name}.py", command if command.startswith("vlmcap") else f"python {name}.py"
                    )
                )
                return
            register_schemas()
            sys.argv[1:] = hydra_arguments(given, command, of_checkpoint=name == "evaluate")
            main()
    finally:
        for folder in _made:  # those that nothing was written to
            with suppress(OSError):
                folder.rmdir()
        _made.clear()


def hydra_arguments(given: Sequence[str], command: str, *, of_checkpoint: bool = False) -> list[str]:
    """The arguments with overrides in Hydra's grammar; a user's folder of YAML files is taken.

    Args:
        given: As typed.
        command: What was typed in front of them.
        of_checkpoint: Whether the configuration is a checkpoint's, which has the keys of its own kinds.

    Raises:
        UserError: A flag is unknown, an override cannot be right, or the folder is not there.
    """
    from hydra._internal.utils import get_args_parser

    known, unknown = get_args_parser().parse_known_intermixed_args(given)
    if unknown:
        flag, _, value = unknown[0].partition("=")
        following = given[given.index(unknown[0]) + 1 :][:1]
        value = value or next((word for word in following if "=" not in word and not word.startswith("-")), "…")
        override = f"{flag.lstrip('-').replace('-', '_')}={value}"
        instead = foreign_key(override) or f"overrides have no dashes, as in {shlex.quote(override)}"
        raise UserError(f"{flag} is no flag of {command}; {instead}")
    use_config_dir(known.config_dir)
    flags = [*given]
    for override in known.overrides:
        flags.remove(override)
    is_sweep = known.multirun and known.cfg is None
    again = "" if known.cfg else shlex.join([*shlex.split(command), "-m", *given])
    overrides = read_overrides(known.overrides, is_sweep=is_sweep, command=again)
    return [*flags, *(loosened(overrides) if of_checkpoint else overrides)]


def help_text(name: str) -> str:
    """The help of `conf/<name>.yaml`.

    Hydra would print the same, but lists every choice of every group before, whether the template names them or not,
    and copies all of its configuration for each: three quarters of the time that `--help` took.
    """
    text = str(OmegaConf.load(config_file(name)).hydra.help.template)
    load_plugins()
    parts = [f"{group}={kind}" for group in SCHEMAS for kind in plugin_kinds(group)]
    return f"{text}\nFrom plugins: {', '.join(parts)}" if parts else text


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Turns a user's mistake into one line on stderr and exit code 2, and Ctrl-C into one line and 130.

    Stands inside of Hydra's functions too: an exception that reached Hydra would have all overrides of the command
    printed before it.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException

    try:
        yield
        sys.stdout.flush()
        _remove_unused_folder()  # paths.output_dir may have led elsewhere
    except (UserError, HydraException, OmegaConfBaseException) as error:
        cause = error if isinstance(error, UserError) else innermost(error)
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
    """Ends a job so that those to come run: an exit would end them too.

    Hydra keeps the exception, which must keep no model alive.
    """
    print(
        f"Error in job {output_folder().name}: {sentence}" if not isinstance(error, TrialPruned) else sentence,
        file=sys.stderr,
    )
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    _remove_unused_folder()  # one that holds a status.json is kept
    raise UserError(f"a job of the sweep came to nothing, and the others ran: {sentence}") from None


def is_sweep() -> bool:
    """Whether this is a job of a sweep, and not the program around its jobs."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def output_folder() -> Path:
    """The folder that Hydra made for the run."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


def _remove_unused_folder() -> None:
    """Removes the folder that Hydra made for a run that came to nothing.

    One that holds no more than Hydra's own files.
    """
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized() or OmegaConf.is_missing(HydraConfig.get().runtime, "output_dir"):
        return
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    own = {str(hydra_config.output_subdir), f"{hydra_config.job.name}.log"}
    if folder.is_dir() and {child.name for child in folder.iterdir()} <= own:
        shutil.rmtree(folder)
