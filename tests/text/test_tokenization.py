"""Where an answer begins, what is cut, and which characters a token writes: by hand, and by properties."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tlcr.errors import ConfigError, DataError
from tlcr.text import tokenization
from tlcr.text.tokenization import (
    answer_spans,
    character_spans,
    cut_answer,
    decode_text,
    encode_answer,
    encode_answers,
    render_answer,
    render_prompt,
    token_pieces,
)
from tlcr.types import EncodedAnswer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def byte_level(*merges: str, regex: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with exactly these merges, "a b" for a and b: what it does can be worked out by hand."""
    symbols = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    symbols += [merge.replace(" ", "") for merge in merges]
    bpe = Tokenizer(
        models.BPE({symbol: k for k, symbol in enumerate(symbols)}, [tuple(merge.split(" ")) for merge in merges])
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def metaspace() -> PreTrainedTokenizerFast:
    """Words carry their leading space as U+2581 and the text gets one in front, as SentencePiece models do."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(["the good film was good and the bad film was bad"] * 4, trainer)
    trained = json.loads(bpe.to_str())
    vocabulary = trained["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    bpe = Tokenizer.from_str(json.dumps(trained))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def wordpiece() -> PreTrainedTokenizerFast:
    """A decoder that is neither byte-level nor SentencePiece-like."""
    words = ["[UNK]", "un", "##want", "##ed", "runn", "##ing", ",", "[EOS]"]
    model = Tokenizer(models.WordPiece({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", eos_token="[EOS]")


class TestEncodeAnswer:
    def limits(self, prompt: int = 99, answer: int | None = 99) -> dict[str, int | None]:
        return {"max_prompt_tokens": prompt, "max_answer_tokens": answer}

    def names(self, tokenizer: PreTrainedTokenizerFast, encoded: EncodedAnswer) -> tuple[list[str], list[str]]:
        tokens = tokenizer.convert_ids_to_tokens(list(encoded.ids))
        return tokens[: encoded.answer_start], tokens[encoded.answer_start :]

    def test_answer_is_tokenised_as_it_stands_after_its_prompt(self) -> None:
        tokenizer = byte_level("Ġ w", "Ġw e", "w e")
        joint = encode_answer(tokenizer, "a ", "we", **self.limits())
        assert tokenizer.tokenize("we") == ["we"]
        assert self.names(tokenizer, joint) == (["a"], ["Ġwe", "<eos>"])

    def test_token_that_straddles_the_boundary_belongs_to_the_answer(self) -> None:
        tokenizer = byte_level("a b", "ab c")
        assert self.names(tokenizer, encode_answer(tokenizer, "xa", "bcd", **self.limits())) == (
            ["x"],
            ["abc", "d", "<eos>"],
        )
        # One character later nothing straddles, and the first token of the answer is another one.
        assert self.names(tokenizer, encode_answer(tokenizer, "xabc", "d", **self.limits())) == (
            ["x", "abc"],
            ["d", "<eos>"],
        )
        assert self.names(tokenizer, encode_answer(tokenizer, "xd", "bc", **self.limits())) == (
            ["x", "d"],
            ["b", "c", "<eos>"],
        )

    def test_boundary_between_characters_of_many_tokens(self) -> None:
        tokenizer = byte_level()
        encoded = encode_answer(tokenizer, "é🙃", "🙃é", **self.limits())
        assert (encoded.answer_start, len(encoded.answer_ids)) == (2 + 4, 4 + 2 + 1)
        assert decode_text(tokenizer, encoded.answer_ids) == "🙃é"

    def test_metaspace_keeps_the_space_before_the_answer_with_the_answer(
        self, metaspace: PreTrainedTokenizerFast
    ) -> None:
        encoded = encode_answer(metaspace, "the film", " was good", **self.limits())
        assert self.names(metaspace, encoded)[1] == ["▁was", "▁good", "<eos>"]
        glued = encode_answer(metaspace, "the film ", "was good", **self.limits())
        assert glued == encoded, "a space that merges into the answer's first word straddles the boundary"

    def test_special_tokens_in_the_prompt_are_tokens_and_none_is_added(self) -> None:
        tokenizer = byte_level()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
        )
        encoded = encode_answer(tokenizer, "<bos>a", "b", **self.limits())
        assert self.names(tokenizer, encoded) == (["<bos>", "a"], ["b", "<eos>"])

    def test_prompt_loses_its_beginning_and_answer_its_end(self) -> None:
        tokenizer = byte_level()
        encoded = encode_answer(tokenizer, "abcdef", "uvwxyz", **self.limits(prompt=2, answer=3))
        assert self.names(tokenizer, encoded) == (["e", "f"], ["u", "v", "w"])
        assert not encoded.complete

    @pytest.mark.parametrize(("limit", "answer", "complete"), [(4, "uvw$", True), (3, "uvw", False), (2, "uv", False)])
    def test_end_of_sequence_counts_towards_the_limit(self, limit: int, answer: str, complete: bool) -> None:
        tokenizer = byte_level()
        encoded = encode_answer(tokenizer, "a", "uvw", **self.limits(answer=limit))
        assert self.names(tokenizer, encoded)[1] == [{"$": "<eos>"}.get(letter, letter) for letter in answer]
        assert encoded.complete is complete
        assert cut_answer(encode_answer(tokenizer, "a", "uvw", **self.limits(answer=None)), limit) == encoded

    def test_empty_answer_is_its_end_and_empty_prompt_has_no_tokens(self, metaspace: PreTrainedTokenizerFast) -> None:
        tokenizer = byte_level()
        assert self.names(tokenizer, encode_answer(tokenizer, "ab", "", **self.limits())) == (["a", "b"], ["<eos>"])
        bare = encode_answer(tokenizer, "ab", "", end_of_sequence=False, **self.limits())
        assert (bare.answer_ids, bare.complete) == ((), False)
        assert encode_answer(metaspace, "", "film", **self.limits()).answer_start == 0

    def test_batch_is_the_same_as_one_by_one(self, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        prompts, answers = ["The food", "I would never", "x"], [" was good.", "", " naïve 🙃 café" * 9]
        batch = encode_answers(tiny_tokenizer, prompts, answers, max_prompt_tokens=3, max_answer_tokens=20)
        assert batch == [
            encode_answer(tiny_tokenizer, prompt, answer, max_prompt_tokens=3, max_answer_tokens=20)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        assert encode_answers(tiny_tokenizer, [], [], max_prompt_tokens=3, max_answer_tokens=20) == []

    def test_tokenizer_without_end_of_sequence_is_refused(self) -> None:
        tokenizer = byte_level()
        tokenizer.eos_token = None
        with pytest.raises(ConfigError, match="names no end-of-sequence token; set its eos_token"):
            encode_answer(tokenizer, "a", "b", **self.limits())
        assert encode_answer(tokenizer, "a", "b", end_of_sequence=False, **self.limits()).answer_start == 1

    def test_slow_tokenizer_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer = byte_level()
        monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
        for call in (
            lambda: encode_answer(tokenizer, "a", "b", **self.limits()),
            lambda: character_spans(tokenizer, [5]),
        ):
            with pytest.raises(ConfigError, match=r"needs a fast tokenizer .* convert it"):
                call()

    @settings(max_examples=150, deadline=None)
    @given(prompt=TEXTS, answer=TEXTS, merges=st.sampled_from([(), ("a b", "ab a"), ("Ġ a", "Ã ©")]))
    def test_every_token_of_the_answer_and_none_before_reaches_into_it(
        self, prompt: str, answer: str, merges: tuple[str, ...]
    ) -> None:
        tokenizer = byte_level(*merges)
        encoded = encode_answer(tokenizer, prompt, answer, end_of_sequence=False, **self.limits(9999, 9999))
        spans = character_spans(tokenizer, encoded.ids)
        assert decode_text(tokenizer, encoded.ids) == prompt + answer
        assert all(end <= len(prompt) for _, end in spans[: encoded.answer_start])
        assert all(end > len(prompt) for _, end in spans[encoded.answer_start :])


class TestRenderPrompt:
    def with_template(self) -> PreTrainedTokenizerFast:
        tokenizer = byte_level()
        tokenizer.chat_template = TEMPLATE
        return tokenizer

    @pytest.mark.parametrize(("bos", "start"), [("<bos>", "<bos>"), (None, "<eos>")])
    def test_text_without_a_prompt_has_the_token_that_starts_texts(self, bos: str | None, start: str) -> None:
        tokenizer = byte_level()
        tokenizer.bos_token = bos
        assert render_prompt(tokenizer, "") == start
        encoded = encode_answer(tokenizer, start, "hi", max_prompt_tokens=9, max_answer_tokens=9)
        assert tokenizer.convert_ids_to_tokens(list(encoded.ids)) == [start, "h", "i", "<eos>"]
        assert encoded.answer_start == 1, "so that something predicts the answer's first token"
        assert render_prompt(tokenizer, "\n") == "\n", "white space is a token"

    def test_white_space_that_is_no_token_is_no_prompt(self, wordpiece: PreTrainedTokenizerFast) -> None:
        assert render_prompt(wordpiece, " ") == "[EOS] "
        wordpiece.eos_token = None
        with pytest.raises(ConfigError, match="neither a beginning- nor an end-of-sequence token"):
            render_prompt(wordpiece, "")
        wordpiece.eos_token = "[EOS]"

    def test_text_gets_a_beginning_of_sequence_only_from_a_tokenizer_that_adds_one(self) -> None:
        tokenizer = byte_level()
        assert render_prompt(tokenizer, "hi") == "hi"
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
        assert render_prompt(tokenizer, "hi") == "<bos>hi"
        assert render_prompt(tokenizer, "<bos>hi") == "<bos>hi"
        ids = encode_answer(
            tokenizer, render_prompt(tokenizer, "hi"), "x", max_prompt_tokens=9, max_answer_tokens=9
        ).ids
        assert list(ids[:3]) == tokenizer("hi")["input_ids"]

    def test_messages_go_through_the_chat_template(self) -> None:
        messages = [{"role": "user", "content": "hi"}]
        assert render_prompt(self.with_template(), messages) == "<bos>[INST] hi [/INST]"

    def test_answer_opens_as_the_template_opens_it(self) -> None:
        messages = [{"role": "user", "content": "hi"}]
        tokenizer = self.with_template()
        assert render_answer(tokenizer, messages, "Yes.") == " Yes."
        assert render_answer(tokenizer, messages, "  Yes.\n") == " Yes.", "the template strips it"
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}"
        )
        assert render_answer(tokenizer, messages, "Yes.") == "Yes."
        tokenizer.chat_template = "{{ messages | length }}"
        assert render_answer(tokenizer, messages, "Yes.") == "Yes.", (
            "a template that rewrites the past leaves answers alone"
        )

    def test_tokenizer_without_a_template_is_refused_with_the_remedy(self) -> None:
        with pytest.raises(ConfigError, match=r"no chat template; set model\.chat_template"):
            render_prompt(byte_level(), [{"role": "user", "content": "hi"}])

    def test_conversation_that_the_template_refuses(self) -> None:
        with pytest.raises(DataError, match="refuses this conversation: no tools here"):
            render_prompt(self.with_template(), [{"role": "tool", "content": "hi"}])


class TestCharacterSpans:
    def test_by_hand(self) -> None:
        tokenizer = byte_level("a b", "Ġ ð")
        ids = tokenizer("ab é 🙃x<eos>", add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == ["ab", "Ġ", "Ã", "©", "Ġð", "Ł", "Ļ", "ĥ", "x", "<eos>"]
        spans = [(0, 2), (2, 3), (3, 4), (3, 4), (4, 6), (5, 6), (5, 6), (5, 6), (6, 7), (7, 7)]
        assert character_spans(tokenizer, ids) == spans
        assert token_pieces(tokenizer, ids) == ["ab", " ", "é", "", " 🙃", "", "", "", "x", "<eos>"]

    def test_bytes_that_are_no_character_have_their_replacement(self) -> None:
        tokenizer = byte_level()
        ids = tokenizer.convert_tokens_to_ids(["a", "ð", "Ł", "b", "©"])
        assert decode_text(tokenizer, ids) == "a\ufffdb\ufffd"
        assert character_spans(tokenizer, ids) == [(0, 1), (1, 2), (1, 2), (2, 3), (3, 4)]

    def test_context_gives_the_first_word_its_space(self, metaspace: PreTrainedTokenizerFast) -> None:
        prompt, answer = (metaspace.convert_tokens_to_ids(tokens) for tokens in (["▁the", "▁film"], ["▁was", "▁good"]))
        assert decode_text(metaspace, answer) == "was good"
        assert character_spans(metaspace, answer) == [(0, 3), (3, 8)]
        assert decode_text(metaspace, answer, context=prompt) == " was good"
        assert character_spans(metaspace, answer, context=prompt) == [(0, 4), (4, 9)]
        assert token_pieces(metaspace, answer, context=prompt) == [" was", " good"]

    def test_byte_fallback(self, metaspace: PreTrainedTokenizerFast) -> None:
        ids = metaspace("the é film", add_special_tokens=False)["input_ids"]
        tokens = metaspace.convert_ids_to_tokens(ids)
        assert tokens == ["▁the", "▁", "<0xC3>", "<0xA9>", "▁film"]
        metaspace_spans = [(0, 3), (3, 4), (4, 5), (4, 5), (5, 10)]
        assert character_spans(metaspace, ids) == metaspace_spans
        assert tokenization._spans_by_bytes(metaspace, ids, "the é film") == metaspace_spans, "without the slow way"

    def test_any_other_decoder(self, wordpiece: PreTrainedTokenizerFast) -> None:
        ids = wordpiece("unwanted , running", add_special_tokens=False)["input_ids"] + [wordpiece.eos_token_id]
        assert decode_text(wordpiece, ids) == "unwanted, running"
        assert character_spans(wordpiece, ids) == [(0, 2), (2, 6), (6, 8), (8, 9), (9, 14), (14, 17), (17, 17)]

    def test_unnamed_special_and_added_tokens(self) -> None:
        tokenizer = byte_level()
        tokenizer.add_tokens([AddedToken("<secret>", special=True), AddedToken("two words", special=False)])
        ids = tokenizer("a<secret>two wordsb", add_special_tokens=False)["input_ids"]
        assert len(ids) == 4
        assert decode_text(tokenizer, ids) == "atwo wordsb"
        assert character_spans(tokenizer, ids) == [(0, 1), (1, 1), (1, 10), (10, 11)]

    @settings(max_examples=150, deadline=None)
    @given(ids=st.lists(st.integers(0, 300)))
    def test_pieces_of_any_ids_join_to_the_text_and_spans_cover_it(self, ids: list[int]) -> None:
        tokenizer = byte_level("a b", "Ġ ð", "Ã ©", "© a")
        ids = [id for id in ids if id < len(tokenizer)]
        ordinary = [id for id in ids if id > 2]
        text = decode_text(tokenizer, ids)
        assert "".join(token_pieces(tokenizer, ordinary)) == text
        spans = character_spans(tokenizer, ids)
        assert all(start == end for id, (start, end) in zip(ids, spans, strict=True) if id <= 2)
        spans = [span for id, span in zip(ids, spans, strict=True) if id > 2]
        assert all(start < end for start, end in spans)
        assert all(after[0] in (before[1], before[1] - 1) for before, after in pairwise(spans))
        assert (spans[0][0], spans[-1][1]) == (0, len(text)) if spans else text == ""

    @settings(max_examples=60, deadline=None)
    @given(text=st.text(st.sampled_from("abé 🙃日\u200d\n"), max_size=20))
    def test_both_ways_of_finding_spans_agree(self, text: str) -> None:
        tokenizer = byte_level("a b", "Ġ ð", "é a")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        by_bytes = tokenization._spans_by_bytes(tokenizer, ids, text)
        assert by_bytes == tokenization._spans_by_prefixes(tokenizer, ids, text)
        assert by_bytes is not None


class TestAnswerSpans:
    def pieces(
        self, tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str, limit: int | None = None
    ) -> list[str]:
        encoded = encode_answer(tokenizer, prompt, answer, max_prompt_tokens=99, max_answer_tokens=limit)
        spans = answer_spans(tokenizer, prompt, answer, encoded)
        assert len(spans) == len(encoded.answer_ids) - encoded.complete
        return [answer[start:end] for start, end in spans]

    def test_a_token_across_the_boundary_counts_by_its_part_of_the_answer(self) -> None:
        tokenizer = byte_level("\u0120 g", "o o")
        assert self.pieces(tokenizer, "was ", "good") == ["g", "oo", "d"]
        assert self.pieces(tokenizer, "was ", "good", limit=2) == ["g", "oo"]
        assert self.pieces(tokenizer, "", "good<eos>") == ["g", "oo", "d"]

    def test_characters_that_the_tokenizer_changes_are_those_of_the_answer(self) -> None:
        tokenizer = byte_level("f i")
        tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
        assert self.pieces(tokenizer, "a", "b\ufb01n") == ["b", "\ufb01", "n"]
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        # what the prompt ends with, lower-cased, is all that this token writes
        assert self.pieces(tokenizer, "is x", "X") == ["X"]

    @pytest.mark.parametrize("trims", [False, True])
    def test_spaces_belong_to_the_token_that_writes_them_where_offsets_are_trimmed_too(self, trims: bool) -> None:
        tokenizer = byte_level("\u0120 g", "\u0120 \u0120")
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
        assert self.pieces(tokenizer, "is", " Go  \u00e9") == [" G", "o", "  ", "\u00e9", "\u00e9"]
        assert self.pieces(tokenizer, "is ", "Go  ") == ["G", "o", "  "]
        assert self.pieces(tokenizer, "is", "  G") == [" ", " G"]

    def test_special_tokens_in_an_answer_have_their_names(self) -> None:
        tokenizer = byte_level()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|final|>"]})
        assert self.pieces(tokenizer, "a", "<|final|>b c") == ["<|final|>", "b", " ", "c"]

    def test_a_special_token_at_the_end_has_its_name_too(self) -> None:
        tokenizer = byte_level("o o")
        encoded = encode_answer(
            tokenizer, "a", "good<eos>", max_prompt_tokens=9, max_answer_tokens=None, end_of_sequence=False
        )
        spans = answer_spans(tokenizer, "a", "good<eos>", encoded)
        assert ["good<eos>"[start:end] for start, end in spans] == ["g", "oo", "d", "<eos>"]

    def test_a_limit_that_cuts_a_character_in_two_leaves_its_first_part(self) -> None:
        assert self.pieces(byte_level(), "a", "b\u00e9c", limit=2) == ["b", "\u00e9"]

    def test_without_a_prompt_the_mark_of_a_word_is_part_of_the_answer(
        self, metaspace: PreTrainedTokenizerFast
    ) -> None:
        encoded = encode_answer(metaspace, "", "a film", max_prompt_tokens=9, max_answer_tokens=None)
        spans = answer_spans(metaspace, "", "a film", encoded)
        assert spans == character_spans(metaspace, encoded.answer_ids[:-1])
