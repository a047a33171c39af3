"""OpenAI-compatible endpoint that follows a script, in place of a capable endpoint on the network.

It is not a language model: it looks the queries up. Like real models, it makes two mistakes. In the first query for
one question in four it misspells a table, and corrects that after the database's error. To most queries it adds an id
that was not asked for, until a rule in its prompt forbids that. Asked to improve a prompt, it adds the user's remarks
as rules, so only a remark can introduce that rule.
"""

from __future__ import annotations

import json
import re
import threading
import zlib
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sqlbench.agent.prompts import CORRECT
from sqlbench.data.tasks import Task

RULE = "Leave out ids"
"""Text of the rule in a prompt, in any letter case."""


class ScriptedEndpoint(ThreadingHTTPServer):
    """The endpoint, on a free port of this machine until the process ends.

    Args:
        tasks: the questions that it can answer.
    """

    daemon_threads = True

    def __init__(self, tasks: Iterable[Task]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.gold = {task.question: task.gold for task in tasks}
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, messages: list[str]) -> str:
        """Answer one prompt, given the texts of its messages."""
        system, user = messages[0], messages[-1]
        if "lines of JSON" in user:  # example questions
            pairs = [{"question": question, "sql": sql} for question, sql in self.gold.items()]
            return "\n".join(map(json.dumps, pairs[:: max(1, len(pairs) // 10)]))
        if part := re.search(r"of its prompts:\n```\n(.*?)\n```\n\nThis is how", user, re.DOTALL):
            remarks = dict.fromkeys(re.findall(r"The user's remark: (.+)", user))
            rules = "".join(f"\n- {remark}" for remark in remarks if remark not in part[1])
            return f"```\n{part[1]}{rules}\n```"
        if "You review" in system:
            return f"The query names the columns and tables of the schema. {CORRECT}"
        match = re.search(r"^Question: (.*)$", user, re.MULTILINE)
        question = match[1] if match else ""
        sql, number = self.gold.get(question, "SELECT 'not in the script'"), zlib.crc32(question.encode())
        if number % 3 and RULE.lower() not in system.lower():
            sql = _with_id(sql, user)
        if number // 3 % 4 == 0 and "An earlier" not in system:
            sql = re.sub(r"\bFROM (\w+)", r"FROM \1_table", sql, count=1)
        return f"```sql\n{sql}\n```"


def _with_id(sql: str, prompt: str) -> str:
    """Add the first column of the query's first table to its SELECT."""
    source = re.search(r"\bFROM (\w+)(?: AS (\w+))?", sql)
    column = source and re.search(rf'CREATE TABLE "?{source[1]}"? *\(\s*"?(\w+)', prompt)
    if not source or not column or re.search(r"\b(UNION|EXCEPT|INTERSECT)\b", sql):
        return sql
    return re.sub(r"^SELECT (DISTINCT )?", rf"SELECT \1{source[2] or source[1]}.{column[1]}, ", sql, count=1)


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedEndpoint

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stream = bool(request.get("stream"))
        message = {"role": "assistant", "content": self.server.answer([m["content"] for m in request["messages"]])}
        choice = {"index": 0, "finish_reason": "stop", "delta" if stream else "message": message}
        kind = f"chat.completion{'.chunk' * stream}"
        body = json.dumps({"id": "1", "object": kind, "created": 1, "model": request["model"], "choices": [choice]})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if stream else "application/json")
        self.end_headers()
        self.wfile.write((f"data: {body}\n\ndata: [DONE]\n\n" if stream else body).encode())

    def log_message(self, *_: object) -> None:
        """Log nothing."""
