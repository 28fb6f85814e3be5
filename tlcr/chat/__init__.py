"""Language models that are asked in words, behind an endpoint or run here: one door, a store, and caps.

``ask(model, questions, store, label=...)`` is the way in; ``model`` is an ``Endpoint`` (tlcr.chat.endpoint) or a
``LocalModel`` (tlcr.chat.local). Nothing here knows what is asked, or what for.
"""

from tlcr.chat.ask import ask, stored
from tlcr.chat.store import AnswerStore
from tlcr.chat.types import Answer, ChatModel, Message, NoAnswer, Question

__all__ = ["Answer", "AnswerStore", "ChatModel", "Message", "NoAnswer", "Question", "ask", "stored"]
