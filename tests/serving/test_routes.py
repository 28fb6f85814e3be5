"""What each route answers: the numbers of ``tlcr score`` and of PPO's reward at every token, in the order asked for."""

from __future__ import annotations

import json
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers

from tests.serving.conftest import TEMPERATURE, TEMPLATE, Running, reader_of
from tlcr.cli import main as cli
from tlcr.serving.limits import Refused
from tlcr.serving.model import ServedModel
from tlcr.serving.protocols import ROUTES

PROMPT, RESPONSE = "The food was", " good and the service was not bad"
ITEMS = "/v1/token_rewards"


def expected(folder: Path, prompt_ids: list[int], response_ids: list[int]) -> list[float]:
    """2 p - 1 at each response token, from the saved model and nothing else of ours, in float64."""
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(folder).double().eval()
    with torch.no_grad():
        logits_LC = model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0]
    return (2 * (logits_LC / TEMPERATURE).softmax(-1)[len(prompt_ids) :, 1] - 1).tolist()


def ids(served: ServedModel, text: str) -> list[int]:
    return served.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_ids_get_a_reward_for_every_response_token(server: Running, served: ServedModel, discriminator: Path) -> None:
    rows = [(ids(served, PROMPT), ids(served, RESPONSE)), ([5], [6, 7]), ([], [9, 10, 11]), (list(range(3, 90)), [2])]
    items = [{"prompt_ids": prompt, "response_ids": response} for prompt, response in rows]
    status, body, _ = server.ask(ITEMS, {"items": items})
    assert status == 200 and body["temperature"] == TEMPERATURE and body["model"] == str(discriminator)
    for found, (prompt, response) in zip(body["data"], rows, strict=True):
        wanted = expected(discriminator, prompt, response)
        assert found["tokens"] == len(response) and "offsets" not in found
        assert found["rewards"] == pytest.approx(wanted, abs=1e-5)
        assert found["score"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)
    late = expected(discriminator, rows[0][0], rows[0][1])
    assert body["data"][0]["rewards"][1:] != pytest.approx(late[:-1], abs=1e-2)  # one token late is another answer


