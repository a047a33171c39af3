"""The named prompt components of each model family, and how a prompt is put together from them.

Two families share one graph: ``chat`` (the long prompts that instruction-tuned models expect) and ``nano`` (the few
words on which the embedded policy was trained). A component is plain text with ``{fields}``; prompt evolution edits
components, never code.
"""

from __future__ import annotations

import difflib
import re

from sqlbench.agent.trajectory import Execution, Message, Record
from sqlbench.database.schema import Schema

CORRECT, INCORRECT = "THE QUERY IS CORRECT", "THE QUERY IS INCORRECT"

NANO = {
    "write.system": "write {dialect}",
    "write.user": "{question}\n{schema}",
    "rewrite.system": "rewrite {dialect}",
    "rewrite.user": "{question}\n{schema}\n query: {sql}\n result: {execution}",
    "check.system": "check {dialect}",
    "check.user": "{question}\n{schema}\n query: {sql}\n result: {execution}",
}
