"""An agent of your own, in plain Python: think, act, observe, until it answers (ReAct, Yao et al., ICLR 2023).

    sqlbench eval --run react --agent examples.react_agent:ReAct --model openai:NAME

A model that does not know ACT and FINISH, such as nano, answers with a query, which counts as its action.
"""

from sqlbench.agent.prompts import extract_sql
from sqlbench.agent.trajectory import Message
from sqlbench.rollout import RolloutContext

SYSTEM = """You answer a question about a {dialect} database in steps. Think in a sentence, then write one line, either
ACT and a query in a ```sql block, whose result you will be shown, or
FINISH and the final query in a ```sql block."""


class ReAct:
    """Looks at results until the model finishes, or until `max_turns` queries have run."""

    async def run(self, context: RolloutContext) -> str:
        """Return the final query, or else the last one that ran."""
        database, question = context.database, context.task.question
        system = Message(role="system", content=SYSTEM.format(dialect=database.dialect))
        talk = [system, Message(role="user", content=f"{question}\n{context.schema_text}")]
        sql = ""
        while len(context.executions) < context.config.max_turns:
            answer = await context.ask("act", talk)
            sql = extract_sql(answer)
            await context.execute(sql)
            if "FINISH" in answer:
                break
            _, observed = context.history[-1]
            talk += [Message(role="assistant", content=answer), Message(role="user", content=f"Result: {observed}")]
        return sql
