"""`posttrain push`: a run's result, with its card, to a repository of the hub: a private one, and never over another's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import get_session, hf_raise_for_status, validate_repo_id

from posttrain.console import say
from posttrain.errors import RunError, UserError, first_line
from posttrain.models.builtin import offline
from posttrain.reports.card import hub_name, write_card
from posttrain.runs.artifact import ADAPTER_CONFIG, Artifact, open_artifact
from posttrain.runs.manifest import CARD
from posttrain.runs.remote import here
from posttrain.secrets import redact

T = TypeVar("T")
Operation = CommitOperationAdd | CommitOperationDelete
# files of weights, and those by which loaders find them
_WEIGHTS = re.compile(r"(adapter_model|model|pytorch_model)\S*\.(safetensors|bin)(\.index\.json)?|adapter_config\.json")


def push_run(run: Path, repository: str, update: bool = False, public: bool = False) -> str:
    """Write a run's adapter or model, and its card, to `repository` (org/name) in one commit; returns its address.

    The token is that of HF_TOKEN or of `hf auth login`. update: where the repository exists already, else it is refused.
    public: whether a new one is. Raises UserError before anything is sent, and RunError for what the hub answers.
    """
    run = Path(here(run, "run"))
    artifact = open_artifact(run, "run")
    artifact.finished()
    files = _operations(artifact.verified(), run)
    api = HfApi(token=_token(repository))
    exists = _asked(lambda: api.repo_exists(repository), UserError)
    if exists and not update:
        raise UserError(f"push: {repository} exists already; give another name, or --update to write over its files")
    _check_card(artifact.weights / CARD, api.endpoint)
    if not exists:
        _asked(lambda: api.create_repo(repository, private=not public), UserError)
        say(f"{repository} made, {'public' if public else 'private'}")
    else:
        files += _stale(api, repository, {file.path_in_repo for file in files}, public)
    message = f"posttrain: {artifact.finished().stage} run {run.resolve().name}"
    after = "" if exists else f" ({repository} is there and empty: --update goes on)"
    _asked(lambda: api.create_commit(repository, files, commit_message=message), RunError, after)
    address = f"{api.endpoint}/{repository}"
    say(f"pushed {sum(isinstance(file, CommitOperationAdd) for file in files)} files to {address}")
    return address


def _stale(api: HfApi, repository: str, new: set[str], public: bool) -> list[Operation]:
    """What is to be deleted of a repository that exists: weights of another result, which loaders would take too."""
    found = _asked(lambda: api.model_info(repository), UserError)
    if not found.private:
        say(f"{repository} is public")
    elif public:
        say(f"{repository} exists already, private: --public changes nothing")
    stale = [s.rfilename for s in found.siblings or [] if _WEIGHTS.fullmatch(s.rfilename) and s.rfilename not in new]
    if stale:
        say(f"{len(stale)} files of another result, such as {stale[0]}, are deleted there")
    return [CommitOperationDelete(name) for name in stale]


def _token(repository: str) -> str:
    """Raises UserError for a name that is none, without a network and without a token."""
    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise UserError(f"push: '{repository}' is no name of a repository; write org/name") from None
    if repository.count("/") != 1:
        raise UserError(f"push: '{repository}' does not say whose it is; write org/name")
    if offline():
        raise UserError("push: HF_HUB_OFFLINE is set, so nothing is sent; unset it")
    if not (token := get_token()):
        raise UserError("push: no token for the hub; run `hf auth login`, or set HF_TOKEN to one that may write")
    return token


def _check_card(card: Path, endpoint: str) -> None:
    """Raises UserError, before anything is made there, for a card that the hub's own check does not take.

    Asked of the hub that is pushed to: before 2.2 the client's own `validate` sends the card to huggingface.co in any case.
    """

    def complaint() -> str:
        words = {"repoType": "model", "content": card.read_text(encoding="utf-8")}
        answer = get_session().post(f"{endpoint}/api/validate-yaml", json=words)
        if answer.status_code == 400:
            return " ".join(answer.text.split())[:300]
        hf_raise_for_status(answer)
        return ""

    if said := _asked(complaint, UserError):
        raise UserError(f"push: the hub does not take the card ({redact(said)}); mend {card}")


def _operations(artifact: Artifact, run: Path) -> list[Operation]:
    """The files that the manifest lists, and the card; an adapter's config with the base's name on the hub in place of a path."""
    if not (artifact.weights / CARD).is_file():
        write_card(run)
    prefix = f"{artifact.finished().weights.path}/"
    found: dict[str, Any] = {name.removeprefix(prefix): run / name for name in sorted(artifact.weight_files)}
    if ADAPTER_CONFIG in found and Path(artifact.base.path).is_dir():
        name = hub_name(artifact.base)
        if name is None:
            say(f"the base is a directory here, {Path(artifact.base.path).name}: whoever loads the adapter has to have it too")
        config = artifact.adapter.whole | {"base_model_name_or_path": name or Path(artifact.base.path).name}
        found[ADAPTER_CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    found[CARD] = run / prefix / CARD
    return [CommitOperationAdd(name, content) for name, content in found.items()]


def _asked(question: Callable[[], T], failure: type[UserError] | type[RunError], after: str = "") -> T:
    """The hub's answer. Raises `failure`, in one line without secrets: UserError while nothing has been made there."""
    try:
        return question()
    except Exception as error:  # of the client, of the network, of the hub: all are one line here
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        reason = {401: "it does not take the token", 403: "the token may not write there", 409: "the name is taken"}.get(
            status or 0
        )
        line = reason or (f"it answered {status}" if status else first_line(error))
        raise failure(f"push: the hub could not be written to: {redact(line)}{after}") from None
