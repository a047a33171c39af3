"""Commands that answer questions."""

from __future__ import annotations

from sqlbench.config import POCKET, Request
from sqlbench.options import command, send_request
from sqlbench_chat.settings import ApiConfig, AskConfig, ChatConfig


@command("ask")
def _ask(settings: AskConfig, request: Request = None) -> None:
    from sqlbench_chat.answer import ask

    send_request(request)
    ask(settings)


@command("api")
def _api(settings: ApiConfig, request: Request = None) -> None:
    from sqlbench_chat.api import serve

    send_request(request)
    serve(settings)


@command("chat")
def _chat(settings: ChatConfig, request: Request = None) -> None:
    from sqlbench.data.tasks import open_dataset
    from sqlbench.interfaces import is_plugin, load_plugin
    from sqlbench.models import open_model, policy_folder
    from sqlbench.models.checkpoint import check_checkpoint
    from sqlbench.runs import run_path
    from sqlbench_chat.page import serve_chat

    send_request(request)
    if settings.data == POCKET and not POCKET.exists():
        from pocket.dataset import write_pocket
        from sqlbench.data.audit import audit_dataset

        write_pocket(POCKET)
        print(audit_dataset(POCKET).summary())
    open_dataset(settings.data)
    load_plugin("agent", settings.agent)
    if settings.model.startswith("openai:") or is_plugin(settings.model):
        open_model(settings.model)
    else:  # the page loads it later; a missing one is reported now
        check_checkpoint(policy_folder(settings.model))
    folder = run_path(settings.results, "laptop", settings.run)
    folder.mkdir(parents=True, exist_ok=True)
    serve_chat(settings, folder)