def test_text_gets_the_numbers_of_tlcr_score(
    server: Running, discriminator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "How do I bake bread?"}]
    records: list[dict[str, Any]] = [
        {"prompt": PROMPT, "response": RESPONSE},
        {"prompt": PROMPT, "response": RESPONSE + "<eos>"},
        {"prompt": messages, "response": "Mix flour, water, salt and yeast."},
        {"prompt": "", "response": "na\u00efve \U0001f600 caf\u00e9"},
        {"prompt": PROMPT, "response": ""},
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    assert cli.main(["score", "--discriminator", str(discriminator), str(file), "--json"]) == 0
    scored = list(map(json.loads, capsys.readouterr().out.splitlines()))
    items = [
        {
            "messages" if isinstance(record["prompt"], list) else "prompt": record["prompt"],
            "response": record["response"],
        }
        for record in records
    ]
    _, body, _ = server.ask(ITEMS, {"items": items})
    for record, wanted, found in zip(records, scored, body["data"], strict=True):
        assert found["rewards"] == pytest.approx(wanted["rewards"], abs=1e-6)
        assert found["score"] == pytest.approx(wanted["score"], abs=1e-6)
        text, end = record["response"].removesuffix("<eos>"), len(record["response"].removesuffix("<eos>"))
        assert found["offsets"][-1] == [end, end]  # the end of sequence writes nothing
        pieces = [text[start:stop] for start, stop in found["offsets"][:-1]]
        if text.isascii():
            assert "".join(pieces) == text
        assert all(piece for piece in pieces) and found["offsets"] == sorted(found["offsets"])


GPT_OSS = TEMPLATE.replace(
    "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<|final|>{% endif %}{{ m['content'] }}"
)


@pytest.mark.parametrize(
    ("change", "item", "pieces"),
    [
        ({}, {"prompt": PROMPT + " ", "response": "good and"}, ["good", " and"]),
        (
            {"normalizer": "NFKC"},
            {"prompt": PROMPT, "response": " \ufb01ne was bad"},
            [" \ufb01", "\ufb01n", "e", " was", " bad"],
        ),
        (
            {"chat_template": GPT_OSS},
            {"messages": [{"role": "user", "content": "Hi"}], "response": "was good"},
            ["", "w", "a", "s", " good"],
        ),
    ],
)
def test_offsets_are_the_characters_of_the_answer_as_it_was_sent(
    served: ServedModel, change: dict[str, str], item: dict[str, Any], pieces: list[str]
) -> None:
    """Where decoding does not give back the answer: part of a token is the prompt's, Unicode forms, special tokens."""
    changed = copy(served)
    changed.tokenizer = deepcopy(served.tokenizer)
    changed.tokenizer.add_special_tokens({"additional_special_tokens": ["<|final|>"]})
    if "normalizer" in change:
        changed.tokenizer.backend_tokenizer.normalizer = getattr(normalizers, change["normalizer"])()
    changed.tokenizer.chat_template = change.get("chat_template", changed.tokenizer.chat_template)
    (row,) = ROUTES[ITEMS].rows(reader_of(changed), {"items": [item]}, {})
    assert row.offsets is not None and len(row.offsets) == len(row.encoded.answer_ids)
    end = len(item["response"])
    assert [item["response"][start:stop] for start, stop in row.offsets[:-1]] == pieces
    assert row.offsets[-1] == (end, end)


def test_the_chat_template_is_given_what_comes_with_messages(served: ServedModel) -> None:
    changed = copy(served)
    changed.tokenizer = deepcopy(served.tokenizer)
    changed.tokenizer.chat_template = (
        "{% if tools is not none %}{{ tools[0].name }} {% endif %}{% if documents %}{{ documents[0].text }} {% endif %}"
        "{% if shout %}LOUD {% endif %}" + TEMPLATE
    )
    item = {"messages": [{"role": "user", "content": "Hi"}], "response": "good"}
    more = {"tools": [{"name": "look_up"}], "documents": [{"text": "A page."}], "chat_template_kwargs": {"shout": True}}
    reader = reader_of(changed)
    plain, given = ROUTES[ITEMS].rows(reader, {"items": [item, {**item, **more}]}, {})
    texts = [changed.tokenizer.decode(row.encoded.ids) for row in (plain, given)]
    assert texts[1] == "look_up A page. LOUD " + texts[0]
    for nothing in (dict.fromkeys(more), {"tools": [], "documents": [], "chat_template_kwargs": {}}):
        assert list(ROUTES[ITEMS].rows(reader, {"items": [{**item, **nothing}]}, {})) == [plain]
    wrong = {**item, "chat_template_kwargs": {"chat_template": "{{ 'x' * 10 }}"}}
    with pytest.raises(Refused, match=r"'chat_template' in 'chat_template_kwargs', .* no switch .*, which reads shout"):
        list(ROUTES[ITEMS].rows(reader, {"items": [wrong]}, {}))


def test_an_answer_that_was_cut_off_has_no_end(server: Running, served: ServedModel, discriminator: Path) -> None:
    _, body, _ = server.ask(ITEMS, {"items": [{"prompt": PROMPT, "response": RESPONSE, "ended": False}]})
    (found,) = body["data"]
    assert found["rewards"] == pytest.approx(
        expected(discriminator, ids(served, PROMPT), ids(served, RESPONSE)), abs=1e-5
    )
    assert found["offsets"][-1][1] == len(RESPONSE)


def test_rewards_are_those_of_ppo(server: Running, served: ServedModel) -> None:
    """The source of rewards in PPO, on a padded rollout: prompts on the left, one answer cut off, one ended."""
    from tlcr.config.schema import RewardConfig
    from tlcr.rewards.composition import compose_rewards
    from tlcr.rewards.sources.discriminator import DiscriminatorSource
    from tlcr.rewards.sources.frozen_model import FrozenModel
    from tlcr.text.padding import pad_left, pad_right
    from tlcr.types import Rollout

    prompts, answers = [[5, 6, 7], [8], [9, 10]], [[20, 21, 2], [22, 23, 24, 25], [26]]
    (prompt_ids, prompt_mask), (answer_ids, mask) = pad_left(prompts, 0), pad_right(answers, 0)
    rollout = Rollout(
        ("",) * 3, ("",) * 3, prompt_ids, prompt_mask, answer_ids, mask, torch.tensor([True, False, False])
    )
    source = DiscriminatorSource(FrozenModel(served.model, served.tokenizer, served.tokenizer, max_prompt_tokens=99))
    rewards = compose_rewards(
        source(rollout),
        mask,
        ended_B=rollout.ended_B,
        kl_BT=None,
        kl_coef=0.0,
        cfg=RewardConfig(),
        temperature=served.temperature,
        centre=None,
    ).rewards_BT
    items = [{"prompt_ids": p, "response_ids": r} for p, r in zip(prompts, answers, strict=True)]
    _, body, _ = server.ask(ITEMS, {"items": items})
    for found, row, counted in zip(body["data"], rewards, mask, strict=True):
        assert found["rewards"] == pytest.approx(row[counted].tolist(), abs=1e-6)


# ---- the routes of others


def test_openrlhf_gets_one_number_an_answer(server: Running, served: ServedModel, discriminator: Path) -> None:
    whole, cut = f"<bos>{PROMPT}{RESPONSE}<eos>", f"<bos>{PROMPT}{RESPONSE}"
    _, body, _ = server.ask("/get_reward", {"query": [whole, cut], "prompts": [PROMPT, PROMPT], "labels": [None, 1]})
    prompt, answer = ids(served, "<bos>" + PROMPT), ids(served, RESPONSE)
    ended, stopped = (expected(discriminator, prompt, row) for row in ([*answer, 2], answer))
    means = [sum(row) / len(row) for row in (ended, stopped)]
    assert body["rewards"] == pytest.approx(means, abs=1e-5) and body["scores"] == body["rewards"]
    shares = [sum(value < 0 for value in row) / len(row) for row in (ended, stopped)]
    assert body["extra_logs"] == {"negative_share": pytest.approx(shares)}


def test_slime_gets_a_score_and_rewards(server: Running, served: ServedModel, discriminator: Path) -> None:
    _, body, _ = server.ask("/remote_rm", {"prompt": PROMPT, "response": RESPONSE + "<eos>", "label": "x"})
    wanted = expected(discriminator, ids(served, PROMPT), [*ids(served, RESPONSE), 2])
    assert body["rewards"] == pytest.approx(wanted, abs=1e-5) and body["tokens"] == len(wanted)


def test_slimes_answer_ended_where_it_has_its_end(server: Running, served: ServedModel, discriminator: Path) -> None:
    """slime sends the end that was sampled; an answer without one was cut, after a text as after messages."""
    rendered = "<|user|>\nHello<eos>\n<|assistant|>\n"
    for prompt in (rendered, [{"role": "user", "content": "Hello"}]):
        for end, last in (("", []), ("<eos>", [2])):
            _, found, _ = server.ask("/remote_rm", {"prompt": prompt, "response": "Hi" + end})
            wanted = expected(discriminator, ids(served, rendered), [*ids(served, "Hi"), *last])
            assert found["rewards"] == pytest.approx(wanted, abs=1e-5)


def test_llama_factory_gets_scores_of_the_last_answer(
    server: Running, served: ServedModel, discriminator: Path
) -> None:
    before = "<|user|>\nHi<eos>\n<|assistant|>\nHello<eos>\n<|user|>\nHow was it?<eos>\n<|assistant|>\n"
    _, body, _ = server.ask("/score_texts", {"model": "model", "messages": [before + "Good<eos>"]})
    wanted = expected(discriminator, ids(served, before), [*ids(served, "Good"), 2])
    assert body == {"scores": [pytest.approx(sum(wanted) / len(wanted), abs=1e-5)]}
    _, named, _ = server.ask("/score_texts?answer_after=was", {"messages": [PROMPT + RESPONSE]})
    head, tail = (PROMPT + RESPONSE).rsplit("was", 1)
    wanted = expected(discriminator, ids(served, head + "was"), ids(served, tail))
    assert named["scores"] == pytest.approx([sum(wanted) / len(wanted)], abs=1e-5)
    status, refused, _ = server.ask("/score_texts?answer_after=Nowhere:", {"messages": ["a"]})
    assert status == 400 and refused["error"].startswith("messages[0] does not contain 'Nowhere:'")


def test_pooling_has_vllms_numbers_for_every_token(server: Running, served: ServedModel, discriminator: Path) -> None:
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(discriminator).eval()
    rows = [[5, 6, 7], [8, 9, 10, 11]]
    with torch.no_grad():
        logits = [model(torch.tensor([row])).logits[0] for row in rows]
    _, body, _ = server.ask("/pooling", {"input": rows, "use_activation": False})
    assert [entry["index"] for entry in body["data"]] == [0, 1] and body["usage"]["prompt_tokens"] == 7
    for entry, logits_LC in zip(body["data"], logits, strict=True):
        torch.testing.assert_close(torch.tensor(entry["data"]), logits_LC, atol=1e-5, rtol=1e-5)
    _, one, _ = server.ask("/pooling", {"input": rows[0]})
    torch.testing.assert_close(torch.tensor(one["data"][0]["data"]), logits[0].softmax(-1), atol=1e-5, rtol=1e-5)
    _, text, _ = server.ask("/pooling", {"input": PROMPT})
    assert len(text["data"][0]["data"]) == len(ids(served, PROMPT))


# ---- facts


def test_info_says_what_a_client_has_to_know(server: Running, served: ServedModel, discriminator: Path) -> None:
    from tlcr.hosts.client import vocabulary_fingerprint

    status, body, _ = server.ask("/v1/info")
    assert status == 200
    assert (body["server"], body["model"], body["labels"]) == ("tlcr", str(discriminator), ["negative", "positive"])
    assert body["temperature"] == TEMPERATURE and body["max_tokens"] == 256
    assert body["tokenizer"]["fingerprint"] == vocabulary_fingerprint(served.tokenizer)
    assert set(body["versions"]) == {"tlcr", "torch", "transformers", "python", "starlette", "uvicorn"}
    assert body["limits"] == {"items": 1024, "body_bytes": 16 * 2**20, "request_tokens": 524288}
    assert server.ask("/health")[:2] == (200, {"status": "ok"})


def test_metrics_count_what_was_done(server: Running) -> None:
    def figures() -> dict[str, float]:
        lines = [line for line in server.ask("/metrics")[1].splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = figures()
    server.ask(
        ITEMS, {"items": [{"prompt_ids": [5, 6, 7], "response_ids": [8, 9]}, {"prompt_ids": [5], "response_ids": [6]}]}
    )
    server.ask(ITEMS, {"items": []})
    after = figures()

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grew("tlcr_answers_total") == 2 and grew("tlcr_tokens_scored_total") == 3
    assert grew("tlcr_tokens_read_total") == 7 and grew("tlcr_tokens_padding_total") == 3
    assert grew('tlcr_requests_total{route="/v1/token_rewards",status="200"}') == 1
    assert grew('tlcr_requests_total{route="/v1/token_rewards",status="400"}') == 1
    assert after["tlcr_queue_tokens"] == 0


# ---- what is refused, in one sentence


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{", 400, "the request's body is not JSON: "),
        (b"[1]", 400, "the request's body is a JSON list; wanted an object"),
        (b"[" * 100000, 400, "the request's body is not JSON: it has more than 100 levels"),
        (b"\xff\xfe{}", 400, "the request's body is not JSON: "),
        ({}, 400, "'items' is missing; wanted a list"),
        ({"items": []}, 400, "'items' is empty; wanted a list"),
        ({"items": {}}, 400, "'items' is a dict; wanted a list"),
        ({"items": [3]}, 400, "items[0] is a int; wanted an object"),
        ({"items": [{"prompt_ids": [5], "response_ids": [6]}, {}]}, 400, "items[1] has no prompt, or two"),
        ({"items": [{"prompt_ids": [5], "response_ids": []}]}, 400, "items[0] has an empty answer"),
        ({"items": [{"prompt": "a", "response": "", "ended": False}]}, 400, "items[0] has an empty answer"),
        ({"items": [{"response_ids": [5]}]}, 400, "items[0] has no list of token ids under 'prompt_ids'"),
        ({"items": [{"prompt_ids": [True], "response_ids": [5]}]}, 400, "items[0] has no list of token ids"),
        ({"items": [{"prompt_ids": [1.5], "response_ids": [5]}]}, 400, "items[0] has no list of token ids"),
        (
            {"items": [{"prompt_ids": [5], "response_ids": [6, 100000]}]},
            400,
            "items[0] has the id 100000 in 'response_ids', and the discriminator's vocabulary ends at ",
        ),
        ({"items": [{"prompt_ids": [-1], "response_ids": [6]}]}, 400, "items[0] has the id -1 in 'prompt_ids'"),
        (
            {"items": [{"prompt_ids": [5], "response_ids": [6], "response": "x"}]},
            400,
            "items[0] has both ids and 'response'",
        ),
        ({"items": [{"prompt": "a"}]}, 400, "items[0] has no text under 'response'"),
        (
            {"items": [{"prompt": "a", "response": "\ud83d"}]},
            400,
            "items[0] has a text under 'response' that is not valid",
        ),
        ({"items": [{"prompt": "a", "response": "<eos>"}]}, 400, "items[0]: an answer is '<eos>', which is special"),
        (
            {"items": [{"messages": [{"content": "a"}], "response": "b"}]},
            400,
            "items[0] has a message without a 'role'",
        ),
        ({"items": [{"messages": [], "response": "b"}]}, 400, "items[0] has no messages"),
        (
            {"items": [{"messages": [{"role": "user", "content": ""}] * 257, "response": "b"}]},
            400,
            "items[0] has 257 messages, and the discriminator reads at most 256 tokens",
        ),
        (
            {"items": [{"prompt": "a", "response": "b", "end": False}]},
            400,
            "items[0] has 'end', which is not read; an item may have prompt_ids, response_ids, prompt, messages, ",
        ),
        (
            {"items": [{"prompt": "a", "response": "b", "tools": [{}]}]},
            400,
            "items[0] has 'tools' beside 'prompt', and only a chat template reads them; send 'messages'",
        ),
        (
            {"items": [{"prompt_ids": [5], "response_ids": [6], "tools": [{}]}]},
            400,
            "items[0] has both ids and 'tools'",
        ),
        (
            {"items": [{"messages": [{"role": "user", "content": "a"}], "response": "b", "documents": ["c"]}]},
            400,
            "items[0] has 'documents' that are no list of objects",
        ),
        (
            {"items": [{"messages": [{"role": "user", "content": "a"}], "response": "b", "chat_template_kwargs": 1}]},
            400,
            "items[0] has 'chat_template_kwargs' that is a int; wanted an object",
        ),
        (
            {"items": [{"messages": [{"role": "user", "content": "a"}], "response": "b", "tools": [{"\ud83d": 1}]}]},
            400,
            "items[0] has a text under 'tools' that is not valid Unicode",
        ),
        *(
            (
                {"items": [{"messages": [{"role": "user", "content": "a"}, message], "response": "b"}]},
                400,
                "items[0] has a text in 'messages[1]' that is not valid Unicode (half of a surrogate pair at",
            )
            for message in (
                {"role": "user\ud83d", "content": "a"},
                {"role": "user", "content": "a", "name\ud83d": 1},
                {"role": "user", "content": "a", "tool_calls": [{"function": {"name": "look\ud83d"}}]},
            )
        ),
        ({"items": [{"prompt": "a", "response": "b", "ended": 1}]}, 400, "items[0] has 'ended': 1; wanted true"),
        (
            {
                "items": [
                    {"prompt_ids": [5] * 200, "response_ids": [6]},
                    {"prompt_ids": [5] * 200, "response_ids": [6] * 57},
                ]
            },
            400,
            "items[1] has 257 tokens with its prompt, and the discriminator reads at most 256",
        ),
        (
            {"items": [{"prompt_ids": [5], "response_ids": [6]}] * 1025},
            413,
            "the request has 1025 answers, and this server takes at most 1024; split it",
        ),
        (
            {"items": [{"prompt_ids": [5], "response_ids": [6]}], "model": "x"},
            400,
            "the request has 'model', which is not read; wanted {'items': [...]}",
        ),
    ],
)
def test_a_request_that_cannot_be_scored(server: Running, body: Any, status: int, sentence: str) -> None:
    found, answer, _ = server.ask(ITEMS, body)
    assert found == status and answer["error"].startswith(sentence), answer
    assert "\n" not in answer["error"]
    assert server.ask(ITEMS, {"items": [{"prompt_ids": [5], "response_ids": [6]}]})[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("/get_reward", {"query": ["a"], "prompts": []}, "'prompts' is empty"),
        ("/get_reward", {"query": ["a"], "prompts": ["a", "b"]}, "'query' has 1 texts and 'prompts' 2"),
        ("/get_reward", {"query": ["xyz"], "prompts": ["abc"]}, "query[0] does not contain its prompt"),
        ("/get_reward", {"query": ["abc"], "prompts": ["abc"]}, "query[0] has an empty answer"),
        ("/remote_rm", {"prompt": "a"}, "the request has no text under 'response'"),
        ("/remote_rm", {"prompt": "a", "response": ""}, "the request has an empty answer"),
        ("/score_texts", {"messages": [3]}, "messages[0] has no text under 'the conversation'"),
        ("/pooling", {}, "input has no list of token ids"),
        ("/pooling", {"input": []}, "input is empty"),
        ("/pooling", {"input": [[5], []]}, "input[1] is empty"),
    ],
)
def test_what_other_routes_refuse(server: Running, path: str, body: Any, sentence: str) -> None:
    status, answer, _ = server.ask(path, body)
    assert status == 400 and answer["error"].startswith(sentence), answer


def test_an_unknown_route_and_method_say_so(server: Running) -> None:
    assert server.ask("/nothing")[0] == 404
    status, answer, _ = server.ask(ITEMS)
    assert status == 405 and answer["error"].startswith("GET /v1/token_rewards: Method Not Allowed")
