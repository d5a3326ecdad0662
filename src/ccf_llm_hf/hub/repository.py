"""The repository that is pushed to: whether the token may write there, what it holds, and in one
sentence what went wrong."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from huggingface_hub import HfApi, get_token, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.checkpoint_files import CARD_FILE
from ccf_llm_hf.modeling.configuration_ccf_llm import CCFLLMConfig

REASONS = {
    401: "the Hub does not know who you are: run `hf auth login`, or set HF_TOKEN",
    402: "the Hub asks for payment for this",
    403: "this token may not write there: use one with write access to it",
    404: "the Hub has no such repository or branch for this token",
    412: "somebody else pushed to it meanwhile",
    429: "the Hub takes no more requests for now",
}
COULD_NOT_ASK = "the Hub could not be asked for token, repository and rights"
# After these nothing is gained by trying the same again.
FINAL = (400, 401, 402, 403, 404)
# What a repository may hold before anything is pushed to it: the Hub makes these with it.
STARTERS = {".gitattributes", ".gitignore", CARD_FILE, "LICENSE"}
# By which file what we published is known, and by which value in it.
MARKS = {
    "model": (
        ("config.json", "model_type", CCFLLMConfig.model_type),
        ("processor_config.json", "processor_class", "CCFLLMProcessor"),
    ),
    "dataset": (("protocol.json", "history_rule", None),),
    "space": (("checkpoint.json", "checkpoint", None),),
}
PUBLISHES = {
    "model": "a CCF-LLM checkpoint",
    "dataset": "a prepared folder",
    "space": "a CCF-LLM Space",
}


def ask_hub(
    api: HfApi,
    repo_id: str,
    *,
    kind: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    replace: bool = False,
    dry_run: bool = False,
) -> tuple[Any, list[str]]:
    """Ask, before any work, what would refuse a push; nothing is made or changed.

    Args:
        kind: `model`, `dataset` or `space`.
        private, revision, replace: see [`look`].
        dry_run: an unreachable Hub is no error.

    Returns:
        The state of the branch, see [`look`], and notes: what could not be asked.

    Raises:
        InputError: the token is missing or may not write there, the Hub cannot be reached, or see
            [`look`].
    """
    try:
        head = look(api, repo_id, kind=kind, private=private, revision=revision, replace=replace)
        check_may_write(api, repo_id, kind, exists=head is not None)
    except InputError:
        raise
    except Exception as error:  # of httpx and of the Hub: they share no class
        reason, final = tell_reason(error), status_of(error) in FINAL
        if dry_run and not final:
            return None, [f"note: {COULD_NOT_ASK}: {reason}"]
        why = reason if final else f"{COULD_NOT_ASK}: {reason}; run the same again when it answers"
        raise InputError(f"{repo_id} was not published: {why}") from error
    return head, []


def look(
    api: HfApi,
    repo_id: str,
    *,
    kind: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    replace: bool = False,
) -> Any:
    """The state of the branch that is to be pushed to, or of `main` where the branch is not there
    and will be made of it; None where the repository is not there.

    Args:
        private: it must not be public.
        revision: branch; default main.
        replace: it may hold something else than we publish.

    Raises:
        InputError: it is public, or holds somebody's other work.
    """
    try:
        try:
            head = api.repo_info(repo_id, repo_type=kind, revision=revision)
        except RevisionNotFoundError:
            head = api.repo_info(repo_id, repo_type=kind)
    except RepositoryNotFoundError:
        return None
    if private and not head.private:
        raise InputError(
            f"{repo_id} is public, and pushing to it does not make it private: change that in its "
            "settings, or choose another name"
        )
    if not replace and (foreign := find_foreign(api, head, kind)):
        raise InputError(
            f"{repo_id} holds something else than {PUBLISHES[kind]} ({foreign}): choose another "
            "name, or say --replace to push over it"
        )
    return head


def find_foreign(api: HfApi, head: Any, kind: str) -> str:
    """A file that tells that a repository holds something else than we publish; empty if none."""
    files = sorted({sibling.rfilename for sibling in head.siblings or []} - STARTERS)
    for name, key, ours in MARKS[kind]:
        if name in files:
            value = read_remote_json(api, head, kind, name).get(key)
            if value == ours or (value and ours is None):
                return ""
            return f"{name} says {key}: {value}" if value else name
    return files[0] if files else ""


def tell_overwritten(head: Any, repo_id: str, names: Iterable[str]) -> list[str]:
    """A line that names the files of a branch (`head`; None: it is not there) that an upload writes
    over; none where it writes over none."""
    present = {sibling.rfilename for sibling in (head.siblings if head else None) or []}
    both = sorted(present.intersection(names))
    return [f"the commit overwrites in {repo_id}: {', '.join(both)}"] if both else []


def read_remote_json(api: HfApi, head: Any, kind: str, name: str) -> dict[str, Any]:
    """A JSON object of a repository at the commit of `head`; empty where the file holds none."""
    url = hf_hub_url(head.id, name, repo_type=kind, revision=head.sha, endpoint=api.endpoint)
    answer = get_session().get(url, headers=build_hf_headers(token=api.token))
    hf_raise_for_status(answer)
    try:
        values = answer.json()
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def check_may_write(api: HfApi, repo_id: str, kind: str, exists: bool) -> None:
    """Raise unless the token in use may write to a repository, or make it where it is not there."""
    if not (get_token() if api.token in (None, True) else api.token):
        raise InputError(f"{repo_id} was not published: {REASONS[401]}")
    me = api.whoami()
    if exists:
        try:
            api.auth_check(repo_id, repo_type=kind, write=True)
            return
        except HfHubHTTPError as error:
            if status_of(error) != 404:  # a mirror of the Hub may have no such page
                raise
    token = me.get("auth", {}).get("accessToken", {})
    namespace = repo_id.split("/")[0]
    roles = {org["name"]: org.get("roleInOrg") for org in me.get("orgs", [])}
    member = namespace == me["name"] or roles.get(namespace, "read") != "read"
    if token.get("role") == "fineGrained":
        scopes = token.get("fineGrained", {}).get("scoped", [])
        member = member and any(
            scope.get("entity", {}).get("name") in (namespace, repo_id)
            and "repo.write" in scope.get("permissions", [])
            for scope in scopes
        )
    if not member or token.get("role") == "read":
        raise InputError(f"{repo_id} was not published: {REASONS[403]}")


def open_repo(
    api: HfApi,
    repo_id: str,
    *,
    kind: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    replace: bool = False,
) -> Any:
    """The state of the branch that is pushed to, made if it is not there; see [`look`]."""
    options: Any = {"kind": kind, "private": private, "replace": replace}
    head = look(api, repo_id, revision=revision, **options)
    if head is None:
        sdk = "docker" if kind == "space" else None
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type=kind, space_sdk=sdk)
        head = look(api, repo_id, **options)
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=kind)
        head = api.repo_info(repo_id, revision=revision, repo_type=kind)
    return head


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error, or one that it came from, tells; None if none does."""
    answers = [getattr(link, "response", None) for link in chain(error)]
    return next((answer.status_code for answer in answers if answer is not None), None)


def chain(error: BaseException) -> Sequence[BaseException]:
    """An error, what it came from, and so on."""
    links = [error]
    while links[-1].__cause__ is not None:
        links.append(links[-1].__cause__)
    return links


def tell_reason(error: BaseException) -> str:
    """What went wrong between here and the Hub, as half a sentence."""
    status = status_of(error)
    if status is not None:
        return REASONS.get(status, f"the Hub answered with error {status}")
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, json.JSONDecodeError):
        return "the Hub gave an answer that cannot be read"
    return " ".join(str(chain(error)[-1]).split()) or type(error).__name__


def explain(error: BaseException, repo_id: str) -> str:
    """One sentence: what happened, in which state the repository is, and the mend."""
    status = status_of(error)
    if status in FINAL:
        text = " ".join(str(error).split())
        return f"{repo_id} was not published: {REASONS.get(status, text)}"
    reason = tell_reason(error)
    return (
        f"pushing to {repo_id} broke off: {reason}; it holds all of this upload or nothing of it "
        "(a new repository may have been made, and be empty): run the same again to complete it"
    )
