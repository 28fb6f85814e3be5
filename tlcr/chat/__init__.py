"""Chat with language models, at an endpoint or on this machine: one interface, a store of answers, and caps.

Call ``ask(model, questions, store, label=...)``; ``model`` is an ``Endpoint`` (tlcr.chat.endpoint) or a
``LocalModel`` (tlcr.chat.local). This folder does not depend on the content of the questions.
"""

from tlcr.chat.ask import ask, stored
from tlcr.chat.store import AnswerStore
from tlcr.chat.types import Answer, ChatModel, Message, NoAnswer, Question

__all__ = ["Answer", "AnswerStore", "ChatModel", "Message", "NoAnswer", "Question", "ask", "stored"]
